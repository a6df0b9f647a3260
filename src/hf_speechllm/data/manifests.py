"""Lists of utterances from the layouts that speech data comes in.

Four layouts give the same thing, a list of [`Utterance`]:

* an *audiofolder*: a folder with `metadata.csv` (or one such file per split folder), columns `file_name` and
  `transcription`, optionally `duration`, `speaker`, `split` and any others;
* a *jsonl* file: one object a line with `audio` and `text`, optionally `duration`, `speaker`, `split`;
* a *Kaldi* folder: `wav.scp` and `text`, optionally `utt2spk` and `utt2dur`. Pipes in `wav.scp` are refused;
* a *Hub data set* through `datasets` with `Audio(decode=False)`: decoded here, so without torchcodec.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


AUDIO_COLUMNS = ("file_name", "audio", "wav", "path")
TEXT_COLUMNS = ("transcription", "text", "txt", "sentence")


class ManifestError(ValueError):
    """A manifest that cannot be read; the message names file, line or column, what was expected and what was found."""


@dataclass(frozen=True)
class Utterance:
    """One clip and its text.

    Args:
        key (`str`): name of the clip, unique in its manifest.
        audio (`Path` or `bytes`): an audio file, or the content of one.
        text (`str`): the transcript, as written in the manifest.
        duration (`float`, *optional*): seconds; `None` where the manifest does not tell.
        speaker (`str`, *optional*): name of the speaker.
        columns (`dict[str, str]`): every column of the manifest's row, for filters.
    """

    key: str
    audio: Path | bytes
    text: str
    duration: float | None = None
    speaker: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)


def _first_present(row: Mapping[str, object], names: Sequence[str], where: str) -> str:
    for name in names:
        if row.get(name) not in (None, ""):
            return name
    raise ManifestError(f"{where}: expected one of the columns {', '.join(names)}, found {', '.join(map(str, row))}")


def _number(value: object, where: str) -> float | None:
    if value in (None, ""):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ManifestError(f"{where}: expected a duration in seconds, found {value!r}") from None


def _utterance(row: Mapping[str, object], folder: Path, where: str) -> Utterance:
    audio_column = _first_present(row, AUDIO_COLUMNS, where)
    text_column = next((name for name in TEXT_COLUMNS if row.get(name) is not None), None)
    if text_column is None:
        raise ManifestError(f"{where}: expected one of the columns {', '.join(TEXT_COLUMNS)}, found {', '.join(row)}")
    name = str(row[audio_column])
    return Utterance(
        key=str(row.get("key") or name),
        audio=folder / name,
        text=str(row[text_column]),
        duration=_number(row.get("duration"), where),
        speaker=None if row.get("speaker") in (None, "") else str(row["speaker"]),
        columns={key: str(value) for key, value in row.items()},
    )


def read_audiofolder(folder: Path) -> list[Utterance]:
    """Read a folder with `metadata.csv`; without one, every `*/metadata.csv` below it.

    Args:
        folder (`Path`): the data set or one split of it. `file_name` is relative to the metadata file.

    Raises:
        ManifestError: no metadata file, or a row without its audio or text column.
    """
    tables = (
        [folder / "metadata.csv"] if (folder / "metadata.csv").is_file() else sorted(folder.glob("*/metadata.csv"))
    )
    if not tables:
        raise ManifestError(f"{folder}: expected metadata.csv here or one folder below, found none")
    utterances = []
    for table in tables:
        with table.open(encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.DictReader(file), start=2):
                utterances.append(_utterance(row, table.parent, f"{table}:{number}"))
    return utterances


def read_jsonl(path: Path) -> list[Utterance]:
    """Read one JSON object a line; relative audio paths are relative to the file.

    Raises:
        ManifestError: a line that is not a JSON object, or one without audio or text.
    """
    utterances = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ManifestError(f"{path}:{number}: expected a JSON object, found {error.msg}") from None
            if not isinstance(row, dict):
                raise ManifestError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
            utterances.append(_utterance(row, path.parent, f"{path}:{number}"))
    return utterances


def _kaldi_table(path: Path) -> dict[str, str]:
    table: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        key, _, value = line.strip().partition(" ")
        if key in table:
            raise ManifestError(f"{path}:{number}: expected each key once, found {key!r} again")
        table[key] = value.strip()
    return table


def read_kaldi(folder: Path) -> list[Utterance]:
    """Read `wav.scp` and `text` (plus `utt2spk`, `utt2dur` where they exist), in the order of `wav.scp`.

    Raises:
        ManifestError: a missing file, a key without text, or a command (a line that ends in `|`) instead of a path.
    """
    for name in ("wav.scp", "text"):
        if not (folder / name).is_file():
            raise ManifestError(f"{folder}: expected the file {name}, found none")
    audio, text = _kaldi_table(folder / "wav.scp"), _kaldi_table(folder / "text")
    optional = {
        name: _kaldi_table(folder / name) if (folder / name).is_file() else {} for name in ("utt2spk", "utt2dur")
    }
    utterances = []
    for key, path in audio.items():
        if path.endswith("|"):
            raise ManifestError(f"{folder / 'wav.scp'}: {key}: expected a path, found a command; commands are not run")
        if key not in text:
            raise ManifestError(f"{folder / 'text'}: expected a transcript of {key}, found none")
        row = {"key": key, "file_name": path, "transcription": text[key]}
        row |= {"speaker": optional["utt2spk"].get(key, ""), "duration": optional["utt2dur"].get(key, "")}
        utterances.append(_utterance(row, folder, f"{folder / 'wav.scp'}: {key}"))
    return utterances


def read_hub_dataset(
    name: str, split: str, config: str | None = None, audio_column: str = "audio", text_column: str = "text"
) -> list[Utterance]:
    """Read one split of a Hub (or local) data set without decoding its audio column.

    Args:
        name (`str`): repository id, or a folder that `datasets.load_dataset` understands.
        split (`str`): split name.
        config (`str`, *optional*): configuration name.
        audio_column, text_column (`str`): which columns to read.

    Raises:
        ManifestError: a missing column.
    """
    from datasets import Audio, load_dataset

    table = load_dataset(name, config, split=split)
    for column in (audio_column, text_column):
        if column not in table.column_names:
            raise ManifestError(
                f"{name}[{split}]: expected the column {column}, found {', '.join(table.column_names)}"
            )
    utterances = []
    for number, row in enumerate(table.cast_column(audio_column, Audio(decode=False))):
        audio, text = row.pop(audio_column), row[text_column]
        utterances.append(
            Utterance(
                key=str(number),
                audio=audio["bytes"] if audio["bytes"] is not None else Path(audio["path"]),
                text=str(text),
                duration=_number(row.get("duration"), f"{name}[{split}] row {number}"),
                speaker=None if row.get("speaker") is None else str(row["speaker"]),
                columns={key: str(value) for key, value in row.items()} | {"split": str(row.get("split", split))},
            )
        )
    return utterances


def parse_filters(items: Sequence[str]) -> dict[str, list[str]]:
    """`["split=test", "speaker=a,b"]`, as command lines give it, to the `where` of [`read_manifest`]."""
    return {column: values.split(",") for column, _, values in (item.partition("=") for item in items)}


def read_manifest(source: str | Path, where: Mapping[str, str | Sequence[str]] | None = None) -> list[Utterance]:
    """Read an audiofolder, a jsonl file or a Kaldi folder, whichever `source` is, and filter it by column.

    Args:
        source (`str` or `Path`): file ending in `.jsonl`, a folder with `wav.scp`, or a folder with `metadata.csv`.
        where (`Mapping`, *optional*): column name to the value, or the values, that are kept,
            e.g. `{"split": "test_unseen"}`.

    Raises:
        ManifestError: an unknown layout, an unknown column in `where`, or a filter that keeps nothing.
    """
    path = Path(source)
    if path.is_file() and path.suffix == ".jsonl":
        utterances = read_jsonl(path)
    elif (path / "wav.scp").is_file():
        utterances = read_kaldi(path)
    elif path.is_dir():
        utterances = read_audiofolder(path)
    else:
        raise ManifestError(f"{path}: expected a .jsonl file or a folder with wav.scp or metadata.csv, found neither")
    for column, wanted in (where or {}).items():
        values = {wanted} if isinstance(wanted, str) else set(map(str, wanted))
        if utterances and column not in utterances[0].columns:
            raise ManifestError(f"{path}: expected the column {column}, found {', '.join(utterances[0].columns)}")
        utterances = [utterance for utterance in utterances if utterance.columns[column] in values]
    if not utterances:
        raise ManifestError(f"{path}: expected at least one utterance, found none{f' with {where}' if where else ''}")
    return utterances
