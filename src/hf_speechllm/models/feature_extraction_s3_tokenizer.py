"""Feature extractor of the S3 tokenizers: waveform to Whisper's log-mel spectrogram."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import BatchFeature, SequenceFeatureExtractor

from .feature_extraction_kaldi_fbank import AudioError, mono_waveforms
from .ragged_rows import with_mask
from .whisper_log_mel import num_whisper_frames, whisper_log_mel


class S3FeatureExtractor(SequenceFeatureExtractor):
    r"""Log-mel frames, 100 a second.

    Args:
        feature_size (`int`): mel bins.
        sampling_rate (`int`): Hz; other rates are refused, see `hf_speechllm.models.resampling`.
    """

    model_input_names = ["input_features", "attention_mask"]

    def __init__(
        self, feature_size: int = 128, sampling_rate: int = 16000, padding_value: float = 0.0, **kwargs
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
            AudioError: another sampling rate, NaN, or a shape that is no waveform.
        """
        if sampling_rate is not None and sampling_rate != self.sampling_rate:
            raise AudioError(f"sampling_rate: expected {self.sampling_rate}, got {sampling_rate}")
        waveforms = mono_waveforms(audio)
        num_samples = torch.tensor([len(waveform) for waveform in waveforms])
        padded = torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True)
        features = whisper_log_mel(padded, num_samples, self.feature_size)
        data = with_mask("input_features", features, num_whisper_frames(num_samples), "attention_mask")
        return BatchFeature(data, tensor_type=return_tensors)


S3FeatureExtractor.register_for_auto_class()
