"""CosyVoice's language models: one vocabulary, batches, generation, loss, export."""

import copy

import pytest
import torch
from tiny_cosyvoice_lm import (
    END_OF_PROMPT,
    QWEN,
    SPEECH_SIZE,
    TEXT_SIZE,
    TRANSFORMER,
    build,
    build_qwen,
    build_transformer,
    row_alone,
    sentences,
)
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from hf_speechllm.data.cosyvoice_lm_examples import SpeechLmCollator, one_stream
from hf_speechllm.models.configuration_cosyvoice_lm import CosyVoiceLmConfig
from hf_speechllm.models.configuration_cosyvoice_transformer_lm import CosyVoiceTransformerLmConfig
from hf_speechllm.models.modeling_cosyvoice_lm import CosyVoiceLmForCausalLM
from hf_speechllm.models.modeling_cosyvoice_transformer_lm import CosyVoiceTransformerLm
from hf_speechllm.models.prompts_cosyvoice_lm import speech_prompt
from hf_speechllm.models.speech_head_loss import smoothed_cross_entropy, token_accuracy


every_version = pytest.mark.parametrize("version", (1, 2, 3))
qwen_versions = pytest.mark.parametrize("version", (2, 3))
RATIOS = {"min_token_text_ratio": 2, "max_token_text_ratio": 6}


def test_published_vocabularies():
    two, three = CosyVoiceLmConfig(version=2), CosyVoiceLmConfig(version=3)
    assert (two.num_speech_rows, two.vocab_size, three.num_speech_rows, three.vocab_size) == (
        6564,
        158528,
        6761,
        158720,
    )
    first = 151936
    ids = [two.end_token_id, two.fill_token_id, two.start_token_id, two.task_token_id]
    assert ids == [first + 6561, first + 6563, first + 6564, first + 6565]
    assert two.stop_token_ids == two.eos_token_id == [first + 6561, first + 6562, first + 6563]
    ids = [three.start_token_id, three.end_token_id, three.task_token_id, three.fill_token_id]
    assert ids == [first + 6561, first + 6562, first + 6563, first + 6564]
    assert three.stop_token_ids == list(range(first + 6561, first + 6761))
    assert (two.rope_parameters["rope_theta"], two.hidden_size, two.num_hidden_layers) == (1000000.0, 896, 24)
    assert three.silent_token_ids == [1, 2, 28, 29, 55, 248, 494, 2241, 2242, 2322, 2323] and not two.silent_token_ids


def test_published_number_of_parameters():
    """What the files of the published packs hold (reference: their sizes), less the rows that the padding adds."""
    with torch.device("meta"):
        one = CosyVoiceTransformerLm(CosyVoiceTransformerLmConfig())
        two, three = (CosyVoiceLmForCausalLM(CosyVoiceLmConfig(version=version)) for version in (2, 3))
    assert one.num_parameters() == 310_718_465
    assert two.num_parameters() - (158528 - 151936 - 6564 - 2) * 896 == 505_803_812
    assert three.num_parameters() - (158720 - 151936 - 6761) * 896 == 506_148_480


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (CosyVoiceLmConfig, {"version": 1}, "version"),
        (CosyVoiceLmConfig, {"mix_ratio": [5]}, "mix_ratio"),
        (CosyVoiceLmConfig, {"label_smoothing": 1.0}, "label_smoothing"),
        (CosyVoiceLmConfig, {"tie_word_embeddings": True}, "tie_word_embeddings"),
        (CosyVoiceLmConfig, {"silent_token_ids": [6561]}, "silent_token_ids"),
        (CosyVoiceLmConfig, {"speech_vocab_size": 0}, "speech_vocab_size"),
        (CosyVoiceTransformerLmConfig, {"num_attention_heads": 3}, "num_attention_heads"),
        (CosyVoiceTransformerLmConfig, {"text_encoder_hidden_act": "swish"}, "text_encoder_hidden_act"),
        (CosyVoiceTransformerLmConfig, {"text_encoder_chunk_size": -1}, "text_encoder_chunk_size"),
    ],
)
def test_contradictions_are_refused(config, changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


@qwen_versions
def test_logits_of_the_whole_vocabulary_are_the_compact_ones(version):
    model = build_qwen(version)
    config, ids = model.config, torch.tensor([[1, 5, 70, 3]])
    with torch.no_grad():
        whole, compact = model(ids).logits, model(ids, speech_logits_only=True).logits
    assert whole.shape == (1, 4, config.vocab_size) and config.vocab_size % 64 == 0
    speech = slice(TEXT_SIZE, TEXT_SIZE + config.num_speech_rows)
    assert torch.equal(whole[..., speech], compact)
    rest = torch.cat([whole[..., : speech.start], whole[..., speech.stop :]], dim=-1)
    assert (rest == torch.finfo(torch.float32).min).all()
    head = model.get_output_embeddings()
    hidden = model.model(ids).last_hidden_state
    torch.testing.assert_close(head(hidden)[..., speech], compact)
    assert (head(hidden)[..., : speech.start] < -1e29).all() and head.weight.shape == (config.vocab_size, 32)
    assert [name for name, _ in model.named_parameters() if "lm_head" in name] == (
        ["lm_head.weight", "lm_head.bias"] if version == 2 else ["lm_head.weight"]
    )


@every_version
def test_alone_is_in_a_batch(version):
    """Ids and logits of sentences of different lengths, with and without prompts, in greedy and seeded decoding."""
    model, inputs = build(version), sentences(version)
    whole = model.generate_speech_tokens(**inputs, **RATIOS, do_sample=False, output_logits=True)
    seeded = model.generate_speech_tokens(
        **inputs, **RATIOS, generator=[torch.Generator().manual_seed(row) for row in range(3)]
    )
    counts = []
    for row in range(3):
        alone = row_alone(inputs, row)
        one = model.generate_speech_tokens(**alone, **RATIOS, do_sample=False, output_logits=True)
        real = whole.token_mask[row].bool()
        assert torch.equal(whole.token_ids[row][real], one.token_ids[0]) and one.token_mask.all()
        steps = one.logits.shape[1]
        torch.testing.assert_close(whole.logits[row, :steps], one.logits[0], rtol=1e-4, atol=1e-4)
        words = int(inputs["text_mask"][row].sum())
        assert 2 * words <= one.token_ids.shape[1] <= 6 * words
        drawn = model.generate_speech_tokens(**alone, **RATIOS, generator=[torch.Generator().manual_seed(row)])
        assert torch.equal(seeded.token_ids[row][seeded.token_mask[row].bool()], drawn.token_ids[0])
        counts.append(one.token_ids.shape[1])
    assert len(set(counts)) > 1
    assert 0 <= whole.token_ids.min() and whole.token_ids.max() < SPEECH_SIZE


@every_version
def test_decoding_with_a_cache_is_one_pass(version):
    """Every step's logits are those of the whole sequence at once."""
    model, inputs = build(version), row_alone(sentences(version), 0)
    output = model.generate_speech_tokens(**inputs, **RATIOS, do_sample=False, output_logits=True)
    text = torch.cat([inputs["prompt_text_ids"], inputs["text_ids"]], dim=1)
    speech = torch.cat([inputs["prompt_speech_ids"], output.token_ids], dim=1)
    with torch.no_grad():
        if version == 1:
            embeds, mask = model.prompt_embeds(text, None, inputs["speaker_embedding"], None, speech)
            logits = model(inputs_embeds=embeds, attention_mask=mask).logits
        else:
            ids = speech_prompt(model.config, text[0].tolist(), speech[0].tolist())
            logits = model(torch.tensor([ids]), speech_logits_only=True).logits
    steps = output.logits.shape[1]
    first = logits.shape[1] - 1 - output.token_ids.shape[1]
    torch.testing.assert_close(logits[:, first : first + steps], output.logits, rtol=1e-4, atol=1e-4)


@every_version
def test_static_cache_is_the_dynamic_one(version):
    model, inputs = build(version), sentences(version)
    dynamic = model.generate_speech_tokens(**inputs, **RATIOS, do_sample=False)
    static = model.generate_speech_tokens(
        **inputs, **RATIOS, do_sample=False, cache_implementation="static", disable_compile=True
    )
    assert torch.equal(static.token_ids, dynamic.token_ids) and torch.equal(static.token_mask, dynamic.token_mask)


@every_version
def test_lengths_are_limited_row_by_row(version):
    model, inputs = build(version), sentences(version)
    words = inputs["text_mask"].sum(dim=1)
    exact = model.generate_speech_tokens(**inputs, min_token_text_ratio=3.5, max_token_text_ratio=3.5)
    assert torch.equal(exact.token_mask.sum(dim=1), (3.5 * words).long())
    assert (exact.token_ids.masked_select(exact.token_mask == 0) == 0).all()
    nothing = model.generate_speech_tokens(**inputs, max_token_text_ratio=0.1)
    assert nothing.token_ids.shape == (3, 0)
    some = model.generate_speech_tokens(**inputs, min_token_text_ratio=0, max_token_text_ratio=0.2)
    assert some.token_ids.shape[1] <= 1 and some.token_mask[1:].sum() == 0


def test_upstream_forbids_only_one_end_of_an_early_answer():
    """Version 3: the token that upstream masks is the start, so an answer may end before its minimum."""
    model = build_qwen(3)
    end = model.config.end_token_id - model.config.first_speech_token_id
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.norm.weight.zero_()
        model.lm_head.weight[end] = 0.0
    text = torch.tensor([[5, 9, END_OF_PROMPT]])
    ratios = {"min_token_text_ratio": 3, "max_token_text_ratio": 5}
    # All logits are equal: the first allowed id is the most probable one, and 9 tokens must come.
    assert model.generate_speech_tokens(text, **ratios, do_sample=False).token_ids.shape == (1, 15)
    sampled = [
        model.generate_speech_tokens(
            text, **ratios, sampling=None, generator=torch.Generator().manual_seed(seed), compatibility=compatibility
        ).token_ids.shape[1]
        for compatibility in (None, "upstream")
        for seed in range(6)
    ]
    assert min(sampled[:6]) >= 9 and min(sampled[6:]) < 9
    with pytest.raises(ValueError, match="compatibility"):
        model.generate_speech_tokens(text, compatibility="downstream")


def test_ids_out_of_range_are_refused():
    two, three, one = build_qwen(2), build_qwen(3), build_transformer()
    with pytest.raises(ValueError, match="endofprompt"):
        three.generate_speech_tokens(torch.tensor([[1, 2]]))
    for model in (one, two):
        with pytest.raises(ValueError, match="text_ids"):
            model.generate_speech_tokens(torch.tensor([[TEXT_SIZE]]))
        with pytest.raises(ValueError, match="speech_ids"):
            model.generate_speech_tokens(torch.tensor([[1]]), prompt_speech_ids=torch.tensor([[SPEECH_SIZE]]))
    with pytest.raises(ValueError, match="labels"):
        two(torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match="text_ids"):
        one(torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]]))


@pytest.mark.parametrize("smoothing", (0.0, 0.1))
def test_smoothed_loss_is_the_divergence(smoothing):
    """Written out, per sequence and per token."""
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 5, 7), torch.tensor([[1, 2, -100, 3, 6], [-100, 0, 5, -100, -100]])
    total = 0.0
    for row, target in zip(logits.flatten(0, 1), targets.flatten().tolist(), strict=True):
        if target != -100:
            wanted = torch.full((7,), smoothing / 6)
            wanted[target] = 1 - smoothing
            total += nn.functional.kl_div(row.log_softmax(-1), wanted, reduction="sum")
    torch.testing.assert_close(smoothed_cross_entropy(logits, targets, smoothing), total / 6)
    torch.testing.assert_close(smoothed_cross_entropy(logits, targets, smoothing, False), total / 2)
    torch.testing.assert_close(smoothed_cross_entropy(logits, targets, smoothing, num_items=12), total / 12)
    assert smoothed_cross_entropy(logits, torch.full((2, 5), -100), smoothing) == 0
    right = logits.argmax(dim=-1)
    assert token_accuracy(logits, right) == 1 and token_accuracy(logits, (right + 1) % 7) == 0


@qwen_versions
def test_loss_is_that_of_the_speech_and_of_nothing_else(version):
    model = build_qwen(version)
    config = model.config
    example = one_stream(config, [3, 4, 5], [7, 8, 9], [11, END_OF_PROMPT])
    batch = SpeechLmCollator(0)([{"input_ids": example.input_ids, "labels": example.labels}])
    output = model(**batch)
    first = len(example.input_ids) - 5
    expected = nn.functional.cross_entropy(
        model(batch["input_ids"], speech_logits_only=True).logits[0, first : first + 4],
        torch.tensor([7, 8, 9, config.end_token_id - TEXT_SIZE]),
    )
    torch.testing.assert_close(output.loss, expected)
    assert output.logits.shape == (1, len(example.input_ids), config.num_speech_rows)
    whole = model(**batch, speech_logits_only=False, logits_to_keep=2).logits
    assert whole.shape == (1, 2, config.vocab_size)
    torch.testing.assert_close(model(**batch, num_items_in_batch=8).loss, expected / 2)
    output.loss.backward()
    assert model.get_input_embeddings().weight.grad[END_OF_PROMPT].abs().sum() > 0


def test_loss_of_version_1_is_alone_in_a_batch():
    """Rows with and without a speaker, padded on the right, weighted by their targets."""
    model, inputs = build_transformer(), sentences(1)
    text, text_mask = inputs["text_ids"].clamp_min(0), inputs["text_mask"]
    speech, mask = inputs["prompt_speech_ids"].clamp_min(0), inputs["prompt_speech_mask"]
    labels = torch.full((3, speech.shape[1] + 1), -100)
    for row, count in enumerate(mask.sum(dim=1).tolist()):
        labels[row, :count], labels[row, count] = speech[row, :count], SPEECH_SIZE
    whole = model(
        input_ids=speech,
        attention_mask=mask,
        text_ids=text,
        text_mask=text_mask,
        speaker_embedding=inputs["speaker_embedding"],
        speaker_mask=inputs["speaker_mask"],
        labels=labels,
    )
    losses, count = 0.0, 0
    for row in range(3):
        alone = row_alone(inputs, row)
        targets = labels[row : row + 1, : int(mask[row].sum()) + 1]
        one = model(
            input_ids=alone["prompt_speech_ids"],
            text_ids=alone["text_ids"],
            speaker_embedding=alone.get("speaker_embedding"),
            labels=targets,
        )
        torch.testing.assert_close(whole.logits[row, : targets.shape[1]], one.logits[0], rtol=1e-4, atol=1e-4)
        losses, count = losses + one.loss * targets.shape[1], count + targets.shape[1]
    torch.testing.assert_close(whole.loss, losses / count)
    whole.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("chunk_size", (1, 2, 0))
def test_text_encoder_sees_its_chunk(chunk_size):
    model = build_transformer(text_encoder_chunk_size=chunk_size)
    ids = torch.tensor([[3, 4, 5, 6]])
    changed = torch.tensor([[3, 4, 5, 9]])
    with torch.no_grad():
        moved = (model.encode_text(ids) - model.encode_text(changed)).abs().amax(dim=(0, 2)) > 1e-6
    assert moved.tolist() == {1: [False] * 3 + [True], 2: [False] * 2 + [True] * 2, 0: [True] * 4}[chunk_size]


def training_inputs(version: int) -> dict[str, torch.Tensor]:
    if version == 1:
        return {
            "input_ids": torch.tensor([[7, 8, 9]]),
            "text_ids": torch.tensor([[3, 4, 5]]),
            "speaker_embedding": torch.ones(1, 192),
            "labels": torch.tensor([[7, 8, 9, SPEECH_SIZE]]),
        }
    example = one_stream(build_qwen(version).config, [3, 4], [7, 8, 9], [END_OF_PROMPT])
    return SpeechLmCollator(0)([{"input_ids": example.input_ids, "labels": example.labels}])


@every_version
def test_gradient_checkpointing_changes_nothing(version):
    gradients = []
    for checkpointing in (False, True):
        model = build(version).train()
        if checkpointing:
            # Its name before transformers 5.23.
            old = model.gradient_checkpointing_enable
            getattr(model, "activation_checkpointing_enable", old)()
        model(**training_inputs(version)).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


@every_version
def test_saving_again_changes_nothing(version, tmp_path):
    build(version).save_pretrained(tmp_path / "one")
    auto = AutoModel if version == 1 else AutoModelForCausalLM
    loaded, problems = auto.from_pretrained(tmp_path / "one", output_loading_info=True)
    assert not any(problems.values())
    loaded.save_pretrained(tmp_path / "two")
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {path.name for path in (tmp_path / "two").iterdir()}
    assert {"config.json", "speech_token_generation.py", "ras_sampling.py", "model.safetensors"} <= names
    assert version == 1 or "streaming_cosyvoice_lm.py" in names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


@every_version
def test_lora_merged_is_unmerged(version):
    peft = pytest.importorskip("peft")
    model = build(version)
    inputs = training_inputs(version)
    with torch.no_grad():
        before = model(**inputs).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    adapted.eval()
    with torch.no_grad():
        unmerged = adapted(**inputs).logits
        merged = adapted.merge_and_unload()(**inputs).logits
    torch.testing.assert_close(merged, unmerged, rtol=1e-4, atol=1e-4)
    assert (merged - before).abs().max() > 1e-2


def test_plain_model_says_the_same(tmp_path):
    """Version 3, whose head has no bias: equal logits and ids, in the class that vLLM and others know."""
    model = build_qwen(3)
    model.to_plain().save_pretrained(tmp_path)
    plain, problems = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(plain) is Qwen2ForCausalLM and not any(problems.values()) and not list(tmp_path.glob("*.py"))
    config = plain.config
    assert (config.first_speech_token_id, config.task_token_id) == (TEXT_SIZE, model.config.task_token_id)
    prompt = torch.tensor([speech_prompt(model.config, [4, END_OF_PROMPT, 6], [3])])
    speech = slice(TEXT_SIZE, TEXT_SIZE + model.config.num_speech_rows)
    with torch.no_grad():
        expected = model(prompt, speech_logits_only=True).logits
        torch.testing.assert_close(plain(prompt).logits[..., speech], expected)
    biased = build_qwen(2)
    head = copy.deepcopy(biased.lm_head)
    head.bias = None
    hidden = torch.randn(1, 2, 32)
    torch.testing.assert_close(biased.to_plain().lm_head(hidden)[..., TEXT_SIZE : TEXT_SIZE + 43], head(hidden))


def test_training_starts_from_a_qwen(tmp_path):
    """Text and layers are the language model's; speech has rows of its own."""
    torch.manual_seed(0)
    sizes = {name: QWEN[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    qwen = Qwen2ForCausalLM(Qwen2Config(vocab_size=70, tie_word_embeddings=True, **sizes, **heads)).eval()
    model = CosyVoiceLmForCausalLM.from_qwen2(qwen, version=3, speech_vocab_size=SPEECH_SIZE, end_of_prompt_id=62)
    assert model.config.text_vocab_size == 70 and model.config.vocab_size == 320
    ids = torch.tensor([[3, 69, 8]])
    with torch.no_grad():
        expected = qwen.model(ids).last_hidden_state
        assert torch.equal(model.eval().model(ids).last_hidden_state, expected)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).last_hidden_state, expected)


def test_vocabulary_does_not_grow():
    model = build_qwen(2)
    assert model.resize_token_embeddings(model.config.vocab_size) is model.get_input_embeddings()
    with pytest.raises(ValueError, match="new_num_tokens"):
        model.resize_token_embeddings(model.config.vocab_size + 64)
    with pytest.raises(ValueError, match="lm_head"):
        model.set_output_embeddings(nn.Linear(32, 7))


def test_sizes_of_the_tiny_models_differ():
    """So that a mix-up of two sizes cannot pass."""
    assert len({TRANSFORMER[name] for name in ("input_size", "hidden_size", "text_encoder_hidden_size")}) == 3
    assert QWEN["hidden_size"] != QWEN["intermediate_size"]
