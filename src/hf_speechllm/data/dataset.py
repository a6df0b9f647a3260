"""Map-style speech recognition data set: utterances to features and labels.

Decoded and resampled audio is kept in memory, so an epoch after the first costs only augmentation and filter banks.
What happens to item `i` in epoch `e` is settled by the plan of `(seed, e, i)` alone (see `augmentation.py`), which
also tells its length before any audio is touched; the bucketing sampler relies on that.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from hf_speechllm.audio import load_audio, resample
from hf_speechllm.data.augmentation import (
    AugmentationConfig,
    augment_log_mel,
    augment_waveform,
    change_speed,
    change_tempo,
    join_clips,
    mask_features,
    sample_generator,
)
from hf_speechllm.data.manifests import Utterance
from hf_speechllm.models.feature_extraction_kaldi_fbank import KaldiFbankFeatureExtractor


@dataclass(frozen=True)
class ClipPlan:
    """What is drawn for one item in one epoch before its audio is read.

    Args:
        clips (`tuple[int, ...]`): indices of the joined utterances, the item itself first.
        speeds (`tuple[float, ...]`): speed factor of each clip.
        gaps (`tuple[int, ...]`): silence in samples before, between and after the clips.
        silence_levels (`tuple[float, ...]`): level of each gap in dB relative to full scale.
        tempo (`float`): change of duration applied to the features.
        num_frames (`int`): feature frames that result, after stacking and before SpecTrim.
    """

    clips: tuple[int, ...]
    speeds: tuple[float, ...]
    gaps: tuple[int, ...]
    silence_levels: tuple[float, ...]
    tempo: float
    num_frames: int


def log_mel_extractor(extractor: KaldiFbankFeatureExtractor) -> KaldiFbankFeatureExtractor:
    """The same filter banks without stacking and CMVN."""
    plain = copy.copy(extractor)
    plain.lfr_m = plain.lfr_n = 1
    plain.cmvn_mean = plain.cmvn_inverse_std = None
    return plain


def _resample(waveform: np.ndarray, rate_in: int, rate_out: int) -> np.ndarray:
    return resample(torch.from_numpy(waveform), rate_in, rate_out).numpy()


class SpeechRecognitionDataset(Dataset):
    """Features and labels of a list of utterances.

    Args:
        utterances (`Sequence[Utterance]`): the clips; joined clips come from the same speaker.
        feature_extractor ([`KaldiFbankFeatureExtractor`]): waveform to log-mel.
        tokenizer ([`PreTrainedTokenizerBase`]): text to label ids, called with `add_special_tokens=False`.
        augmentation ([`AugmentationConfig`], *optional*): `None` gives the plain features (evaluation).
        seed (`int`): first part of every random draw.
        separator (`str`): put between the texts of joined clips; `" "` for languages that write spaces, else `""`.
        min_seconds, max_seconds (`float`): clips outside are left out.
        min_tokens, max_tokens (`int`): clips whose label is shorter or longer are left out.
        label_maker (`Callable`, *optional*): text and the columns of its manifest row to label ids, in place of the
            tokenizer, for labels that are more than the text (`FunasrSenseVoiceProcessor.label_ids_of_row`). Joined
            clips have the columns of the first.

    Raises:
        ValueError: no utterance is left, or two clips are to be joined that do not name their speaker.
    """

    def __init__(
        self,
        utterances: Sequence[Utterance],
        feature_extractor: KaldiFbankFeatureExtractor,
        tokenizer: PreTrainedTokenizerBase,
        augmentation: AugmentationConfig | None = None,
        seed: int = 0,
        separator: str = " ",
        min_seconds: float = 0.0,
        max_seconds: float = 102.4,
        min_tokens: int = 1,
        max_tokens: int = 200,
        label_maker: Callable[[str, Mapping[str, str]], list[int]] | None = None,
    ):
        self.label_maker = label_maker
        self.log_mel_extractor = log_mel_extractor(feature_extractor)
        self.feature_extractor = feature_extractor
        self.tokenizer = tokenizer
        self.augmentation = augmentation
        self.seed = seed
        self.separator = separator
        self.epoch = 0
        self._waveforms: dict[int, np.ndarray] = {}

        kept, samples, texts = [], [], []
        for utterance in utterances:
            seconds = utterance.duration
            waveform = None
            if seconds is None:
                waveform = load_audio(utterance.audio, feature_extractor.sampling_rate)
                seconds = waveform.size / feature_extractor.sampling_rate
            tokens = len(self._labels(utterance.text, utterance.columns))
            if not (min_seconds <= seconds <= max_seconds and min_tokens <= tokens <= max_tokens):
                continue
            if waveform is not None:
                self._waveforms[len(kept)] = waveform
            kept.append(utterance)
            texts.append(utterance.text)
            samples.append(int(round(seconds * feature_extractor.sampling_rate)))
        if not kept:
            raise ValueError(
                f"expected at least one of {len(utterances)} utterances within the length limits, found none"
            )
        self.utterances, self.texts, self._nominal_samples = kept, texts, samples

        by_speaker: dict[str | None, list[int]] = defaultdict(list)
        for index, utterance in enumerate(kept):
            by_speaker[utterance.speaker].append(index)
        if augmentation is not None and len(augmentation.join_weights) > 1 and None in by_speaker:
            raise ValueError(
                f"join_weights: expected a speaker for every clip, found none for {kept[by_speaker[None][0]].key}"
            )
        self._same_speaker = {speaker: np.array(members) for speaker, members in by_speaker.items()}

    def __len__(self) -> int:
        return len(self.utterances)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that plain integer indices refer to."""
        self.epoch = epoch

    def waveform(self, index: int) -> np.ndarray:
        """The clip at the model's sampling rate, float32 `(samples,)`; decoded once, then kept in memory."""
        if index not in self._waveforms:
            self._waveforms[index] = load_audio(self.utterances[index].audio, self.feature_extractor.sampling_rate)
        return self._waveforms[index]

    def plan(self, index: int, epoch: int, rng: np.random.Generator | None = None) -> ClipPlan:
        """The draws of item `index` in `epoch` that settle its length.

        Args:
            rng (`np.random.Generator`, *optional*): the item's own generator, fresh; by default it is made here.
        """
        config, rate = self.augmentation, self.feature_extractor.sampling_rate
        if config is None:
            frames = self._stacked(self._frames(self._nominal_samples[index]))
            return ClipPlan((index,), (1.0,), (0, 0), (0.0, 0.0), 1.0, frames)
        rng = rng or sample_generator(self.seed, epoch, index)
        weights = np.cumsum(config.join_weights)
        count = 1 + int(np.searchsorted(weights, rng.random() * weights[-1], side="right"))
        members = self._same_speaker[self.utterances[index].speaker]
        clips = (index, *(int(clip) for clip in members[rng.integers(len(members), size=count - 1)]))
        speeds = tuple(config.speeds[draw] for draw in rng.integers(len(config.speeds), size=count))
        pauses = rng.uniform(*config.join_gap_seconds, size=count - 1)
        edges = rng.uniform(*config.edge_silence_seconds, size=2) * (rng.random(2) < config.edge_silence_probability)
        gaps = tuple(int(seconds * rate) for seconds in (edges[0], *pauses, edges[1]))
        silence_levels = tuple(rng.uniform(*config.silence_level_db, size=count + 1).tolist())
        stretched, tempo = rng.random(), rng.uniform(*config.tempo_factors)
        tempo = tempo if stretched < config.tempo_probability else 1.0
        samples = sum(gaps) + sum(
            self._nominal_samples[clip] / speed for clip, speed in zip(clips, speeds, strict=True)
        )
        frames = self._stacked(int(round(self._frames(int(samples)) / tempo)))
        return ClipPlan(clips, speeds, gaps, silence_levels, tempo, frames)

    def lengths(self, epoch: int) -> np.ndarray:
        """Feature frames of every item in `epoch`, int64 `(items,)`, from the plans (audio is not read)."""
        return np.array([self.plan(index, epoch).num_frames for index in range(len(self))], dtype=np.int64)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, torch.Tensor]:
        """Features and labels of an item.

        Args:
            index (`int` or `tuple[int, int]`): the item, or (epoch, item) as the bucketing sampler gives it, which
                leaves nothing to the state of this object.

        Returns:
            `input_features` float32 `(frames, lfr_m * bins)` and `labels` int64 `(tokens,)`.
        """
        epoch, index = index if isinstance(index, tuple) else (self.epoch, index)
        config, rate = self.augmentation, self.feature_extractor.sampling_rate
        if config is None:
            features = self.feature_extractor(self.waveform(index), sampling_rate=rate).input_features[0]
            labels = self._labels(self.texts[index], self.utterances[index].columns)
            return {"input_features": features, "labels": torch.tensor(labels)}

        rng = sample_generator(self.seed, epoch, index)
        plan = self.plan(index, epoch, rng)
        waveform = self.augmented_waveform(plan, rng)
        dither = {}
        if config.dither > 0:
            seed = int(rng.integers(2**63))
            dither = {"dither": config.dither, "generator": torch.Generator().manual_seed(seed)}
        log_mel = self.log_mel_extractor(waveform, sampling_rate=rate, **dither).input_features[0].numpy()
        log_mel = augment_log_mel(change_tempo(log_mel, plan.tempo), config, rng, rate)
        features, _ = self.feature_extractor.stack_and_normalize(
            torch.from_numpy(log_mel)[None], torch.tensor([len(log_mel)])
        )
        features = mask_features(features[0].numpy(), config, rng)
        return {"input_features": torch.from_numpy(features), "labels": torch.tensor(self.joined_labels(plan))}

    def augmented_waveform(self, plan: ClipPlan, rng: np.random.Generator) -> np.ndarray:
        """The clips of a plan at their speeds, joined and augmented, float32 `(samples,)`.

        Args:
            rng (`np.random.Generator`): the generator that the plan was drawn from, where the plan left it.
        """
        clips = [
            change_speed(self.waveform(clip), speed, self.feature_extractor.sampling_rate, _resample)
            for clip, speed in zip(plan.clips, plan.speeds, strict=True)
        ]
        return augment_waveform(join_clips(clips, plan.gaps, plan.silence_levels, rng), self.augmentation, rng)

    def joined_labels(self, plan: ClipPlan) -> list[int]:
        """Label ids of the joined clips of a plan."""
        text = self.separator.join(self.texts[clip] for clip in plan.clips)
        return self._labels(text, self.utterances[plan.clips[0]].columns)

    def _labels(self, text: str, columns: Mapping[str, str]) -> list[int]:
        if self.label_maker is not None:
            return self.label_maker(text, columns)
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _frames(self, samples: int) -> int:
        extractor = self.feature_extractor
        if samples < extractor.window_length:
            return 0
        return 1 + (samples - extractor.window_length) // extractor.hop_length

    def _stacked(self, frames: int) -> int:
        return -(-frames // self.feature_extractor.lfr_n)


def cmvn_statistics(dataset: SpeechRecognitionDataset, max_items: int = 2000) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and inverse standard deviation per feature over (evenly spaced) items, accumulated in float64.

    Args:
        dataset ([`SpeechRecognitionDataset`]): without SpecAugment, whose zeros are not speech.
        max_items (`int`): at most this many items are read.

    Returns:
        two float32 tensors, one number per feature (a stacked frame has `lfr_m * bins`); the variance is floored at
        1e-20 as upstream.
    """
    total = total_squares = 0.0
    count = 0
    for index in np.unique(np.linspace(0, len(dataset) - 1, min(max_items, len(dataset))).astype(int)):
        features = dataset[int(index)]["input_features"].double()
        total, total_squares = total + features.sum(0), total_squares + features.square().sum(0)
        count += features.shape[0]
    mean = total / count
    variance = (total_squares / count - mean.square()).clamp_min(1e-20)
    return mean.float(), variance.rsqrt().float()
