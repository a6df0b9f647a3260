"""Writing a `safetensors` file tensor by tensor.

The library's own writer holds a copy of all tensors as bytes. This one holds none, so that a checkpoint whose tensors
are memory mapped is converted in little more than the memory of its largest tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .memory_pages import release_pages


# In the order in which the library sorts them, widest first.
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes CPU tensors, laid out as `safetensors.torch.save_file` does, with the metadata that transformers expects.

    Raises:
        KeyError: a dtype that a state dict from a pack cannot have.
    """
    order = list(_DTYPE_NAMES)
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for name in names:
            stream.write(_bytes(tensors[name]))
            release_pages(tensors[name])


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().contiguous().flatten()
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")
