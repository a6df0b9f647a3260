"""Filter banks: against kaldi-native-fbank, batched = alone, block boundaries, stacking, dither, mel filters."""

import math

import numpy as np
import pytest
import torch
from conftest import speech_like

from hf_speechllm.models.kaldi_fbank import (
    analysis_window,
    kaldi_fbank,
    low_frame_rate,
    mel_filter_bank,
    mel_scale,
    num_fbank_frames,
    num_lfr_frames,
)


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(int(16000 * seconds))).astype(np.float32)


def int16_scale(waveform: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(waveform)[None] * 32768.0


@pytest.mark.parametrize("window_type", ["povey", "hamming"])
@pytest.mark.parametrize("num_mel_bins", [23, 80])
@pytest.mark.parametrize(
    "waveform", [noise(0.7), speech_like(1.1), speech_like(0.6, seed=3) + 0.2], ids=["noise", "speech", "offset"]
)
def test_equals_kaldi_native_fbank(waveform, num_mel_bins, window_type):
    knf = pytest.importorskip("kaldi_native_fbank", reason="kaldi-native-fbank, the oracle, is not installed")
    options = knf.FbankOptions()
    options.frame_opts.dither = 0.0
    options.frame_opts.window_type = window_type
    options.mel_opts.num_bins = num_mel_bins
    options.energy_floor = 0.0
    oracle = knf.OnlineFbank(options)
    scaled = int16_scale(waveform)
    oracle.accept_waveform(16000, scaled[0].tolist())
    oracle.input_finished()
    expected = np.stack([oracle.get_frame(i) for i in range(oracle.num_frames_ready)])
    actual = kaldi_fbank(scaled, num_mel_bins=num_mel_bins, window_type=window_type)[0].numpy()
    assert actual.shape == expected.shape == (1 + (len(waveform) - 400) // 160, num_mel_bins)
    assert np.abs(actual - expected).max() <= 1e-3


def test_first_frame_from_the_definition():
    """One window in float64, written out: DC removal, pre-emphasis, window, power spectrum, mel, log."""
    samples = int16_scale(speech_like(0.1, seed=5))[0].double()[:400]
    samples = samples - samples.mean()
    emphasised = torch.stack([samples[i] - 0.97 * samples[max(i - 1, 0)] for i in range(400)])
    window = torch.tensor([(0.5 - 0.5 * math.cos(2 * math.pi * i / 399)) ** 0.85 for i in range(400)])
    power = torch.fft.rfft(emphasised * window, n=512).abs() ** 2

    def mel(frequency: float) -> float:
        return 1127.0 * math.log(1.0 + frequency / 700.0)

    low, high = mel(20.0), mel(8000.0)
    step = (high - low) / 81
    expected = []
    for bin_index in range(80):
        left, centre, right = (low + (bin_index + k) * step for k in range(3))
        total = 0.0
        for k in range(256):
            at = mel(k * 16000 / 512)
            if left < at < right:
                weight = (at - left) / (centre - left) if at <= centre else (right - at) / (right - centre)
                total += weight * float(power[k])
        expected.append(math.log(max(total, 1.1920928955078125e-07)))
    actual = kaldi_fbank(int16_scale(speech_like(0.1, seed=5)))[0, 0].double()
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), atol=2e-4, rtol=0)


def test_batch_equals_alone():
    waveforms = [int16_scale(noise(s, seed=i))[0] for i, s in enumerate((0.31, 1.0, 0.025, 0.5))]
    batch = kaldi_fbank(torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True))
    lengths = num_fbank_frames(torch.tensor([len(w) for w in waveforms]), 400, 160)
    for row, waveform, length in zip(batch, waveforms, lengths, strict=True):
        torch.testing.assert_close(row[:length], kaldi_fbank(waveform[None])[0], atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("frames", [1023, 1024, 1025, 1026])
def test_no_seam_between_blocks(frames):
    waveform = torch.from_numpy(noise(10.5))[None] * 32768.0
    samples = 400 + 160 * (frames - 1)
    whole = kaldi_fbank(waveform[:, :samples])
    assert whole.shape[1] == frames
    # The same frames, each from a piece that no block boundary cuts.
    for start in (0, 1015):
        piece = kaldi_fbank(waveform[:, start * 160 : samples])
        torch.testing.assert_close(whole[:, start : start + piece.shape[1]], piece, atol=1e-5, rtol=1e-6)
    assert kaldi_fbank(waveform[:, : samples + 159]).shape[1] == frames
    assert kaldi_fbank(waveform[:, : samples - 1]).shape[1] == frames - 1


@pytest.mark.parametrize("samples,frames", [(0, 0), (1, 0), (399, 0), (400, 1), (559, 1), (560, 2)])
def test_frame_count(samples, frames):
    assert int(num_fbank_frames(torch.tensor(samples), 400, 160)) == frames
    assert kaldi_fbank(torch.zeros(2, samples)).shape == (2, frames, 80)


def test_silence_is_the_floor():
    assert torch.equal(kaldi_fbank(torch.zeros(1, 560)), torch.full((1, 2, 80), math.log(2**-23)))
    constant = kaldi_fbank(torch.full((1, 560), 1234.0))
    torch.testing.assert_close(constant, torch.full((1, 2, 80), math.log(2**-23)))


def test_eight_kilohertz_has_its_own_window_and_filters():
    assert kaldi_fbank(torch.randn(1, 8000), sampling_rate=8000, num_mel_bins=40).shape == (1, 98, 40)


def test_dither_needs_a_generator_and_follows_it():
    waveform = int16_scale(noise(0.2))
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="generator"):
        kaldi_fbank(waveform, dither=1.0)
    first = kaldi_fbank(waveform, dither=1.0, generator=torch.Generator().manual_seed(7))
    again = kaldi_fbank(waveform, dither=1.0, generator=torch.Generator().manual_seed(7))
    other = kaldi_fbank(waveform, dither=1.0, generator=torch.Generator().manual_seed(8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, kaldi_fbank(waveform))
    assert torch.equal(torch.get_rng_state(), before)


def test_dither_has_the_stated_deviation():
    """On silence the spectrum of white noise of deviation s scales with s squared."""
    silent = torch.zeros(1, 16000)
    quiet = kaldi_fbank(silent, dither=1.0, generator=torch.Generator().manual_seed(0))
    loud = kaldi_fbank(silent, dither=10.0, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loud - quiet, torch.full_like(quiet, math.log(100.0)), atol=1e-3, rtol=0)


def test_mel_filters_sum_to_one_between_the_outer_centres():
    """Neighbouring triangles are complements of each other on the mel axis."""
    bank = mel_filter_bank(80, 512, 16000, 20.0, 0.0)
    assert bank.shape == (257, 80) and bool((bank >= 0).all()) and bool((bank <= 1).all())
    low, high = mel_scale(torch.tensor([20.0, 8000.0], dtype=torch.float64)).tolist()
    step = (high - low) / 81
    mels = mel_scale(torch.arange(257, dtype=torch.float64) * 16000 / 512)
    inner = (mels >= low + step) & (mels <= high - step)
    torch.testing.assert_close(bank.sum(dim=1)[inner], torch.ones(int(inner.sum())), atol=1e-6, rtol=0)
    assert float(bank[256].sum()) == 0.0 and float(bank[0].sum()) == 0.0


@pytest.mark.parametrize("low,high", [(-1.0, 0.0), (100.0, 50.0), (20.0, 9000.0), (8000.0, 0.0)])
def test_impossible_mel_range(low, high):
    with pytest.raises(ValueError, match="mel filter bank"):
        mel_filter_bank(80, 512, 16000, low, high)


def test_high_freq_counts_from_nyquist():
    assert torch.equal(mel_filter_bank(23, 512, 16000, 20.0, -400.0), mel_filter_bank(23, 512, 16000, 20.0, 7600.0))


def test_unknown_window():
    with pytest.raises(ValueError, match="'hanning'"):
        analysis_window("hanning", 400)


def plain_low_frame_rate(frames: list[list[float]], m: int, n: int) -> list[list[float]]:
    """FunASR's `apply_lfr` as a loop: (m - 1) // 2 copies of the first frame, windows; the last frame fills up."""
    padded = [frames[0]] * ((m - 1) // 2) + frames
    stacked = []
    for i in range(math.ceil(len(frames) / n)):
        window = padded[i * n : i * n + m]
        window = window + [frames[-1]] * (m - len(window))
        stacked.append([value for frame in window for value in frame])
    return stacked


@pytest.mark.parametrize("m,n", [(7, 6), (5, 3), (1, 1), (4, 4), (6, 1)])
@pytest.mark.parametrize("frames", [1, 2, 5, 6, 7, 12, 13, 25])
def test_low_frame_rate_is_the_loop(frames, m, n):
    features = torch.randn(1, frames, 3)
    stacked = low_frame_rate(features, torch.tensor([frames]), m, n)
    assert torch.equal(stacked[0], torch.tensor(plain_low_frame_rate(features[0].tolist(), m, n)))
    assert stacked.shape[1] == int(num_lfr_frames(torch.tensor(frames), n))


def test_low_frame_rate_repeats_each_items_own_last_frame():
    lengths = [25, 1, 13, 8]
    features = torch.randn(4, 25, 3)
    stacked = low_frame_rate(features, torch.tensor(lengths), 7, 6)
    for row, item, length in zip(stacked, features, lengths, strict=True):
        expected = torch.tensor(plain_low_frame_rate(item[:length].tolist(), 7, 6))
        assert torch.equal(row[: len(expected)], expected)
