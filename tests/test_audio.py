"""Reading and resampling audio files."""

import io
import sys

import numpy as np
import pytest
import scipy.signal
import soundfile
import torch

from hf_speechllm.audio import AudioError, load_audio, resample, resample_sinc
from hf_speechllm.models import audio_file


def tone(frequency: float, rate: int, seconds: float = 0.5) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate)


def encode(samples: np.ndarray, rate: int, format: str = "WAV", subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=format, subtype=subtype)
    return buffer.getvalue()


def assert_tone(samples: np.ndarray, frequency: float, tolerance: float = 1e-3, rate: int = 16000) -> None:
    """The inner part equals the ideal tone (edges ring, lossy formats shift nothing but add noise)."""
    inner = slice(1600, len(samples) - 1600)
    np.testing.assert_allclose(samples[inner], tone(frequency, rate, 1.0)[: len(samples)][inner], atol=tolerance)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000, 96000])
def test_any_rate_becomes_the_models(rate):
    samples = load_audio(encode(tone(440, rate), rate, subtype="FLOAT"), 16000)
    assert samples.dtype == np.float32
    assert abs(len(samples) - 8000) <= 1
    assert_tone(samples, 440)


@pytest.mark.parametrize(
    ("format", "subtype", "tolerance"),
    [
        ("WAV", "PCM_16", 1e-3),
        ("WAV", "PCM_24", 1e-3),
        ("WAV", "PCM_U8", 2e-2),
        ("FLAC", "PCM_16", 1e-3),
        ("OGG", "VORBIS", 5e-2),
    ],
)
def test_formats(format, subtype, tolerance):
    assert_tone(load_audio(encode(tone(440, 16000), 16000, format, subtype), 16000), 440, tolerance)


def test_mp3_keeps_pitch_and_level():
    samples = load_audio(encode(tone(440, 16000, 2.0), 16000, "MP3"), 16000)
    spectrum = np.abs(np.fft.rfft(samples[8000:24000]))
    assert np.argmax(spectrum) == 440
    assert spectrum[440] / 8000 == pytest.approx(0.5, rel=0.05)


def test_channels_are_averaged():
    stereo = np.stack([tone(440, 16000), 0.2 * tone(440, 16000)], axis=1)
    mono = load_audio(encode(stereo, 16000, subtype="FLOAT"), 16000)
    np.testing.assert_allclose(mono, 0.6 * tone(440, 16000), atol=1e-6)


def test_path_bytes_and_file_object_agree(tmp_path):
    content = encode(tone(300, 8000), 8000)
    path = tmp_path / "a.wav"
    path.write_bytes(content)
    with path.open("rb") as file:
        results = [load_audio(path), load_audio(str(path)), load_audio(content), load_audio(file)]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_empty_file_gives_no_samples():
    assert load_audio(encode(np.zeros(0), 8000), 16000).shape == (0,)


@pytest.mark.parametrize("content", [b"", b"RIFF", b"not audio at all" * 100, b"\x00" * 4096])
def test_corrupt_bytes_raise(content):
    with pytest.raises(AudioError, match=f"<{len(content)} bytes>: cannot be read as audio"):
        load_audio(content)


def test_missing_file_and_directory_raise(tmp_path):
    with pytest.raises(AudioError, match="none.wav: no such file"):
        load_audio(tmp_path / "none.wav")
    with pytest.raises(AudioError, match="expected a file, got a folder"):
        load_audio(tmp_path)


def test_mutated_files_never_give_non_finite_samples():
    """A few hundred damaged files: a waveform or AudioError, nothing else."""
    rng = np.random.default_rng(0)
    outcomes = {"read": 0, "refused": 0}
    for format in ("WAV", "FLAC", "OGG"):
        original = np.frombuffer(encode(tone(440, 16000, 0.2), 16000, format), dtype=np.uint8)
        for _ in range(80):
            damaged = original.copy()
            damaged[rng.integers(0, min(len(damaged), 400), size=6)] = rng.integers(0, 256, size=6)
            try:
                samples = load_audio(damaged.tobytes(), 16000, max_duration_s=10)
            except AudioError:
                outcomes["refused"] += 1
            else:
                outcomes["read"] += 1
                assert np.isfinite(samples).all()
    assert outcomes["refused"] > 0 and outcomes["read"] > 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_file_raises(bad):
    samples = tone(440, 16000)
    samples[100] = bad
    with pytest.raises(AudioError, match="NaN or infinite"):
        load_audio(encode(samples, 16000, subtype="FLOAT"))


def test_limits_are_enforced():
    with pytest.raises(AudioError, match="duration: expected at most 0.3 s"):
        load_audio(encode(tone(440, 16000), 16000), max_duration_s=0.3)
    with pytest.raises(AudioError, match="sampling rate: expected 1000 to 768000 Hz, got 500"):
        load_audio(encode(tone(44, 500), 500))
    with pytest.raises(AudioError, match=f"channels: expected at most 32, got {audio_file.MAX_CHANNELS + 1}"):
        load_audio(encode(np.zeros((160, audio_file.MAX_CHANNELS + 1)), 16000))


RATES = [(8000, 16000), (44100, 16000), (48000, 16000), (16000, 8000), (22050, 16000), (16000, 44100), (15999, 16000)]


@pytest.mark.parametrize(("rate", "target"), RATES)
def test_sinc_resampler_is_exact_in_the_pass_band(rate, target):
    frequency = 0.42 * min(rate, target)
    waveform = torch.from_numpy(tone(frequency, rate)).float()
    result = resample_sinc(waveform, rate, target).numpy()
    assert len(result) == -(-len(waveform) * target // rate)
    inner = slice(1000, len(result) - 1000)
    np.testing.assert_allclose(result[inner], tone(frequency, target, 0.51)[: len(result)][inner], atol=2e-5)


@pytest.mark.parametrize(("rate", "target"), [(44100, 16000), (48000, 16000), (16000, 8000)])
def test_sinc_resampler_does_not_alias(rate, target):
    waveform = torch.from_numpy(tone(0.53 * target, rate)).float()
    assert resample_sinc(waveform, rate, target)[500:-500].abs().max() < 1e-4


@pytest.mark.parametrize(("rate", "target"), [(8000, 16000), (48000, 16000), (44100, 16000)])
def test_sinc_resampler_agrees_with_soxr_and_scipy(rate, target):
    soxr = pytest.importorskip("soxr")
    rng = np.random.default_rng(0)
    # Noise below the transition bands of all three filters.
    band = scipy.signal.firwin(511, 0.7 * min(rate, target) / rate)
    noise = np.convolve(rng.standard_normal(rate), band, mode="same").astype(np.float32) * 0.3
    ours = resample_sinc(torch.from_numpy(noise), rate, target).numpy()
    inner = slice(2000, len(ours) - 2000)
    np.testing.assert_allclose(ours[inner], soxr.resample(noise, rate, target)[inner], atol=2e-4)
    theirs = scipy.signal.resample(noise, len(ours))
    np.testing.assert_allclose(ours[inner], theirs[inner], atol=2e-4)


def test_without_soxr_the_sinc_resampler_answers(monkeypatch):
    waveform = torch.from_numpy(tone(440, 8000)).float()
    monkeypatch.setitem(sys.modules, "soxr", None)
    torch.testing.assert_close(resample(waveform, 8000, 16000), resample_sinc(waveform, 8000, 16000), atol=0, rtol=0)


def test_resample_edge_cases():
    empty, one = torch.zeros(0), torch.ones(1)
    assert resample(empty, 8000, 16000).shape == (0,)
    assert resample(one, 8000, 16000).shape == (2,)
    assert resample_sinc(one, 48000, 16000).shape == (1,)
    assert resample(one, 16000, 16000) is one
    constant = resample_sinc(torch.full((4000,), 0.25), 44100, 16000)
    torch.testing.assert_close(constant[300:-300], torch.full_like(constant[300:-300], 0.25), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="expected a positive integer in Hz, got 0"):
        resample_sinc(one, 0, 16000)
