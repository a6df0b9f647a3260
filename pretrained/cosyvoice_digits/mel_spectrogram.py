"""Log-mel spectrograms of vocoders: magnitudes, Slaney's mel scale, natural logarithm.

What Matcha-TTS calls `mel_spectrogram` (`matcha/utils/audio.py`, from HiFi-GAN's `meldataset.py`) with librosa's
filters. There the filters are remembered by their upper edge alone, so that a second sampling rate in one process gets
those of the first; here they belong to all of their arguments.

Shape legend: `b` batch, `n` samples, `t` frames, `m` mel bins.
"""

import warnings
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from transformers.audio_utils import mel_filter_bank

from .reflected_edges import reflect_edges


# Added to the power before the root, which keeps its gradient finite in silence.
_POWER_FLOOR = 1e-9
_MEL_FLOOR = 1e-5


@lru_cache(maxsize=16)
def _slaney_filters(
    num_mel_bins: int, fft_length: int, sampling_rate: int, low_freq: float, high_freq: float
) -> np.ndarray:
    with warnings.catch_warnings():
        # Short windows leave some filters empty, as they do in librosa.
        warnings.filterwarnings("ignore", message="At least one mel filter")
        filters = mel_filter_bank(
            num_frequency_bins=fft_length // 2 + 1,
            num_mel_filters=num_mel_bins,
            min_frequency=low_freq,
            max_frequency=high_freq,
            sampling_rate=sampling_rate,
            norm="slaney",
            mel_scale="slaney",
        )
    return filters.astype(np.float32)


def slaney_mel_filters(
    num_mel_bins: int, fft_length: int, sampling_rate: int, low_freq: float = 0.0, high_freq: float | None = None
) -> Tensor:
    """Triangular filters of equal area on Slaney's mel scale, `(fft_length // 2 + 1, num_mel_bins)` float32.

    `high_freq=None` is half of the sampling rate.
    """
    high_freq = sampling_rate / 2 if high_freq is None else high_freq
    return torch.from_numpy(_slaney_filters(num_mel_bins, fft_length, sampling_rate, low_freq, high_freq))


def num_mel_frames(num_samples: Tensor, hop_length: int) -> Tensor:
    """Frames of so many samples: as many hops as fit."""
    return num_samples // hop_length


def log_mel_spectrogram(
    waveforms: Tensor,
    num_samples: Tensor | None = None,
    *,
    sampling_rate: int = 24000,
    fft_length: int = 1920,
    hop_length: int = 480,
    num_mel_bins: int = 80,
    low_freq: float = 0.0,
    high_freq: float | None = 8000.0,
) -> Tensor:
    """Log-mel spectrograms of a batch of waveforms; an item of a batch equals the item alone.

    A frame `i` is about samples `i * hop_length` to `(i + 1) * hop_length`: both ends are mirrored by (fft_length -
    hop_length) / 2 samples. Has a gradient.

    Args:
        waveforms (`Tensor` of shape `(b, n)`): float samples in [-1, 1] at `sampling_rate`.
        num_samples (`Tensor` of shape `(b,)`, int64, *optional*): samples of each item; default all `n`.
        fft_length: samples of a window (periodic Hann) and of its transform. hop_length: samples between two.
        high_freq: upper edge of the highest filter in Hz; `None` is half of the sampling rate.

    Returns:
        `Tensor` of shape `(b, n // hop_length, num_mel_bins)`, float32. Frames after an item's own
        ([`num_mel_frames`]) are to be masked.

    Raises:
        ValueError: `fft_length - hop_length` is odd or negative.
    """
    if fft_length < hop_length or (fft_length - hop_length) % 2:
        raise ValueError(
            f"fft_length: expected hop_length {hop_length} and an even number more, got {fft_length} samples"
        )
    waveforms = waveforms.float()
    frames = waveforms.shape[1] // hop_length
    if frames == 0:
        return waveforms.new_zeros(len(waveforms), 0, num_mel_bins)
    padded = reflect_edges(waveforms, num_samples, (fft_length - hop_length) // 2)
    window = torch.hann_window(fft_length, device=waveforms.device)
    spectrum = torch.stft(padded, fft_length, hop_length, window=window, center=False, return_complex=True)
    magnitudes = (torch.view_as_real(spectrum).square().sum(-1) + _POWER_FLOOR).sqrt()
    filters = slaney_mel_filters(num_mel_bins, fft_length, sampling_rate, low_freq, high_freq)
    return (magnitudes.transpose(1, 2) @ filters.to(waveforms.device)).clamp_min(_MEL_FLOOR).log()
