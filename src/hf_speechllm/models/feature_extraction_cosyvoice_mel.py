"""Feature extractor of CosyVoice's flow and vocoder: waveform to log-mel spectrogram."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, SequenceFeatureExtractor

from .feature_extraction_kaldi_fbank import AudioError, mono_waveforms
from .mel_spectrogram import log_mel_spectrogram, num_mel_frames


class CosyVoiceMelFeatureExtractor(SequenceFeatureExtractor):
    r"""Natural logarithm of Slaney mel spectrograms of magnitudes, see `mel_spectrogram.py`.

    Args:
        feature_size (`int`): mel bins. sampling_rate (`int`): Hz. padding_value (`float`): of padded frames.
        fft_length, hop_length (`int`): samples of a window, and between two. Version 1 has 1024 and 256 at 22050 Hz,
            versions 2 and 3 have 1920 and 480 at 24000 Hz, the defaults.
        low_freq, high_freq (`float`): edges of the filters in Hz; `None` is half of the sampling rate, which version 3
            has, and 8000 the upper one of versions 1 and 2.
    """

    model_input_names = ["input_features", "attention_mask"]

    def __init__(
        self,
        feature_size: int = 80,
        sampling_rate: int = 24000,
        padding_value: float = 0.0,
        fft_length: int = 1920,
        hop_length: int = 480,
        low_freq: float = 0.0,
        high_freq: float | None = 8000.0,
        **kwargs,
    ) -> None:
        kwargs.setdefault("return_attention_mask", True)
        super().__init__(feature_size=feature_size, sampling_rate=sampling_rate, padding_value=padding_value, **kwargs)
        self.fft_length, self.hop_length = fft_length, hop_length
        self.low_freq, self.high_freq = low_freq, high_freq

    def num_frames(self, num_samples: torch.Tensor) -> torch.Tensor:
        """Frames of so many samples: as many hops as fit."""
        return num_mel_frames(num_samples, self.hop_length)

    def __call__(
        self,
        raw_speech: np.ndarray | torch.Tensor | Sequence,
        sampling_rate: int | None = None,
        return_tensors: str | None = "pt",
        return_attention_mask: bool | None = True,
        device: str | torch.device | None = None,
        padding: bool | str = True,
    ) -> BatchFeature:
        """Spectrograms of one waveform or of a list; an item of a list equals the item alone.

        Args:
            raw_speech: one waveform (array, tensor or list of numbers) or a list of waveforms; see
                [`to_mono_waveform`].
            sampling_rate: rate of `raw_speech` in Hz; must be the extractor's own.
            device: where to compute; the features stay there. Defaults to the CPU.
            padding: kept for the callers of transformers; a batch is always padded to its longest item.

        Returns:
            [`BatchFeature`] with `input_features` `(batch, frames, feature_size)` float32 and `attention_mask`
            `(batch, frames)` int64, 1 = real frame. Audio shorter than a hop has no frame.

        Raises:
            AudioError: another sampling rate, or unusable samples.
        """
        if sampling_rate is not None and sampling_rate != self.sampling_rate:
            raise AudioError(f"sampling_rate: this extractor expects {self.sampling_rate} Hz, got {sampling_rate} Hz")
        waveforms = mono_waveforms(raw_speech)
        if device is not None:
            waveforms = [waveform.to(device) for waveform in waveforms]
        num_samples = torch.tensor([len(waveform) for waveform in waveforms], device=waveforms[0].device)
        features = log_mel_spectrogram(
            pad_sequence(waveforms, batch_first=True),
            num_samples,
            sampling_rate=self.sampling_rate,
            fft_length=self.fft_length,
            hop_length=self.hop_length,
            num_mel_bins=self.feature_size,
            low_freq=self.low_freq,
            high_freq=self.high_freq,
        )
        real = torch.arange(features.shape[1], device=features.device) < self.num_frames(num_samples)[:, None]
        data = {"input_features": features.masked_fill(~real[..., None], self.padding_value)}
        if return_attention_mask:
            data["attention_mask"] = real.long()
        return BatchFeature(data, tensor_type=return_tensors)


CosyVoiceMelFeatureExtractor.register_for_auto_class()
