"""Feature extractor of the speaker encoder: waveform to Kaldi filter banks without their mean."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import BatchFeature, SequenceFeatureExtractor

from .feature_extraction_kaldi_fbank import AudioError, mono_waveforms
from .kaldi_fbank import kaldi_fbank
from .ragged_rows import padded_with_mask


class CampplusFeatureExtractor(SequenceFeatureExtractor):
    r"""Log-mel filter banks as Kaldi computes them on samples in [-1, 1], minus their mean over the recording.

    Args:
        feature_size (`int`): mel bins.
        sampling_rate (`int`): Hz; other rates are refused, see `hf_speechllm.models.resampling`.
    """

    model_input_names = ["input_features", "attention_mask"]

    def __init__(
        self, feature_size: int = 80, sampling_rate: int = 16000, padding_value: float = 0.0, **kwargs
    ) -> None:
        super().__init__(feature_size, sampling_rate, padding_value, **kwargs)

    def __call__(
        self,
        audio: np.ndarray | torch.Tensor | Sequence[float] | Sequence[np.ndarray] | Sequence[torch.Tensor],
        sampling_rate: int | None = None,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """
        Args:
            audio: a waveform or a list of them, floats in [-1, 1] or integers.
            sampling_rate (`int`, *optional*): their rate in Hz.

        Returns:
            `input_features` `(b, t, feature_size)` float32 and `attention_mask` `(b, t)` int64, 1 = real frame.

        Raises:
            AudioError: another sampling rate, NaN, a shape that is no waveform, or less than one window of 25 ms.
        """
        if sampling_rate is not None and sampling_rate != self.sampling_rate:
            raise AudioError(f"sampling_rate: expected {self.sampling_rate}, got {sampling_rate}")
        rows = []
        for waveform in mono_waveforms(audio):
            # Kaldi's features do not depend on a scale but for their floor; upstream computes them without one.
            frames = kaldi_fbank(waveform[None], sampling_rate=self.sampling_rate, num_mel_bins=self.feature_size)[0]
            if len(frames) == 0:
                raise AudioError(f"audio: expected at least one window of 25 ms, got {len(waveform)} samples")
            rows.append(frames - frames.mean(dim=0))
        data = padded_with_mask("input_features", rows, "attention_mask")
        return BatchFeature(data, tensor_type=return_tensors)


CampplusFeatureExtractor.register_for_auto_class()
