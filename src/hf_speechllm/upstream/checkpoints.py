"""Reading a PyTorch state dict from a stranger.

The unpickler's allow-list (`weights_only=True`) is the boundary. In front of it, the zip directory and the opcodes of
the pickle are checked without running anything, so that bombs and foreign callables are named instead of loaded;
behind it, every tensor must be covered by real storage and finite.
"""

from __future__ import annotations

import pickletools
import re
import reprlib
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

import torch

from .errors import ConversionError, UnsafeArtifactError
from .files import require_regular_file
from .memory_pages import release_pages


MAX_CHECKPOINT_BYTES = 64 << 30
MAX_MEMBERS = 100_000
MAX_PICKLE_BYTES = 32 << 20

_MEMBER = re.compile(
    r"[^/\\\0]+/(data\.pkl|byteorder|version|\.data/serialization_id|\.format_version|\.storage_alignment|data/[0-9]+)"
)
# Bytes per element of the storages that a state dict may name.
_STORAGES = {
    **dict.fromkeys(("torch DoubleStorage", "torch LongStorage"), 8),
    **dict.fromkeys(("torch FloatStorage", "torch IntStorage"), 4),
    **dict.fromkeys(("torch HalfStorage", "torch BFloat16Storage", "torch ShortStorage"), 2),
    **dict.fromkeys(("torch CharStorage", "torch ByteStorage", "torch BoolStorage"), 1),
}
_CALLABLES = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *_STORAGES,
}
_DTYPES = {
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}


def read_state_dict(
    path: str | PathLike[str], *, allowed_scalars: frozenset[str] = frozenset(), wrappers: tuple[str, ...] = ()
) -> dict[str, torch.Tensor]:
    """Reads a zip-format checkpoint that is a flat mapping of names to tensors.

    The tensors are memory mapped: the file must stay in place while they are used.

    Args:
        allowed_scalars: names that may hold a plain number (`"epoch"`, …); they are left out of the result.
        wrappers: names under which a trainer's checkpoint holds the weights beside its own state, which is left out;
            tried in this order, each on the result of the one before.
    Raises:
        UnsafeArtifactError: not a zip written by `torch.save`, a member that is compressed or oddly named, a callable
            outside of the allow-list, a tensor that its storage does not cover, or a value that is not finite.
        ConversionError: the file is missing, or its content is not a flat mapping of names to tensors.
    """
    path = require_regular_file(path, MAX_CHECKPOINT_BYTES)
    check_archive(path)
    try:
        content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever the loader raises for bad content becomes one typed error; no second attempt
        reason = str(error).strip().splitlines() or [""]
        raise UnsafeArtifactError(
            "checkpoint cannot be read", file=path, actual=f"{type(error).__name__}: {reason[0]}"
        ) from None
    if not isinstance(content, dict):
        raise ConversionError("checkpoint is not a mapping", file=path, actual=type(content).__name__)
    for wrapper in wrappers:
        if isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    tensors: dict[str, torch.Tensor] = {}
    total = 0
    budget = 2 * path.stat().st_size
    checked: set[tuple] = set()
    for name, value in content.items():
        if not isinstance(name, str):
            raise ConversionError("name is not a string", file=path, key=repr(name))
        if not isinstance(value, torch.Tensor):
            if name in allowed_scalars and isinstance(value, (int, float)):
                continue
            raise ConversionError("value is not a tensor", file=path, key=name, actual=type(value).__name__)
        check_tensor(value, path, name)
        view = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if view not in checked:  # tied weights are one view under several names
            checked.add(view)
            total += value.numel() * value.element_size()
            if total > budget:
                raise UnsafeArtifactError("tensors overlap too often", file=path, key=name, expected=f"{budget} bytes")
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise UnsafeArtifactError("weight is not finite", file=path, key=name, actual="NaN or infinity")
            release_pages(value)
        tensors[name] = value.detach()
    if not tensors:
        raise ConversionError("checkpoint holds no tensors", file=path)
    return tensors


def check_archive(path: Path) -> None:
    """Checks the zip directory and the pickle of a checkpoint without loading it.

    Raises:
        UnsafeArtifactError: see `read_state_dict`.
    """
    members = check_members(path)
    pickles = [member for member in members if member.filename.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise UnsafeArtifactError("no single data.pkl", file=path, actual=[m.filename for m in pickles])
    if pickles[0].file_size > MAX_PICKLE_BYTES:
        raise UnsafeArtifactError("pickle is too large", file=path, key=pickles[0].filename)
    with typed_zip_errors(path), zipfile.ZipFile(path) as archive:
        _check_pickle(path, archive.read(pickles[0]), {m.filename.split("/", 1)[1]: m.file_size for m in members})


def check_members(path: Path) -> list[zipfile.ZipInfo]:
    """The members of a checkpoint, after checks of the zip directory: uncompressed, named as `torch.save` names them.

    Raises:
        UnsafeArtifactError: see `read_state_dict`.
    """
    size = path.stat().st_size
    with typed_zip_errors(path):
        with path.open("rb") as stream:
            if stream.read(4) != b"PK\x03\x04":
                raise UnsafeArtifactError("not a zip-format checkpoint", file=path, expected="written by torch.save")
            stream.seek(max(size - 22, 0))
            if stream.read(4) != b"PK\x05\x06":
                raise UnsafeArtifactError("zip directory is not at the end of the file", file=path)
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if len(members) > MAX_MEMBERS:
                raise UnsafeArtifactError(
                    "too many members", file=path, expected=f"at most {MAX_MEMBERS}", actual=len(members)
                )
            _check_members(path, size, members)
    return members


@contextmanager
def typed_zip_errors(path: Path) -> Iterator[None]:
    """Turns what `zipfile` raises for a damaged file into an `UnsafeArtifactError` that names it."""
    try:
        yield
    except (zipfile.BadZipFile, NotImplementedError, OSError, EOFError, struct.error, UnicodeDecodeError) as error:
        raise UnsafeArtifactError("damaged zip file", file=path, actual=f"{type(error).__name__}: {error}") from None


def _check_members(path: Path, size: int, members: list[zipfile.ZipInfo]) -> None:
    seen: set[str] = set()
    total = 0
    root = members[0].filename.split("/")[0] if members else ""
    with path.open("rb") as stream:
        for member in members:
            name = member.filename
            if not _MEMBER.fullmatch(member.orig_filename) or name != member.orig_filename or ".." in name.split("/"):
                raise UnsafeArtifactError("member name is not one of torch.save", file=path, key=repr(name))
            if name.split("/")[0] != root or name.lower() in seen:
                raise UnsafeArtifactError("member occurs twice or has another root", file=path, key=name)
            seen.add(name.lower())
            if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
                raise UnsafeArtifactError("member is compressed", file=path, key=name, expected="stored")
            if member.flag_bits & 0x1:
                raise UnsafeArtifactError("member is encrypted", file=path, key=name)
            total += member.file_size
            if total > size:
                raise UnsafeArtifactError("members are larger than the file", file=path, key=name, actual=total)
            stream.seek(member.header_offset)
            header = stream.read(30)
            if len(header) != 30 or header[:4] != b"PK\x03\x04":
                raise UnsafeArtifactError("member has no header", file=path, key=name)
            method = int.from_bytes(header[8:10], "little")
            local_name = stream.read(int.from_bytes(header[26:28], "little"))
            if method != zipfile.ZIP_STORED or local_name != name.encode("utf-8"):
                raise UnsafeArtifactError("header of the member disagrees with the directory", file=path, key=name)


def _check_pickle(path: Path, data: bytes, sizes: dict[str, int]) -> None:
    """Follows the pickle symbolically: only known callables and opcodes, every storage as large as its member.

    The second half matters because the loader maps the bytes that the *pickle* claims, past the end of the member.
    """
    try:
        _follow(path, data, sizes)
    except UnsafeArtifactError:
        raise
    except Exception as error:  # pickletools raises many kinds for malformed data
        raise UnsafeArtifactError("damaged pickle", file=path, actual=f"{type(error).__name__}: {error}") from None


def _follow(path: Path, data: bytes, sizes: dict[str, int]) -> None:
    mark, opaque = object(), object()
    stack: list[object] = []
    memo: dict[int, object] = {}

    def pop_to_mark() -> tuple:
        position = len(stack) - 1 - stack[::-1].index(mark)
        items = tuple(stack[position + 1 :])
        del stack[position:]
        return items

    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name == "GLOBAL":
            if argument not in _CALLABLES:
                raise UnsafeArtifactError("pickle names a callable that no state dict needs", file=path, key=argument)
            stack.append(("global", argument))
        elif name in ("PROTO", "STOP"):
            pass
        elif name == "MARK":
            stack.append(mark)
        elif name in ("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"):
            stack.append(argument)
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "NEWTRUE", "NEWFALSE", "NONE"):
            stack.append(opaque)
        elif name == "EMPTY_TUPLE":
            stack.append(())
        elif name == "TUPLE":
            stack.append(pop_to_mark())
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            items = tuple(stack[-count:])
            del stack[-count:]
            stack.append(items)
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("SETITEMS", "APPENDS"):
            pop_to_mark()
        elif name == "SETITEM":
            del stack[-2:]
        elif name in ("APPEND", "BUILD"):
            stack.pop()
        elif name == "REDUCE":
            del stack[-2:]
            stack.append(opaque)
        elif name == "BINPERSID":
            _check_storage(path, stack.pop(), sizes)
            stack.append(opaque)
        else:
            raise UnsafeArtifactError("pickle opcode that no state dict needs", file=path, key=name)


def _check_storage(path: Path, reference: object, sizes: dict[str, int]) -> None:
    """Checks `("storage", class, key, device, elements)` against the member `data/<key>`."""
    match reference:
        case ("storage", ("global", str(kind)), str(key), str(), int(count)) if kind in _STORAGES:
            actual = sizes.get(f"data/{key}")
            if actual != count * _STORAGES[kind]:
                raise UnsafeArtifactError(
                    "storage and its member differ in size",
                    file=path,
                    key=f"data/{key}",
                    expected=f"{count * _STORAGES[kind]} bytes",
                    actual=actual,
                )
        case _:
            raise UnsafeArtifactError("malformed storage reference", file=path, actual=reprlib.repr(reference))


def check_tensor(tensor: torch.Tensor, path: Path, name: str) -> None:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise UnsafeArtifactError("not a plain tensor", file=path, key=name, actual=f"{tensor.layout} {tensor.device}")
    if tensor.dtype not in _DTYPES:
        raise UnsafeArtifactError("dtype is not allowed", file=path, key=name, actual=tensor.dtype)
    needed = tensor.numel() * tensor.element_size()
    stored = tensor.untyped_storage().nbytes()
    if needed > stored:
        raise UnsafeArtifactError(
            "tensor is larger than its storage",
            file=path,
            key=name,
            expected=f"at most {stored} bytes",
            actual=f"{tuple(tensor.shape)} needs {needed} bytes",
        )
