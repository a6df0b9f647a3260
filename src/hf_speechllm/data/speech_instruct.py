"""SpeechInstruct out of any speech with transcripts: cross-modal pairs, and chains of modality.

Paper: SpeechGPT (https://arxiv.org/abs/2305.11000), section 3 and appendices A to C. The rows are those of the
published data set, `{"prefix", "plain_text"}`, with what they were made of beside them. Everything is drawn from
(seed, place of the row), so the same input gives the same rows.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_speechllm.data.augmentation import sample_generator
from hf_speechllm.data.task_descriptions import RECOGNITION_DESCRIPTIONS, SYNTHESIS_DESCRIPTIONS
from hf_speechllm.models.prompts_speechgpt_lm import (
    META_INSTRUCTION,
    SpeechGptTurn,
    Style,
    chain_text,
    cross_modal_text,
)
from hf_speechllm.models.unit_string import unit_string


# Modalities of the question and of the answer.
FORMATS = ("speech_to_speech", "speech_to_text", "text_to_speech", "text_to_text")


@dataclass(frozen=True)
class SpokenText:
    """An utterance: its words, and its units with adjacent repeats removed."""

    key: str
    text: str
    units: tuple[int, ...]
    speaker: str = ""

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "SpokenText":
        """A row of `training/extract_units.py`."""
        return cls(str(row["key"]), str(row["text"]), tuple(row["units"]), str(row.get("speaker") or ""))


def cross_modal_rows(
    items: Sequence[SpokenText],
    seed: int = 0,
    recognition_probability: float = 0.5,
    speakable: Callable[[SpokenText], bool] = lambda item: True,
    count_tokens: Callable[[str], int] | None = None,
    max_tokens: int | None = None,
    prefix: str = META_INSTRUCTION,
) -> list[dict[str, Any]]:
    """Stage 2: each utterance once, as a request to write it down or to read it out, in random words.

    Args:
        items: utterances. seed (`int`): of the draws.
        recognition_probability (`float`): how often an utterance becomes recognition and not synthesis.
        speakable: utterances that may become synthesis, e.g. those of one voice; the others are recognised.
        count_tokens, max_tokens: with both, turns are packed into one dialogue as long as the prefix and the turns
            have no more than this many tokens together; a turn that is too long by itself is a dialogue of its own.
        prefix (`str`): meta instruction of every row.

    Returns:
        rows of `prefix`, `plain_text`, `tasks` (`"recognition"` or `"synthesis"` of each turn) and `keys`.

    Raises:
        ValueError: a probability outside of 0 to 1, or `max_tokens` without `count_tokens`.
    """
    if not 0.0 <= recognition_probability <= 1.0:
        raise ValueError(f"recognition_probability: expected 0..1, got {recognition_probability}")
    if (max_tokens is None) != (count_tokens is None):
        raise ValueError("max_tokens and count_tokens: expected both or neither")
    rows: list[dict[str, Any]] = []
    used, prefix_tokens = 0, count_tokens(prefix) if count_tokens is not None else 0
    for place, item in enumerate(items):
        rng = sample_generator(seed, 0, place)
        recognise = bool(rng.random() < recognition_probability) or not speakable(item)
        descriptions = RECOGNITION_DESCRIPTIONS if recognise else SYNTHESIS_DESCRIPTIONS
        description = descriptions[int(rng.integers(len(descriptions)))]
        speech = unit_string(item.units)
        turn = cross_modal_text(description, *((speech, item.text) if recognise else (item.text, speech)))
        task = "recognition" if recognise else "synthesis"
        size = count_tokens(turn) if count_tokens is not None else 0
        if rows and max_tokens is not None and used + size <= max_tokens:
            rows[-1]["plain_text"] += turn
            rows[-1]["tasks"].append(task)
            rows[-1]["keys"].append(item.key)
            used += size
        else:
            rows.append({"prefix": prefix, "plain_text": turn, "tasks": [task], "keys": [item.key]})
            used = prefix_tokens + size
    return rows


def chain_turn(chain_format: str, question: SpokenText, answer: SpokenText) -> SpeechGptTurn:
    """A question and its answer as a turn in one of `FORMATS`.

    Raises:
        ValueError: an unknown format.
    """
    if chain_format not in FORMATS:
        raise ValueError(f"format: expected one of {FORMATS}, got {chain_format!r}")
    return SpeechGptTurn(
        question=question.text,
        answer=answer.text,
        question_units=unit_string(question.units) if chain_format.startswith("speech") else None,
        answer_units=unit_string(answer.units) if chain_format.endswith("speech") else None,
    )


def chain_rows(
    dialogues: Sequence[tuple[SpokenText, SpokenText]],
    seed: int = 0,
    formats: Sequence[str] = FORMATS,
    style: Style = "released",
    prefix: str = META_INSTRUCTION,
) -> list[dict[str, Any]]:
    """Stage 3: each (question, answer) once, in a format that is drawn from `formats`.

    Returns:
        rows of `prefix`, `plain_text`, `format` and `key`.
    """
    rows = []
    for place, (question, answer) in enumerate(dialogues):
        chosen = formats[int(sample_generator(seed, 1, place).integers(len(formats)))]
        text = chain_text(chain_turn(chosen, question, answer), style)
        rows.append({"prefix": prefix, "plain_text": text, "format": chosen, "key": question.key})
    return rows


def write_data_set(rows: Sequence[Mapping[str, Any]], folder: Path, split: str, facts: Mapping[str, Any]) -> Path:
    """Write rows as `folder/data/SPLIT.parquet`, and the card `folder/README.md` with how they were made.

    Args:
        split (`str`): e.g. `"train"`; a folder may get several, one call each.
        facts: what the card says: `sources`, `seed` and any others, by name.

    Returns:
        the parquet file. `datasets.load_dataset(folder)` reads the folder.
    """
    from datasets import Dataset

    path = folder / "data" / f"{split}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list([dict(row) for row in rows]).to_parquet(str(path))
    record = folder / "data" / f"{split}.json"
    record.write_text(json.dumps({"rows": len(rows), **facts}, indent=1, ensure_ascii=False), encoding="utf-8")
    splits = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(record.parent.glob("*.json"))}
    lines = ["---", "pretty_name: SpeechInstruct", "task_categories:", "- any-to-any", "configs:"]
    lines += ["- config_name: default", "  data_files:"]
    lines += [f"  - {{split: {name}, path: data/{name}.parquet}}" for name in splits]
    lines += ["---", "", "# Instructions for a speech language model", ""]
    lines += ["Each row is a meta instruction (`prefix`) and a dialogue (`plain_text`) in which speech is written as"]
    lines += ["units, `<sosp><12><7>...<eosp>`. The layout is that of SpeechGPT's SpeechInstruct.", ""]
    for name, told in splits.items():
        lines += [f"## {name}", "", *(f"- {key}: {value}" for key, value in told.items()), ""]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
    return path


def shuffled(items: Sequence[Any], seed: int) -> list[Any]:
    """The items in an order that depends on the seed and their number alone."""
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(items))
    return [items[int(index)] for index in order]
