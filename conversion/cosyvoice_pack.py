"""What every part of a CosyVoice pack is found by: its yaml."""

from __future__ import annotations

from pathlib import Path

from hf_speechllm.upstream.errors import ConversionError


# In the order of the versions.
YAML_NAMES = ("cosyvoice.yaml", "cosyvoice2.yaml", "cosyvoice3.yaml")
# Shape of the Qwen2 and text tokens of versions 2 and 3.
QWEN_FOLDER = "CosyVoice-BlankEN"


def find_yaml(pack: Path) -> Path:
    """The yaml of a pack, whose name says the version.

    Raises:
        ConversionError: no folder, or not exactly one such file.
    """
    if not pack.is_dir():
        raise ConversionError("pack is not a directory", file=pack)
    found = [pack / name for name in YAML_NAMES if (pack / name).exists()]
    if len(found) != 1:
        raise ConversionError(
            "no single yaml",
            file=pack,
            expected=f"one of {', '.join(YAML_NAMES)}",
            actual=[path.name for path in found],
        )
    return found[0]
