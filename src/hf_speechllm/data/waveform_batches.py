"""Utterances as batches of waveforms of similar length, without holding a data set in memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hf_speechllm.audio import load_audio
from hf_speechllm.data.manifests import Utterance


# Utterances that are decoded and sorted by length together.
_WINDOW = 256


@dataclass
class WaveformBatch:
    """
    Args:
        indices: which utterances these are.
        input_values (`(b, samples)`, float32), attention_mask (`(b, samples)`, int64, 1 = real sample).
    """

    indices: list[int]
    input_values: Tensor
    attention_mask: Tensor

    @property
    def waveforms(self) -> list[Tensor]:
        """`(samples,)` each, without padding."""
        return [row[mask.bool()] for row, mask in zip(self.input_values, self.attention_mask, strict=True)]


def waveform_batches(
    utterances: Sequence[Utterance], sampling_rate: int, batch_seconds: float = 60.0
) -> Iterator[WaveformBatch]:
    """Batches of at most `batch_seconds` with their padding; a longer utterance is a batch of its own.

    Raises:
        AudioError: an audio file that cannot be used.
    """
    budget = int(batch_seconds * sampling_rate)
    for first in range(0, len(utterances), _WINDOW):
        window = range(first, min(first + _WINDOW, len(utterances)))
        waveforms = {index: torch.from_numpy(load_audio(utterances[index].audio, sampling_rate)) for index in window}
        batch: list[int] = []
        for index in sorted(window, key=lambda index: (-waveforms[index].numel(), index)):
            if batch and (len(batch) + 1) * waveforms[batch[0]].numel() > budget:
                yield _batch(batch, waveforms)
                batch = []
            batch.append(index)
        yield _batch(batch, waveforms)


def _batch(indices: list[int], waveforms: dict[int, Tensor]) -> WaveformBatch:
    samples = torch.tensor([waveforms[index].numel() for index in indices])
    values = pad_sequence([waveforms[index] for index in indices], batch_first=True)
    return WaveformBatch(indices, values, (torch.arange(values.shape[1]) < samples[:, None]).long())
