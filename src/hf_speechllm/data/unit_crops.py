"""Random crops of recordings with the units and the pitch of the same stretch, for training a vocoder of units."""

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
from hf_speechllm.models.pitch_scale import PitchScale
from hf_speechllm.train.pitch import track_pitch


# Longer runs of durations are cut: they would make the padding of a batch.
_MAX_DURATIONS = 400


@dataclass
class UnitUtterance:
    """One recording and the units of its frames.

    Args:
        utterance: where its audio is.
        unit_ids (`(t,)`, int64): one per frame; frame `i` is taken for samples `i * hop` to `(i + 1) * hop`.
        speaker_id, style_id: numbers of the speaker and of the style.
    """

    utterance: Utterance
    unit_ids: Tensor
    speaker_id: int = 0
    style_id: int = 0


class UnitCropDataset(Dataset):
    """Items of `crop_frames` frames: units, waveform, speaker, style, pitch; and the runs of units of the
    whole recording.

    A recording that is shorter than a crop goes on with others of its speaker and style, as upstream repeats it, so
    that the crop is full and joins of words occur.

    Args:
        utterances: the recordings. crop_frames: length of an item. hop_length: samples per frame.
        sampling_rate: of the waveforms in Hz. seed: first part of every random draw.
        gain_db: range of the random gain of a crop, in dB.
        pitch_scale: of the pitch that a model reads, for items with it.

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
        pitch_scale: PitchScale | None = None,
    ) -> None:
        self.utterances = [item for item in utterances if len(item.unit_ids)]
        if not self.utterances:
            raise ValueError(f"expected at least one of {len(utterances)} recordings with a frame, found none")
        self.crop_frames, self.hop_length, self.sampling_rate = crop_frames, hop_length, sampling_rate
        self.seed, self.gain_db, self.pitch_scale = seed, gain_db, pitch_scale
        self._members: dict[tuple[int, int], list[int]] = {}
        for index, item in enumerate(self.utterances):
            self._members.setdefault((item.speaker_id, item.style_id), []).append(index)
        self._waveforms: dict[int, np.ndarray] = {}
        self._pitch: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.utterances)

    def recording(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Waveform and units of a recording, cut to what both cover: `(t * hop,)` float32 and `(t,)` int64."""
        if index not in self._waveforms:
            self._waveforms[index] = load_audio(self.utterances[index].utterance.audio, self.sampling_rate)
        waveform, units = self._waveforms[index], self.utterances[index].unit_ids.numpy()
        frames = min(len(waveform) // self.hop_length, len(units))
        return waveform[: frames * self.hop_length], units[:frames]

    def pitch(self, index: int) -> np.ndarray:
        """What a model reads as the pitch of each frame of [`recording`], `(t,)`: int64 bins, or float32.

        It is that of the whole recording, so that the edges of crops do not change it.
        """
        if index not in self._pitch:
            waveform, scale = torch.from_numpy(self.recording(index)[0])[None], self.pitch_scale
            f0 = track_pitch(waveform, self.sampling_rate, self.hop_length, scale.lowest, scale.highest)
            self._pitch[index] = scale.encode(f0[0]).numpy()
        return self._pitch[index]

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Tensor]:
        """An item, or (epoch, item); nothing else decides what it is.

        Returns:
            `unit_ids` int64 `(crop_frames,)`, `waveform` float32 `(crop_frames * hop,)`, `speaker_id` and
            `style_id` int64 `()`, with a pitch scale `f0` `(crop_frames,)` as [`pitch`] has it,
            `duration_unit_ids` and `duration_labels` int64 `(n,)`: runs of the recording's units, and their frames.
        """
        epoch, index = index if isinstance(index, tuple) else (0, index)
        rng = sample_generator(self.seed, epoch, index)
        speaker, style = self.utterances[index].speaker_id, self.utterances[index].style_id
        waveform, units = self.recording(index)
        runs, durations = torch.unique_consecutive(torch.from_numpy(units), return_counts=True)
        pieces, waves, rows, count = [index], [waveform], [units], len(units)
        members = self._members[speaker, style]
        while count < self.crop_frames:
            pieces.append(members[int(rng.integers(len(members)))])
            waveform, units = self.recording(pieces[-1])
            waves.append(waveform)
            rows.append(units)
            count += len(units)
        waveform, units = np.concatenate(waves), np.concatenate(rows)
        first = int(rng.integers(len(units) - self.crop_frames + 1))
        gain = level(rng.uniform(*self.gain_db))
        samples = slice(first * self.hop_length, (first + self.crop_frames) * self.hop_length)
        item = {
            "unit_ids": torch.from_numpy(units[first : first + self.crop_frames]),
            "waveform": torch.from_numpy(waveform[samples] * np.float32(gain)),
            "speaker_id": torch.tensor(speaker),
            "style_id": torch.tensor(style),
            "duration_unit_ids": runs[:_MAX_DURATIONS],
            "duration_labels": durations[:_MAX_DURATIONS],
        }
        if self.pitch_scale is not None:
            f0 = np.concatenate([self.pitch(piece) for piece in pieces])
            item["f0"] = torch.from_numpy(f0[first : first + self.crop_frames])
        return item


def collate_unit_crops(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stacks crops, and pads runs with 0."""
    runs = ("duration_unit_ids", "duration_labels")
    batch = {name: torch.stack([item[name] for item in items]) for name in items[0] if name not in runs}
    for name in runs:
        batch[name] = pad_sequence([item[name] for item in items], batch_first=True)
    return batch
