"""Writing the checkpoint that upstream loads, tensor by tensor.

`torch.save` writes the whole memory behind a view, and what is memory mapped stays mapped until the end. Here a view
is made to end where its values end, without a copy, and the pages of a tensor are given back once it is in the file:
memory-mapped weights pass from file to file in little more than the memory of the largest.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from .memory_pages import release_memory


def compact(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CPU tensors whose storages hold their values and nothing else; names of one tensor stay tied.

    What is contiguous is not copied, and must not be changed while the result is used.
    """
    alone: dict[tuple[object, ...], Tensor] = {}
    result = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if place not in alone:
            alone[place] = _without_surroundings(tensor)
        result[name] = alone[place]
    return result


def _without_surroundings(tensor: Tensor) -> Tensor:
    flat = tensor.detach().contiguous().flatten()
    if not flat.numel():
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    return torch.from_numpy(flat.view(torch.uint8).numpy()).view(flat.dtype).reshape(tensor.shape)


def write_state_dict(path: Path, state: Mapping[str, Tensor]) -> None:
    """Writes CPU tensors as the dictionary that `torch.load` reads, each with all of its storage: see [`compact`]."""
    with path.open("wb") as file:
        torch.save(dict(state), _ReleasingFile(file))


class _ReleasingFile:
    """A binary file that gives the pages of what it has written back to the system.

    `torch.save` hands it each tensor as one view of the tensor's own memory.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def write(self, data: bytes | memoryview) -> int:
        """The number of bytes written."""
        count = self.file.write(data)
        release_memory(np.frombuffer(data, dtype=np.uint8).ctypes.data, count)
        return count

    def flush(self) -> None:
        """What is buffered goes to the file."""
        self.file.flush()
