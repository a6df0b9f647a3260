"""The wire format of protobuf messages, read strictly and without the protobuf package.

Source: the encoding chapter of the protobuf documentation.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from os import PathLike

from .errors import UnsafeArtifactError


def message_fields(
    data: bytes | memoryview, path: str | PathLike[str], where: str
) -> Iterator[tuple[int, int | float | bytes | memoryview]]:
    """Yields (field number, value) of one message: int for varints, float for 32-bit values, a slice of `data` for the
    rest (a view where `data` is one, so that a large file is not copied).

    Args:
        path, where: the file and the part of it, for messages.
    Raises:
        UnsafeArtifactError: truncated, or a tag that no message has.
    """
    position = 0
    while position < len(data):
        tag, position = _varint(data, position, path, where)
        field, wire = tag >> 3, tag & 7
        if field == 0 or field > (1 << 29) - 1:
            raise UnsafeArtifactError("bad field number", file=path, key=where, actual=field)
        if wire == 0:
            value, position = _varint(data, position, path, where)
            yield field, value
            continue
        if wire == 2:
            size, position = _varint(data, position, path, where)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise UnsafeArtifactError("bad wire type", file=path, key=f"{where} field {field}", actual=wire)
        if size > len(data) - position:
            raise UnsafeArtifactError(
                "truncated",
                file=path,
                key=f"{where} field {field}",
                expected=f"{size} bytes",
                actual=len(data) - position,
            )
        chunk = data[position : position + size]
        position += size
        yield field, struct.unpack("<f", chunk)[0] if wire == 5 else chunk


def packed_varints(data: bytes | memoryview, path: str | PathLike[str], where: str) -> list[int]:
    """The numbers of a packed repeated varint field, negative ones as int64."""
    numbers, position = [], 0
    while position < len(data):
        value, position = _varint(data, position, path, where)
        numbers.append(signed(value))
    return numbers


def signed(value: int) -> int:
    """A varint read as int64 (two's complement)."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _varint(data: bytes | memoryview, position: int, path: str | PathLike[str], where: str) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise UnsafeArtifactError("truncated number", file=path, key=where)
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise UnsafeArtifactError("number longer than 10 bytes", file=path, key=where)
