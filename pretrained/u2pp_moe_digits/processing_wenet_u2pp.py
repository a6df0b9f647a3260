"""Processor of WeNet models: features, labels, text, hot words, and the windows of a stream."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .feature_extraction_kaldi_fbank import AudioError, to_mono_waveform
from .kaldi_fbank import num_fbank_frames


@dataclass
class FeatureStreamState:
    """What a feature stream keeps between two pieces of audio.

    Args:
        samples (`(n,)`, float32): tail of the audio that fills no analysis window yet.
        features (`(frames, bins)`): features that the next window starts with.
        chunk_size: encoder frames per window.
        ended: whether the last piece has been seen.
    """

    samples: Tensor
    features: Tensor
    chunk_size: int
    ended: bool = False


class WenetU2ppProcessor(ProcessorMixin):
    r"""Feature extractor and tokenizer of a WeNet model.

    Args:
        feature_extractor ([`KaldiFbankFeatureExtractor`]).
        tokenizer ([`WenetU2ppTokenizer`]).
        subsampling_rate, right_context (`int`): of the model's encoder in feature frames; they shape the windows of a
            stream.
    """

    def __init__(
        self, feature_extractor=None, tokenizer=None, subsampling_rate: int = 4, right_context: int = 6, **kwargs
    ):
        self.subsampling_rate = subsampling_rate
        self.right_context = right_context
        super().__init__(feature_extractor, tokenizer, **kwargs)

    def __call__(
        self,
        audio: np.ndarray | Tensor | Sequence | None = None,
        text: str | list[str] | None = None,
        sampling_rate: int | None = None,
        return_tensors: str | None = "pt",
        **kwargs,
    ) -> BatchFeature:
        """Model inputs.

        Args:
            audio: waveform or list of waveforms, see [`KaldiFbankFeatureExtractor.__call__`], which also takes
                `kwargs`.
            text: transcript or list of transcripts.

        Returns:
            `input_features`, `attention_mask` (1 = real frame) for audio; `labels` (-100 = padding) for text.

        Raises:
            ValueError: neither audio nor text. AudioError: unusable audio.
        """
        if audio is None and text is None:
            raise ValueError("processor: expected audio, text or both")
        data = {}
        if audio is not None:
            data |= self.feature_extractor(audio, sampling_rate=sampling_rate, return_tensors=return_tensors, **kwargs)
        if text is not None:
            encoded = self.tokenizer(
                [text] if isinstance(text, str) else text, padding=True, return_tensors=return_tensors
            )
            labels = encoded["input_ids"]
            if return_tensors == "pt":
                labels = labels.masked_fill(encoded["attention_mask"] == 0, -100)
            data["labels"] = labels
        return BatchFeature(data)

    def batch_decode(
        self, sequences: Tensor | Sequence[Sequence[int]], skip_special_tokens: bool = True, **kwargs
    ) -> list[str]:
        """Texts of token ids from `generate`; repeated tokens are kept (they are not CTC frames)."""
        return [self.decode(row, skip_special_tokens=skip_special_tokens, **kwargs) for row in sequences]

    def decode(self, token_ids: Tensor | Sequence[int], skip_special_tokens: bool = True, **kwargs) -> str:
        """Text of one hypothesis, see [`batch_decode`]."""
        kwargs.setdefault("group_tokens", False)
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, **kwargs)

    def hotword_ids(self, phrases: Sequence[str]) -> list[list[int]]:
        """Token ids of phrases, for `generate(hotwords=...)`; blank lines are dropped."""
        return [self.tokenizer(phrase)["input_ids"] for phrase in phrases if phrase.strip()]

    def samples_per_chunk(self, chunk_size: int) -> int:
        """Audio samples that a stream consumes per chunk of `chunk_size` encoder frames."""
        return chunk_size * self.subsampling_rate * self.feature_extractor.hop_length

    def latency_ms(self, chunk_size: int) -> float:
        """Audio in milliseconds that must have arrived before the first chunk can be computed."""
        extractor = self.feature_extractor
        frames = (chunk_size - 1) * self.subsampling_rate + self.right_context + 1
        samples = (frames - 1) * extractor.hop_length + extractor.window_length
        return 1000.0 * samples / extractor.sampling_rate

    def stream(
        self,
        samples: np.ndarray | Tensor | Sequence[float],
        state: FeatureStreamState | None = None,
        sampling_rate: int | None = None,
        is_last: bool = False,
        chunk_size: int = 16,
    ) -> tuple[list[BatchFeature], FeatureStreamState]:
        """Cut a piece of a stream into windows for `model.stream_step`. Any cut of the audio gives the same windows.

        Args:
            samples: the next piece, of any length (also 0).
            state: from the last piece; `None` opens a stream with `chunk_size` encoder frames per window.
            is_last: nothing follows: the rest comes out as a last, shorter (possibly empty) window.

        Returns:
            windows (`input_features` `(1, frames, bins)`, `attention_mask` `(1, frames)`) and the new state. Windows
            overlap by what the subsampling convolutions see twice.

        Raises:
            AudioError: wrong rate, or a piece after the last one.
        """
        extractor = self.feature_extractor
        if sampling_rate is not None and sampling_rate != extractor.sampling_rate:
            raise AudioError(
                f"sampling_rate: expected {extractor.sampling_rate} Hz, got {sampling_rate} Hz; resample first"
            )
        if state is None:
            state = FeatureStreamState(torch.zeros(0), torch.zeros(0, extractor.feature_size), chunk_size)
        if state.ended:
            raise AudioError("stream: audio after the last piece")
        waveform = torch.cat([state.samples, to_mono_waveform(samples)])
        frames = int(num_fbank_frames(torch.tensor(len(waveform)), extractor.window_length, extractor.hop_length))
        features = state.features
        if frames:
            new = extractor(waveform, sampling_rate=extractor.sampling_rate)["input_features"][0]
            features = torch.cat([features, new])
            waveform = waveform[frames * extractor.hop_length :]
        shift = state.chunk_size * self.subsampling_rate
        width = shift - self.subsampling_rate + self.right_context + 1
        windows = []
        while len(features) >= width:
            windows.append(self._window(features[:width]))
            features = features[shift:]
        if is_last:
            # A rest that holds no whole encoder frame still goes out, empty, so that the model learns of the end.
            rest = features if len(features) > self.right_context else features[:0]
            windows.append(self._window(rest))
            features = features[:0]
        return windows, FeatureStreamState(waveform, features, state.chunk_size, ended=is_last)

    def _window(self, features: Tensor) -> BatchFeature:
        mask = torch.ones(1, len(features), dtype=torch.long)
        return BatchFeature({"input_features": features[None], "attention_mask": mask})

    def pad_windows(self, windows: Sequence[BatchFeature | None]) -> BatchFeature:
        """Windows of several streams as one batch for `stream_step`; `None` = this stream has nothing now."""
        width = max((w["input_features"].shape[1] for w in windows if w is not None), default=0)
        features = torch.zeros(len(windows), width, self.feature_extractor.feature_size)
        mask = torch.zeros(len(windows), width, dtype=torch.long)
        for row, window in enumerate(windows):
            if window is not None:
                frames = window["input_features"].shape[1]
                features[row, :frames] = window["input_features"][0]
                mask[row, :frames] = 1
        return BatchFeature({"input_features": features, "attention_mask": mask})


WenetU2ppProcessor.register_for_auto_class()
