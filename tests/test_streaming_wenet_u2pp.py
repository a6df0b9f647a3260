"""Streaming: equal to one masked pass for every chunking and packetisation; streams in a batch; saved states."""

import copy
import random

import numpy as np
import pytest
import torch
from conftest import build_tiny_processor, speech_like
from tiny_wenet_u2pp import pad, tiny_features, tiny_model

from hf_speechllm.models.feature_extraction_kaldi_fbank import AudioError
from hf_speechllm.models.generation_wenet_u2pp import DECODINGS, WenetU2ppStreamingState


CAUSAL = [
    "u2pp",
    "moe",
    "conv2d6",
    "conv2d8",
    "linear",
    "absolute",
    "no positions",
    "relative without table",
    "rel_pos, plain attention",
    "no macaron",
    "no convolution",
    "causal batch norm",
    "rms norms",
    "even kernel",
    "kernel 1, wide",
    "transformer",
    "grouped queries",
    "relative grouped queries",
    "post-norm",
    "no final norm",
    "lite",
]


def cut_windows(features: torch.Tensor, chunk: int, config) -> list[torch.Tensor]:
    """Windows of `(chunk - 1) * rate + right_context + 1` frames, advancing by `chunk * rate`; the last is shorter."""
    rate, context = config.subsampling_rate, config.right_context
    windows = []
    for start in range(0, len(features), chunk * rate):
        window = features[start : start + (chunk - 1) * rate + context + 1]
        if len(window) > context:
            windows.append(window)
    return windows or [features[:0]]


def stream_features(model, windows: list[torch.Tensor], **options) -> list:
    """Step one stream through its windows; the outputs of all steps."""
    outputs, state = [], None
    for index, window in enumerate(windows):
        opening = options if state is None else {}
        output = model.stream_step(window[None], state=state, is_last=index == len(windows) - 1, **opening)
        outputs.append(output)
        state = output.state
    return outputs


def stream_audio(model, processor, pieces: list[np.ndarray], chunk: int, **options) -> list:
    """The same from audio: pieces through the processor, its windows through the model."""
    outputs, state, audio_state = [], None, None
    for index, piece in enumerate(pieces):
        last_piece = index == len(pieces) - 1
        windows, audio_state = processor.stream(piece, audio_state, is_last=last_piece, chunk_size=chunk)
        for place, window in enumerate(windows):
            opening = {"chunk_size": chunk, **options} if state is None else {}
            is_last = last_piece and place == len(windows) - 1
            output = model.stream_step(**window, state=state, is_last=is_last, **opening)
            outputs.append(output)
            state = output.state
    return outputs


def cut_audio(audio: np.ndarray, borders: list[int]) -> list[np.ndarray]:
    return np.split(audio, sorted(borders))


def close(actual, expected, atol=3e-5):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-5)


@pytest.fixture(scope="module")
def processor():
    return build_tiny_processor()


# -- streamed = one masked pass ---------------------------------------------------------------------------------------
@torch.no_grad()
def assert_streamed_equals_masked(model, frames: int, chunk: int, left: int) -> None:
    (features,) = tiny_features(frames, seed=frames)
    whole = model(features[None], decoding_chunk_size=chunk, num_left_chunks=left)
    windows = cut_windows(features, chunk, model.config)
    state = stream_features(model, windows, chunk_size=chunk, num_left_chunks=left, decoding="ctc_greedy")[-1].state
    close(state.encoder_outputs[0], whole.encoder_last_hidden_state[0])
    assert state.encoder.offsets.tolist() == [whole.logits.shape[1]]
    if left >= 0:
        assert state.encoder.keys[0].shape[2] <= left * chunk


@pytest.mark.parametrize("left", [-1, 0, 1, 2])
@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 16])
def test_streamed_equals_masked_pass(chunk, left):
    model = tiny_model("u2pp", num_hidden_layers=3)
    # Ragged and whole last windows, one window only, one frame only.
    for frames in (7, 11, 67, 68, 69, 70, 71, 90, 131):
        assert_streamed_equals_masked(model, frames, chunk, left)


@pytest.mark.parametrize("chunk,left", [(1, 2), (2, 0), (3, 1), (5, -1), (16, -1)])
@pytest.mark.parametrize("variant", CAUSAL)
def test_streamed_equals_masked_pass_for_every_architecture(variant, chunk, left):
    model = tiny_model(variant)
    for frames in (75, 101):
        assert_streamed_equals_masked(model, frames, chunk, left)


def test_static_chunk_model_streams_its_chunk():
    assert_streamed_equals_masked(tiny_model("static chunk"), 90, 3, -1)


def test_the_chunk_size_matters():
    """Otherwise the equalities above would prove little."""
    model, (features,) = tiny_model(), tiny_features(90)
    outputs = [
        stream_features(model, cut_windows(features, c, model.config), chunk_size=c, num_left_chunks=left)[-1]
        for c, left in ((2, -1), (5, -1), (2, 1))
    ]
    hidden = [output.state.encoder_outputs[0] for output in outputs]
    assert not torch.allclose(hidden[0], hidden[1], atol=1e-2) and not torch.allclose(hidden[0], hidden[2], atol=1e-2)


# -- final result = generate ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("hotwords", [None, [[3, 4], [7]]])
@pytest.mark.parametrize("decoding", DECODINGS)
@pytest.mark.parametrize("chunk,left", [(1, 2), (3, -1), (4, 0), (16, -1)])
@pytest.mark.parametrize("variant", ["u2pp", "moe", "lite"])
def test_final_result_is_that_of_generate(variant, chunk, left, decoding, hotwords):
    model = tiny_model(variant)
    options = {
        "decoding": decoding,
        "num_beams": 4,
        "ctc_weight": 0.4,
        "blank_penalty": 0.5,
        "length_penalty": 0.3,
        "hotwords": hotwords,
        "num_left_chunks": left,
    }
    found_text = False
    for frames in (90, 131, 33, 7, 3):
        (features,) = tiny_features(frames, seed=frames)
        windows = cut_windows(features, chunk, model.config)
        outputs = stream_features(model, windows, chunk_size=chunk, **options)
        assert [output.is_final for output in outputs] == [[False]] * (len(outputs) - 1) + [[True]]
        expected = model.generate(
            **pad([features]), decoding_chunk_size=chunk, return_dict_in_generate=True, **options
        )
        assert outputs[-1].sequences == [expected.sequences[0].tolist()]
        assert outputs[-1].scores == pytest.approx(expected.scores.tolist(), abs=2e-4)
        stamps, wanted = np.array(outputs[-1].token_timestamps[0]), expected.token_timestamps[0].numpy()
        assert np.allclose(stamps.flatten()[:-1], wanted.flatten()[:-1])  # the last end differs by the unused tail
        found_text = found_text or expected.sequences.shape[1] > 1
    assert found_text


@pytest.mark.parametrize(
    "decoding,batch_decoding", [("attention_rescoring", "ctc_prefix_beam_search"), ("ctc_greedy", "ctc_greedy")]
)
def test_partial_results_are_those_of_the_audio_so_far(decoding, batch_decoding):
    model, (features,) = tiny_model(), tiny_features(131)
    windows = cut_windows(features, 4, model.config)
    outputs = stream_features(model, windows, chunk_size=4, decoding=decoding, num_beams=4)
    texts = set()
    for index, output in enumerate(outputs[:-1]):
        seen = features[: index * 16 + len(windows[index])]
        expected = model.generate(
            **pad([seen]), decoding=batch_decoding, decoding_chunk_size=4, num_beams=4, return_dict_in_generate=True
        )
        assert output.sequences == [expected.sequences[0].tolist()]
        assert output.scores == pytest.approx(expected.scores.tolist(), abs=1e-4)
        texts.add(tuple(output.sequences[0]))
    assert len(texts) > 2


def test_hot_words_change_a_stream():
    model, (features,) = tiny_model(), tiny_features(131)
    windows = cut_windows(features, 4, model.config)
    beam = {"decoding": "ctc_prefix_beam_search", "decoding_chunk_size": 4, "num_return_sequences": 10}
    best, *others = ([t for t in row if t] for row in model.generate(features[None], **beam).tolist())
    assert stream_features(model, windows, chunk_size=4, decoding=beam["decoding"])[-1].sequences[0] == best
    pairs = [row[i : i + 2] for row in others for i in range(len(row) - 1)]
    phrase = next(pair for pair in pairs if not contains(best, pair))
    options = {"chunk_size": 4, "decoding": "ctc_prefix_beam_search", "hotwords": [phrase], "hotwords_score": 20.0}
    favoured = stream_features(model, windows, **options)[-1].sequences[0]
    assert contains(favoured, phrase)


def contains(tokens: list[int], phrase: list[int]) -> bool:
    return any(tokens[i : i + len(phrase)] == phrase for i in range(len(tokens)))


# -- audio in any pieces ----------------------------------------------------------------------------------------------
def windows_of(processor, pieces: list[np.ndarray], chunk: int) -> list[torch.Tensor]:
    windows, state = [], None
    for index, piece in enumerate(pieces):
        new, state = processor.stream(piece, state, 16000, is_last=index == len(pieces) - 1, chunk_size=chunk)
        for window in new:
            assert window["attention_mask"].tolist() == [[1] * window["input_features"].shape[1]]
        windows += [window["input_features"][0] for window in new]
    return windows


@pytest.mark.parametrize("chunk", [1, 2, 5, 16])
def test_canonical_windows_are_cuts_of_the_features(processor, chunk):
    for samples in (0, 399, 400, 1359, 1360, 8000, 11200, 12345, 16000):
        audio = speech_like(1.0)[:samples]
        features = processor(audio=audio, sampling_rate=16000)["input_features"][0]
        expected = cut_windows(features, chunk, tiny_model().config)
        windows = windows_of(processor, [audio], chunk)
        if len(windows) == len(expected) + 1:  # the audio ended with a whole window: the end is an empty one
            assert len(windows[-1]) == 0
            windows = windows[:-1]
        assert [len(window) for window in windows] == [len(window) for window in expected]
        for window, cut in zip(windows, expected, strict=True):
            close(window, cut, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_any_packets_give_the_same_windows_and_ids(processor, chunk):
    model, audio = tiny_model(), speech_like(1.3, seed=2)
    canonical = windows_of(processor, [audio], chunk)
    expected = stream_audio(model, processor, [audio], chunk)
    assert len(expected[-1].sequences[0]) > 1
    draw = random.Random(chunk)
    packets = [list(range(n, len(audio), n)) for n in (160, 400, 1000, 5000)]
    packets += [[draw.randrange(len(audio) + 1) for _ in range(draw.randrange(1, 40))] for _ in range(6)]
    packets += [[0, 0, 700, 700, 700, len(audio), len(audio)]]  # empty pieces at both ends and in between
    for borders in packets:
        pieces = cut_audio(audio, borders)
        windows = windows_of(processor, pieces, chunk)
        assert [len(window) for window in windows] == [len(window) for window in canonical]
        for window, wanted in zip(windows, canonical, strict=True):
            close(window, wanted, atol=1e-4)
        outputs = stream_audio(model, processor, pieces, chunk)
        assert [output.sequences for output in outputs] == [output.sequences for output in expected]
        assert outputs[-1].scores == pytest.approx(expected[-1].scores, abs=1e-3)


@pytest.mark.parametrize("samples", [0, 1, 399, 400, 401, 1359, 1360, 1361, 2100])
def test_single_samples(processor, samples):
    model, audio = tiny_model(), speech_like(0.2, seed=1)[:samples]
    one = stream_audio(model, processor, [audio], 1)
    many = stream_audio(model, processor, [*(audio[i : i + 1] for i in range(samples)), audio[:0]], 1)
    assert one[-1].is_final == many[-1].is_final == [True]
    assert [output.sequences for output in one] == [output.sequences for output in many]
    if samples < 1360:
        assert one[-1].sequences == [[]]


def test_integer_pieces(processor):
    audio = (speech_like(0.5) * 32767).astype(np.int16)
    windows = windows_of(processor, cut_audio(audio, [3001]), 4)
    for window, wanted in zip(windows, windows_of(processor, [audio.astype(np.float32) / 32768], 4), strict=True):
        close(window, wanted, atol=1e-4)


def test_audio_stream_is_a_value_and_refuses_misuse(processor):
    audio = speech_like(0.5)
    _, state = processor.stream(audio[:3000], chunk_size=2)
    kept = copy.deepcopy(state)
    first, _ = processor.stream(audio[3000:], state, is_last=True)
    again, ended = processor.stream(audio[3000:], state, is_last=True)
    assert torch.equal(state.samples, kept.samples) and torch.equal(state.features, kept.features)
    assert all(torch.equal(a["input_features"], b["input_features"]) for a, b in zip(first, again, strict=True))
    with pytest.raises(AudioError, match="after the last piece"):
        processor.stream(audio, ended)
    with pytest.raises(AudioError, match="16000 Hz, got 8000"):
        processor.stream(audio, sampling_rate=8000)
    with pytest.raises(AudioError, match="NaN"):
        processor.stream(np.array([np.nan]), state)


def test_first_chunk_comes_after_the_stated_latency(processor):
    for chunk in (1, 4, 16):
        needed = int(processor.latency_ms(chunk) * 16)
        assert len(windows_before_end(processor, needed - 1, chunk)) == 0
        assert len(windows_before_end(processor, needed, chunk)) == 1
        assert len(windows_before_end(processor, needed + processor.samples_per_chunk(chunk), chunk)) == 2


def windows_before_end(processor, samples: int, chunk: int) -> list:
    return processor.stream(np.zeros(samples, dtype=np.float32), chunk_size=chunk)[0]


# -- several streams in one batch -------------------------------------------------------------------------------------
def batch_step(model, processor, windows: list, last: list[bool], state, **options):
    """One step; `None` = this stream has nothing now."""
    pieces = [None if w is None else {"input_features": w[None]} for w in windows]
    inputs = processor.pad_windows(pieces)
    return model.stream_step(**inputs, state=state, is_last=last, **options)


@pytest.mark.parametrize("variant", ["u2pp", "moe", "absolute", "grouped queries", "transformer", "even kernel"])
@pytest.mark.parametrize("chunk,left", [(3, -1), (3, 1), (2, 0), (1, 2)])
def test_streams_of_a_batch_are_those_alone(processor, variant, chunk, left):
    """Starting late, standing still, ending early: each stream gets what it gets alone, at every step."""
    model, draw = tiny_model(variant), random.Random(chunk)
    streams = [cut_windows(f, chunk, model.config) for f in tiny_features(91, 40, 66, 7, 3)]
    options = {"chunk_size": chunk, "num_left_chunks": left, "num_beams": 4}
    alone = [stream_features(model, windows, **options) for windows in streams]
    place, state, steps = [0] * len(streams), None, 0
    while any(p < len(windows) for p, windows in zip(place, streams, strict=True)):
        go = [p < len(windows) and draw.random() < 0.6 for p, windows in zip(place, streams, strict=True)]
        if steps == 0:
            go[0], go[1] = True, False
        windows = [w[p] if g else None for g, w, p in zip(go, streams, place, strict=True)]
        last = [g and p == len(w) - 1 for g, w, p in zip(go, streams, place, strict=True)]
        output = batch_step(model, processor, windows, last, state, **(options if state is None else {}))
        state, steps = output.state, steps + 1
        for row, moved in enumerate(go):
            if moved:
                wanted = alone[row][place[row]]
                assert output.sequences[row] == wanted.sequences[0]
                assert output.scores[row] == pytest.approx(wanted.scores[0], abs=2e-4)
                assert output.token_timestamps[row] == wanted.token_timestamps[0]
                assert output.is_final[row] == wanted.is_final[0]
                place[row] += 1
    for row, outputs in enumerate(alone):
        close(state.encoder_outputs[row], outputs[-1].state.encoder_outputs[0], atol=1e-4)
    assert state.ended == [True] * len(streams)


@pytest.mark.parametrize("decoding", ["attention_rescoring", "ctc_greedy"])
@pytest.mark.parametrize("left", [-1, 1])
def test_reset_starts_one_stream_anew(processor, left, decoding):
    model = tiny_model()
    first, second, third = (cut_windows(f, 3, model.config) for f in tiny_features(60, 85, 48))
    options = {"chunk_size": 3, "num_left_chunks": left, "num_beams": 4, "decoding": decoding}
    alone = [stream_features(model, windows, **options) for windows in (second, third)]
    state = None
    for step in range(2):
        state = batch_step(model, processor, [first[step], second[step]], [step == 1, False], state,
                           **(options if state is None else {})).state  # fmt: skip
    assert state.ended == [True, False]
    before = state.encoder.key_mask.clone()
    state, old = state.reset([0]), state
    assert torch.equal(old.encoder.key_mask, before) and old.ended == [True, False]
    assert state.ended == [False, False] and state.encoder.offsets.tolist() == [0, 6]
    for step in range(max(len(third), len(second) - 2)):
        windows = [third[step] if step < len(third) else None, second[step + 2] if step + 2 < len(second) else None]
        last = [step == len(third) - 1, step + 2 == len(second) - 1]
        output = batch_step(model, processor, windows, last, state)
        state = output.state
        if windows[0] is not None:
            assert output.sequences[0] == alone[1][step].sequences[0]
            assert output.scores[0] == pytest.approx(alone[1][step].scores[0], abs=2e-4)
        if windows[1] is not None:
            assert output.sequences[1] == alone[0][step + 2].sequences[0]
            assert output.scores[1] == pytest.approx(alone[0][step + 2].scores[0], abs=2e-4)


def test_all_streams_standing_still(processor):
    model, (features,) = tiny_model(), tiny_features(60)
    windows = cut_windows(features, 3, model.config)
    expected = stream_features(model, windows, chunk_size=3)
    state = model.open_stream(1, chunk_size=3)
    for index, window in enumerate(windows):
        idle = model.stream_step(torch.zeros(1, 0, 80), state=state)
        assert idle.sequences == (expected[index - 1].sequences if index else [[]])
        output = model.stream_step(window[None], state=idle.state, is_last=index == len(windows) - 1)
        state = output.state
        assert output.sequences == expected[index].sequences


# -- the state is a value ---------------------------------------------------------------------------------------------
def snapshot(state: WenetU2ppStreamingState, path) -> bytes:
    state.save(path)
    return path.read_bytes()


@pytest.mark.parametrize("decoding", DECODINGS)
@pytest.mark.parametrize("left", [-1, 1])
def test_saved_state_goes_on_as_if_nothing_had_happened(tmp_path, decoding, left):
    model, hotwords = tiny_model("moe"), [[3, 4], [5]]
    options = {"chunk_size": 3, "num_left_chunks": left, "decoding": decoding, "hotwords": hotwords, "num_beams": 4}
    windows = cut_windows(tiny_features(100)[0], 3, model.config)
    expected = stream_features(model, windows, **options)
    state = model.open_stream(1, **options)
    for index, window in enumerate(windows):
        state.save(tmp_path / "state.safetensors")
        state = WenetU2ppStreamingState.load(tmp_path / "state.safetensors")
        output = model.stream_step(window[None], state=state, is_last=index == len(windows) - 1)
        state = output.state
        assert output.sequences == expected[index].sequences
        assert output.scores == pytest.approx(expected[index].scores, abs=1e-4)
        assert output.token_timestamps == expected[index].token_timestamps
    close(state.encoder_outputs[0], expected[-1].state.encoder_outputs[0])


@pytest.mark.parametrize("decoding", DECODINGS)
def test_a_step_leaves_the_old_state_unchanged(tmp_path, decoding):
    model = tiny_model()
    windows = cut_windows(tiny_features(100)[0], 3, model.config)
    state = model.open_stream(1, chunk_size=3, num_left_chunks=1, decoding=decoding, num_beams=4)
    for window in windows:
        before = snapshot(state, tmp_path / "before")
        first = model.stream_step(window[None], state=state, is_last=True)
        again = model.stream_step(window[None], state=state)
        model.stream_step(torch.randn(1, 15, 80), state=state)
        state.reset([0])
        assert snapshot(state, tmp_path / "after") == before
        repeated = model.stream_step(window[None], state=state, is_last=True)
        assert (repeated.sequences, repeated.scores) == (first.sequences, first.scores)
        state = again.state


def test_memory_of_a_stream_with_limited_left_context_is_bounded():
    model = tiny_model()
    state = model.open_stream(2, chunk_size=2, num_left_chunks=3, decoding="ctc_prefix_beam_search")
    sizes = set()
    for step in range(30):
        mask = torch.ones(2, 11, dtype=torch.long)
        mask[1, 11 * (step % 2) :] = 0  # the second stream moves every other step
        state = model.stream_step(torch.randn(2, 11, 80) + 8, state=state, attention_mask=mask).state
        sizes.add(state.encoder.keys[0].shape[2])
        assert state.encoder.convolutions[0].numel() == 2 * 16 * 4
    assert max(sizes) == 6


# -- misuse -----------------------------------------------------------------------------------------------------------
def test_input_after_the_end_is_refused():
    model = tiny_model()
    output = model.stream_step(tiny_features(30)[0][None], is_last=True)
    with pytest.raises(ValueError, match=r"stream 0 has ended.*reset\(\[0\]\)"):
        model.stream_step(tiny_features(30)[0][None], state=output.state)
    model.stream_step(torch.zeros(1, 0, 80), state=output.state)  # nothing is no input
    model.stream_step(tiny_features(30)[0][None], state=output.state.reset([0]))


@pytest.mark.parametrize("variant", ["full context only", "non-causal batch norm"])
def test_models_that_never_saw_chunks_do_not_stream(variant):
    model = tiny_model(variant, use_dynamic_chunk=False)
    with pytest.raises(ValueError, match="neither use_dynamic_chunk nor static_chunk_size"):
        model.stream_step(tiny_features(30)[0][None])


@pytest.mark.parametrize(
    "options,message",
    [
        ({"chunk_size": 0}, "chunk_size.*0"),
        ({"decoding": "beam"}, "decoding.*'beam'"),
        ({"hotwords_end": "x"}, "hotwords_end.*'x'"),
        ({"chunk": 3}, "chunk"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        tiny_model().stream_step(tiny_features(30)[0][None], **options)


def test_options_and_batch_are_fixed_once_a_stream_is_open():
    model, (features,) = tiny_model(), tiny_features(30)
    state = model.stream_step(features[None]).state
    with pytest.raises(ValueError, match=r"\['num_beams'\] are fixed"):
        model.stream_step(features[None], state=state, num_beams=3)
    with pytest.raises(ValueError, match="1 streams, the input 2"):
        model.stream_step(features.expand(2, -1, -1), state=state)


def test_a_model_without_decoder_streams_ctc_only():
    model, (features,) = tiny_model("ctc only"), tiny_features(60)
    assert model.open_stream().options.decoding == "ctc_prefix_beam_search"
    with pytest.raises(ValueError, match="needs a decoder"):
        model.open_stream(decoding="attention_rescoring")
    output = model.stream_step(features[None], is_last=True)
    assert output.sequences == [model.generate(features[None])[0].tolist()]
