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


def chunk_visibility(
    starts: list[int],
    counts: list[int],
    chunk_size: int,
    device: torch.device,
    num_left_chunks: int = -1,
    firsts: list[int] | None = None,
) -> Tensor | None:
    """Which keys the frames of a step see, `(b, 1, t, s)` bool, or `None` where all see all.

    Frame `i` of row `b` stands at `starts[b] + i` and sees its own chunk, as far as it exists, and those before it.

    Args:
        starts, counts: frames before the step and in it, one number a row; `t` is the largest count and `s` the
            largest number of keys.
        chunk_size: 0 = everything that exists is visible.
        num_left_chunks: chunks that are seen before the own one; negative = all (`subsequent_chunk_mask` of
            `cosyvoice/utils/mask.py`).
        firsts: where the first key of each row stands, no later than the first that is seen; 0 by default.
    """
    width = max(counts)
    firsts = [0] * len(starts) if firsts is None else firsts
    if len(set(starts)) == 1 and len(set(counts)) == 1:
        if not chunk_size:
            return None
        chunk = starts[0] // chunk_size
        lowest = 0 if num_left_chunks < 0 else max(chunk - num_left_chunks, 0) * chunk_size
        if chunk == (starts[0] + width - 1) // chunk_size and lowest == firsts[0]:
            return None
    start, first = (torch.tensor(values, device=device)[:, None] for values in (starts, firsts))
    end = start + torch.tensor(counts, device=device)[:, None]
    position = start + torch.arange(width, device=device)
    limit = end.expand_as(position)
    if chunk_size:
        limit = torch.minimum((position // chunk_size + 1) * chunk_size, end)
    num_keys = max(s + c - f for s, c, f in zip(starts, counts, firsts, strict=True))
    key = (first + torch.arange(num_keys, device=device))[:, None]
    visible = key < limit[..., None]
    if chunk_size and num_left_chunks >= 0:
        visible &= key >= ((position // chunk_size - num_left_chunks) * chunk_size)[..., None]
    # A padded frame must see something, or its softmax is undefined.
    return (visible | ((position >= end)[..., None] & (key == first[..., None])))[:, None]


@dataclass
class CausalCache:
    """Keys, values and past inputs of all layers of one network, and the step that is running.

    A step is announced by [`begin`], every layer then takes its past by its number, and [`end`] closes it. The tensors
    are written in place: continue from a cache once, and [`clone`] it to continue twice.

    Args:
        lengths: frames that each row has seen.
        chunk_size (`int`): frames of a chunk of the attention; 0 = it sees everything that exists.
        num_left_chunks (`int`): chunks that the attention sees before its own, behind which keys are forgotten;
            negative = all of them.
        dtype (*optional*): what keys and values are rounded to; that of the network where it is not given.
        keys, values (`dict` of `(b, capacity, c)`): by number of the layer; row `b` is filled with its frames from
            `firsts[b]` to `lengths[b]`.
        inputs (`dict` of `(b, n, c)`): what each convolution still sees, by its number.
        firsts: the first frame of each row whose keys are kept.
        counts: frames of each row in the running step.
        visible (`(b, 1, t, s)`, bool or `None`): what the running step's frames see.
    """

    lengths: list[int]
    chunk_size: int
    num_left_chunks: int = -1
    dtype: torch.dtype | None = None
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    inputs: dict[int, Tensor] = field(default_factory=dict)
    firsts: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    visible: Tensor | None = None

    def __post_init__(self) -> None:
        self.firsts = self.firsts or [0] * len(self.lengths)

    def begin(self, counts: list[int], device: torch.device) -> None:
        """Announce a step that brings `counts[b]` frames for row `b`; at least one row has some."""
        self.counts = counts
        self.visible = chunk_visibility(
            self.lengths, counts, self.chunk_size, device, self.num_left_chunks, self.firsts
        )

    def end(self) -> None:
        """Close the step."""
        self.firsts = self._firsts_behind()
        self.lengths = self._ends()

    @property
    def uniform(self) -> bool:
        """All rows stand at the same frame and bring the same number."""
        return len(set(self.lengths)) == 1 and len(set(self.counts)) == 1

    @property
    def starts(self) -> list[int]:
        """Keys of each row that are in front of those of the step."""
        return [length - first for length, first in zip(self.lengths, self.firsts, strict=True)]

    @property
    def num_keys(self) -> int:
        """Keys of the step's attention, with those of the step."""
        return max(start + count for start, count in zip(self.starts, self.counts, strict=True))

    @property
    def num_bytes(self) -> int:
        """Memory of the tensors."""
        stores = (self.keys, self.values, self.inputs)
        return sum(tensor.numel() * tensor.element_size() for store in stores for tensor in store.values())

    @property
    def bytes_per_frame(self) -> int:
        """Memory of one frame of one row."""
        stores = (self.keys, self.values)
        return sum(tensor.shape[2] * tensor.element_size() for store in stores for tensor in store.values())

    def extend_attention(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add the step's keys and values `(b, t, c)`; all that are visible, `(b, s, c)` each, zero or old where a row
        has fewer."""
        write = self._write if self.num_left_chunks < 0 or not self.chunk_size else self._write_bounded
        return write(self.keys, layer, key), write(self.values, layer, value)

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

        tensors = [copy(store) for store in (self.keys, self.values, self.inputs)]
        return CausalCache(
            list(self.lengths), self.chunk_size, self.num_left_chunks, self.dtype, *tensors, list(self.firsts)
        )

    def _ends(self) -> list[int]:
        return [length + count for length, count in zip(self.lengths, self.counts, strict=True)]

    def _firsts_behind(self) -> list[int]:
        """The first frame of each row that the next step can see."""
        if self.num_left_chunks < 0 or not self.chunk_size:
            return self.firsts
        return [max(end // self.chunk_size - self.num_left_chunks, 0) * self.chunk_size for end in self._ends()]

    def _write(self, store: dict[int, Tensor], layer: int, new: Tensor) -> Tensor:
        held, needed = store.get(layer), self.num_keys
        if held is None or held.shape[1] < needed:
            capacity = max(needed, _FIRST_CAPACITY if held is None else held.shape[1] * 3 // 2)
            grown = new.new_zeros(new.shape[0], capacity, new.shape[2], dtype=self.dtype)
            if held is not None:
                grown[:, : held.shape[1]] = held
            store[layer] = held = grown
        self._put(held, new)
        return held[:, :needed].to(new.dtype)

    def _write_bounded(self, store: dict[int, Tensor], layer: int, new: Tensor) -> Tensor:
        """As [`_write`], and only what the next step can see stays: no layer ever keeps more."""
        held = store.get(layer)
        joined = new.new_zeros(new.shape[0], self.num_keys, new.shape[2], dtype=self.dtype)
        if held is not None:
            joined[:, : held.shape[1]] = held[:, : joined.shape[1]]
        self._put(joined, new)
        behind, ends = self._firsts_behind(), self._ends()
        longest = max(end - first for end, first in zip(ends, behind, strict=True))
        kept = joined.new_zeros(len(joined), longest, new.shape[2])
        for row, (first, end, past) in enumerate(zip(behind, ends, self.firsts, strict=True)):
            kept[row, : end - first] = joined[row, first - past : end - past]
        store[layer] = kept
        return joined.to(new.dtype)

    def _put(self, keys: Tensor, new: Tensor) -> None:
        """The step's frames `(b, t, c)` behind those that are there."""
        starts, counts = self.starts, self.counts
        if self.uniform:
            keys[:, starts[0] : starts[0] + counts[0]] = new[:, : counts[0]]
            return
        for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
            keys[row, start : start + count] = new[row, :count]


def gather_rows(caches: list[CausalCache], rows: list[tuple[int, int]]) -> CausalCache:
    """A cache whose row `i` is row `rows[i][1]` of `caches[rows[i][0]]`, all of the same network and options.

    The caches are used up: their tensors go one by one, so that never two copies of all of them exist.
    """
    first = caches[0]

    def of_rows(name: str) -> list[int]:
        return [getattr(caches[number], name)[row] for number, row in rows]

    lengths, firsts = of_rows("lengths"), of_rows("firsts")
    kept = [length - past for length, past in zip(lengths, firsts, strict=True)]
    result = CausalCache(lengths, first.chunk_size, first.num_left_chunks, first.dtype, firsts=firsts)
    for name in ("keys", "values", "inputs"):
        stores: list[dict[int, Tensor]] = [getattr(cache, name) for cache in caches]
        for layer in {layer: None for store in stores for layer in store}:
            # A cache that has seen nothing has no tensors.
            held = [store.pop(layer, None) for store in stores]
            like = next(tensor for tensor in held if tensor is not None)
            size = max(tensor.shape[1] for tensor in held if tensor is not None)
            if name != "inputs":
                # Room to grow, but not that of a long row that has left.
                size = min(size, max(_FIRST_CAPACITY, max(kept) * 3 // 2))
            gathered = like.new_zeros(len(rows), size, like.shape[2])
            for index, (number, row) in enumerate(rows):
                source = held[number]
                if source is not None:
                    count = size if name == "inputs" else kept[index]
                    gathered[index, :count] = source[row, :count]
            getattr(result, name)[layer] = gathered
    return result


def number_layers(network: torch.nn.Module, kind: type[torch.nn.Module]) -> None:
    """Give every module of a `kind` in `network` its number in a cache, as `cache_index`, in the order of creation."""
    for index, module in enumerate(module for module in network.modules() if isinstance(module, kind)):
        module.cache_index = index
