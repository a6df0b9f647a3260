"""Which model a folder holds, before anything of it is loaded for the way back."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from .errors import ConversionError
from .json_config import read_json_mapping


def require_model_type(folder: Path, expected: Collection[str]) -> str:
    """`model_type` of the `config.json` in `folder`, one of `expected`.

    Raises:
        ConversionError: no such file, or another model.
        UnsafeArtifactError: the file is no JSON.
    """
    path = folder / "config.json"
    actual = read_json_mapping(path).get("model_type")
    if actual not in expected:
        raise ConversionError(
            "another model", file=path, key="model_type", expected=" or ".join(sorted(expected)), actual=actual
        )
    return actual
