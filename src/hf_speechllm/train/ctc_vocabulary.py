"""The vocabulary of a CTC head over characters."""

import json
from collections.abc import Sequence
from pathlib import Path

from transformers import Wav2Vec2CTCTokenizer


def character_tokenizer(texts: Sequence[str], folder: Path) -> Wav2Vec2CTCTokenizer:
    """A tokenizer over the sorted characters of the texts; `<pad>` 0 is the blank, `|` the space.

    Args:
        folder: receives its `vocab.json`.
    """
    characters = sorted({character for text in texts for character in text if not character.isspace()})
    names = ["<pad>", "<s>", "</s>", "<unk>", "|", *characters]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "vocab.json"
    path.write_text(json.dumps({name: number for number, name in enumerate(names)}), encoding="utf-8")
    return Wav2Vec2CTCTokenizer(str(path))
