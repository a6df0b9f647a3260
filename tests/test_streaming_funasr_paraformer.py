"""Streaming Paraformer: every packetisation gives one result, streams are independent, the state is a value."""

import copy

import pytest
import torch
from tiny_funasr_paraformer import pad, tiny_features, tiny_model

from hf_speechllm.models.feature_extraction_kaldi_fbank import AudioError, KaldiFbankFeatureExtractor
from hf_speechllm.models.feature_stream import stream_stacked_features
from hf_speechllm.models.streaming_funasr_paraformer import FunasrParaformerStreamingState


STREAMING = {"is_streaming": True, "decoder_fsmn_shift": 5, "chunk_size": [0, 6, 3], "num_hidden_layers": 3}


def close(actual, expected, atol=3e-5):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-4)


def streaming_model(**changes):
    return tiny_model("paraformer", **{**STREAMING, **changes})


def run(model, features, cuts, **options):
    """Feed one stream in pieces that end at `cuts`; the last output."""
    state, output, start = model.open_stream(1, **options), None, 0
    for cut in [*cuts, len(features)]:
        output = model.stream_step(features[None, start:cut], state, is_last=cut == len(features))
        state, start = output.state, cut
    return output


def test_any_packetisation_gives_the_same_result():
    model = streaming_model()
    for length in (41, 42, 36, 5, 1):
        (features,) = tiny_features(model, length)
        whole = run(model, features, [])
        assert length < 36 or len(whole.sequences[0]) > 3, "the test needs tokens"
        assert whole.is_final == [True]
        for cuts in ([1, 2, 3], [6, 12, 18], [0, 0, 7, 30], list(range(1, length)), [length]):
            pieces = run(model, features, [cut for cut in cuts if cut <= length])
            assert pieces.sequences == whole.sequences
            assert pieces.token_timestamps == whole.token_timestamps
            close(torch.tensor(pieces.scores), torch.tensor(whole.scores))


def test_one_large_window_is_recognition_of_the_whole():
    """Without future frames, a window that holds the whole utterance is the offline pass."""
    model = streaming_model()
    for length in (40, 17, 1):
        (features,) = tiny_features(model, length, seed=length)
        expected = model.generate(**pad([features]), return_dict_in_generate=True)
        actual = run(model, features, [length // 2], chunk_size=[0, 50, 0])
        assert actual.sequences[0] == expected.sequences[0].tolist()
        if actual.sequences[0]:
            times = torch.tensor(actual.token_timestamps[0])
            close(times, expected.token_timestamps[0])


def test_tokens_come_early_and_never_change():
    model = streaming_model()
    (features,) = tiny_features(model, 60)
    state, seen = None, []
    for start in range(0, 60, 6):
        output = model.stream_step(features[None, start : start + 6], state)
        assert output.sequences[0][: len(seen)] == seen
        state, seen = output.state, output.sequences[0]
        spans = output.token_timestamps[0]
        assert all(a <= b <= output.state.streams[0].num_frames * 0.06 + 1e-9 for a, b in spans)
        assert all(before[1] <= after[0] + 1e-9 for before, after in zip(spans, spans[1:], strict=False))
    assert len(seen) > 3
    final = model.stream_step(features[None, :0], state, is_last=True)
    assert final.sequences[0][: len(seen)] == seen


def test_streams_of_a_batch_are_independent():
    model = streaming_model()
    pieces = tiny_features(model, 40, 22, 31)
    alone = [run(model, piece, []) for piece in pieces]
    state = model.open_stream(3)
    for step in range(5):
        width = 10
        features, mask = torch.full((3, width, 12), 9.0), torch.zeros(3, width, dtype=torch.long)
        for row, piece in enumerate(pieces):
            part = piece[step * width : (step + 1) * width]
            features[row, : len(part)], mask[row, : len(part)] = part, 1
        last = [len(piece) <= (step + 1) * width for piece in pieces]
        output = model.stream_step(features, state, mask, last)
        state = output.state
    assert output.sequences == [one.sequences[0] for one in alone]
    assert output.token_timestamps == [one.token_timestamps[0] for one in alone]


def test_state_is_a_value_and_survives_a_file(tmp_path):
    model = streaming_model()
    (features,) = tiny_features(model, 45)
    first = model.stream_step(features[None, :20], None)
    kept = copy.deepcopy(first.state)
    expected = model.stream_step(features[None, 20:], first.state, is_last=True)
    first.state.save(tmp_path / "state.safetensors")
    again = FunasrParaformerStreamingState.load(tmp_path / "state.safetensors")
    for state in (first.state, kept, again):
        output = model.stream_step(features[None, 20:], state, is_last=True)
        assert output.sequences == expected.sequences
        assert output.token_timestamps == expected.token_timestamps


def test_reset_starts_one_stream_anew():
    model = streaming_model()
    one, other = tiny_features(model, 24, 30)
    both = torch.stack([one, other[:24]])
    state = model.reset_streams(model.stream_step(both, None).state, [0])
    output = model.stream_step(torch.stack([one[:6], other[24:]]), state, is_last=[False, True])
    assert output.sequences[1] == run(model, other, []).sequences[0]
    rest = model.stream_step(
        torch.stack([one[6:], one[6:]]), output.state, torch.tensor([[1] * 18, [0] * 18]), is_last=True
    )
    assert rest.sequences[0] == run(model, one, []).sequences[0]


@pytest.mark.parametrize("look_back", [0, 1, 2, -1])
def test_caches_hold_what_they_should(look_back):
    model = streaming_model()
    (features,) = tiny_features(model, 42)
    output = model.stream_step(
        features[None], None, encoder_chunk_look_back=look_back, decoder_chunk_look_back=max(look_back, 0)
    )
    stream = output.state.streams[0]
    # Seven windows of six new frames; the last three frames wait for the next window.
    expected = 42 if look_back < 0 else look_back * 6
    assert {key.shape[2] for key in stream.keys} == {expected}
    assert {key.shape[2] for key in stream.cross_keys} == {min(max(look_back, 0) * 6, 42)}
    assert all(memory.shape == (1, 10, 16) for memory in stream.memories)


def test_look_back_matters():
    model = streaming_model()
    (features,) = tiny_features(model, 60)
    scores = {
        round(run(model, features, [], encoder_chunk_look_back=n, decoder_chunk_look_back=m).scores[0], 4)
        for n, m in ((0, 0), (2, 0), (2, 1), (-1, 1))
    }
    assert len(scores) == 4


def test_empty_stream():
    model = streaming_model()
    output = model.stream_step(torch.zeros(2, 0, 12), None, is_last=True)
    assert output.sequences == [[], []] and output.is_final == [True, True]


def test_misuse_is_refused():
    offline = tiny_model("paraformer")
    with pytest.raises(ValueError, match="not trained with chunks"):
        offline.stream_step(torch.zeros(1, 6, 12))
    with pytest.raises(ValueError, match="causal decoder"):
        streaming_model(decoder_fsmn_shift=0).open_stream()
    model = streaming_model()
    with pytest.raises(ValueError, match="chunk_size"):
        model.open_stream(1, chunk_size=[0, 0, 5])
    ended = model.stream_step(torch.zeros(1, 6, 12), None, is_last=True).state
    with pytest.raises(ValueError, match="has ended"):
        model.stream_step(torch.zeros(1, 1, 12), ended)
    with pytest.raises(ValueError, match="fixed when a stream is opened"):
        model.stream_step(torch.zeros(1, 1, 12), model.open_stream(), chunk_size=[0, 5, 5])
    with pytest.raises(ValueError, match="2 streams, the input 1"):
        model.stream_step(torch.zeros(1, 1, 12), model.open_stream(2))


@pytest.mark.parametrize(("lfr_m", "lfr_n"), [(7, 6), (1, 1), (5, 1), (4, 3)])
def test_stacked_features_of_any_pieces_are_those_of_the_whole(lfr_m, lfr_n):
    mean, scale = [0.5] * 20 * lfr_m, [2.0] * 20 * lfr_m
    extractor = KaldiFbankFeatureExtractor(
        feature_size=20, lfr_m=lfr_m, lfr_n=lfr_n, cmvn_mean=mean, cmvn_inverse_std=scale, window_type="hamming"
    )
    generator = torch.Generator().manual_seed(0)
    for length in (16000, 9999, 1200, 400, 399, 0):
        waveform = torch.randn(length, generator=generator) * 0.1
        whole = extractor(waveform, sampling_rate=16000)["input_features"][0] if length else torch.zeros(0, 20 * lfr_m)
        for piece in (1, 160, 777, 5000, 20000):
            if piece == 1 and length > 1200:
                continue
            state, rows = None, []
            for start in range(0, length, piece):
                features, state = stream_stacked_features(extractor, waveform[start : start + piece], state)
                rows.append(features)
            features, state = stream_stacked_features(extractor, torch.zeros(0), state, is_last=True)
            close(torch.cat([*rows, features]), whole, atol=1e-3)
    with pytest.raises(AudioError, match="after the last piece"):
        stream_stacked_features(extractor, torch.zeros(5), state)
