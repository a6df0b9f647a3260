"""Residual vector quantization with codebooks that are moving averages.

Source: SoundStream (https://arxiv.org/abs/2107.03312), algorithm 1, as SpeechTokenizer has it
(`speechtokenizer/quantization/core_vq.py`): plain Euclidean neighbours, no projection.

What differs from upstream: k-means gives the moving averages sums of vectors to start from (there, the means, so that
the first update divides every codeword by the size of its cluster), a codeword that is hardly used is really replaced
(there, the replacement is overwritten by the moving average in the same step), and processes that train together share
one codebook.

Shape legend: `n` vectors (frames of a batch), `d` their size, `k` codewords, `q` levels.
"""

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional


def _in_a_group() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def sample_vectors(vectors: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """`count` random rows of `vectors` `(n, d)`; without repetition where there are enough."""
    if len(vectors) >= count:
        index = torch.randperm(len(vectors), generator=generator, device=vectors.device)[:count]
    else:
        index = torch.randint(len(vectors), (count,), generator=generator, device=vectors.device)
    return vectors[index]


def nearest(vectors: Tensor, codewords: Tensor) -> Tensor:
    """Index of the nearest codeword `(k, d)` of each vector `(n, d)`, int64 `(n,)`."""
    # |x|^2 is the same for all codewords.
    return torch.addmm(codewords.square().sum(dim=1), vectors, codewords.T, alpha=-2.0).argmin(dim=1)


def kmeans(
    vectors: Tensor, count: int, iterations: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from random vectors; an empty cluster keeps its mean.

    Returns:
        means `(count, d)`, and how many vectors each has, `(count,)`; both of the dtype of `vectors` `(n, d)`.
    """
    means = sample_vectors(vectors, count, generator)
    sizes = vectors.new_zeros(count)
    for _ in range(iterations):
        index = nearest(vectors, means)
        sizes = torch.bincount(index, minlength=count).to(vectors.dtype)
        sums = torch.zeros_like(means).index_add_(0, index, vectors)
        means = torch.where(sizes[:, None] > 0, sums / sizes.clamp_min(1)[:, None], means)
    return means, sizes


class EmaCodebook(nn.Module):
    """One level: codewords that follow the mean of the vectors they stand for.

    Buffers, all of the dtype of the model: `embed` `(k, d)`, the codewords; `embed_avg` `(k, d)` and `cluster_size`
    `(k,)`, the averaged sums and counts of vectors; `inited` `(1,)`, 1 after the first training batch.

    Args:
        decay: of the averages. dead_code_threshold: averaged count below which a codeword is replaced; 0 never.
        kmeans_iterations: for the codewords of the first training batch.
    """

    # Of the Laplace smoothing of the counts.
    epsilon = 1e-5

    def __init__(
        self, codebook_size: int, size: int, decay: float, dead_code_threshold: float, kmeans_iterations: int
    ) -> None:
        super().__init__()
        self.decay, self.dead_code_threshold = decay, dead_code_threshold
        self.kmeans_iterations = kmeans_iterations
        self.register_buffer("inited", torch.zeros(1))
        self.register_buffer("cluster_size", torch.zeros(codebook_size))
        self.register_buffer("embed", torch.zeros(codebook_size, size))
        self.register_buffer("embed_avg", torch.zeros(codebook_size, size))

    def encode(self, vectors: Tensor) -> Tensor:
        """Nearest codeword of each vector, `(n, d)` → int64 `(n,)`."""
        return nearest(vectors, self.embed.to(vectors.dtype))

    def decode(self, codes: Tensor) -> Tensor:
        """Codewords: int64 of any shape → that shape plus `(d,)`."""
        return functional.embedding(codes, self.embed)

    @torch.no_grad()
    def initialize(self, vectors: Tensor, generator: torch.Generator | None = None) -> None:
        """Codewords from k-means on `vectors` `(n, d)`; a group of processes takes those of the first."""
        means, sizes = kmeans(vectors, len(self.embed), self.kmeans_iterations, generator)
        if _in_a_group():
            distributed.broadcast(means, 0)
            distributed.broadcast(sizes, 0)
        # A mean that no vector chose counts as one, so that it stays where it is.
        sizes = sizes.clamp_min(1)
        self.embed.copy_(means)
        self.embed_avg.copy_(means * sizes[:, None])
        self.cluster_size.copy_(sizes)
        self.inited.fill_(1)

    @torch.no_grad()
    def update(self, vectors: Tensor, codes: Tensor, generator: torch.Generator | None = None) -> None:
        """Move the averages by the vectors `(n, d)` and their codes `(n,)`, replace dead codewords."""
        dead = self.cluster_size < self.dead_code_threshold
        size = len(self.embed)
        counts = torch.bincount(codes, minlength=size).to(vectors.dtype)
        sums = vectors.new_zeros(self.embed.shape).index_add_(0, codes, vectors)
        if _in_a_group():
            distributed.all_reduce(counts)
            distributed.all_reduce(sums)
        self.cluster_size.mul_(self.decay).add_(counts, alpha=1 - self.decay)
        self.embed_avg.mul_(self.decay).add_(sums, alpha=1 - self.decay)
        if bool(dead.any()):
            # A new codeword starts as a vector of this batch that was seen just often enough.
            fresh = sample_vectors(vectors, size, generator)
            if _in_a_group():
                fresh = fresh.contiguous()
                distributed.broadcast(fresh, 0)
            self.embed_avg.copy_(torch.where(dead[:, None], fresh * self.dead_code_threshold, self.embed_avg))
            self.cluster_size.masked_fill_(dead, self.dead_code_threshold)
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + self.epsilon) / (total + size * self.epsilon) * total
        self.embed.copy_(self.embed_avg / smoothed[:, None])


class ResidualVectorQuantizer(nn.Module):
    """Levels of codebooks; each quantizes what those before it left over."""

    def __init__(
        self,
        num_quantizers: int,
        codebook_size: int,
        size: int,
        decay: float = 0.99,
        dead_code_threshold: float = 2.0,
        kmeans_iterations: int = 50,
    ) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            EmaCodebook(codebook_size, size, decay, dead_code_threshold, kmeans_iterations)
            for _ in range(num_quantizers)
        )

    def encode(
        self, vectors: Tensor, num_quantizers: int, first_quantizer: int = 0, subtract_skipped: bool = True
    ) -> Tensor:
        """Codes of the levels `first_quantizer..num_quantizers-1`: `(n, d)` → int64 `(q, n)`.

        Args:
            subtract_skipped: what the levels before `first_quantizer` stand for is subtracted first.
        """
        codes, residual = [], vectors
        for index, level in enumerate(self.levels[:num_quantizers]):
            if index < first_quantizer and not subtract_skipped:
                continue
            chosen = level.encode(residual)
            residual = residual - level.decode(chosen)
            if index >= first_quantizer:
                codes.append(chosen)
        return torch.stack(codes)

    def decode(self, codes: Tensor, first_quantizer: int = 0) -> Tensor:
        """Sum of the codewords of the levels from `first_quantizer` on: int64 `(q, ...)` → `(..., d)`."""
        levels = self.levels[first_quantizer : first_quantizer + len(codes)]
        total = levels[0].decode(codes[0])
        for level, chosen in zip(levels[1:], codes[1:], strict=True):
            total = total + level.decode(chosen)
        return total

    def forward(
        self, vectors: Tensor, num_quantizers: int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Quantize; while training, also move the codebooks and let the gradient through (straight-through).

        As upstream, a residual carries no gradient: the encoder feels the commitment to the first level, and what
        comes back through the sum.

        Args:
            vectors: `(n, d)`. num_quantizers: levels to use. generator: for k-means and dead codewords.
        Returns:
            their sum `(n, d)`; the codes, int64 `(q, n)`; the commitment loss, a scalar, mean over the levels of the
            mean squared distance (0 in evaluation); the first level's codewords `(n, d)`.
        """
        total, residual = torch.zeros_like(vectors), vectors
        codes, losses, first = [], [], vectors
        for index, level in enumerate(self.levels[:num_quantizers]):
            if self.training and not bool(level.inited):
                level.initialize(residual.detach(), generator)
            chosen = level.encode(residual.detach())
            quantized = level.decode(chosen)
            if self.training:
                level.update(residual.detach(), chosen, generator)
                losses.append(functional.mse_loss(residual, quantized))
                quantized = residual + (quantized - residual).detach()
            first = quantized if index == 0 else first
            residual = residual - quantized
            total = total + quantized
            codes.append(chosen)
        loss = torch.stack(losses).mean() if losses else vectors.new_zeros(())
        return total, torch.stack(codes), loss, first
