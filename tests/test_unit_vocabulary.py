"""A text LM gets units: what was there keeps its bits, what is new is drawn as documented."""

import pytest
import torch
from tiny_speechgpt_lm import NUM_UNITS, build_plain, build_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_speechllm.models.unit_string import parse_unit_string, unit_string
from hf_speechllm.models.unit_tokens import vocabulary_tokens
from hf_speechllm.train.unit_vocabulary import add_unit_tokens, extend_with_units


WORDS = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(97))]
tied_or_not = pytest.mark.parametrize("tied", (False, True), ids=("untied", "tied"))


def word_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@tied_or_not
@pytest.mark.parametrize("init", ("mean", "normal"))
@pytest.mark.parametrize("base", ("llama", "qwen2"))
def test_old_rows_keep_their_bits(base, init, tied):
    tokenizer, model = word_tokenizer(), build_plain(base, vocab_size=100, tie_word_embeddings=tied)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.tensor([[1, 5, 99]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    done = extend_with_units(model, tokenizer, 50, init=init, generator=seeded())
    assert (done.old_rows, done.rows, done.first_unit_id, done.num_units) == (100, 192, 100, 50)
    assert list(done.added_tokens) == vocabulary_tokens(50)
    assert len(tokenizer) == 156 and model.config.vocab_size == 192
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor[: len(before[name])], before[name]), name
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits[..., :100], logits)
    # The padding has rows and no tokens: it is never generated.
    assert model.generation_config.suppress_tokens == list(range(156, 192))
    generated = model.generate(ids, max_new_tokens=30, do_sample=True, temperature=5.0)
    assert generated.max() < 156
    model(input_ids=torch.tensor([[100, 151, 191]]), labels=torch.tensor([[100, 151, 191]])).loss.backward()


@tied_or_not
def test_new_rows_follow_the_old_ones(tied):
    """Mean and covariance, for the embedding and an untied head each their own; the generator alone decides."""

    def rows(seed: int, scale: float) -> tuple[torch.Tensor, ...]:
        model = build_plain(vocab_size=100, tie_word_embeddings=tied)
        extend_with_units(model, word_tokenizer(), 4000, generator=seeded(seed), covariance_scale=scale)
        return model.get_input_embeddings().weight.detach(), model.lm_head.weight.detach()

    for matrix in rows(0, 1.0)[: 1 if tied else 2]:
        old, new = matrix[:100], matrix[100:]
        deviation = old.std(dim=0, correction=0)
        assert ((new.mean(dim=0) - old.mean(dim=0)).abs() < 5 * deviation / len(new) ** 0.5).all()
        assert torch.allclose(torch.cov(new.T), torch.cov(old.T, correction=0), atol=0.02)
    if not tied:
        embedding, head = rows(0, 0.0)
        assert torch.allclose(embedding[100:], embedding[:100].mean(dim=0), atol=1e-6)
        assert torch.allclose(head[100:], head[:100].mean(dim=0), atol=1e-6)
    assert torch.equal(rows(1, 1e-5)[0], rows(1, 1e-5)[0])
    assert not torch.equal(rows(1, 1e-5)[0], rows(2, 1e-5)[0])


def test_upstream_initialisation_is_normal():
    model = build_plain(vocab_size=100)
    model.config.initializer_range = 0.02
    torch.manual_seed(9)
    extend_with_units(model, word_tokenizer(), 4000, init="normal", generator=seeded())
    for matrix in (model.get_input_embeddings().weight, model.lm_head.weight):
        new = matrix[100:].detach()
        assert new.mean().abs() < 1e-3 and new.std().item() == pytest.approx(0.02, rel=0.02)
        assert new.unique(dim=0).shape == new.shape


def test_spare_rows_of_the_base_become_rows_of_units():
    """Many base models have more rows than tokens; such a row belongs to nobody, and is no old row."""
    model = build_plain(vocab_size=128)
    before = model.get_input_embeddings().weight.detach().clone()
    done = extend_with_units(model, word_tokenizer(), 20, generator=seeded())
    after = model.get_input_embeddings().weight.detach()
    assert (done.old_rows, done.rows, done.first_unit_id) == (100, 128, 100)
    assert torch.equal(after[:100], before[:100]) and not (after[100:] == before[100:]).all(dim=1).any()


def test_second_call_adds_nothing():
    tokenizer, model = word_tokenizer(), build_plain(vocab_size=100)
    extend_with_units(model, tokenizer, 20, generator=seeded())
    before = model.get_input_embeddings().weight.detach().clone()
    again = extend_with_units(model, tokenizer, 20)
    assert again.added_tokens == () and again.first_unit_id == 100
    assert torch.equal(model.get_input_embeddings().weight[: len(tokenizer)], before[: len(tokenizer)])


def test_units_that_are_not_in_a_row_are_refused():
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["<3>"])
    with pytest.raises(ValueError, match="in a row of 20"):
        extend_with_units(build_plain(vocab_size=100), tokenizer, 20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_units": 0}, "num_units"),
        ({"num_units": 5, "init": "zero"}, "init"),
        ({"num_units": 5, "covariance_scale": -1.0}, "covariance_scale"),
        ({"num_units": 5, "pad_to_multiple_of": 0}, "pad_to_multiple_of"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        extend_with_units(build_plain(vocab_size=100), word_tokenizer(), **arguments)


@pytest.mark.parametrize("marker", ("", "\U0001f5e3\ufe0f"))
def test_text_of_3000_units_survives_any_tokenizer(tmp_path, marker):
    """Units -> text -> ids -> text -> units, after a save and a load as well."""
    tokenizer = word_tokenizer()
    add_unit_tokens(tokenizer, 1024, marker=marker)
    tokenizer.save_pretrained(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    units = torch.randint(0, 1024, (3000,), generator=seeded()).tolist()
    text = unit_string(units).replace("<", f"<{marker}") if marker else unit_string(units)
    text = text.replace(f"<{marker}sosp>", "<sosp>").replace(f"<{marker}eosp>", "<eosp>")
    ids = tokenizer(text).input_ids
    assert len(ids) == 3002 and tokenizer.convert_ids_to_tokens(ids[0]) == "<sosp>"
    assert [i - tokenizer.convert_tokens_to_ids(f"<{marker}0>") for i in ids[1:-1]] == units
    assert tokenizer.decode(ids).replace(" ", "") == text
    assert parse_unit_string(tokenizer.decode(ids).replace(marker, "")) == units


def test_text_of_3000_units_survives_upstreams_tokenizer():
    tokenizer = build_tokenizer()
    units = torch.randint(0, NUM_UNITS, (3000,), generator=seeded()).tolist()
    ids = tokenizer(unit_string(units), add_special_tokens=False).input_ids
    assert len(ids) == 3002 and parse_unit_string(tokenizer.decode(ids)) == units
    # Upstream's decoding puts a space between tokens, which its tokenizer takes away again.
    assert tokenizer.decode(ids).replace(" ", "") == unit_string(units)
    assert tokenizer(tokenizer.decode(ids), add_special_tokens=False).input_ids == ids
