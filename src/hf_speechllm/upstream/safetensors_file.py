"""Writing a `safetensors` file tensor by tensor, and reading that of a stranger.

The library's own writer holds a copy of all tensors as bytes. This one holds none, so that a checkpoint whose tensors
are memory mapped is converted in little more than the memory of its largest tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import UnsafeArtifactError
from .files import require_regular_file
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


MAX_FILE_BYTES = 64 << 30


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, memory mapped: it must stay in place while they are used.

    Raises:
        UnsafeArtifactError: a damaged file, no tensor in it, or a value that is not finite.
        ConversionError: the file is missing.
    """
    path = require_regular_file(path, MAX_FILE_BYTES)
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                tensors[name] = file.get_tensor(name)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UnsafeArtifactError("damaged safetensors file", file=path, actual=str(error)) from None
    if not tensors:
        raise UnsafeArtifactError("file holds no tensors", file=path)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UnsafeArtifactError("weight is not finite", file=path, key=name, actual="NaN or infinity")
        release_pages(tensor)
    return tensors


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
