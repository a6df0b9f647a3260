"""Distance of two spectrograms whose timing may differ: L1 after dynamic time warping."""

import numpy as np
import torch
from torch import Tensor


def warping_path(costs: np.ndarray) -> np.ndarray:
    """The cheapest way from the first to the last pair of frames.

    A step advances in the first, in the second or in both by one frame; every pair on the way is paid for once. Where
    two ways cost the same, steps that advance in both come first, then those in the first.

    Args:
        costs (`(n, m)`): of pairing each frame with each.

    Returns:
        pairs `(steps, 2)`, int64, in order of time.

    Raises:
        ValueError: no frame, or costs that are not finite.
    """
    rows, columns = costs.shape
    if not rows or not columns:
        raise ValueError(f"costs: expected at least one frame of each, got {rows} and {columns}")
    if not np.isfinite(costs).all():
        raise ValueError("costs: expected finite numbers, got NaN or infinity")
    # totals[i + 1, j + 1] is the cost of the cheapest way that ends in the pair (i, j). What the pairs of one
    # antidiagonal build on lies on the two before, so that a whole one is computed at once.
    totals = np.full((rows + 1, columns + 1), np.inf)
    totals[0, 0] = 0.0
    for diagonal in range(rows + columns - 1):
        i = np.arange(max(0, diagonal - columns + 1), min(rows, diagonal + 1))
        j = diagonal - i
        cheapest = np.minimum(totals[i, j], np.minimum(totals[i, j + 1], totals[i + 1, j]))
        totals[i + 1, j + 1] = costs[i, j] + cheapest
    i, j = rows, columns
    path = [(i, j)]
    while (i, j) != (1, 1):
        i, j = min(((i - 1, j - 1), (i - 1, j), (i, j - 1)), key=lambda pair: totals[pair])
        path.append((i, j))
    return np.array(path[::-1], dtype=np.int64) - 1


def mel_distance(first: Tensor, second: Tensor) -> float:
    """Mean absolute difference of log-mel spectrograms `(n, bins)` and `(m, bins)` along their cheapest alignment.

    In the unit of the spectrograms (nats for natural logarithms), averaged over bins and over the pairs of frames.

    Raises:
        ValueError: spectrograms without a frame, of other shapes, or with NaN.
    """
    if first.dim() != 2 or second.dim() != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(
            f"mel: expected two spectrograms (frames, bins), got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    costs = (torch.cdist(first.double(), second.double(), p=1.0) / first.shape[1]).cpu().numpy()
    path = warping_path(costs)
    return float(costs[path[:, 0], path[:, 1]].mean())
