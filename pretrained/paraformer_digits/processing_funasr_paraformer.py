"""Processor of Paraformer: features, labels, text with times, and hot words."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .cif_timestamps import firing_segments, milliseconds
from .feature_extraction_kaldi_fbank import AudioError
from .feature_stream import StackedFeatureStreamState, stream_stacked_features
from .transcript_text import upstream_sentence


class FunasrParaformerProcessor(ProcessorMixin):
    r"""Feature extractor and tokenizer of a Paraformer.

    Args:
        feature_extractor ([`KaldiFbankFeatureExtractor`]).
        tokenizer ([`FunasrParaformerTokenizer`]).
    """

    def __init__(self, feature_extractor=None, tokenizer=None, **kwargs):
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
                # A batch of empty texts has no token to take the integer type from.
                labels = labels.long().masked_fill(encoded["attention_mask"] == 0, -100)
            data["labels"] = labels
        return BatchFeature(data)

    def batch_decode(
        self, sequences: Tensor | Sequence[Sequence[int]], skip_special_tokens: bool = True, **kwargs
    ) -> list[str]:
        """Texts of token ids from `generate`."""
        return [self.decode(row, skip_special_tokens=skip_special_tokens, **kwargs) for row in sequences]

    def decode(self, token_ids: Tensor | Sequence[int], skip_special_tokens: bool = True, **kwargs) -> str:
        """Text of one hypothesis, see [`batch_decode`]."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, **kwargs)

    def hotword_ids(self, phrases: str | Sequence[str], upstream: bool = False) -> list[list[int]]:
        """Token ids of phrases, for `generate(hotwords=...)`; blank phrases are dropped.

        Args:
            phrases: a list, or one text of phrases separated by white space, as upstream takes them.
            upstream: see [`FunasrParaformerTokenizer.hotword_ids`].
        """
        phrases = phrases.split() if isinstance(phrases, str) else phrases
        return [self.tokenizer.hotword_ids(phrase, upstream) for phrase in phrases if phrase.strip()]

    def stream(
        self,
        samples: np.ndarray | Tensor,
        state: StackedFeatureStreamState | None = None,
        sampling_rate: int | None = None,
        is_last: bool = False,
    ) -> tuple[list[BatchFeature], StackedFeatureStreamState]:
        """Features that a piece of a stream completes, for `model.stream_step`. Any cut of the audio gives the same.

        Args:
            samples: the next piece, of any length (also 0).
            state: from the last piece; `None` opens a stream.
            is_last: nothing follows; then there is always a result, so that the model learns of the end.

        Returns:
            at most one `input_features` `(1, frames, features)` with `attention_mask` `(1, frames)`, and the state.

        Raises:
            AudioError: wrong rate, or a piece after the last one.
        """
        extractor = self.feature_extractor
        if sampling_rate is not None and sampling_rate != extractor.sampling_rate:
            raise AudioError(
                f"sampling_rate: expected {extractor.sampling_rate} Hz, got {sampling_rate} Hz; resample first"
            )
        features, state = stream_stacked_features(extractor, samples, state, is_last)
        mask = torch.ones(1, len(features), dtype=torch.long)
        window = BatchFeature({"input_features": features[None], "attention_mask": mask})
        return [window] if len(features) or is_last else [], state

    def post_process(
        self, sequences: Tensor | Sequence[Sequence[int]], token_timestamps: Tensor | None = None
    ) -> list[dict[str, object]]:
        """Texts and, with times, words.

        Args:
            sequences (`(batch, tokens)`): from `generate`.
            token_timestamps (`(batch, tokens, 2)`, seconds): of the same output.

        Returns:
            per utterance `{"text": str}`, and with times `"words": list[str]` and `"timestamp": [[start, end], ...]`
            in milliseconds, one per word; a Chinese character is a word.
        """
        results: list[dict[str, object]] = []
        for row, ids in enumerate(sequences):
            decoded = self.tokenizer.decode(ids, skip_special_tokens=True, output_word_offsets=True)
            result: dict[str, object] = {"text": decoded["text"]}
            if token_timestamps is not None:
                times = token_timestamps[row].tolist()
                offsets = decoded["word_offsets"]
                result["words"] = [item["word"] for item in offsets]
                result["timestamp"] = [
                    [round(times[item["start_offset"]][0] * 1000), round(times[item["end_offset"] - 1][1] * 1000)]
                    for item in offsets
                ]
            results.append(result)
        return results

    def post_process_upstream(
        self,
        token_ids: Sequence[int],
        alphas: Tensor | None = None,
        peaks: Tensor | None = None,
        upsample_rate: int = 3,
        offset_ms: float = 0.0,
    ) -> dict[str, object]:
        """Text and times of one utterance exactly as upstream prints them, for comparisons.

        Upstream's text loses pieces and symbols in some mixtures (see [`upstream_sentence`]), and with times it has a
        space between any two words.

        Args:
            token_ids: of one hypothesis; blank and sentence marks are dropped.
            alphas, peaks (`(t,)`, float32): tracks of the timestamp head. `None`: text without times.
            upsample_rate: positions per frame of 60 ms. A plain Paraformer has 1, and there upstream passes its
                `peaks` for `alphas` and the other way round.
            offset_ms: start of the utterance in its recording.

        Returns:
            `text`, `words`, and with tracks `timestamp`, a list of `[start, end]` in milliseconds.

        Raises:
            IndexError: the tracks have fewer peaks than there are tokens, where upstream raises it too.
        """
        tokenizer = self.tokenizer
        marks = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
        kept = [int(index) for index in token_ids if int(index) not in marks]
        tokens = tokenizer.tokens_of_ids(kept)
        if tokenizer.unit_kind == "bpe":
            text = self.decode(kept)
            words = text.split()
            return {"text": text, "words": words}
        if alphas is None:
            text, _, words = upstream_sentence(tokens, toolkit=tokenizer.segmentation)
            return {"text": text, "words": words}
        segments = firing_segments(alphas.float(), peaks.float(), len(tokens), upsample_rate, offset_ms)
        text, times, words = upstream_sentence(tokens, milliseconds(segments), tokenizer.segmentation)
        return {"text": text, "timestamp": times, "words": words}


FunasrParaformerProcessor.register_for_auto_class()
