"""Fading from the end of one piece into the beginning of the next, as CosyVoice joins overlapping pieces."""

import torch
from torch import Tensor


def hamming_window(length: int, device: torch.device | None = None) -> Tensor:
    """The symmetric Hamming window of numpy, `(length,)` float32. Its rising and falling half do not add up to 1."""
    return torch.hamming_window(length, periodic=False, dtype=torch.float64, device="cpu").float().to(device)


def cross_fade(piece: Tensor, before: Tensor, window: Tensor) -> Tensor:
    """`piece` with its beginning faded in and the end of `before` faded out over it.

    Args:
        piece (`(..., n)`), before (`(..., m)`): at least half a window long. window (`(2 k,)`): its rising half is for
            `piece`, its falling half for `before`.

    Raises:
        ValueError: one of them is too short.
    """
    overlap = len(window) // 2
    if piece.shape[-1] < overlap or before.shape[-1] < overlap:
        raise ValueError(
            f"cross_fade: expected at least {overlap} on both sides, got {piece.shape[-1]} and {before.shape[-1]}"
        )
    window = window.to(piece)
    faded = piece[..., :overlap] * window[:overlap] + before[..., before.shape[-1] - overlap :] * window[overlap:]
    return torch.cat((faded, piece[..., overlap:]), dim=-1)
