"""JSON files from a stranger."""

from __future__ import annotations

import json
from os import PathLike

from .errors import ConversionError, UnsafeArtifactError
from .files import read_utf8


MAX_JSON_BYTES = 1 << 20


def read_json(path: str | PathLike[str], max_bytes: int = MAX_JSON_BYTES) -> object:
    """Reads one JSON document.

    Raises:
        UnsafeArtifactError: malformed, too large or too deep, a key that occurs twice, or NaN and infinity.
        ConversionError: the file is missing or empty.
    """
    return parse_json(read_utf8(path, max_bytes), path)


def parse_json(text: str, path: str | PathLike[str]) -> object:
    """The document in `text`, which came from `path`.

    Raises:
        UnsafeArtifactError: see [`read_json`].
    """

    def refuse(name: str) -> object:
        raise UnsafeArtifactError("not a finite number", file=path, actual=name)

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise UnsafeArtifactError("key occurs twice", file=path, actual=[key for key, _ in pairs])
        return table

    try:
        return json.loads(text, parse_constant=refuse, object_pairs_hook=unique)
    except ConversionError:
        raise
    except (ValueError, RecursionError) as error:
        raise UnsafeArtifactError("not valid JSON", file=path, actual=type(error).__name__) from None


def read_json_mapping(path: str | PathLike[str], max_bytes: int = MAX_JSON_BYTES) -> dict[str, object]:
    """Reads a JSON document whose root is a mapping; see `read_json`.

    Raises:
        ConversionError: the root is something else.
    """
    content = read_json(path, max_bytes)
    if not isinstance(content, dict):
        raise ConversionError(
            "root of the document is not a mapping", file=path, expected="mapping", actual=type(content).__name__
        )
    return content
