"""Fundamental frequency of recordings by YIN (https://www.ee.columbia.edu/~dpwe/papers/deChevK02-yin.pdf), in torch.

What a vocoder's own network for the fundamental frequency is trained on. Upstream's trainer of CosyVoice takes
pyworld's Harvest, which finds a voice in nearly every frame; this needs no other package, runs where the waveforms
are, and says 0 where a waveform does not repeat itself.

Shape legend: `b` batch, `n` samples, `t` frames, `w` samples of a window, `l` lags.
"""

import torch
from torch import Tensor
from torch.nn import functional


# Integration over one and a half periods of the lowest voice.
_PERIODS = 1.5
# Frames transformed at a time.
_FRAMES_PER_BLOCK = 1024


def track_pitch(
    waveforms: Tensor,
    sampling_rate: int,
    hop_length: int,
    lowest: float = 65.0,
    highest: float = 800.0,
    threshold: float = 0.2,
    silence_db: float = -50.0,
) -> Tensor:
    """Fundamental frequency in Hz of every frame, 0 where there is no voice.

    Frame `i` is about samples `i * hop_length` to `(i + 1) * hop_length`.

    Args:
        waveforms (`(b, n)`): float samples in [-1, 1]. sampling_rate: Hz. hop_length: samples per frame.
        lowest, highest: Hz, the range that is searched.
        threshold: of the normalised difference, under which a period counts as found (step 4 of the paper); a lower
            one finds voice in fewer frames.
        silence_db: frames whose power is less, in dB of full scale, have no voice.

    Returns:
        `(b, n // hop_length)` float32.

    Raises:
        ValueError: a range without lags.
    """
    shortest, longest = int(sampling_rate / highest), int(sampling_rate / lowest) + 1
    if not 2 <= shortest < longest:
        raise ValueError(f"lowest, highest: expected a range below {sampling_rate / 2} Hz, got {lowest}..{highest}")
    frames = waveforms.shape[1] // hop_length
    if frames == 0:
        return waveforms.new_zeros(len(waveforms), 0, dtype=torch.float32)
    window = int(_PERIODS * longest)
    length = window + longest
    # A window and its latest lag lie about the middle of the frame.
    left = (length - hop_length) // 2
    padded = functional.pad(waveforms.float(), (max(left, 0), length))[:, max(-left, 0) :]
    pieces = padded.unfold(1, length, hop_length)[:, :frames].reshape(-1, length)
    pitch = [_pitch_of(block, window, shortest, longest, threshold) for block in pieces.split(_FRAMES_PER_BLOCK)]
    power = pieces.square().mean(dim=1)
    voiced = power > 10 ** (silence_db / 10)
    lags = torch.cat(pitch)
    f0 = torch.where(voiced & (lags > 0), sampling_rate / lags.clamp_min(1.0), 0.0).reshape(len(waveforms), frames)
    return _without_strays(f0)


def _pitch_of(pieces: Tensor, window: int, shortest: int, longest: int, threshold: float) -> Tensor:
    """Period in samples of each of `pieces` `(b, w + l)`, 0 where none was found."""
    difference = squared_difference(pieces, window, longest)
    # Equation 8: the difference over its mean at all smaller lags, 1 at lag 0.
    lags = torch.arange(longest + 1, device=pieces.device, dtype=torch.float32)
    mean = difference.cumsum(dim=1) / lags.clamp_min(1.0)
    normalized = torch.where(mean > 0, difference / mean.clamp_min(1e-12), 1.0)
    normalized[:, 0] = 1.0
    inner = normalized[:, 1:-1]
    valley = (inner <= normalized[:, :-2]) & (inner < normalized[:, 2:]) & (inner < threshold)
    valley[:, : shortest - 1] = False
    found = valley.any(dim=1)
    # Step 4: the first valley under the threshold, not the deepest, which may be that of two periods.
    best = torch.where(found, valley.int().argmax(dim=1) + 1, 1)
    # Step 5: a parabola through the valley and its neighbours, on the difference itself.
    before, here, after = (difference.gather(1, (best + step)[:, None])[:, 0] for step in (-1, 0, 1))
    curvature = before - 2 * here + after
    shift = torch.where(curvature > 0, (before - after) / (2 * curvature.clamp_min(1e-12)), 0.0)
    return torch.where(found, best + shift.clamp(-1.0, 1.0), 0.0)


def squared_difference(pieces: Tensor, window: int, longest: int) -> Tensor:
    """Sum over a window of the squared difference to the same samples later (equation 6), `(b, longest + 1)`.

    Args:
        pieces (`(b, window + longest)`): float32.
    """
    size = 1 << (pieces.shape[1] + window - 1).bit_length()
    correlation = torch.fft.irfft(
        torch.fft.rfft(pieces, size) * torch.fft.rfft(pieces[:, :window], size).conj(), size
    )[:, : longest + 1]
    energy = functional.pad(pieces.double().square().cumsum(dim=1), (1, 0))
    energy = (energy[:, window : window + longest + 1] - energy[:, : longest + 1]).float()
    return (energy[:, :1] + energy - 2 * correlation).clamp_min(0.0)


def _without_strays(f0: Tensor) -> Tensor:
    """Median of three neighbours where all three have a voice; a single voiced frame between two others has none."""
    if f0.shape[1] < 3:
        return f0
    trio = functional.pad(f0, (1, 1)).unfold(1, 3, 1)
    voices = (trio > 0).sum(dim=2)
    alone = (f0 > 0) & (voices == 1)
    return torch.where(alone, 0.0, torch.where(voices == 3, trio.median(dim=2).values, f0))
