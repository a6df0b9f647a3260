"""What a training run leaves beside the model: its numbers."""

import json
from collections.abc import Mapping
from pathlib import Path


def write_summary(output_dir: str | Path, summary: Mapping[str, object]) -> None:
    """Writes `training_summary.json` and prints it as one line."""
    text = json.dumps(summary, indent=1)
    (Path(output_dir) / "training_summary.json").write_text(text, encoding="utf-8")
    print(json.dumps(summary), flush=True)
