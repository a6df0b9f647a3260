"""Long pauses in generated speech.

Upstream (`llm_job` of `cosyvoice/cli/model.py`, version 3): of tokens that sound like nothing at most five in a row
are given out. The language model's own history keeps all of them.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class SilentRun:
    """How many silent tokens have come in a row: the state of one stream."""

    length: int = 0


def drop_long_silence(
    token_ids: Iterable[int], silent_token_ids: Collection[int], max_run: int = 5, run: SilentRun | None = None
) -> Iterator[int]:
    """The tokens without the silent ones that exceed `max_run` in a row.

    Args:
        run (*optional*): carries the count from one piece of a stream to the next.
    """
    silent, run = frozenset(silent_token_ids), SilentRun() if run is None else run
    for token in token_ids:
        run.length = run.length + 1 if token in silent else 0
        if run.length <= max_run:
            yield token


def drop_long_silences(
    token_ids: Tensor, token_mask: Tensor, silent_token_ids: Collection[int], max_run: int = 5
) -> tuple[Tensor, Tensor]:
    """The same for a batch.

    Args:
        token_ids, token_mask (`(batch, tokens)`, int64, 1 = real): padded on the right.

    Returns:
        the same two, as wide as the longest row that is left.
    """
    rows = [
        list(drop_long_silence(row[real].tolist(), silent_token_ids, max_run))
        for row, real in zip(token_ids, token_mask.bool(), strict=True)
    ]
    width = max((len(row) for row in rows), default=0)
    ids = token_ids.new_zeros(len(rows), width)
    mask = token_mask.new_zeros(len(rows), width)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row, dtype=ids.dtype)
        mask[number, : len(row)] = 1
    return ids, mask
