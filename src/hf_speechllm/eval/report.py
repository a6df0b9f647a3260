"""What an evaluation found, for a person and for a file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_report(report: Mapping[str, Any], output: Path | None) -> None:
    """Prints the figures as JSON, and writes them to `output` (its folder is made) where one is named."""
    text = json.dumps(report, indent=1)
    print(text)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n", encoding="utf-8")
