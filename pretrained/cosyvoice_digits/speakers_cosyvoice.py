"""Speakers that a CosyVoice knows by name: what the models read of a voice prompt, kept as a safetensors file.

Upstream keeps them as `spk2info.pt`, a pickle.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


SPEAKERS_NAME = "speakers.safetensors"
_PARTS = ("embedding", "speech_ids", "mel", "text_ids")


@dataclass
class CosyVoiceSpeaker:
    """One voice.

    Args:
        embedding (`(size,)`, float32): of the speaker encoder.
        speech_ids (`(n,)`, int64), mel (`(t, m)`, float32): of the recording; empty for a speaker without one, who can
            only speak in the modes `sft` and `instruct`.
        text_ids (`(n',)`, int64): what the recording says; empty where that is not known.
    """

    embedding: Tensor
    speech_ids: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    mel: Tensor = field(default_factory=lambda: torch.zeros(0, 80))
    text_ids: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))


def save_speakers(path: Path, speakers: Mapping[str, CosyVoiceSpeaker]) -> None:
    """Writes the file; names may hold any characters."""
    tensors = {
        f"{number}.{part}": getattr(speaker, part).contiguous().clone()
        for number, speaker in enumerate(speakers.values())
        for part in _PARTS
    }
    # One entry alone: with two, the library writes them in any order.
    save_file(tensors, path, metadata={"speakers": json.dumps(list(speakers), ensure_ascii=False)})


def load_speakers(path: Path) -> dict[str, CosyVoiceSpeaker]:
    """The speakers of a file.

    Raises:
        ValueError: damaged, or not such a file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = json.loads((file.metadata() or {}).get("speakers", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: damaged: {error}") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: metadata: expected a list of names as `speakers`, got {names!r}")
    expected = {f"{number}.{part}" for number in range(len(names)) for part in _PARTS}
    if tensors.keys() != expected:
        raise ValueError(f"{path}: expected tensors {sorted(expected)}, got {sorted(tensors)}")
    return {
        name: CosyVoiceSpeaker(**{part: tensors[f"{number}.{part}"] for part in _PARTS})
        for number, name in enumerate(names)
    }
