"""Reflection of a waveform at both of its ends, each item of a padded batch at its own end.

Shape legend: `b` batch, `n` samples.
"""

import torch
from torch import Tensor


def reflect_edges(waveforms: Tensor, num_samples: Tensor | None, edge: int, after: int = 0) -> Tensor:
    """Continue every item by its mirror image, the sample at the end not repeated.

    An item that is shorter than `edge` is mirrored again and again, where `torch.nn.functional.pad` refuses; one
    sample is repeated.

    Args:
        waveforms (`Tensor` of shape `(b, n)`): samples, an item's own first.
        num_samples (`Tensor` of shape `(b,)`, int64, *optional*): samples of each item; default all `n`.
        edge: samples in front and behind. after: more samples behind, also mirrored.

    Returns:
        `Tensor` of shape `(b, edge + n + edge + after)`: sample `i` of an item is at `edge + i`. What follows the
        mirror image at an item's end is more of the same, and means nothing.
    """
    length = waveforms.shape[1]
    if num_samples is None and length > edge + after:
        return torch.nn.functional.pad(waveforms[:, None], (edge, edge + after), mode="reflect")[:, 0]
    if length == 0:
        return waveforms.new_zeros(len(waveforms), 2 * edge + after)
    positions = torch.arange(-edge, length + edge + after, device=waveforms.device)
    if num_samples is None:
        num_samples = torch.full((len(waveforms),), length, device=waveforms.device)
    last = (num_samples.to(waveforms.device) - 1).clamp_min(0)[:, None]
    # Mirrored at 0 and at `last`, a position has the period 2 last.
    period = (2 * last).clamp_min(1)
    folded = positions[None] % period
    return waveforms.gather(1, torch.minimum(torch.where(folded > last, period - folded, folded), last))
