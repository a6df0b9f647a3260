"""Random crops of recordings with the number of their speaker, for training a speaker encoder."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from hf_speechllm.audio import load_audio
from hf_speechllm.data.augmentation import AugmentationConfig, sample_generator
from hf_speechllm.data.dataset import SpeechRecognitionDataset
from hf_speechllm.data.manifests import ManifestError, Utterance
from hf_speechllm.data.sources import read_sources
from hf_speechllm.models.feature_extraction_kaldi_fbank import KaldiFbankFeatureExtractor


def read_speaker_sources(sources: Sequence[Any], data_dir: str | None) -> list[Utterance]:
    """As [`read_sources`], where every utterance must name its speaker, in its row or by `columns: {speaker: ...}`.

    A name stands for one speaker in all sources.

    Raises:
        ManifestError: a source with an utterance that does not.
    """
    utterances = []
    for source in sources:
        given = {} if isinstance(source, str) else source.get("columns", {})
        for item in read_sources([source], data_dir):
            speaker = item.speaker or given.get("speaker")
            if speaker is None:
                raise ManifestError(f"{source}: expected a speaker for every utterance, found none for {item.key}")
            utterances.append(replace(item, speaker=str(speaker)))
    return utterances


class SpeakerCropDataset(SpeechRecognitionDataset):
    """Items of `crop_samples` samples from anywhere in an augmented utterance; a shorter one is repeated.

    What an [`AugmentationConfig`] does to features is left out. The clips of a joined utterance have one speed.

    Args:
        utterances: with speakers. speakers: those that are told apart, in the order of their numbers.
        clock: settles the sampling rate and the length of a frame.
        crop_samples: length of an item.
        augmentation, seed: as of [`SpeechRecognitionDataset`].
        speeds_are_speakers: a speaker at another speed, and so at another pitch, is another class.
        min_seconds, max_seconds: clips outside are left out.

    Raises:
        ValueError: no utterance is left.
    """

    def __init__(
        self,
        utterances: Sequence[Utterance],
        speakers: Sequence[str],
        clock: KaldiFbankFeatureExtractor,
        crop_samples: int,
        augmentation: AugmentationConfig,
        seed: int = 0,
        speeds_are_speakers: bool = False,
        min_seconds: float = 0.0,
        max_seconds: float = 102.4,
    ) -> None:
        self.numbers = {speaker: number for number, speaker in enumerate(speakers)}
        self.crop_samples, self.speeds_are_speakers = crop_samples, speeds_are_speakers
        super().__init__(
            utterances,
            clock,
            tokenizer=None,
            augmentation=augmentation,
            seed=seed,
            min_seconds=min_seconds,
            max_seconds=max_seconds,
            # Texts play no part; every clip has one label.
            label_maker=lambda text, columns: [0],
        )

    @property
    def variants(self) -> int:
        """Classes of a speaker: `class // variants` is the speaker's number."""
        return len(self.augmentation.speeds) if self.speeds_are_speakers else 1

    def lengths(self, epoch: int) -> np.ndarray:
        """Frames of every item, all alike, int64 `(items,)`."""
        return np.full(len(self), self._frames(self.crop_samples), dtype=np.int64)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, torch.Tensor]:
        """`waveform` float32 `(crop_samples,)` and `label` int64 `()` of an item, or of (epoch, item)."""
        epoch, index = index if isinstance(index, tuple) else (self.epoch, index)
        rng = sample_generator(self.seed, epoch, index)
        plan = self.plan(index, epoch, rng)
        plan = replace(plan, speeds=plan.speeds[:1] * len(plan.clips))
        waveform = self.augmented_waveform(plan, rng)
        missing = self.crop_samples - len(waveform)
        if missing > 0:
            waveform = np.pad(waveform, (0, missing), mode="wrap")
        start = int(rng.integers(max(-missing, 0) + 1))
        label = self.numbers[self.utterances[index].speaker]
        if self.speeds_are_speakers:
            label = label * self.variants + self.augmentation.speeds.index(plan.speeds[0])
        return {
            "waveform": torch.from_numpy(np.ascontiguousarray(waveform[start : start + self.crop_samples])),
            "label": torch.tensor(label),
        }


class SpeakerRecordings(Dataset):
    """Whole recordings and the numbers of their speakers, for evaluation.

    Args:
        utterances: with speakers. speakers: as of the training set; others get the numbers behind these.
        sampling_rate: of the waveforms in Hz.
    """

    def __init__(self, utterances: Sequence[Utterance], speakers: Sequence[str], sampling_rate: int) -> None:
        everyone = dict.fromkeys([*speakers, *(item.speaker for item in utterances)])
        self.numbers = {speaker: number for number, speaker in enumerate(everyone)}
        self.utterances, self.sampling_rate = list(utterances), sampling_rate

    def __len__(self) -> int:
        return len(self.utterances)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`waveform` float32 `(samples,)` and `label` int64 `()`, the speaker's number."""
        item = self.utterances[index]
        waveform = load_audio(item.audio, self.sampling_rate)
        return {"waveform": torch.from_numpy(waveform), "label": torch.tensor(self.numbers[item.speaker])}
