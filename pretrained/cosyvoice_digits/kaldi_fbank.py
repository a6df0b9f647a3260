"""Kaldi log-mel filter banks as batched torch functions, and low-frame-rate stacking.

Reproduces Kaldi's `compute-fbank-feats` as WeNet and FunASR call it (through torchaudio's or kaldi-native-fbank's
port): framing with `snip_edges`, removal of the DC offset, pre-emphasis 0.97, povey or hamming window, power spectrum,
HTK mel scale, natural logarithm floored at the float32 epsilon. Input waveforms carry int16 scale (a float wave in
[-1, 1] times 32768). Everything runs on the device of its input, for a whole padded batch at once.

Shape legend: `b` batch, `n` samples, `t` frames, `w` samples of one window, `m` mel bins.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor


# Frames transformed per step: keeps the (b, t, n_fft) working set inside the cache and bounds memory on hour-long
# audio.
_FRAMES_PER_BLOCK = 512


def mel_scale(frequency: Tensor) -> Tensor:
    """HTK mel scale of a frequency in Hz: 1127 ln(1 + f / 700)."""
    return 1127.0 * torch.log1p(frequency / 700.0)


@lru_cache(maxsize=16)
def mel_filter_bank(
    num_mel_bins: int, fft_length: int, sampling_rate: int, low_freq: float, high_freq: float
) -> Tensor:
    """Triangular filters on the mel axis, `(fft_length // 2 + 1, num_mel_bins)` float32.

    `high_freq <= 0` counts from the Nyquist frequency. Kaldi gives the Nyquist bin itself no weight.
    """
    nyquist = sampling_rate / 2
    high = high_freq if high_freq > 0 else nyquist + high_freq
    if not 0 <= low_freq < high <= nyquist:
        raise ValueError(
            f"mel filter bank: expected 0 <= low_freq < high_freq <= {nyquist}, got {low_freq} and {high}"
        )
    edges = torch.tensor([low_freq, high], dtype=torch.float64)
    low_mel, high_mel = mel_scale(edges).tolist()
    step = (high_mel - low_mel) / (num_mel_bins + 1)
    left = low_mel + step * torch.arange(num_mel_bins, dtype=torch.float64)[None, :]
    bins = mel_scale(torch.arange(fft_length // 2, dtype=torch.float64) * sampling_rate / fft_length)[:, None]
    rising, falling = (bins - left) / step, (left + 2 * step - bins) / step
    weights = torch.minimum(rising, falling).clamp_min(0.0)
    return torch.cat([weights, weights.new_zeros(1, num_mel_bins)]).float()


@lru_cache(maxsize=16)
def analysis_window(window_type: str, length: int) -> Tensor:
    """Kaldi's `povey` (a Hann window to the power 0.85) or `hamming` window, `(length,)` float32."""
    phase = 2 * math.pi * torch.arange(length, dtype=torch.float64) / (length - 1)
    if window_type == "povey":
        return (0.5 - 0.5 * torch.cos(phase)).pow(0.85).float()
    if window_type == "hamming":
        return (0.54 - 0.46 * torch.cos(phase)).float()
    raise ValueError(f"window_type: expected 'povey' or 'hamming', got {window_type!r}")


def num_fbank_frames(num_samples: Tensor, window_length: int, window_shift: int) -> Tensor:
    """Whole windows that fit (`snip_edges`): `1 + (n - window) // shift`, and 0 for less than one window."""
    return torch.where(num_samples < window_length, 0, 1 + (num_samples - window_length) // window_shift)


def kaldi_fbank(
    waveforms: Tensor,
    *,
    sampling_rate: int = 16000,
    num_mel_bins: int = 80,
    frame_length_ms: float = 25.0,
    frame_shift_ms: float = 10.0,
    window_type: str = "povey",
    preemphasis: float = 0.97,
    low_freq: float = 20.0,
    high_freq: float = 0.0,
    dither: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Log-mel filter banks of a batch of waveforms.

    Args:
        waveforms (`Tensor` of shape `(b, n)`): float32 samples at int16 scale; right padding only adds frames.
        dither: standard deviation of the Gaussian noise that Kaldi adds to every sample of every window.
        generator: source of that noise; required when `dither > 0`, so that no draw is ever unaccounted for.

    Returns:
        `Tensor` of shape `(b, t, num_mel_bins)`, float32, `t = 1 + (n - window) // shift` (0 if `n` is shorter).
    """
    window_length = int(sampling_rate * frame_length_ms * 0.001)
    window_shift = int(sampling_rate * frame_shift_ms * 0.001)
    fft_length = 1 << (window_length - 1).bit_length()
    if waveforms.shape[-1] < window_length:
        return waveforms.new_zeros(waveforms.shape[0], 0, num_mel_bins)
    if dither > 0 and generator is None:
        raise ValueError("kaldi_fbank: dither > 0 needs an explicit generator")

    device = waveforms.device
    window = analysis_window(window_type, window_length).to(device)
    mel = mel_filter_bank(num_mel_bins, fft_length, sampling_rate, low_freq, high_freq).to(device)
    floor = torch.finfo(torch.float32).eps
    frames = waveforms.unfold(-1, window_length, window_shift)  # (b, t, w), a view
    blocks = []
    for block in frames.split(_FRAMES_PER_BLOCK, dim=1):
        if dither > 0:
            noise = torch.randn(block.shape, generator=generator, device=generator.device)
            block = block + dither * noise.to(device)
        block = block - block.mean(dim=-1, keepdim=True)
        # y[i] = x[i] - a x[i-1]; Kaldi lets the first sample be its own predecessor. Written into rows that are
        # already as long as the transform: torch pads several times slower than this.
        padded = block.new_zeros(*block.shape[:-1], fft_length)
        emphasised = padded[..., :window_length]
        torch.sub(block[..., 1:], block[..., :-1], alpha=preemphasis, out=emphasised[..., 1:])
        torch.mul(block[..., :1], 1.0 - preemphasis, out=emphasised[..., :1])
        emphasised.mul_(window)
        spectrum = torch.fft.rfft(padded)
        power = spectrum.real.square().add_(spectrum.imag.square())
        blocks.append((power @ mel).clamp_min_(floor).log_())
    return torch.cat(blocks, dim=1)


def num_lfr_frames(num_frames: Tensor, lfr_n: int) -> Tensor:
    """Frames after low-frame-rate stacking: `ceil(t / lfr_n)`."""
    return (num_frames + lfr_n - 1) // lfr_n


def low_frame_rate(features: Tensor, num_frames: Tensor, lfr_m: int, lfr_n: int) -> Tensor:
    """Stack `lfr_m` neighbouring frames every `lfr_n` frames (FunASR's `apply_lfr`; 7 and 6 for Paraformer).

    The first frame is repeated `(lfr_m - 1) // 2` times on the left and each item's own last frame on the right, so an
    item of a batch equals the item alone.

    Args:
        features (`Tensor` of shape `(b, t, d)`): padded features.
        num_frames (`Tensor` of shape `(b,)`): real frames per item.

    Returns:
        `Tensor` of shape `(b, ceil(t / lfr_n), lfr_m * d)`; rows past an item's own length are to be masked.
    """
    batch, time, dim = features.shape
    stacked = (time + lfr_n - 1) // lfr_n
    first = torch.arange(stacked, device=features.device)[:, None] * lfr_n - (lfr_m - 1) // 2
    index = first + torch.arange(lfr_m, device=features.device)  # (stacked, lfr_m)
    last = (num_frames.to(features.device) - 1).clamp_min(0)
    index = torch.minimum(index.clamp_min(0)[None], last[:, None, None]).reshape(batch, -1)
    return features.gather(1, index[..., None].expand(-1, -1, dim)).reshape(batch, stacked, lfr_m * dim)
