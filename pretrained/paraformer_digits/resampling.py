"""Sampling rate conversion: soxr where it is installed, otherwise a windowed sinc in torch.

The torch version evaluates band-limited interpolation (J. O. Smith, "Digital Audio Resampling", 2002,
https://ccrma.stanford.edu/~jos/resample/) exactly at the output times. With the rates reduced to `up / down` by their
greatest common divisor there are only `up` different fractional delays; each one is a short FIR filter applied with
stride `down`, and the outputs of the filters interleave.
"""

import math

import torch


# Kaiser window, 64 zero crossings on each side: about 85 dB of stop band, pass band up to 0.91 of the lower Nyquist
# rate.
_ZERO_CROSSINGS = 64
_KAISER_BETA = 8.6
_ROLLOFF = 0.95


def resample(waveform: torch.Tensor, sampling_rate: int, target_sampling_rate: int) -> torch.Tensor:
    """`waveform` at another rate, by soxr if it is installed and the samples are on the CPU, else by
    [`resample_sinc`].

    Args:
        waveform: `(samples,)`, floating point.
        sampling_rate: rate of `waveform` in Hz.
        target_sampling_rate: rate wanted in Hz.

    Returns:
        `(new_samples,)`, float32; `waveform` itself where both rates are equal.
    """
    if sampling_rate == target_sampling_rate:
        return waveform
    try:
        import soxr
    except ImportError:
        return resample_sinc(waveform, sampling_rate, target_sampling_rate)
    if waveform.device.type != "cpu" or waveform.shape[-1] == 0:
        return resample_sinc(waveform, sampling_rate, target_sampling_rate)
    return torch.from_numpy(soxr.resample(waveform.float().numpy(), sampling_rate, target_sampling_rate))


def resample_sinc(waveform: torch.Tensor, sampling_rate: int, target_sampling_rate: int) -> torch.Tensor:
    """Windowed-sinc interpolation of `waveform` `(samples,)` to `ceil(samples * target / rate)` samples, float32.

    Raises:
        ValueError: a rate that is not a positive integer.
    """
    for rate in (sampling_rate, target_sampling_rate):
        if rate != int(rate) or rate <= 0:
            raise ValueError(f"sampling_rate: expected a positive integer in Hz, got {rate}")
    divisor = math.gcd(int(sampling_rate), int(target_sampling_rate))
    down, up = int(sampling_rate) // divisor, int(target_sampling_rate) // divisor
    num_samples = waveform.shape[-1]
    num_outputs = -(-num_samples * up // down)
    waveform = waveform.float()
    if num_outputs == 0 or up == down:
        return waveform[:num_outputs].clone()

    # Cut-off in units of the input's Nyquist rate, and the reach of the filter in input samples.
    cutoff = _ROLLOFF * min(1.0, up / down)
    half_width = math.ceil(_ZERO_CROSSINGS / cutoff)
    taps = torch.arange(-half_width, half_width + 2, dtype=torch.float64, device=waveform.device)
    output = waveform.new_zeros(-(-num_outputs // up), up)
    # Output period q, phase p lies at input time q * down + p * down / up.
    reach = output.shape[0] * down + 2 * half_width + 2
    padded = torch.nn.functional.pad(waveform, (half_width, max(0, reach - num_samples - half_width)))
    for phase in range(min(up, num_outputs)):
        start, remainder = divmod(phase * down, up)
        kernel = _windowed_sinc(taps - remainder / up, cutoff, half_width)
        segment = padded[start : start + (output.shape[0] - 1) * down + len(taps)]
        periods = torch.nn.functional.conv1d(segment[None, None], kernel.to(waveform.dtype)[None, None], stride=down)
        output[: periods.shape[-1], phase] = periods[0, 0]
    return output.reshape(-1)[:num_outputs]


def _windowed_sinc(times: torch.Tensor, cutoff: float, half_width: int) -> torch.Tensor:
    """Low-pass filter at `times` (in input samples), scaled to unit gain at 0 Hz."""
    window = torch.i0(_KAISER_BETA * (1 - (times / half_width).square()).clamp(min=0).sqrt())
    kernel = torch.where(times.abs() <= half_width, torch.sinc(cutoff * times) * window, 0.0)
    return kernel / kernel.sum()
