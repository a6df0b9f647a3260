"""Times of tokens from the firing track of a timestamp predictor (https://arxiv.org/abs/2301.12343).

The second CIF head of a Paraformer runs at a multiple of the frame rate and fires where a token *starts*; the stretch
between two peaks is the token before the second. Rules and numbers: upstream `ts_prediction_lfr6_standard`.
"""

import torch
from torch import Tensor

from .cif import fire_rounded


# A peak: the accumulated weight reaches the threshold up to rounding.
_FIRE_THRESHOLD = 1.0 - 1e-4
# Peaks come this many frames late.
_PEAK_DELAY = 1.5
# Frames: a longer stretch before the first peak or after the last one is silence …
_EDGE_SILENCE = 5
# … and whatever of a token exceeds this is silence after it.
_LONGEST_TOKEN = 12


def integrate_and_fire(alphas: Tensor, threshold: float = _FIRE_THRESHOLD) -> Tensor:
    """Accumulated weight `(t,)` before each subtraction, for weights `(t,)` float32; a peak is a value ≥ `threshold`.

    With upstream's rounding, because a peak decides over a token's time.
    """
    return fire_rounded(alphas[None], threshold, threshold).peaks[0]


def firing_segments(
    alphas: Tensor, peaks: Tensor, num_tokens: int, upsample_rate: int = 3, offset_ms: float = 0.0
) -> list[tuple[int | None, float, float]]:
    """The time line of an utterance: `(index of the token, start, end)` in seconds, `None` for silence.

    Args:
        alphas (`(t,)`, float32): weights of the second head, scaled to sum to one more than the emitted tokens.
        peaks (`(t,)`): accumulated weights.
        num_tokens: tokens to place. Where the peaks do not number one more (the decoder gave a token without text),
            the weights are scaled to that number and integrated again.
        upsample_rate: positions per frame of 60 ms.
        offset_ms: added to every time.

    Returns:
        segments in order. A start may be negative, because peaks are taken early; fewer than `num_tokens` tokens occur
        where the weights do not fire often enough.
    """
    if num_tokens == 0 or not len(alphas):
        return []
    seconds = 10.0 * 6 / 1000 / upsample_rate
    alphas, peaks = alphas.detach().cpu(), peaks.detach().cpu()
    fires = _fires(peaks)
    if len(fires) != num_tokens + 1:
        peaks = integrate_and_fire(alphas / (alphas.sum() / (num_tokens + 1)))
        fires = _fires(peaks)
    if not fires:
        return []
    num_frames = len(peaks)
    segments: list[tuple[int | None, float, float]] = []
    if fires[0] > _EDGE_SILENCE:
        segments.append((None, 0.0, fires[0] * seconds))
    for index, (start, end) in enumerate(zip(fires[: num_tokens + 1], fires[1 : num_tokens + 1], strict=False)):
        if end - start <= _LONGEST_TOKEN:
            segments.append((index, start * seconds, end * seconds))
        else:
            segments.append((index, start * seconds, (start + _LONGEST_TOKEN) * seconds))
            segments.append((None, (start + _LONGEST_TOKEN) * seconds, end * seconds))
    # The last segment, which may be the silence after the last token, takes half of a long rest or all of a short one.
    if segments:
        last = fires[min(len(fires), num_tokens + 1) - 1]
        index, start, _ = segments[-1]
        if num_frames - last > _EDGE_SILENCE:
            middle = (num_frames + last) * 0.5
            segments[-1] = (index, start, middle * seconds)
            segments.append((None, middle * seconds, num_frames * seconds))
        else:
            segments[-1] = (index, start, num_frames * seconds)
    if offset_ms:
        segments = [(index, start + offset_ms / 1000.0, end + offset_ms / 1000.0) for index, start, end in segments]
    return segments


def token_times(segments: list[tuple[int | None, float, float]], num_tokens: int) -> list[tuple[float, float]]:
    """`(start, end)` in seconds of every token, never negative; tokens that did not fire end where the line ends."""
    times = [(max(start, 0.0), max(end, 0.0)) for index, start, end in segments if index is not None]
    end = max(segments[-1][2], 0.0) if segments else 0.0
    return times[:num_tokens] + [(end, end)] * (num_tokens - len(times))


def milliseconds(segments: list[tuple[int | None, float, float]]) -> list[list[int]]:
    """`[start, end]` of each token, truncated to whole milliseconds as upstream prints them."""
    return [[int(start * 1000), int(end * 1000)] for index, start, end in segments if index is not None]


def segments_text(
    segments: list[tuple[int | None, float, float]], tokens: list[str], with_silence: bool = True
) -> str:
    """Upstream's line `token start end;…` in seconds, silence as `<sil>`, numbers cut to five characters."""
    line = ""
    for index, start, end in segments:
        if index is not None or with_silence:
            name = "<sil>" if index is None else tokens[index]
            line += f"{name} {str(start + 0.0005)[:5]} {str(end + 0.0005)[:5]};"
    return line


def _fires(peaks: Tensor) -> list[float]:
    return [index - _PEAK_DELAY for index in torch.where(peaks >= _FIRE_THRESHOLD)[0].tolist()]
