"""Feature extractor on every kind of audio that callers hold, good and bad: a defined result or `AudioError`."""

import numpy as np
import pytest
import torch
from conftest import build_tiny_model, speech_like

from hf_speechllm.models.feature_extraction_kaldi_fbank import (
    AudioError,
    KaldiFbankFeatureExtractor,
    to_mono_waveform,
)
from hf_speechllm.models.kaldi_fbank import kaldi_fbank


EXTRACTOR = KaldiFbankFeatureExtractor()
SPEECH = speech_like(0.5)
INT16 = (SPEECH * 32767).round().astype(np.int16)


def features_of(audio, **options) -> torch.Tensor:
    """Features of one waveform, with what must hold for all of them."""
    batch = EXTRACTOR(audio, sampling_rate=16000, **options)
    features, mask = batch["input_features"], batch["attention_mask"]
    assert features.dtype == torch.float32 and mask.dtype == torch.int64
    assert features.shape[:2] == mask.shape and features.shape[2] == 80
    assert bool(torch.isfinite(features).all())
    return features


@pytest.mark.parametrize("samples", [0, 1, 2, 159, 160, 399, 400, 401, 559, 560])
def test_short_audio(samples):
    features = features_of(SPEECH[:samples])
    assert features.shape == (1, 0 if samples < 400 else 1 + (samples - 400) // 160, 80)


@pytest.fixture(scope="module")
def model():
    return build_tiny_model()


@pytest.mark.parametrize("decoding", ["ctc_greedy", "ctc_prefix_beam_search", "attention", "attention_rescoring"])
@pytest.mark.parametrize("samples", [0, 1, 2, 159, 160, 399, 400, 401, 1359])
def test_audio_without_an_encoder_frame_is_an_empty_text(model, samples, decoding):
    inputs = EXTRACTOR(SPEECH[:samples], sampling_rate=16000)
    output = model.generate(**inputs, decoding=decoding, length_penalty=0.5, return_dict_in_generate=True)
    assert output.sequences.shape == (1, 0)
    assert output.sequences_lengths.tolist() == [0]
    assert not torch.isnan(output.scores).any() and not torch.isnan(output.confidences).any()


def test_empty_item_in_a_batch_changes_nothing_for_the_others(model):
    alone = EXTRACTOR(SPEECH, sampling_rate=16000)
    batch = EXTRACTOR([SPEECH[:0], SPEECH, SPEECH[:300]], sampling_rate=16000)
    assert batch["attention_mask"].sum(dim=1).tolist() == [0, alone["input_features"].shape[1], 0]
    torch.testing.assert_close(batch["input_features"][1:2], alone["input_features"], atol=1e-5, rtol=0)
    output = model.generate(**batch, return_dict_in_generate=True)
    expected = model.generate(**alone, return_dict_in_generate=True)
    assert output.sequences_lengths.tolist() == [0, expected.sequences_lengths[0], 0]
    assert expected.sequences_lengths[0] > 0
    assert torch.equal(output.sequences[1], expected.sequences[0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 4000, -1])
def test_nan_and_infinity_are_refused(bad, position):
    audio = SPEECH.copy()
    audio[position] = bad
    for form in (audio, audio.astype(np.float64), torch.from_numpy(audio), audio.tolist()):
        with pytest.raises(AudioError, match="NaN or infinite"):
            EXTRACTOR(form, sampling_rate=16000)
    with pytest.raises(AudioError, match="NaN or infinite"):
        EXTRACTOR([SPEECH, audio], sampling_rate=16000)


@pytest.mark.parametrize("value", [1e300, 1e38, 1e30, 1e15])
def test_numbers_that_are_no_audio_never_become_nan(value):
    try:
        features_of(SPEECH.astype(np.float64) * value)
    except AudioError:
        pass


EQUAL_FORMS = {
    "float64": SPEECH.astype(np.float64),
    "long double": SPEECH.astype(np.longdouble),
    "list": SPEECH.tolist(),
    "tuple": tuple(SPEECH.tolist()),
    "torch": torch.from_numpy(SPEECH.copy()),
    "torch with gradient": torch.from_numpy(SPEECH.copy()).requires_grad_(),
    "big endian": SPEECH.astype(">f4"),
    "strided": np.repeat(SPEECH, 2)[::2],
    "negative stride": np.ascontiguousarray(SPEECH[::-1])[::-1],
    "(1, n)": SPEECH[None],
    "(n, 1)": SPEECH[:, None],
    "torch (1, n)": torch.from_numpy(SPEECH.copy())[None],
    "equal stereo (2, n)": np.stack([SPEECH, SPEECH]),
    "equal stereo (n, 2)": np.stack([SPEECH, SPEECH], axis=1),
    "fortran stereo": np.asfortranarray(np.stack([SPEECH, SPEECH])),
    "list of one": [SPEECH],
}


@pytest.mark.parametrize("form", EQUAL_FORMS)
def test_forms_of_the_same_audio(form):
    assert torch.equal(features_of(EQUAL_FORMS[form]).detach(), features_of(SPEECH))


def test_read_only_memory_is_read_and_not_written(recwarn):
    audio = SPEECH.copy()
    audio.setflags(write=False)
    assert torch.equal(features_of(audio), features_of(SPEECH))
    assert np.array_equal(audio, SPEECH)
    assert not [warning for warning in recwarn if "writable" in str(warning.message)]


def test_callers_audio_stays_what_it_was():
    audio, tensor = SPEECH.copy(), torch.from_numpy(SPEECH.copy())
    features_of(audio)
    features_of(tensor)
    assert np.array_equal(audio, SPEECH) and np.array_equal(tensor.numpy(), SPEECH)


def test_integers_are_scaled_by_their_range():
    expected = to_mono_waveform(INT16.astype(np.float32) / 32768)
    forms = {
        "int16": INT16,
        "int32": INT16.astype(np.int32) * 65536,
        "int64": INT16.astype(np.int64),
        "list": INT16.tolist(),
        "torch int16": torch.from_numpy(INT16),
    }
    for name, form in forms.items():
        assert torch.equal(to_mono_waveform(form), expected), name
    assert to_mono_waveform(np.array([0, 128, 255], dtype=np.uint8)).tolist() == [-1.0, 0.0, 127 / 128]
    assert to_mono_waveform(np.array([-128, 127], dtype=np.int8)).tolist() == [-1.0, 127 / 128]
    assert to_mono_waveform(np.array([-(2**31)], dtype=np.int32)).tolist() == [-1.0]


def test_int16_features_are_kaldis_of_the_samples():
    expected = kaldi_fbank(torch.from_numpy(INT16.astype(np.float32))[None])
    torch.testing.assert_close(features_of(INT16), expected, atol=1e-5, rtol=0)


def test_channels_are_averaged():
    other = speech_like(0.5, seed=9)
    mean = ((SPEECH.astype(np.float64) + other) / 2).astype(np.float32)
    torch.testing.assert_close(to_mono_waveform(np.stack([SPEECH, other])), torch.from_numpy(mean))
    torch.testing.assert_close(to_mono_waveform(np.stack([SPEECH, other], axis=1)), torch.from_numpy(mean))
    torch.testing.assert_close(to_mono_waveform(np.stack([SPEECH] * 8)), torch.from_numpy(SPEECH))


def test_empty_stereo_is_empty():
    assert to_mono_waveform(np.zeros((2, 0), dtype=np.float32)).shape == (0,)
    assert to_mono_waveform(np.zeros((0, 2), dtype=np.float32)).shape == (0,)


@pytest.mark.parametrize(
    "audio",
    [
        np.zeros((2, 3, 4)),
        np.float32(0.5),
        np.array(["a", "b"]),
        np.zeros(800, dtype=bool),
        np.zeros(800, dtype=np.complex64),
        np.array([object()] * 800),
        torch.zeros(800, dtype=torch.bool),
        torch.zeros(800, dtype=torch.complex64),
        "a.wav",
        b"RIFF",
        None,
        {"array": [0.0]},
    ],
    ids=lambda audio: type(audio).__name__ + str(getattr(audio, "dtype", "")),
)
def test_unusable_audio(audio):
    with pytest.raises(AudioError):
        EXTRACTOR(audio, sampling_rate=16000)


@pytest.mark.parametrize("rate", [8000, 11025, 44100, 48000, 0, -1])
def test_wrong_rate(rate):
    with pytest.raises(AudioError, match=f"expects 16000 Hz, got {rate} Hz"):
        EXTRACTOR(SPEECH, sampling_rate=rate)


@pytest.mark.parametrize(
    "audio",
    [
        np.zeros(8000, dtype=np.float32),
        np.full(8000, 0.9, dtype=np.float32),
        np.sign(np.sin(np.arange(8000))).astype(np.float32),
        np.full(8000, 1e-40, dtype=np.float32),
        np.full(8000, -32768, dtype=np.int16),
        SPEECH * 50,
    ],
    ids=["silence", "DC", "full-scale square", "denormals", "int16 minimum", "far over full scale"],
)
def test_odd_but_valid_audio(audio, model):
    assert features_of(audio).shape[1] > 0
    scores = model.generate(**EXTRACTOR(audio, sampling_rate=16000), return_dict_in_generate=True).scores
    assert bool(torch.isfinite(scores).all())


def test_batch_equals_alone_with_stacking_and_cmvn():
    extractor = KaldiFbankFeatureExtractor(
        feature_size=20, window_type="hamming", lfr_m=7, lfr_n=6, cmvn_mean=[0.3] * 140, cmvn_inverse_std=[0.5] * 140
    )
    pieces = [SPEECH, SPEECH[:400], SPEECH[:3333], SPEECH[:100]]
    batch = extractor(pieces, sampling_rate=16000)
    lengths = batch["attention_mask"].sum(dim=1)
    assert lengths.tolist() == extractor.num_frames(torch.tensor([len(p) for p in pieces])).tolist() == [8, 1, 4, 0]
    for row, length, piece in zip(batch["input_features"], lengths, pieces, strict=True):
        torch.testing.assert_close(row[:length], extractor(piece)["input_features"][0], atol=1e-5, rtol=0)
        assert bool((row[length:] == 0).all())
    plain = KaldiFbankFeatureExtractor(feature_size=20, window_type="hamming", lfr_m=7, lfr_n=6)
    expected = (plain(SPEECH)["input_features"] - 0.3) * 0.5
    torch.testing.assert_close(extractor(SPEECH)["input_features"], expected)


def test_half_a_cmvn_is_refused():
    with pytest.raises(ValueError, match="cmvn"):
        KaldiFbankFeatureExtractor(cmvn_mean=[0.0] * 80)


def test_packs_dither_is_not_applied_unless_asked_for():
    extractor = KaldiFbankFeatureExtractor(dither=1.0)
    assert torch.equal(extractor(SPEECH)["input_features"], features_of(SPEECH))
    with pytest.raises(ValueError, match="generator"):
        extractor(SPEECH, dither=1.0)
    noisy = extractor(SPEECH, dither=1.0, generator=torch.Generator().manual_seed(0))["input_features"]
    assert not torch.equal(noisy, features_of(SPEECH))


def test_numpy_tensors_and_no_mask():
    batch = EXTRACTOR(SPEECH, return_tensors="np", return_attention_mask=False)
    assert isinstance(batch["input_features"], np.ndarray) and "attention_mask" not in batch


def test_save_and_load(tmp_path):
    extractor = KaldiFbankFeatureExtractor(window_type="hamming", dither=0.1, lfr_m=7, lfr_n=6, feature_size=20)
    extractor.save_pretrained(tmp_path)
    loaded = KaldiFbankFeatureExtractor.from_pretrained(tmp_path)
    assert loaded.to_dict() == extractor.to_dict()
    assert torch.equal(loaded(SPEECH)["input_features"], extractor(SPEECH)["input_features"])
