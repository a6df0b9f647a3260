"""Batches of similar duration under a budget of frames.

The cost of a batch is its padded size (items times the longest item), as in WeNet's `max_frames_in_batch`. Batches
depend on (seed, epoch) only; their number per epoch is the same in every epoch, which is what `Trainer` needs to find
its place again when it resumes.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch.utils.data import DataLoader, Sampler


class DurationBucketBatchSampler(Sampler[list[tuple[int, int]]]):
    """Yields lists of `(epoch, index)` whose padded frames stay within a budget.

    Items are shuffled, cut into windows, sorted by length inside a window and packed greedily; then the batches are
    shuffled. When augmentation changes lengths between epochs the number of batches would vary: an epoch with more
    batches than the first drops some at random, one with fewer repeats some.

    Args:
        lengths (`Callable[[int], Sequence[int]]`): frames of every item in an epoch, e.g. `dataset.lengths`.
        max_frames (`int`): largest padded size of a batch in frames. A single longer item forms its own batch.
        max_items (`int`): largest number of items in a batch.
        window (`int`): items sorted together; larger means less padding and less randomness.
        seed (`int`): of the shuffling.
        shuffle (`bool`): `False` sorts all items by length, longest first.
        rank, world_size (`int`): this process and the number of processes. Every process gets the same number of
            batches (the last are repeated from the start), as with `DistributedSampler`.

    Raises:
        ValueError: a budget that is not positive.
    """

    def __init__(
        self,
        lengths: Callable[[int], Sequence[int]],
        max_frames: int,
        max_items: int = 64,
        window: int = 512,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ):
        if max_frames < 1 or max_items < 1 or window < 1:
            raise ValueError(
                f"expected positive max_frames, max_items, window, found {(max_frames, max_items, window)}"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"expected 0 <= rank < world_size, found rank {rank} of {world_size}")
        self.lengths = lengths
        self.max_frames, self.max_items, self.window = max_frames, max_items, window
        self.seed, self.shuffle, self.rank, self.world_size = seed, shuffle, rank, world_size
        self.epoch = 0
        first = len(self._pack(0))
        self._batches_per_epoch = -(-first // world_size) * world_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._batches_per_epoch // self.world_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        batches = self._pack(self.epoch)
        wanted = self._batches_per_epoch
        batches = [batches[number % len(batches)] for number in range(wanted)]
        for batch in batches[self.rank :: self.world_size]:
            yield [(self.epoch, index) for index in batch]

    def _pack(self, epoch: int) -> list[list[int]]:
        lengths = np.asarray(self.lengths(epoch))
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, epoch))))
        if self.shuffle:
            order = rng.permutation(lengths.size)
            windows = [order[start : start + self.window] for start in range(0, lengths.size, self.window)]
        else:
            windows = [np.arange(lengths.size)]
        batches: list[list[int]] = []
        for members in windows:
            batch: list[int] = []
            # Longest first: the first item of a batch is its padded length.
            for index in members[np.argsort(-lengths[members], kind="stable")]:
                longest = lengths[batch[0]] if batch else lengths[index]
                if batch and (len(batch) == self.max_items or (len(batch) + 1) * longest > self.max_frames):
                    batches.append(batch)
                    batch = []
                batch.append(int(index))
            batches.append(batch)
        if self.shuffle:
            batches = [batches[number] for number in rng.permutation(len(batches))]
        return batches


class EpochDataLoader(DataLoader):
    """A `DataLoader` that hands `set_epoch` on to its batch sampler (`Trainer` calls it at the start of an epoch)."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)
