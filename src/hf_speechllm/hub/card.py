"""Model cards: facts (YAML, written by a person) and results (JSON, written by an evaluation) to README.md.

facts: the keys below, and what the template uses besides; see `model_cards/*.yaml`. `pipeline_tag` chooses a template:
`automatic-speech-recognition` (the default) or `text-to-speech`, whose evaluation is a text of the facts.

results: `{"rows": [{"model", "dataset", "split", "decoding", "chunk_size", "metric", "value", "per_seed"}, ...]}`,
where `value` is the mean over seeds in percent, `per_seed` (optional) lists them, and `chunk_size` is -1 for full
context. `substitutions`, `deletions` and `insertions` (optional, mean numbers) get a column.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..shipped import shipped_folder


REQUIRED_FACTS = ("model_name", "title", "summary", "language", "license", "tags", "datasets")
TEMPLATES = {
    "automatic-speech-recognition": "template.md.jinja",
    "text-to-speech": "synthesis.md.jinja",
}
REQUIRED_RESULT = ("model", "dataset", "split", "decoding", "chunk_size", "metric", "value")


def read_facts(facts: str | os.PathLike, results: str | os.PathLike | None = None) -> dict[str, Any]:
    """Facts with the rows of the results file under `results`.

    Raises:
        ValueError: a missing key, by file and name.
    """
    content = yaml.safe_load(Path(facts).read_text(encoding="utf-8"))
    missing = [key for key in REQUIRED_FACTS if key not in content]
    if missing:
        raise ValueError(f"{facts}: expected the keys {', '.join(REQUIRED_FACTS)}; missing: {', '.join(missing)}")
    content["results"] = [] if results is None else _read_rows(results)
    return content


def _read_rows(results: str | os.PathLike) -> list[dict[str, Any]]:
    rows = json.loads(Path(results).read_text(encoding="utf-8"))["rows"]
    for number, row in enumerate(rows):
        missing = [key for key in REQUIRED_RESULT if key not in row]
        if missing:
            raise ValueError(f"{results}: rows[{number}]: missing: {', '.join(missing)}")
    return rows


def render_card(facts: dict[str, Any], template: str | os.PathLike | None = None) -> str:
    """README.md with metadata that the Hub reads (`model-index` holds the results).

    Args:
        facts: of [`read_facts`].
        template: Jinja file; default the one in `model_cards/` for the task.

    Raises:
        ValueError: a `pipeline_tag` without a template.
    """
    results, task = facts["results"], facts.get("pipeline_tag", "automatic-speech-recognition")
    if task not in TEMPLATES:
        raise ValueError(f"pipeline_tag: expected one of {sorted(TEMPLATES)}, got {task!r}")
    data = ModelCardData(
        model_name=facts["model_name"],
        language=facts["language"],
        license=facts["license"],
        library_name="transformers",
        pipeline_tag=task,
        tags=facts["tags"],
        datasets=facts["datasets"],
        metrics=sorted({row["metric"] for row in results}) or None,
        base_model=facts.get("base_model"),
        eval_results=[_eval_result(row) for row in results if row["model"] == facts["model_name"]] or None,
    )
    if template is None:
        template = shipped_folder("model_cards") / TEMPLATES[task]
    card = ModelCard.from_template(
        data, template_path=str(template), **{k: v for k, v in facts.items() if k != "tags"}
    )
    # Jinja leaves an empty line for every `if`.
    return re.sub(r"\n{3,}", "\n\n", str(card)).rstrip() + "\n"


def _eval_result(row: dict[str, Any]) -> EvalResult:
    chunk = "full context" if row["chunk_size"] == -1 else f"chunk {row['chunk_size']}"
    return EvalResult(
        task_type="automatic-speech-recognition",
        task_name="Automatic Speech Recognition",
        dataset_type=row["dataset"],
        dataset_name=row["dataset"],
        dataset_split=row["split"],
        metric_type=row["metric"],
        metric_name=f"{row['metric'].upper()} ({row['decoding']}, {chunk})",
        metric_value=row["value"],
    )
