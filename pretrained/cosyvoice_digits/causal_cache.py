"""What a causal network remembers between two pieces of a stream: keys, values, and the inputs of its convolutions.

A network whose convolutions look back only, and whose attention sees its own chunk and everything before it, gives the
same for a sequence in pieces as for the whole, as long as a piece ends where a chunk ends. Rows of a batch may be at
different positions, and a step may bring a different number of frames for each of them: rows are filled from the left.

Shape legend: `b` batch, `t` frames of a step, `s` keys, `c` channels.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


# Frames that a store of keys holds at first; it grows by half when it is full: all copies together stay linear.
_FIRST_CAPACITY = 256


def chunk_visibility(starts: list[int], counts: list[int], chunk_size: int, device: torch.device) -> Tensor | None:
    """Which keys the frames of a step see, `(b, 1, t, s)` bool, or `None` where all see all.

    Frame `i` of row `b` stands at `starts[b] + i` and sees keys up to the end of its chunk, as far as they exist.

    Args:
        starts, counts: frames before the step and in it, one number a row; `t` is the largest count and `s` the
            largest sum of the two.
        chunk_size: 0 = everything that exists is visible.
    """
    width = max(counts)
    if len(set(starts)) == 1 and len(set(counts)) == 1:
        if not chunk_size or starts[0] // chunk_size == (starts[0] + width - 1) // chunk_size:
            return None
    start = torch.tensor(starts, device=device)[:, None]
    end = start + torch.tensor(counts, device=device)[:, None]
    position = start + torch.arange(width, device=device)
    limit = end.expand_as(position)
    if chunk_size:
        limit = torch.minimum((position // chunk_size + 1) * chunk_size, end)
    key = torch.arange(max(s + c for s, c in zip(starts, counts, strict=True)), device=device)
    # A padded frame must see something, or its softmax is undefined.
    return ((key < limit[..., None]) | (key == 0))[:, None]


@dataclass
class CausalCache:
    """Keys, values and past inputs of all layers of one network, and the step that is running.

    A step is announced by [`begin`], every layer then takes its past by its number, and [`end`] closes it. The tensors
    are written in place: continue from a cache once, and [`clone`] it to continue twice.

    Args:
        lengths: frames that each row has seen.
        chunk_size (`int`): frames of a chunk of the attention; 0 = it sees everything that exists.
        keys, values (`dict` of `(b, capacity, c)`): by number of the layer, filled up to `lengths`.
        inputs (`dict` of `(b, n, c)`): what each convolution still sees, by its number.
        counts: frames of each row in the running step.
        visible (`(b, 1, t, s)`, bool or `None`): what the running step's frames see.
    """

    lengths: list[int]
    chunk_size: int
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    inputs: dict[int, Tensor] = field(default_factory=dict)
    counts: list[int] = field(default_factory=list)
    visible: Tensor | None = None

    def begin(self, counts: list[int], device: torch.device) -> None:
        """Announce a step that brings `counts[b]` frames for row `b`; at least one row has some."""
        self.counts = counts
        self.visible = chunk_visibility(self.lengths, counts, self.chunk_size, device)

    def end(self) -> None:
        """Close the step."""
        self.lengths = [length + count for length, count in zip(self.lengths, self.counts, strict=True)]

    @property
    def uniform(self) -> bool:
        """All rows stand at the same frame and bring the same number."""
        return len(set(self.lengths)) == 1 and len(set(self.counts)) == 1

    def extend_attention(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add the step's keys and values `(b, t, c)`; all of them so far, `(b, s, c)` each, zero or old where a row
        has fewer."""
        needed = max(length + count for length, count in zip(self.lengths, self.counts, strict=True))
        return self._write(self.keys, layer, key, needed), self._write(self.values, layer, value, needed)

    def extend_convolution(self, layer: int, hidden: Tensor, past: int) -> Tensor:
        """The step's frames `(b, t, c)` with the `past` frames before them, `(b, past + t, c)`; zeros before the
        first."""
        before = self.inputs.get(layer)
        if before is None:
            before = hidden.new_zeros(hidden.shape[0], past, hidden.shape[2])
        extended = torch.cat([before, hidden], dim=1)
        if self.uniform:
            self.inputs[layer] = extended[:, extended.shape[1] - past :].clone()
        else:
            self.inputs[layer] = torch.stack(
                [row[count : count + past] for row, count in zip(extended, self.counts, strict=True)]
            )
        return extended

    def clone(self) -> "CausalCache":
        """A cache that can be continued without changing this one."""

        def copy(tensors: dict[int, Tensor]) -> dict[int, Tensor]:
            return {layer: tensor.clone() for layer, tensor in tensors.items()}

        return CausalCache(list(self.lengths), self.chunk_size, copy(self.keys), copy(self.values), copy(self.inputs))

    def _write(self, store: dict[int, Tensor], layer: int, new: Tensor, needed: int) -> Tensor:
        held = store.get(layer)
        if held is None or held.shape[1] < needed:
            capacity = max(needed, _FIRST_CAPACITY if held is None else held.shape[1] * 3 // 2)
            grown = new.new_zeros(new.shape[0], capacity, new.shape[2])
            if held is not None:
                grown[:, : held.shape[1]] = held
            store[layer] = held = grown
        if self.uniform:
            held[:, self.lengths[0] : needed] = new[:, : self.counts[0]]
        else:
            for row, (length, count) in enumerate(zip(self.lengths, self.counts, strict=True)):
                held[row, length : length + count] = new[row, :count]
        return held[:, :needed]


def number_layers(network: torch.nn.Module, kind: type[torch.nn.Module]) -> None:
    """Give every module of a `kind` in `network` its number in a cache, as `cache_index`, in the order of creation."""
    for index, module in enumerate(module for module in network.modules() if isinstance(module, kind)):
        module.cache_index = index
