"""Utterances to waveforms and labels, for models that read samples (HuBERT)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from hf_speechllm.data.augmentation import sample_generator
from hf_speechllm.data.dataset import SpeechRecognitionDataset


class SpeechWaveformDataset(SpeechRecognitionDataset):
    """As [`SpeechRecognitionDataset`], but an item is its augmented waveform.

    The feature extractor settles the sampling rate and the length of a plan; what an [`AugmentationConfig`] does to
    features is left out.

    Args:
        normalize (`bool`): every waveform gets mean 0 and variance 1, as `Wav2Vec2FeatureExtractor` does.
    """

    def __init__(self, *args, normalize: bool = True, **kwargs):
        super().__init__(*args, **kwargs)
        self.normalize = normalize

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, torch.Tensor]:
        """`input_values` float32 `(samples,)` and `labels` int64 `(tokens,)` of an item, or of (epoch, item)."""
        epoch, index = index if isinstance(index, tuple) else (self.epoch, index)
        if self.augmentation is None:
            waveform, labels = self.waveform(index), self._labels(self.texts[index], self.utterances[index].columns)
        else:
            rng = sample_generator(self.seed, epoch, index)
            plan = self.plan(index, epoch, rng)
            waveform, labels = self.augmented_waveform(plan, rng), self.joined_labels(plan)
        if self.normalize:
            waveform = (waveform - waveform.mean()) / np.sqrt(waveform.var() + 1e-7)
        return {"input_values": torch.from_numpy(waveform.astype(np.float32)), "labels": torch.tensor(labels)}


def collate_waveforms(items: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Pads waveforms with 0 and labels with -100.

    Returns:
        `input_values` float32 `(batch, samples)`, `attention_mask` int64 `(batch, samples)` with 1 = real sample,
        `labels` int64 `(batch, tokens)`.
    """
    samples = torch.tensor([item["input_values"].numel() for item in items])
    values = pad_sequence([item["input_values"] for item in items], batch_first=True)
    return {
        "input_values": values,
        "attention_mask": (torch.arange(values.shape[1]) < samples[:, None]).long(),
        "labels": pad_sequence([item["labels"] for item in items], batch_first=True, padding_value=-100),
    }
