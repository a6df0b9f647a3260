"""`units.txt` and the list of non-linguistic symbols of a WeNet pack."""

from __future__ import annotations

import re
from os import PathLike

from .errors import ConversionError, UnsafeArtifactError
from .files import read_utf8


MAX_UNITS_BYTES = 32 << 20
MAX_UNITS = 1_000_000
NON_LINGUISTIC_PATTERN = r"\[[^\[\]]+\]|<[^<>]+>|\{[^{}]+\}"


def read_units(path: str | PathLike[str]) -> dict[str, int]:
    """Reads lines of `token id` into a table in the order of the ids.

    Stricter than the toolkit, where a later line silently replaces an earlier one: every token and every id occurs
    once and the ids are exactly 0 .. n-1, in any order. Lines end with LF or CRLF.

    Raises:
        UnsafeArtifactError: bad encoding, too large, or a line that is not `token id`.
        ConversionError: duplicate token or id, negative id, or a gap.
    """
    tokens: dict[int, str] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(read_utf8(path, MAX_UNITS_BYTES).removesuffix("\n").split("\n"), start=1):
        fields = line.split()
        if len(fields) != 2 or not re.fullmatch(r"-?[0-9]{1,9}", fields[1]):
            raise UnsafeArtifactError("line is not `token id`", file=path, key=f"line {number}", actual=repr(line))
        token, index = fields[0], int(fields[1])
        if index < 0:
            raise ConversionError("negative id", file=path, key=token, expected="0 or more", actual=index)
        if token in lines:
            raise ConversionError("token occurs twice", file=path, key=token, actual=f"lines {lines[token]}, {number}")
        if index in tokens:
            raise ConversionError("id occurs twice", file=path, key=str(index), actual=f"{tokens[index]!r}, {token!r}")
        if len(tokens) >= MAX_UNITS:
            raise UnsafeArtifactError("too many units", file=path, expected=f"at most {MAX_UNITS}")
        tokens[index] = token
        lines[token] = number
    for index in range(len(tokens)):
        if index not in tokens:
            raise ConversionError(
                "ids have a gap", file=path, key=str(index), expected=f"0..{len(tokens) - 1}", actual=f"no id {index}"
            )
    return {tokens[index]: index for index in range(len(tokens))}


def write_units(units: dict[str, int]) -> str:
    """The text of a `units.txt`, one `token id` line per unit in the order of the ids."""
    return "".join(f"{token} {index}\n" for token, index in sorted(units.items(), key=lambda item: item[1]))


def read_non_linguistic_symbols(path: str | PathLike[str]) -> list[str]:
    """Reads one symbol per line, each written `{X}`, `<X>` or `[X]`.

    Raises:
        ConversionError: a line of another form, or a symbol that occurs twice.
    """
    symbols: list[str] = []
    for number, line in enumerate(read_utf8(path, 1 << 20).rstrip("\n").split("\n"), start=1):
        symbol = line.strip()
        if re.fullmatch(NON_LINGUISTIC_PATTERN, symbol) is None:
            raise ConversionError(
                "not a non-linguistic symbol",
                file=path,
                key=f"line {number}",
                expected="{X}, <X> or [X]",
                actual=symbol,
            )
        if symbol in symbols:
            raise ConversionError("symbol occurs twice", file=path, key=symbol)
        symbols.append(symbol)
    return symbols
