"""Random crops of recordings, for training a codec."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hf_speechllm.audio import load_audio
from hf_speechllm.data.augmentation import level, sample_generator
from hf_speechllm.data.manifests import Utterance


# As `Wav2Vec2FeatureExtractor`.
_VARIANCE_FLOOR = 1e-7


class WaveformCropDataset(Dataset):
    """Items of `crop_samples` samples from anywhere in a recording; a shorter one is continued by zeros.

    Decoded audio is kept in memory. What is drawn for item `i` in epoch `e` is settled by `(seed, e, i)` alone.

    Args:
        utterances: the recordings. crop_samples: length of an item. sampling_rate: of the waveforms in Hz.
        seed: first part of every random draw. gain_db: range of the random gain of a crop.

    Raises:
        ValueError: no recording.
    """

    def __init__(
        self,
        utterances: Sequence[Utterance],
        crop_samples: int,
        sampling_rate: int = 16000,
        seed: int = 0,
        gain_db: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        if not utterances:
            raise ValueError("utterances: expected at least one recording, got none")
        self.utterances, self.crop_samples, self.sampling_rate = list(utterances), crop_samples, sampling_rate
        self.seed, self.gain_db = seed, gain_db
        self._waveforms: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.utterances)

    def waveform(self, index: int) -> np.ndarray:
        """The whole recording, float32 `(samples,)`."""
        if index not in self._waveforms:
            self._waveforms[index] = load_audio(self.utterances[index].audio, self.sampling_rate)
        return self._waveforms[index]

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Tensor]:
        """An item, or (epoch, item).

        Returns:
            `waveform` float32 `(crop_samples,)`; `teacher_values`, the same stretch of the recording at mean 0 and
            variance 1, which a teacher has to hear; `attention_mask` int64 `(crop_samples,)`, 1 = recorded sample.
        """
        epoch, index = index if isinstance(index, tuple) else (0, index)
        rng = sample_generator(self.seed, epoch, index)
        waveform = self.waveform(index)
        start = int(rng.integers(max(len(waveform) - self.crop_samples, 0) + 1))
        gain = level(rng.uniform(*self.gain_db))
        # Statistics of the whole recording: those of a crop of silence would blow up its noise.
        scale = 1 / np.sqrt(waveform.var() + _VARIANCE_FLOOR) if len(waveform) else 1.0
        mean = waveform.mean() if len(waveform) else 0.0
        crop = waveform[start : start + self.crop_samples]
        item = {
            "waveform": crop * gain,
            "teacher_values": (crop - mean) * scale,
            "attention_mask": np.ones(len(crop), dtype=np.int64),
        }
        missing = self.crop_samples - len(crop)
        dtypes = {"attention_mask": np.int64}
        return {
            name: torch.from_numpy(np.pad(values, (0, missing)).astype(dtypes.get(name, np.float32)))
            for name, values in item.items()
        }


def collate_crops(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stacks items of one length: `(batch, crop_samples)` each."""
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}
