"""Random numbers of a batch in which every row has a generator of its own, so that a row draws what it draws alone."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


Draw = Callable[..., Tensor]
Generators = torch.Generator | Sequence[torch.Generator] | None


def split_generators(generator: Generators, parts: int) -> list[Generators]:
    """A generator for each of several parts of a computation, seeded by the given one.

    How much one part draws, which for a row of a batch depends on the other rows, then changes nothing for the next.
    For a sequence of generators, each part has a sequence; for `None`, `None`.
    """
    if generator is None:
        return [None] * parts
    if isinstance(generator, torch.Generator):
        return [_child(generator) for _ in range(parts)]
    rows = [[_child(row) for _ in range(parts)] for row in generator]
    return [list(part) for part in zip(*rows, strict=True)]


def _child(generator: torch.Generator) -> torch.Generator:
    seed = torch.randint(2**62, (1,), generator=generator, device=generator.device)
    return torch.Generator(device=generator.device).manual_seed(int(seed))


def draw_rows(
    draw: Draw, lengths: Sequence[int], width: int, generators: Sequence[torch.Generator], device: torch.device
) -> Tensor:
    """`(rows, max(lengths), width)`: row `r` has `draw(lengths[r], width, generator=generators[r])`, then zeros.

    Args:
        draw: `torch.randn` or `torch.rand`.
    """
    rows = [
        draw(length, width, generator=generator, device=generator.device).to(device)
        for length, generator in zip(lengths, generators, strict=True)
    ]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
