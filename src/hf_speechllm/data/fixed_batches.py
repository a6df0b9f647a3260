"""Shuffled batches of a fixed number of items, for training on crops of equal length."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class FixedBatchSampler(Sampler[list[tuple[int, int]]]):
    """Yields lists of `batch_size` pairs `(epoch, index)`; what is left over at the end of an epoch is dropped.

    The order depends on (seed, epoch) only, so a run that resumes asks for the rest of its epoch with `set_position`.

    Args:
        num_items: size of the data set. batch_size: items per process. seed: of the shuffling.
        rank, world_size: this process and the number of processes; they share an epoch out between them.

    Raises:
        ValueError: fewer items than one batch of every process.
    """

    def __init__(self, num_items: int, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        if not 1 <= batch_size * world_size <= num_items:
            raise ValueError(
                f"batch_size: expected 1..{num_items // world_size} for {num_items} items and {world_size} processes, "
                f"got {batch_size}"
            )
        self.num_items, self.batch_size, self.seed = num_items, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = self.first = 0

    def set_position(self, epoch: int, first: int = 0) -> None:
        """Choose the epoch that the next iteration yields, and which of its batches comes first."""
        self.epoch, self.first = epoch, first

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.num_items // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, self.epoch))))
        order = rng.permutation(self.num_items)
        for number in range(self.first, len(self)):
            start = (number * self.world_size + self.rank) * self.batch_size
            yield [(self.epoch, int(index)) for index in order[start : start + self.batch_size]]
