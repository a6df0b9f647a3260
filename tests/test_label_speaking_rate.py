"""Labels of speaking rate, from rows whose rate is known."""

import json
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "training"))

import label_speaking_rate  # noqa: E402


LENGTHS = {"one": 10, "two": 20, "three": 30, "four": 8}
EDGES = 6
TEXTS = ["one", "two three", "three one one", "two", "three three two one"] * 6


def write(path: Path, texts: list[str], factors: list[float]) -> list[float]:
    from datasets import Dataset

    rows = [
        {"text": text, "speech_token": [0] * round(factor * (EDGES + sum(LENGTHS[word] for word in text.split())))}
        for text, factor in zip(texts, factors, strict=True)
    ]
    Dataset.from_list(rows).to_parquet(str(path))
    return [len(row["speech_token"]) for row in rows]


def read(path: Path) -> list[dict]:
    from datasets import Dataset

    return list(Dataset.from_parquet(str(path)))


def test_a_length_for_every_word_and_one_for_the_edges():
    lengths = [EDGES + sum(LENGTHS[word] for word in text.split()) for text in TEXTS]
    vocabulary, found = label_speaking_rate.word_lengths(TEXTS, lengths)
    assert vocabulary == ["one", "three", "two"]
    assert found == pytest.approx([LENGTHS[word] for word in vocabulary] + [EDGES])


def test_thirds_are_those_of_the_first_file_and_of_what_the_words_take(tmp_path, capsys):
    """A short text of long words that is spoken quickly is quick, whatever its length is."""
    factors = [0.8] * 10 + [1.0] * 10 + [1.25] * 10
    write(tmp_path / "train.parquet", TEXTS, factors)
    write(tmp_path / "validation.parquet", ["three", "one one", "two"], [0.5, 1.5, 1.0])
    files = [str(tmp_path / name) for name in ("train.parquet", "validation.parquet")]
    label_speaking_rate.main([str(tmp_path / "out"), *files, "--slow", "Slowly!"])
    train = read(tmp_path / "out" / "train.parquet")
    assert [row["text"] for row in train] == TEXTS
    quick, slow = "Speak quickly.<|endofprompt|>", "Slowly!<|endofprompt|>"
    assert [row["instruct"] for row in train] == [quick] * 10 + [""] * 10 + [slow] * 10
    assert [row["instruct"] for row in read(tmp_path / "out" / "validation.parquet")] == [quick, slow, ""]
    reports = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [report["file"] for report in reports] == ["train.parquet", "validation.parquet"]
    assert [reports[0][name]["rows"] for name in ("quick", "neutral", "slow")] == [10, 10, 10]
    assert reports[1]["quick"]["seconds_per_word"] == pytest.approx(18 / 25)


def test_words_and_rows_that_cannot_be_used(tmp_path):
    write(tmp_path / "train.parquet", TEXTS, [1.0] * len(TEXTS))
    write(tmp_path / "few.parquet", TEXTS[:3], [1.0] * 3)
    with pytest.raises(ValueError, match="expected more rows than words, found 3 and 3"):
        label_speaking_rate.main([str(tmp_path / "out"), str(tmp_path / "few.parquet")])
    write(tmp_path / "other.parquet", ["four"], [1.0])
    with pytest.raises(ValueError, match="expected the words of the first file, found 'four'"):
        label_speaking_rate.main(
            [str(tmp_path / "out"), *(str(tmp_path / f"{n}.parquet") for n in ("train", "other"))]
        )
