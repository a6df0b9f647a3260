"""The two errors that a reader of upstream packs raises."""

from __future__ import annotations

from os import PathLike


class ConversionError(ValueError):
    """A pack cannot be converted.

    The message names what was read (`file`), the part of it (`key`), and what was `expected` and `actual`, as far as
    they are known; each is also an attribute.
    """

    def __init__(
        self,
        message: str,
        *,
        file: str | PathLike[str] | None = None,
        key: str | None = None,
        expected: object = None,
        actual: object = None,
    ) -> None:
        self.file = None if file is None else str(file)
        self.key = key
        self.expected = expected
        self.actual = actual
        details = [
            f"{name}: {_shorten(value)}"
            for name, value in (("file", self.file), ("key", key), ("expected", expected), ("actual", actual))
            if value is not None
        ]
        super().__init__(f"{message} ({'; '.join(details)})" if details else message)


class UnsafeArtifactError(ConversionError):
    """A file of a pack was refused before or while it was parsed: it is hostile, damaged or mislabelled."""


def _shorten(value: object, limit: int = 400) -> str:
    text = str(value)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"
