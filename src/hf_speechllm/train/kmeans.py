"""Mini-batch k-means in torch (D. Sculley, "Web-scale k-means clustering", WWW 2010), started by k-means++.

Deterministic: the result depends on the points and the seed alone (and, in its last digits, on the machine).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


# Entries of the matrix of distances that are computed at once.
_DISTANCES = 1 << 24


@dataclass
class KMeansResult:
    """
    Args:
        centres (`(k, d)`, float32): the codebook.
        counts (`(k,)`, int64): how many of the points belong to each centre.
        inertia: mean squared distance of the points to their centres.
        batches: mini-batches that were used.
    """

    centres: Tensor
    counts: Tensor
    inertia: float
    batches: int

    @property
    def perplexity(self) -> float:
        """2 to the entropy of the counts: `k` where all clusters are used alike, 1 where one has everything."""
        share = self.counts[self.counts > 0].double() / self.counts.sum()
        return float((-(share * share.log()).sum()).exp())


def nearest_centres(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centre of each point `(n, d)`: its number `(n,)` int64, and the squared distance `(n,)` float32."""
    squares = centres.square().sum(dim=1)
    numbers, distances = [], []
    for piece in points.split(max(1, _DISTANCES // len(centres))):
        smallest, number = torch.addmm(squares, piece, centres.T, alpha=-2).min(dim=1)
        numbers.append(number)
        distances.append((smallest + piece.square().sum(dim=1)).clamp_min(0))
    return torch.cat(numbers), torch.cat(distances)


def spread_out_centres(
    points: Tensor, num_centres: int, generator: torch.Generator, beside: Tensor | None = None
) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii, 2007): each next centre is a point drawn by its squared distance to those
    that there are; `(num_centres, d)`.

    Args:
        points (`(n, d)`): to draw from.
        beside (`(m, d)`, *optional*): centres that there are already.
    """
    chosen: list[Tensor] = []
    distances = None if beside is None or not len(beside) else nearest_centres(points, beside)[1]
    for _ in range(num_centres):
        if distances is None:
            index = int(torch.randint(len(points), (1,), generator=generator))
        else:
            # By inversion: `multinomial` takes no more than 2**24 weights.
            sums = distances.double().cumsum(dim=0)
            drawn = torch.rand((), generator=generator, dtype=torch.float64) * sums[-1].cpu()
            index = min(int(torch.searchsorted(sums, drawn.to(sums.device))), len(points) - 1)
        chosen.append(points[index])
        to_it = (points - chosen[-1]).square().sum(dim=1)
        distances = to_it if distances is None else torch.minimum(distances, to_it)
    return torch.stack(chosen)


def fit_kmeans(
    points: Tensor,
    num_centres: int,
    *,
    batch_size: int = 10_000,
    max_epochs: int = 100,
    patience: int = 100,
    starts: int = 3,
    seed: int = 0,
    report: Callable[[int, float], None] | None = None,
) -> KMeansResult:
    """Fits `num_centres` centres to `points`.

    Args:
        points (`(n, d)`, float32): on any device; at least `num_centres` of them.
        batch_size: points of a mini-batch. max_epochs: passes over all points at most.
        patience: mini-batches without a lower running mean of the inertia after which it ends.
        starts: k-means++ starts, each on a sample of the points; that with the lowest inertia on another sample is
            used.
        seed: of the starts and of the order of the points.
        report: called after every pass with its number and the running mean of the inertia.

    Raises:
        ValueError: fewer points than centres, or points that are not finite.
    """
    if points.dim() != 2 or len(points) < num_centres:
        raise ValueError(f"points: expected at least {num_centres} rows, got {tuple(points.shape)}")
    if not bool(torch.isfinite(points).all()):
        raise ValueError("points: expected finite numbers, got NaN or infinity")
    generator = torch.Generator().manual_seed(seed)
    sample = min(len(points), max(3 * batch_size, 3 * num_centres))
    centres, best = None, float("inf")
    for _ in range(starts):
        found = spread_out_centres(_draw(points, sample, generator), num_centres, generator)
        inertia = float(nearest_centres(_draw(points, sample, generator), found)[1].mean())
        if inertia < best:
            centres, best = found, inertia

    weights = points.new_zeros(num_centres)
    smooth = min(1.0, 2.0 * batch_size / (len(points) + 1))
    running, lowest, since, batches = best, best, 0, 0
    for epoch in range(max_epochs):
        used = torch.zeros(num_centres, dtype=torch.bool, device=points.device)
        for batch in torch.randperm(len(points), generator=generator).split(batch_size):
            batch_points = points[batch.to(points.device)]
            numbers, distances = nearest_centres(batch_points, centres)
            sums = torch.zeros_like(centres).index_add_(0, numbers, batch_points)
            counts = torch.bincount(numbers, minlength=num_centres)
            weights = weights + counts
            # Every point moves its centre by one over the number of points that it has had.
            step = (sums - counts[:, None] * centres) / weights.clamp_min(1)[:, None]
            centres = centres + step
            used |= counts > 0
            running += smooth * (float(distances.mean()) - running)
            batches += 1
            lowest, since = (running, 0) if running < lowest else (lowest, since + 1)
            if since >= patience:
                break
        unused = (~used).nonzero().flatten()
        if report is not None:
            report(epoch + 1, running)
        if since >= patience:
            break
        if len(unused):  # a centre that nothing belongs to starts again among the points that are far from any
            drawn = _draw(points, sample, generator)
            centres[unused] = spread_out_centres(drawn, len(unused), generator, beside=centres[used])
            weights[unused] = 0
    numbers, distances = nearest_centres(points, centres)
    return KMeansResult(centres, torch.bincount(numbers, minlength=num_centres), float(distances.mean()), batches)


def _draw(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return points[torch.randperm(len(points), generator=generator)[:count].to(points.device)]
