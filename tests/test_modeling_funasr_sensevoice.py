"""SenseVoice: equalities of batches, prompts, losses, decoding, times, and what happens at the edges."""

import math

import pytest
import torch
from safetensors.torch import load_file
from tiny_funasr_sensevoice import (
    BASE,
    EMOTIONS,
    ID,
    LANGUAGES,
    label_row,
    pad,
    pad_labels,
    tiny_features,
    tiny_model,
)
from torch import nn
from transformers import AutoModel, AutoModelForCTC, AutoModelForSpeechSeq2Seq

import hf_speechllm  # noqa: F401  registers the Auto classes
from hf_speechllm.models.configuration_funasr_sensevoice import FunasrSenseVoiceConfig
from hf_speechllm.models.generation_funasr_sensevoice import runs
from hf_speechllm.models.modeling_funasr_sensevoice import FunasrSenseVoiceForSpeechRecognition


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


# -- configuration ----------------------------------------------------------------------------------------------------


def test_published_sizes_and_ids_are_the_defaults():
    config = FunasrSenseVoiceConfig()
    with torch.device("meta"):
        model = FunasrSenseVoiceForSpeechRecognition(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 233_999_167
    assert config.language_prompt_ids["yue"] == 7 and config.language_token_ids["nospeech"] == 24992
    assert config.inputs_to_logits_ratio == 960 and config.seconds_per_frame == pytest.approx(0.06)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_attention_heads": 3}, "hidden_size"),
        ({"num_timestamp_prediction_layers": 4}, "num_timestamp_prediction_layers"),
        ({"num_timestamp_prediction_layers": 0}, "num_timestamp_prediction_layers"),
        ({"fsmn_shift": 3}, "fsmn_shift"),
        ({"language_dropout": 1.5}, "language_dropout"),
        ({"language_prompt_ids": {"zh": 3}}, "language_prompt_ids"),
        ({"textnorm_token_ids": {"withitn": 3}}, "textnorm_token_ids"),
        ({"num_prompts": 14}, "textnorm_prompt_ids.withitn"),
        ({"emotion_token_ids": {"HAPPY": 999}}, "emotion_token_ids.HAPPY"),
        ({"input_size": 25}, "input_size"),
    ],
)
def test_contradictions_are_named(change, field):
    with pytest.raises(ValueError, match=field):
        FunasrSenseVoiceConfig(**{**BASE, **change})


# -- equalities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"fsmn_shift": 2}, {"fsmn_kernel_size": 4}, {"input_size": 16}], ids=str)
def test_item_of_a_batch_equals_the_item_alone(changes):
    model = tiny_model(**changes)
    pieces = tiny_features(13, 1, 7, 0, size=model.config.input_size)
    batch = pad(pieces, extra=3)
    languages, styles = ["en", "auto", "ja", "zh"], [True, False, False, True]
    prompt_ids = model.prompt_ids(4, languages, styles)
    with torch.no_grad():
        together = model(**batch, prompt_ids=prompt_ids)
    output = model.generate(**batch, language=languages, use_itn=styles, return_dict_in_generate=True)
    for row, piece in enumerate(pieces):
        with torch.no_grad():
            alone = model(piece[None], prompt_ids=prompt_ids[row : row + 1])
        close(together.logits[row, : len(piece)], alone.logits[0])
        close(together.prompt_logits[row], alone.prompt_logits[0])
        close(together.encoder_last_hidden_state[row, : len(piece)], alone.encoder_last_hidden_state[0])
        single = model.generate(
            piece[None], language=languages[row], use_itn=styles[row], return_dict_in_generate=True
        )
        count = int(output.sequences_lengths[row])
        assert output.sequences[row, :count].tolist() == single.sequences[0].tolist()
        assert not output.sequences[row, count:].any()
        close(output.token_timestamps[row, :count], single.token_timestamps[0])
        close(output.token_confidences[row, :count], single.token_confidences[0])
        assert output.token_frames[row, :count].tolist() == single.token_frames[0].tolist()
        assert int(output.prompt_lengths[row]) == int(single.prompt_lengths[0])
        close(output.scores[row], single.scores[0])


def test_padded_frames_read_blank():
    model = tiny_model()
    with torch.no_grad():
        output = model(**pad(tiny_features(9, 4)))
    assert output.logits.shape == (2, 9, model.config.vocab_size) and output.prompt_logits.shape[:2] == (2, 4)
    assert not output.logits[1, 4:].argmax(dim=-1).any()
    assert not output.encoder_last_hidden_state[1, 4:].any()
    assert output.encoder_attention_mask.sum(dim=1).tolist() == [9, 4]


def test_loss_of_a_batch_is_the_mean_of_its_items():
    model = tiny_model(language_dropout=0.0)
    pieces = tiny_features(12, 9)
    rows = [label_row("t", "h", "e"), label_row("好", language="en", textnorm="withitn")]
    together = model(**pad(pieces), labels=pad_labels(rows))
    alone = [model(piece[None], labels=torch.tensor([row])) for piece, row in zip(pieces, rows, strict=True)]
    for name in ("loss", "loss_ctc", "loss_rich"):
        close(getattr(together, name), sum(getattr(item, name) for item in alone) / 2)


def test_attention_kernels_agree_and_record():
    batch = pad(tiny_features(8, 5))
    eager, sdpa = tiny_model(), tiny_model()
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        one = eager(**batch, output_attentions=True, output_hidden_states=True)
        close(sdpa(**batch).logits, one.logits)
    assert len(one.attentions) == 4 and one.attentions[0].shape == (2, 2, 12, 12)
    assert [tuple(state.shape) for state in one.hidden_states] == [(2, 12, 24), *[(2, 12, 16)] * 4]
    torch.testing.assert_close(one.hidden_states[-1][0, 4:], one.encoder_last_hidden_state[0])
    plain = eager(**batch, return_dict=False)
    assert torch.equal(plain[0], one.logits)


def test_half_precision_and_checkpointing():
    batch = pad(tiny_features(8, 5))
    labels = pad_labels([label_row("t", "h"), label_row("e")])
    plain = tiny_model(hidden_dropout=0.0, attention_dropout=0.0)
    checkpointed = tiny_model(hidden_dropout=0.0, attention_dropout=0.0)
    # Releases before the renaming have the old name only.
    getattr(checkpointed, "activation_checkpointing_enable", checkpointed.gradient_checkpointing_enable)()
    for model in (plain, checkpointed):
        model.train()
        model(**batch, labels=labels, generator=torch.Generator().manual_seed(1)).loss.backward()
    for (name, one), (_, other) in zip(plain.named_parameters(), checkpointed.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)
    half = tiny_model().to(torch.bfloat16)
    output = half(**batch, labels=labels)
    assert output.logits.dtype == torch.bfloat16 and torch.isfinite(output.loss)
    assert half.generate(**batch).shape[0] == 2


def test_save_load_save_is_bit_equal(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "one")
    for auto_class in (AutoModel, AutoModelForCTC, AutoModelForSpeechSeq2Seq):
        loaded, info = auto_class.from_pretrained(tmp_path / "one", output_loading_info=True)
        assert isinstance(loaded, FunasrSenseVoiceForSpeechRecognition)
        assert not info["missing_keys"] and not info["unexpected_keys"]
    loaded.save_pretrained(tmp_path / "two")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert set(load_file(tmp_path / "one" / "model.safetensors")) == set(model.state_dict())
    assert loaded.config.language_token_ids == BASE["language_token_ids"]


def test_parameter_names_are_those_of_transformers():
    names = set(tiny_model().state_dict())
    for name in ("self_attn.q_proj.weight", "self_attn.fsmn.conv.weight", "mlp.fc1.bias", "input_layernorm.weight"):
        assert f"model.encoder.layers.0.{name}" in names
    norms = [name for name in names if "final_layernorm.weight" in name]
    assert sorted(norms) == [f"model.encoder.layers.{index}.final_layernorm.weight" for index in (1, 3)]


# -- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["auto", *LANGUAGES])
@pytest.mark.parametrize("use_itn", [True, False])
def test_every_language_and_normalisation_is_its_row(language, use_itn):
    """The options change the prompt rows that upstream's code has, and nothing else."""
    model = tiny_model()
    rows = {"auto": 0, "zh": 3, "en": 4, "yue": 7, "ja": 11, "ko": 12, "nospeech": 13}
    expected = [rows[language], 1, 2, 14 if use_itn else 15]
    assert model.prompt_ids(2, language, use_itn).tolist() == [expected] * 2
    features = tiny_features(6)[0][None]
    captured = []
    handle = model.model.encoder.register_forward_pre_hook(lambda module, args: captured.append(args[0]))
    ids = model.generate(features, language=language, use_itn=use_itn)
    handle.remove()
    assert torch.equal(captured[0][0, :4], model.model.prompt_embeddings.weight[expected])
    assert torch.equal(captured[0][0, 4:], features[0])
    with torch.no_grad():
        output = model(features, prompt_ids=torch.tensor([expected]))
    frames = torch.cat([output.prompt_logits, output.logits], dim=1)[0].argmax(dim=-1).tolist()
    assert ids[0].tolist() == [label for label, _, _ in runs(frames) if label]


def test_prompts_matter():
    model = tiny_model()
    features = tiny_features(6)[0][None]
    with torch.no_grad():
        outputs = [
            model(features, prompt_ids=model.prompt_ids(1, language, itn)).logits
            for language in ("auto", *LANGUAGES)
            for itn in (True, False)
        ]
    for index, one in enumerate(outputs):
        assert all(not torch.allclose(one, other) for other in outputs[:index])


def test_wrong_options_are_named():
    model, features = tiny_model(), torch.zeros(2, 3, 24)
    with pytest.raises(ValueError, match="language: expected one of .*'nospeech'.*got 'klingon'"):
        model.generate(features, language="klingon")
    with pytest.raises(ValueError, match="language: expected one value or 2, got 1"):
        model.generate(features, language=["zh"])
    with pytest.raises(ValueError, match="decoding: expected one of"):
        model.generate(features, decoding="attention")
    with pytest.raises(ValueError, match="hotwords: need"):
        model.generate(features, decoding="ctc_greedy", hotwords=[[20]])
    without = tiny_model(emotion_token_ids={"HAPPY": ID["HAPPY"]})
    with pytest.raises(ValueError, match="ban_emo_unk"):
        without.generate(features, ban_emo_unk=True)


def test_unknown_emotion_can_be_banned():
    model = tiny_model()
    with torch.no_grad():
        model.ctc_head.bias[ID["EMO_UNKNOWN"]] = 50.0
        model.ctc_head.bias[[ID[name] for name in EMOTIONS if name != "EMO_UNKNOWN"]] = 20.0
    features = tiny_features(5)[0][None]
    assert model.generate(features).unique().tolist() == [ID["EMO_UNKNOWN"]]
    banned = model.generate(features, ban_emo_unk=True, return_dict_in_generate=True)
    assert ID["EMO_UNKNOWN"] not in banned.sequences and ID["EMO_UNKNOWN"] not in banned.prompt_answers
    assert torch.isfinite(banned.scores).all()


def test_language_prompt_is_hidden_at_random_and_reproducibly():
    model = tiny_model()
    labels = torch.tensor([label_row("t", language="en")] * 4000)
    drawn = model.prompt_ids_of_labels(labels, torch.Generator().manual_seed(3))
    assert torch.equal(drawn, model.prompt_ids_of_labels(labels, torch.Generator().manual_seed(3)))
    uniform = torch.rand(4000, generator=torch.Generator().manual_seed(3))
    assert torch.equal(drawn[:, 0], torch.where(uniform > 0.2, 4, 0))
    assert 0.77 < (drawn[:, 0] == 4).float().mean() < 0.83
    assert drawn[:, 1:].unique(dim=0).tolist() == [[1, 2, 15]]
    # Nothing is hidden in evaluation; training draws from the global generator.
    assert model.prompt_ids_of_labels(labels)[:, 0].unique().tolist() == [4]
    model.train()
    torch.manual_seed(3)
    assert torch.equal(model.prompt_ids_of_labels(labels), drawn)
    always = tiny_model(language_dropout=1.0).train()
    assert always.prompt_ids_of_labels(labels)[:, 0].unique().tolist() == [0]


def test_prompts_of_labels():
    model = tiny_model()
    rows = [label_row(language=name, textnorm="withitn") for name in LANGUAGES]
    # A language without a prompt, and one that nobody knows, are "auto".
    rows += [[ID["t"], *rows[0][1:]], [-100, *rows[0][1:]]]
    assert model.prompt_ids_of_labels(torch.tensor(rows))[:, 0].tolist() == [3, 4, 7, 11, 12, 13, 0, 0]
    with pytest.raises(ValueError, match=rf"labels\[1, 3\]: expected a text normalisation.*got {ID['t']}"):
        model.prompt_ids_of_labels(torch.tensor([label_row(), label_row(textnorm="t")]))
    with pytest.raises(ValueError, match=r"labels\[0, 3\].*got -100"):
        model(torch.zeros(1, 3, 24), labels=torch.tensor([[5, 9, 14, -100]]))
    with pytest.raises(ValueError, match=r"expected \(batch, 4 \+ text\)"):
        model(torch.zeros(1, 3, 24), labels=torch.tensor([[5, 9, 14]]))


# -- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("normalized", [True, False])
def test_losses_against_their_definition(smoothing, normalized):
    model = tiny_model(label_smoothing=smoothing, length_normalized_loss=normalized)
    batch = pad(tiny_features(11, 8))
    labels = pad_labels([label_row("t", "h", "e"), label_row("好", "好", language="ja")])
    labels[1, 1] = -100  # nobody knows this emotion
    output = model(**batch, labels=labels)

    ctc = []
    for row, (frames, text) in enumerate(((11, labels[0, 4:7]), (8, labels[1, 4:6]))):
        log_probs = output.logits[row, :frames].log_softmax(dim=-1)[:, None]
        ctc.append(
            nn.CTCLoss(reduction="sum")(log_probs, text[None], torch.tensor([frames]), torch.tensor([len(text)]))
        )
    close(output.loss_ctc, sum(ctc) / 2)

    vocabulary, divergence = model.config.vocab_size, 0.0
    known = [(row, column) for row in range(2) for column in range(4) if labels[row, column] >= 0]
    for row, column in known:
        target = torch.full((vocabulary,), smoothing / (vocabulary - 1))
        target[labels[row, column]] = 1 - smoothing
        log_probs = output.prompt_logits[row, column].log_softmax(dim=-1)
        divergence += nn.functional.kl_div(log_probs, target, reduction="sum")
    close(output.loss_rich, divergence / (len(known) if normalized else 2))
    close(output.loss, output.loss_ctc + output.loss_rich)
    right = [int(output.prompt_logits[row, column].argmax()) == int(labels[row, column]) for row, column in known]
    assert float(output.accuracy) == pytest.approx(sum(right) / len(right))


def test_every_parameter_gets_a_finite_gradient():
    model = tiny_model().train()
    labels = pad_labels([label_row("t", "h"), label_row("e")])
    model(**pad(tiny_features(9, 7)), labels=labels, generator=torch.Generator().manual_seed(0)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        # Adding a constant to every key changes no softmax.
        assert parameter.grad.abs().max() > 0 or name.endswith("k_proj.bias"), name


def test_training_lowers_the_loss_and_teaches_the_answers():
    model = tiny_model(hidden_dropout=0.0, attention_dropout=0.0).train()
    batch = pad(tiny_features(10, 8))
    rows = [label_row("t", "h", "e", emotion="HAPPY"), label_row("好", language="ja", event="BGM")]
    labels = pad_labels(rows)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(**batch, labels=labels, generator=generator).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]
    ids = model.eval().generate(**batch)
    assert ids[0].tolist() == rows[0] and ids[1, : len(rows[1])].tolist() == rows[1]


@pytest.mark.parametrize(
    "frames, rows",
    [
        ((6, 4), [label_row(), label_row("t")]),  # an empty text
        ((6, 4), [label_row(), label_row()]),  # no text at all
        ((2, 6), [label_row("t", "h", "e"), label_row("t")]),  # more text than frames
        ((2, 2), [label_row("t", "t"), label_row("t", "h", "e")]),  # nothing fits
        ((5, 0), [label_row("t"), label_row("h")]),  # an item without audio
        ((0, 0), [label_row("t"), label_row()]),  # no audio at all
        ((1, 1), [label_row("t"), label_row()]),
    ],
    ids=str,
)
def test_edges_have_finite_losses_and_gradients(frames, rows):
    model = tiny_model().train()
    output = model(**pad(tiny_features(*frames)), labels=pad_labels(rows), generator=torch.Generator().manual_seed(0))
    output.loss.backward()
    assert torch.isfinite(output.loss) and torch.isfinite(output.loss_ctc)
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name


def test_items_that_cannot_be_spelled_do_not_dilute_the_mean():
    model = tiny_model()
    pieces = tiny_features(9, 2)
    both = model(**pad(pieces), labels=pad_labels([label_row("t", "h"), label_row("t", "h", "e")]))
    alone = model(pieces[0][None], labels=torch.tensor([label_row("t", "h")]))
    close(both.loss_ctc, alone.loss_ctc)


# -- decoding ---------------------------------------------------------------------------------------------------------


def logits_of(*labels: int) -> torch.Tensor:
    """`(1, frames, v)`: every frame has one clear label."""
    logits = torch.zeros(1, len(labels), BASE["vocab_size"])
    logits[0, torch.arange(len(labels)), torch.tensor(labels)] = 8.0
    return logits


def decode(model, monkeypatch, logits: torch.Tensor, **options):
    """`generate` of a model whose head says `logits`, prompt frames included. The head sees the real frames alone."""
    monkeypatch.setattr(model.ctc_head, "forward", lambda hidden: logits[0])
    return model.generate(torch.zeros(1, logits.shape[1] - 4, 24), return_dict_in_generate=True, **options)


def test_times_of_known_frames(monkeypatch):
    """20 ms a frame: a run [s, e) of frames spans 20 s - 10 .. 20 e - 10 ms, inside of the audio."""
    model, (t, h) = tiny_model(), (ID["t"], ID["h"])
    answers = label_row()
    output = decode(model, monkeypatch, logits_of(*answers, t, t, 0, h, 0, h, h))
    assert output.sequences[0].tolist() == [*answers, t, h, h]
    assert output.prompt_lengths.tolist() == [4] and output.prompt_answers[0].tolist() == answers
    expected = [[0.0, 0.0]] * 4 + [[0.0, 0.03], [0.05, 0.07], [0.09, 0.13]]
    close(output.token_timestamps[0], torch.tensor(expected))
    assert output.token_frames[0, 4:].tolist() == [0, 3, 5] and output.token_frames[0, :4].tolist() == [-1] * 4
    probability = math.exp(8) / (math.exp(8) + BASE["vocab_size"] - 1)
    close(output.token_confidences[0], torch.full((7,), probability))
    close(output.scores, torch.tensor([11 * math.log(probability)], dtype=torch.float64))


def test_repeats_merge_across_the_border_of_prompts_and_audio(monkeypatch):
    """As upstream: one run of labels, whose token belongs to the answers."""
    answers = label_row()
    logits = logits_of(*answers, answers[3], ID["t"])
    logits[0, 4, 0] = 1.0  # blank is the second choice of the merged frame
    output = decode(tiny_model(), monkeypatch, logits)
    assert output.sequences[0].tolist() == [*answers, ID["t"]]
    assert output.prompt_lengths.tolist() == [4]
    close(output.token_timestamps[0, 4], torch.tensor([0.01, 0.03]))


def test_blank_and_repeated_answers(monkeypatch):
    zh, t = ID["zh"], ID["t"]
    output = decode(tiny_model(), monkeypatch, logits_of(zh, zh, 0, 0, 0, t))
    assert output.sequences[0].tolist() == [zh, t] and output.prompt_lengths.tolist() == [1]
    close(output.token_timestamps[0, 1], torch.tensor([0.01, 0.03]))
    silent = decode(tiny_model(), monkeypatch, logits_of(0, 0, 0, 0, 0, 0))
    assert silent.sequences.shape == (1, 0) and silent.confidences.tolist() == [1.0]


def test_no_frames_and_one_frame():
    model = tiny_model()
    for frames in (0, 1):
        output = model.generate(torch.ones(2, frames, 24), return_timestamps=True)
        assert output.sequences.shape[0] == 2
        assert (output.sequences_lengths - output.prompt_lengths <= frames).all()
        assert (output.token_timestamps[..., 1] <= frames * 0.02).all()


def test_beam_finds_more_probable_texts_and_hot_words():
    model = tiny_model()
    batch = pad(tiny_features(14, 9, seed=4))
    greedy = model.generate(**batch, return_dict_in_generate=True)
    beam = model.generate(**batch, decoding="ctc_prefix_beam_search", num_beams=48, return_dict_in_generate=True)
    with torch.no_grad():
        logits = model(**batch, prompt_ids=model.prompt_ids(2, "auto", False)).logits
    for row, frames in enumerate((14, 9)):
        prompts = int(greedy.prompt_lengths[row])
        assert greedy.sequences[row, :prompts].tolist() == beam.sequences[row, :prompts].tolist()
        text = beam.sequences[row, prompts : int(beam.sequences_lengths[row])]
        log_probs = logits[row, :frames].log_softmax(dim=-1)[:, None]
        total = -nn.CTCLoss(reduction="sum")(log_probs, text[None], torch.tensor([frames]), torch.tensor([len(text)]))
        # All paths of the text, of which the beam followed the best.
        assert total - 0.1 < float(beam.scores[row]) <= total + 1e-3
        spans = beam.token_timestamps[row, prompts : int(beam.sequences_lengths[row])]
        assert (spans[:, 1] > spans[:, 0]).all() and (spans[1:, 0] >= spans[:-1, 1] - 1e-6).all()
    phrase = [ID["世"], ID["界"]]
    forced = model.generate(**batch, hotwords=[phrase], hotwords_score=40.0, num_beams=48)
    assert all(unit in forced for unit in phrase)
    assert not all(unit in beam.sequences for unit in phrase)


def test_alignment_of_a_known_text():
    model = tiny_model()
    batch = pad(tiny_features(10, 6))
    labels = torch.tensor([[ID["t"], ID["h"], ID["e"]], [ID["好"], -100, -100]])
    path = model.align(**batch, labels=labels, language="en")
    assert path.shape == (2, 10)
    assert [label for label, _, _ in runs(path[0].tolist()) if label] == labels[0].tolist()
    assert [label for label, _, _ in runs(path[1].tolist()) if label] == [ID["好"]] and not path[1, 6:].any()
    with pytest.raises(ValueError, match="item 1 has 6 frames, its labels need 7"):
        model.align(**batch, labels=torch.tensor([[ID["t"]] + [-100] * 3, [ID["t"]] * 4]))
