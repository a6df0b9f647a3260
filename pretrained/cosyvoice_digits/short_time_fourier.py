"""Short-time Fourier transform and its inverse over centred frames, whole and streamed.

As `torch.stft(center=True)` and `torch.istft` with a periodic Hann window compute them, but every item of a padded
batch has its own end, and both can go on from piece to piece.

Shape legend: `b` batch, `n` samples, `t` frames, `f` frequencies (`fft_length // 2 + 1`).
"""

import torch
from torch import Tensor
from torch.nn import functional

from .edge_convolution import Pass, StreamPass
from .reflected_edges import reflect_edges


# As torch, which refuses windows whose overlap comes closer to zero.
_LEAST_OVERLAP = 1e-11


def real_and_imaginary(
    waveform: Tensor, fft_length: int, hop_length: int, run: Pass, num_samples: Tensor | None = None
) -> Tensor:
    """Real parts over imaginary parts, `(b, 2 f, t)`, of `waveform` `(b, n)`.

    Both ends are mirrored by half a window; `n` samples give `n // hop_length + 1` frames.

    Args:
        num_samples (`(b,)`, int64, *optional*): samples of each item of a whole pass; default all `n`.
    """
    edge = fft_length // 2
    if isinstance(run, StreamPass):
        padded = _next_samples(waveform, edge, fft_length, hop_length, run)
    else:
        padded = reflect_edges(waveform, num_samples, edge)
    if padded.shape[-1] < fft_length:
        return waveform.new_zeros(len(waveform), 2 * (edge + 1), 0)
    window = torch.hann_window(fft_length, device=waveform.device, dtype=waveform.dtype)
    spectrum = torch.fft.rfft(padded.unfold(-1, fft_length, hop_length) * window)
    return torch.cat((spectrum.real, spectrum.imag), dim=-1).transpose(1, 2)


def _next_samples(waveform: Tensor, edge: int, fft_length: int, hop_length: int, run: StreamPass) -> Tensor:
    """The samples of the next frames, mirrored where the beginning or the end is among them."""
    past = run.take()
    begun = past is not None and past.begun
    inputs = waveform if past is None else torch.cat((past.tensors[0], waveform), dim=-1)
    if not begun and run.is_last:
        inputs = reflect_edges(inputs, None, edge)
    elif run.is_last:
        inputs = reflect_edges(inputs, None, edge)[:, edge:]
    elif not begun and inputs.shape[-1] > edge:
        inputs, begun = functional.pad(inputs[:, None], (edge, 0), mode="reflect")[:, 0], True
    if not (begun or run.is_last):
        run.keep(inputs, begun=False)
        return inputs[:, :0]
    frames = max(0, (inputs.shape[-1] - fft_length) // hop_length + 1)
    run.keep(inputs[:, frames * hop_length :])
    return inputs[:, : (frames - 1) * hop_length + fft_length] if frames else inputs[:, :0]


def overlap_add(spectrum: Tensor, hop_length: int, run: Pass, num_frames: Tensor | None = None) -> Tensor:
    """Waveform `(b, n)` of complex spectra `(b, t, f)`.

    Frames are windowed, added, and divided by the sum of the squared windows; half a window goes at both ends, so
    that `t` frames give `(t - 1) * hop_length` samples.

    Args:
        num_frames (`(b,)`, int64, *optional*): frames of each item of a whole pass; default all `t`. What comes after
            an item's own samples is to be masked.
    """
    length = 2 * (spectrum.shape[-1] - 1)
    window = torch.hann_window(length, device=spectrum.device, dtype=spectrum.real.dtype)
    # A transform of no frames is an error.
    frames = (
        torch.fft.irfft(spectrum, n=length) if spectrum.shape[1] else spectrum.real.new_zeros(len(spectrum), 0, length)
    )
    frames = frames * window
    weights = window.square().expand(len(frames), frames.shape[1], -1)
    if num_frames is not None:
        real = (torch.arange(frames.shape[1], device=frames.device) < num_frames[:, None])[..., None]
        frames, weights = frames * real, weights * real
    if not isinstance(run, StreamPass):
        waveform = _divide(_fold(frames, hop_length), _fold(weights, hop_length))
        return waveform[:, length // 2 : waveform.shape[1] - length // 2]
    past = run.take()
    overlap = length - hop_length
    sums = totals = frames.new_zeros(len(frames), overlap)
    if past is not None:
        sums, totals = past.tensors
    begun = past is not None and past.begun
    if added := frames.shape[1] * hop_length:
        # The next frame begins where the last `overlap` sums begin.
        place = sums.shape[1] - overlap
        sums = functional.pad(sums, (0, added)) + functional.pad(_fold(frames, hop_length), (place, 0))
        totals = functional.pad(totals, (0, added)) + functional.pad(_fold(weights, hop_length), (place, 0))
    settled = sums.shape[1] - (length // 2 if run.is_last else overlap)
    first = 0
    if not begun:
        # Half a window comes before the first sample.
        begun = settled >= length // 2
        first, settled = (length // 2, settled) if begun else (0, 0)
    run.keep(sums[:, settled:], totals[:, settled:], begun=begun)
    return _divide(sums[:, first:settled], totals[:, first:settled])


def _fold(frames: Tensor, hop_length: int) -> Tensor:
    """Sum of frames `(b, t, length)` at their places, `(b, (t - 1) * hop_length + length)`."""
    _, count, length = frames.shape
    total = (count - 1) * hop_length + length
    return functional.fold(frames.transpose(1, 2), (1, total), (1, length), stride=(1, hop_length))[:, 0, 0]


def _divide(sums: Tensor, totals: Tensor) -> Tensor:
    return sums / torch.where(totals > _LEAST_OVERLAP, totals, 1.0)
