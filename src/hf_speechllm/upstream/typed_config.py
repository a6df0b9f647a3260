"""Typed values out of a parsed configuration from a stranger, with a record of the keys that were used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from .errors import ConversionError


MAX_COUNT = 1 << 24
# Key of the configuration -> (our field, kind, default upstream). A dict as kind translates values.
KeyTable = Mapping[str, tuple[str, "str | dict[str, str]", object]]


class ConfigReader:
    """Takes typed values out of a configuration and remembers which keys were used.

    Args:
        configs: the parsed document.
        path: the file, for messages.
        required_values: `"section.key"` → the only value that is accepted when the key is present.
    """

    def __init__(self, configs: dict[str, object], path: Path, required_values: Mapping[str, object]) -> None:
        self.path = path
        self.configs = configs
        self.required_values = required_values
        self.used: set[str] = set()
        self.ignored: set[str] = set()

    def section(self, name: str) -> dict[str, object]:
        """The mapping under the top-level key `name`; empty when absent or null."""
        self.used.add(name)
        value = self.configs.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise ConversionError("not a mapping", file=self.path, key=name, actual=repr(value))
        return value

    def read(self, section: str, table: KeyTable, ignored: set[str]) -> dict[str, object]:
        """The fields of `table` from a section, with upstream's defaults; any other key is refused."""
        content = self.section(section)
        for key in content:
            full = f"{section}.{key}"
            if key in ignored:
                self.ignored.add(full)
            elif full in self.required_values:
                self.require(full, content[key])
            elif key not in table:
                raise ConversionError("unknown key", file=self.path, key=full, actual=repr(content[key]))
        return {
            field: self.value(f"{section}.{key}", content.get(key, default), kind)
            for key, (field, kind, default) in table.items()
        }

    def require(self, key: str, actual: object) -> None:
        """Refuses any value but the one that `required_values` has for `key`."""
        expected = self.required_values[key]
        if actual != expected or isinstance(actual, bool) != isinstance(expected, bool):
            raise ConversionError(
                "not supported", file=self.path, key=key, expected=repr(expected), actual=repr(actual)
            )

    def value(self, key: str, value: object, kind: str | dict[str, str]) -> object:
        """`value` checked against `kind`.

        Kinds: a translation table, `"count"` (≥ 1), `"size"` (≥ 0), `"integer"`, `"number"` (≥ 0), `"rate"` (0..1),
        `"flag"`, `"text"`; `"optional …"` also takes null.

        Raises:
            ConversionError: another type, or out of range.
        """
        if isinstance(kind, dict):
            if not isinstance(value, str) or value not in kind:
                raise ConversionError(
                    "not supported", file=self.path, key=key, expected=sorted(kind), actual=repr(value)
                )
            return kind[value]
        if kind.startswith("optional "):
            if value is None:
                return None
            kind = kind.removeprefix("optional ")
        whole = isinstance(value, int) and not isinstance(value, bool)
        real = whole or isinstance(value, float)
        checks: dict[str, tuple[Callable[[], bool], str]] = {
            "count": (lambda: whole and 1 <= value <= MAX_COUNT, f"integer 1..{MAX_COUNT}"),
            "size": (lambda: whole and 0 <= value <= MAX_COUNT, f"integer 0..{MAX_COUNT}"),
            "integer": (lambda: whole and -MAX_COUNT <= value <= MAX_COUNT, f"integer -{MAX_COUNT}..{MAX_COUNT}"),
            "number": (lambda: real and 0 <= value <= 1e9, "number 0..1e9"),
            "rate": (lambda: real and 0 <= value <= 1, "number 0..1"),
            "flag": (lambda: isinstance(value, bool), "true or false"),
            "text": (lambda: isinstance(value, str), "text"),
        }
        accepts, expected = checks[kind]
        if not accepts():
            raise ConversionError("bad value", file=self.path, key=key, expected=expected, actual=repr(value))
        return float(value) if kind in ("number", "rate") else value

    def top(self, key: str, kind: str | dict[str, str], default: object) -> object:
        """A top-level value."""
        self.used.add(key)
        return self.value(key, self.configs.get(key, default), kind)

    def refuse_unknown(self, ignored: set[str]) -> None:
        """Refuses top-level keys that were neither used nor are listed in `ignored` as irrelevant."""
        for key in self.configs:
            if key in ignored:
                self.ignored.add(key)
            elif key not in self.used:
                raise ConversionError("unknown key", file=self.path, key=key, actual=repr(self.configs[key]))
