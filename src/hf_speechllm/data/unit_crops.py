"""Random crops of recordings with the speech units of the same stretch, for training a vocoder of units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from hf_speechllm.audio import load_audio
from hf_speechllm.data.augmentation import level, sample_generator
from hf_speechllm.data.manifests import Utterance


# Longer runs of durations are cut: they would make the padding of a batch.
_MAX_DURATIONS = 400


@dataclass
class UnitUtterance:
    """One recording and the units of its frames.

    Args:
        utterance: where its audio is.
        unit_ids (`(t,)`, int64): one per frame; frame `i` is taken for samples `i * hop` to `(i + 1) * hop`.
        speaker_id: number of the speaker.
    """

    utterance: Utterance
    unit_ids: Tensor
    speaker_id: int = 0


class UnitCropDataset(Dataset):
    """Items of `crop_frames` frames: units, waveform, speaker; and the runs of units of the whole recording.

    A recording that is shorter than a crop goes on with others of its speaker, as upstream repeats it, so that the
    crop is full and joins of words occur.

    Args:
        utterances: the recordings. crop_frames: length of an item. hop_length: samples per frame.
        sampling_rate: of the waveforms in Hz. seed: first part of every random draw.
        gain_db: range of the random gain of a crop, in dB.

    Raises:
        ValueError: no recording has a frame.
    """

    def __init__(
        self,
        utterances: Sequence[UnitUtterance],
        crop_frames: int,
        hop_length: int = 320,
        sampling_rate: int = 16000,
        seed: int = 0,
        gain_db: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        self.utterances = [item for item in utterances if len(item.unit_ids)]
        if not self.utterances:
            raise ValueError(f"expected at least one of {len(utterances)} recordings with a frame, found none")
        self.crop_frames, self.hop_length, self.sampling_rate = crop_frames, hop_length, sampling_rate
        self.seed, self.gain_db = seed, gain_db
        self._members: dict[int, list[int]] = {}
        for index, item in enumerate(self.utterances):
            self._members.setdefault(item.speaker_id, []).append(index)
        self._waveforms: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.utterances)

    def recording(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Waveform and units of a recording, cut to what both cover: `(t * hop,)` float32 and `(t,)` int64."""
        if index not in self._waveforms:
            self._waveforms[index] = load_audio(self.utterances[index].utterance.audio, self.sampling_rate)
        waveform, units = self._waveforms[index], self.utterances[index].unit_ids.numpy()
        frames = min(len(waveform) // self.hop_length, len(units))
        return waveform[: frames * self.hop_length], units[:frames]

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Tensor]:
        """An item, or (epoch, item); nothing else decides what it is.

        Returns:
            `unit_ids` int64 `(crop_frames,)`, `waveform` float32 `(crop_frames * hop,)`, `speaker_id` int64 `()`,
            `duration_unit_ids` and `duration_labels` int64 `(n,)`: runs of the recording's units, and their frames.
        """
        epoch, index = index if isinstance(index, tuple) else (0, index)
        rng = sample_generator(self.seed, epoch, index)
        speaker = self.utterances[index].speaker_id
        waveform, units = self.recording(index)
        runs, durations = torch.unique_consecutive(torch.from_numpy(units), return_counts=True)
        waves, rows, count = [waveform], [units], len(units)
        members = self._members[speaker]
        while count < self.crop_frames:
            waveform, units = self.recording(members[int(rng.integers(len(members)))])
            waves.append(waveform)
            rows.append(units)
            count += len(units)
        waveform, units = np.concatenate(waves), np.concatenate(rows)
        first = int(rng.integers(len(units) - self.crop_frames + 1))
        gain = level(rng.uniform(*self.gain_db))
        samples = slice(first * self.hop_length, (first + self.crop_frames) * self.hop_length)
        return {
            "unit_ids": torch.from_numpy(units[first : first + self.crop_frames]),
            "waveform": torch.from_numpy(waveform[samples] * np.float32(gain)),
            "speaker_id": torch.tensor(speaker),
            "duration_unit_ids": runs[:_MAX_DURATIONS],
            "duration_labels": durations[:_MAX_DURATIONS],
        }


def collate_unit_crops(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stacks crops, and pads runs with 0."""
    batch = {name: torch.stack([item[name] for item in items]) for name in ("unit_ids", "waveform", "speaker_id")}
    for name in ("duration_unit_ids", "duration_labels"):
        batch[name] = pad_sequence([item[name] for item in items], batch_first=True)
    return batch
