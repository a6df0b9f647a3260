"""Sampling rate conversion by a short Hann-windowed sinc: the one that torchaudio has by default.

`torchaudio.transforms.Resample` with `sinc_interp_hann`, six zero crossings and a roll-off of 0.99, which is what
prompts go through in CosyVoice. It lets more of what lies above the lower Nyquist rate through than `resampling.py`
does, and a tokenizer or speaker encoder has been trained with it.

Shape legend: `...` any leading dimensions, `n` samples.
"""

import math

import torch
from torch import Tensor


_ZERO_CROSSINGS = 6
_ROLLOFF = 0.99


def resample_hann_sinc(waveforms: Tensor, sampling_rate: int, target_sampling_rate: int) -> Tensor:
    """Waveforms at another rate.

    What lies before and after a waveform counts as zero, so that an item of a zero-padded batch equals the item alone
    on its own [`num_resampled`] samples.

    Args:
        waveforms (`Tensor` of shape `(..., n)`): float samples.
        sampling_rate, target_sampling_rate: in Hz.

    Returns:
        `Tensor` of shape `(..., ceil(n * target / rate))`, float32; `waveforms` itself where both rates are equal.

    Raises:
        ValueError: a rate that is not a positive integer.
    """
    for rate in (sampling_rate, target_sampling_rate):
        if rate != int(rate) or rate <= 0:
            raise ValueError(f"sampling_rate: expected a positive integer in Hz, got {rate}")
    if sampling_rate == target_sampling_rate:
        return waveforms
    divisor = math.gcd(int(sampling_rate), int(target_sampling_rate))
    down, up = int(sampling_rate) // divisor, int(target_sampling_rate) // divisor
    kernels, reach = _kernels(down, up, waveforms.device)
    length = waveforms.shape[-1]
    if waveforms.numel() == 0:
        return waveforms.float().new_zeros(*waveforms.shape[:-1], -(-length * up // down))
    target_length = -(-length * up // down)
    flat = torch.nn.functional.pad(waveforms.float().reshape(-1, 1, length), (reach, reach + down))
    phases = torch.nn.functional.conv1d(flat, kernels, stride=down)  # (b, up, periods)
    resampled = phases.transpose(1, 2).reshape(len(flat), -1)[:, :target_length]
    return resampled.reshape(*waveforms.shape[:-1], target_length)


def num_resampled(num_samples: int, sampling_rate: int, target_sampling_rate: int) -> int:
    """Samples that `num_samples` become."""
    return -(-num_samples * target_sampling_rate // sampling_rate)


def _kernels(down: int, up: int, device: torch.device) -> tuple[Tensor, int]:
    """One filter per fractional delay, `(up, 1, 2 reach + down)`, and its reach in input samples.

    Computed in float64 and rounded at the end, but for the delays, which torchaudio has in float32.
    """
    cutoff = min(down, up) * _ROLLOFF
    reach = math.ceil(_ZERO_CROSSINGS * down / cutoff)
    taps = torch.arange(-reach, reach + down, dtype=torch.float64)[None, None] / down
    delays = torch.arange(0, -up, -1, dtype=torch.float32)[:, None, None] / up
    times = ((delays + taps) * cutoff).clamp(-_ZERO_CROSSINGS, _ZERO_CROSSINGS)
    window = torch.cos(times * math.pi / _ZERO_CROSSINGS / 2).square()
    return (torch.sinc(times) * window * (cutoff / down)).float().to(device), reach
