"""The unit language model is the plain causal LM, with a loss that needs less memory."""

import copy
from pathlib import Path

import pytest
import torch
from tiny_speechgpt_lm import BASES, FIRST_UNIT, NUM_UNITS, SIZES, build_model, build_plain
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from hf_speechllm.models.chunked_cross_entropy import chunked_cross_entropy
from hf_speechllm.models.configuration_speechgpt_lm import SpeechGptConfig
from hf_speechllm.models.modeling_speechgpt_lm import SpeechGptForCausalLM


tied_or_not = pytest.mark.parametrize("tied", (False, True), ids=("untied", "tied"))


def plain_of(base: str, tied: bool) -> PreTrainedModel:
    if base == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=SIZES["vocab_size"], initializer_range=0.4, tie_word_embeddings=tied, **sizes)
        return GPT2LMHeadModel(config).eval()
    return build_plain(base, tie_word_embeddings=tied)


def batch(padded: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, SIZES["vocab_size"], (2, 13), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :5] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :4] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@tied_or_not
@pytest.mark.parametrize("base", (*BASES, "gpt2"))
def test_it_is_the_plain_model(tmp_path, base, tied):
    """Logits, loss, gradients and generated ids; both ways on the disk, the weights with the plain model's names."""
    plain = plain_of(base, tied)
    model = SpeechGptForCausalLM.from_plain(copy.deepcopy(plain), FIRST_UNIT, NUM_UNITS)
    assert model.config.text_config.model_type == base and model.config.tie_word_embeddings == tied
    inputs = batch()
    expected, found = plain(**inputs), model(**inputs, return_logits=True)
    assert torch.equal(found.logits, expected.logits)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    expected.loss.backward()
    found.loss.backward()
    theirs, ours = list(plain.named_parameters()), list(model.named_parameters())
    assert len(theirs) == len(ours)
    for (name, one), (_, other) in zip(theirs, ours, strict=True):
        largest = one.grad.abs().max().item()
        assert (one.grad - other.grad).abs().max().item() <= 1e-6 * max(1.0, largest), name

    model.save_pretrained(tmp_path / "model")
    loaded, problems = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert type(loaded) is SpeechGptForCausalLM and not any(problems.values())
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    prompt = inputs["input_ids"][:, :5]
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(loaded.generate(prompt, **options), plain.generate(prompt, **options))

    loaded.to_plain().save_pretrained(tmp_path / "plain")
    back, problems = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert type(back) is type(plain) and not any(problems.values())
    assert (back.config.num_units, back.config.first_unit_token_id) == (NUM_UNITS, FIRST_UNIT)
    with torch.no_grad():
        assert torch.equal(back(**inputs).logits, expected.logits)
    if base != "gpt2":
        weights = [Path(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("model", "plain")]
        assert weights[0] == weights[1]


def test_saving_again_changes_nothing(tmp_path):
    build_model().save_pretrained(tmp_path / "one")
    AutoModelForCausalLM.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {path.name for path in (tmp_path / "two").iterdir()}
    assert {"config.json", "modeling_speechgpt_lm.py", "pipeline_speechgpt_lm.py", "unit_string.py"} <= names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


@pytest.mark.parametrize("base", BASES)
def test_alone_is_in_a_batch(base):
    """Left padding, in one pass and in generation."""
    model, inputs = build_model(base), batch(padded=True)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        together = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        alone = model(input_ids=ids[1:, 5:]).logits
    torch.testing.assert_close(together[1, 5:], alone[0], rtol=1e-4, atol=1e-4)
    options = {"max_new_tokens": 8, "do_sample": False}
    generated = model.generate(ids, attention_mask=mask, **options)[1, 13:]
    assert torch.equal(generated, model.generate(ids[1:, 5:], **options)[0, 8:])


def test_labels_give_no_logits_unless_asked():
    model, inputs = build_model(), batch()
    assert model(**inputs).logits is None
    assert model(**inputs, return_logits=True).logits.shape == (2, 13, SIZES["vocab_size"])
    assert model(**inputs, return_logits=True, logits_to_keep=1).logits.shape == (2, 1, SIZES["vocab_size"])
    assert model(input_ids=inputs["input_ids"]).logits is not None
    model.config.logits_with_labels = True
    assert model(**inputs).logits is not None
    as_tuple = model(**inputs, return_dict=False)
    assert torch.equal(as_tuple[0], model(**inputs).loss)


def test_shifted_labels_and_a_given_count():
    """What context-parallel training and `Trainer` with accumulation pass."""
    model, inputs = build_model(), batch()
    loss = model(**inputs).loss
    count = int((inputs["labels"][:, 1:] != -100).sum())
    assert torch.allclose(model(**inputs, num_items_in_batch=2 * count).loss, loss / 2)
    shifted = nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    inputs.pop("labels")
    assert torch.equal(model(**inputs, shift_labels=shifted).loss, loss)


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for checkpointing in (False, True):
        model = build_model().train()
        if checkpointing:
            # Its name before transformers 5.23.
            old = model.gradient_checkpointing_enable
            getattr(model, "activation_checkpointing_enable", old)()
            assert all(layer.gradient_checkpointing for layer in model.model.layers)
        model(**batch()).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("chunk_size", (1, 3, 8, 64))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_chunked_cross_entropy_is_cross_entropy(chunk_size, dtype):
    """Value and both gradients, for chunks that divide the labels and that do not."""
    torch.manual_seed(0)
    head = nn.Linear(7, 29, bias=True).to(dtype)
    hidden = torch.randn(2, 11, 7, dtype=dtype)
    labels = torch.randint(0, 29, (2, 11)).masked_fill(torch.rand(2, 11) < 0.3, -100)
    results = []
    for chunked in (True, False):
        head.zero_grad()
        inputs = hidden.clone().requires_grad_()
        if chunked:
            loss = chunked_cross_entropy(inputs, head, labels, chunk_size)
        else:
            loss = nn.functional.cross_entropy(head(inputs).float().flatten(0, 1), labels.flatten())
        (3 * loss).backward()
        results.append((loss.detach(), inputs.grad, head.weight.grad.clone(), head.bias.grad.clone()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_chunked_cross_entropy_without_labels_is_zero():
    """It still has a gradient, which distributed training waits for."""
    head, hidden = nn.Linear(4, 5), torch.randn(3, 4, requires_grad=True)
    loss = chunked_cross_entropy(hidden, head, torch.full((3,), -100))
    loss.backward()
    assert loss.item() == 0 and torch.equal(hidden.grad, torch.zeros(3, 4))


def test_chunked_cross_entropy_never_holds_all_logits():
    """No tensor that is saved for the backward pass, or made on the way, has more rows than a chunk."""
    head, largest = nn.Linear(8, 500), 0
    hidden, labels = torch.randn(64, 8, requires_grad=True), torch.randint(0, 500, (64,))

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    head.register_forward_hook(lambda module, inputs, output: remember(output))
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        chunked_cross_entropy(hidden, head, labels, chunk_size=4).backward()
    assert largest == 4 * 500


def test_bad_shapes_are_refused():
    head = nn.Linear(4, 5)
    with pytest.raises(ValueError, match=r"labels.*\(2, 3\).*\(2, 4\)"):
        chunked_cross_entropy(torch.randn(2, 3, 4), head, torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="chunk_size"):
        chunked_cross_entropy(torch.randn(2, 4), head, torch.zeros(2, dtype=torch.long), chunk_size=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": {"model_type": "no_such_model"}}, "text_config.model_type"),
        ({"text_config": {"vocab_size": 99}}, "text_config.model_type"),
        ({"text_config": {"model_type": "hubert"}}, "expected a causal LM"),
        ({"text_config": {"model_type": "speechgpt_lm"}}, "expected a causal LM"),
        ({"text_config": {"model_type": "gemma2", "vocab_size": 33006}}, "final_logit_softcapping"),
        ({"first_unit_token_id": 32100}, "first_unit_token_id"),
        ({"num_units": -1}, "first_unit_token_id"),
        ({"loss_chunk_size": 0}, "loss_chunk_size"),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SpeechGptConfig(**changes)


def test_default_is_the_published_shape(tmp_path):
    config = SpeechGptConfig()
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (33006, 4096, 32)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.to_dict() | {"_name_or_path": ""} == config.to_dict()


def test_a_head_with_a_bias_is_refused():
    plain = build_plain()
    plain.lm_head = nn.Linear(16, SIZES["vocab_size"], bias=True)
    with pytest.raises(ValueError, match="bias"):
        SpeechGptForCausalLM.from_plain(plain, FIRST_UNIT, NUM_UNITS)


def test_resizing_keeps_the_two_configurations_together():
    model = build_model()
    model.resize_token_embeddings(1500, mean_resizing=False)
    assert model.config.vocab_size == model.config.text_config.vocab_size == model.model.config.vocab_size == 1500
    assert model(input_ids=torch.tensor([[5, 1499]])).logits.shape == (1, 2, 1500)
