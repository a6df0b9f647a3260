"""Bounded reading of the small text files of a pack."""

from __future__ import annotations

import stat
from os import PathLike
from pathlib import Path

from .errors import ConversionError, UnsafeArtifactError


def require_regular_file(path: str | PathLike[str], max_bytes: int) -> Path:
    """Returns `path` when it is a regular file of 1 to `max_bytes` bytes.

    Raises:
        ConversionError: the file does not exist or is empty.
        UnsafeArtifactError: it is a directory, device or pipe, or too large.
    """
    path = Path(path)
    try:
        status = path.stat()
    except OSError as error:
        raise ConversionError("cannot read file", file=path, actual=error.strerror) from None
    if not stat.S_ISREG(status.st_mode):
        raise UnsafeArtifactError("not a regular file", file=path)
    if status.st_size == 0:
        raise ConversionError("file is empty", file=path)
    if status.st_size > max_bytes:
        raise UnsafeArtifactError(
            "file is too large", file=path, expected=f"at most {max_bytes} bytes", actual=f"{status.st_size} bytes"
        )
    return path


def read_bytes(path: str | PathLike[str], max_bytes: int) -> bytes:
    """The content of a regular file of at most `max_bytes` bytes (see `require_regular_file`)."""
    return require_regular_file(path, max_bytes).read_bytes()


def read_utf8(path: str | PathLike[str], max_bytes: int) -> str:
    """The content as text: UTF-8 without a byte order mark and without NUL characters.

    Raises:
        UnsafeArtifactError: anything else, with the offset of the first bad byte.
    """
    data = read_bytes(path, max_bytes)
    if data.startswith(b"\xef\xbb\xbf"):
        raise UnsafeArtifactError("text starts with a byte order mark", file=path, expected="plain UTF-8")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UnsafeArtifactError("text is not UTF-8", file=path, actual=f"bad byte at offset {error.start}") from None
    if "\0" in text:
        raise UnsafeArtifactError("text contains a NUL character", file=path, actual=f"at offset {text.index(chr(0))}")
    return text
