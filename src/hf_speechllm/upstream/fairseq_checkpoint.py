"""Reading a fairseq checkpoint from a stranger: weights and configuration, without fairseq and without unpickling.

Such a file holds, beside the weights, objects of fairseq itself (a `Dictionary`, an `argparse.Namespace`, omegaconf
nodes), so that torch's allow-list refuses it. Here its pickle is followed without running anything (see
`inert_pickle.py`) and the tensors are mapped from the file.
"""

from __future__ import annotations

import io
import math
import reprlib
import zipfile
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
import torch

from .checkpoints import MAX_CHECKPOINT_BYTES, MAX_PICKLE_BYTES, check_members, typed_zip_errors
from .errors import ConversionError, UnsafeArtifactError
from .files import require_regular_file
from .inert_pickle import InertGlobal, InertObject, PlainValues, read_inert_pickle
from .memory_pages import release_pages


_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class FairseqCheckpoint:
    """
    Args:
        path: the file.
        weights: the model's tensors. They are mapped: the file must stay while they are used.
        model_config, task_config: what the file says of the model and of its task.
        from_arguments: whether both are one `args` namespace of an old file, with the keys of everything else.
    """

    path: Path
    weights: dict[str, torch.Tensor]
    model_config: dict[str, object]
    task_config: dict[str, object]
    from_arguments: bool


@dataclass(frozen=True)
class _Storage:
    offset: int
    elements: int
    dtype: torch.dtype


def read_fairseq_checkpoint(path: str | PathLike[str]) -> FairseqCheckpoint:
    """Reads a checkpoint that `torch.save` of version 1.6 or later has written.

    Raises:
        UnsafeArtifactError: not such a file, damaged, or with tensors that the file does not hold or that are not
            finite.
        ConversionError: the file is missing, or it has no `model` or no configuration.
    """
    path = require_regular_file(path, MAX_CHECKPOINT_BYTES)
    members = {member.filename.split("/", 1)[1]: member for member in check_members(path)}
    with typed_zip_errors(path), zipfile.ZipFile(path) as archive:
        pickle = members.get("data.pkl")
        if pickle is None or pickle.file_size > MAX_PICKLE_BYTES:
            raise UnsafeArtifactError("no data.pkl of a sensible size", file=path)
        data = archive.read(pickle)
        order = archive.read(members["byteorder"]) if "byteorder" in members else b"little"
    if order != b"little":
        raise ConversionError("byte order", file=path, expected="little", actual=order)
    starts = {name: _start_of(path, member) for name, member in members.items() if name.startswith("data/")}

    def storage(reference: object) -> _Storage:
        match reference:
            case ("storage", InertGlobal("torch", str(kind)), str(key), str(), int(elements)) if kind in _STORAGES:
                dtype = _STORAGES[kind]
                expected = elements * dtype.itemsize
                actual = members[f"data/{key}"].file_size if f"data/{key}" in members else None
                if actual != expected:
                    raise UnsafeArtifactError(
                        "storage and its member differ in size",
                        file=path,
                        key=f"data/{key}",
                        expected=f"{expected} bytes",
                        actual=actual,
                    )
                return _Storage(starts[f"data/{key}"], elements, dtype)
            case _:
                raise UnsafeArtifactError("malformed storage reference", file=path, actual=reprlib.repr(reference))

    content = read_inert_pickle(io.BytesIO(data), path, resolve_reference=storage)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ConversionError("not a fairseq checkpoint", file=path, key="model", expected="names and tensors")
    weights = _weights(content["model"], path)
    values = PlainValues(path)
    # fairseq itself looks at `args` first.
    if content.get("args") is not None:
        arguments = values.of(content["args"])
        if not isinstance(arguments, dict):
            raise ConversionError("no configuration", file=path, key="args", actual=type(arguments).__name__)
        return FairseqCheckpoint(path, weights, arguments, arguments, True)
    config = content.get("cfg")
    if isinstance(config, InertObject) and config.kind.startswith("omegaconf.") and isinstance(config.state, dict):
        config = config.state.get("_content")
    sections = {}
    for name in ("model", "task"):
        section = values.of(config.get(name)) if isinstance(config, dict) else None
        if not isinstance(section, dict):
            raise ConversionError("no configuration", file=path, key=f"cfg.{name}", actual=type(section).__name__)
        sections[name] = section
    return FairseqCheckpoint(path, weights, sections["model"], sections["task"], False)


def _start_of(path: Path, member: zipfile.ZipInfo) -> int:
    with path.open("rb") as stream:
        stream.seek(member.header_offset)
        header = stream.read(30)
    name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    return member.header_offset + 30 + name + extra


def _weights(entries: dict, path: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    total, budget = 0, 2 * path.stat().st_size
    for name, value in entries.items():
        if not isinstance(name, str):
            raise ConversionError("name is not a string", file=path, key=repr(name))
        tensor = _tensor(value, path, name)
        total += tensor.numel() * tensor.element_size()
        if total > budget:
            raise UnsafeArtifactError("tensors overlap too often", file=path, key=name, expected=f"{budget} bytes")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UnsafeArtifactError("weight is not finite", file=path, key=name, actual="NaN or infinity")
        release_pages(tensor)
        weights[name] = tensor
    if not weights:
        raise ConversionError("checkpoint holds no tensors", file=path, key="model")
    return weights


def _tensor(value: object, path: Path, name: str) -> torch.Tensor:
    """The tensor that `torch._utils._rebuild_tensor_v2` would have made."""
    if isinstance(value, InertObject) and value.kind == "torch._utils._rebuild_parameter" and value.arguments:
        value = value.arguments[0]
    if not isinstance(value, InertObject) or value.kind != "torch._utils._rebuild_tensor_v2":
        raise ConversionError(
            "value is not a tensor",
            file=path,
            key=name,
            actual=value.kind if isinstance(value, InertObject) else type(value).__name__,
        )
    match value.arguments:
        case (_Storage() as storage, int(offset), tuple() as size, tuple() as stride, *_) if len(size) == len(
            stride
        ) and all(type(n) is int and n >= 0 for n in (offset, *size, *stride)):
            pass
        case _:
            raise UnsafeArtifactError("malformed tensor", file=path, key=name)
    elements = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if elements else offset
    if elements > storage.elements or (elements and last >= storage.elements):
        raise UnsafeArtifactError(
            "tensor is larger than its storage",
            file=path,
            key=name,
            expected=f"at most {storage.elements} elements",
            actual=f"{size} from {offset} by {stride}",
        )
    if not elements:
        return torch.empty(size, dtype=storage.dtype)
    count = storage.elements * storage.dtype.itemsize
    raw = torch.from_numpy(np.memmap(path, np.uint8, "c", storage.offset, (count,)))
    if storage.offset % storage.dtype.itemsize:
        raw = raw.clone()
    return raw.view(storage.dtype).as_strided(size, stride, offset)
