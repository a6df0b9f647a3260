"""Rows of different lengths in one batch: real entries first, padding behind.

Shape legend: `b` batch, `n` and `t` positions. In every mask 1 = real.
"""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def row_lengths(name: str, mask: Tensor | None, values: Tensor) -> Tensor:
    """Real positions of each row, `(b,)` int64; all of them without a mask.

    Raises:
        ValueError: the mask has another shape than `(b, n)`, or padding in front of a real entry.
    """
    if mask is None:
        return torch.full(values.shape[:1], values.shape[1], device=values.device)
    if mask.shape != values.shape[:2]:
        raise ValueError(f"{name}_mask: expected shape {tuple(values.shape[:2])}, got {tuple(mask.shape)}")
    lengths = mask.bool().sum(dim=1)
    if not torch.equal(length_mask(lengths, mask.shape[1]), mask.bool()):
        raise ValueError(f"{name}_mask: expected real entries first and padding behind")
    return lengths


def length_mask(lengths: Tensor, size: int) -> Tensor:
    """`(b, size)` bool, True = real."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def padding_mask(lengths: Tensor, size: int) -> Tensor | None:
    """As [`length_mask`], `None` where nothing is padding."""
    mask = length_mask(lengths, size)
    return None if bool(mask.all()) else mask


def with_mask(name: str, values: Tensor, lengths: Tensor, mask_name: str | None = None) -> dict[str, Tensor]:
    """`values (b, n, …)` and their mask `(b, n)`, int64, under names of inputs; the padding becomes 0.

    Args:
        mask_name: by default `name` and `_mask`.
    """
    mask = length_mask(lengths, values.shape[1])
    padding = ~mask.reshape(*mask.shape, *[1] * (values.dim() - 2))
    return {name: values.masked_fill(padding, 0), mask_name or f"{name}_mask": mask.long()}


def padded_with_mask(name: str, rows: list[Tensor], mask_name: str | None = None) -> dict[str, Tensor]:
    """Rows `(n, …)` of different lengths as one tensor, and its mask, see [`with_mask`]."""
    lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
    return with_mask(name, pad_sequence(rows, batch_first=True), lengths, mask_name)


def join_rows(first: Tensor, first_lengths: Tensor, second: Tensor, second_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of `first (b, n, …)` followed by the same row of `second (b, n', …)`, and the lengths; padding is 0."""
    lengths = first_lengths + second_lengths
    size = int(lengths.max()) if len(lengths) else 0
    joined = first.new_zeros(first.shape[0], size, *first.shape[2:])
    rows = zip(first_lengths.tolist(), second_lengths.tolist(), strict=True)
    for row, (before, after) in enumerate(rows):
        joined[row, :before] = first[row, :before]
        joined[row, before : before + after] = second[row, :after]
    return joined, lengths


def drop_beginnings(values: Tensor, lengths: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `(b, t, c)` without their first `dropped[b]` positions, `(b, t', c)` and the lengths; padding is 0."""
    kept = (lengths - dropped).clamp_min(0)
    size = int(kept.max()) if len(kept) else 0
    index = (torch.arange(size, device=values.device) + dropped[:, None]).clamp(max=max(values.shape[1] - 1, 0))
    moved = values.gather(1, index[..., None].expand(-1, -1, values.shape[2]))
    return moved * length_mask(kept, size)[..., None].to(values.dtype), kept
