"""Feature extractor of CosyVoice: what the model reads of a voice prompt, from one recording at any sampling rate."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, SequenceFeatureExtractor

from .feature_extraction_kaldi_fbank import AudioError, mono_waveforms
from .hann_sinc_resampling import resample_hann_sinc
from .kaldi_fbank import kaldi_fbank
from .mel_spectrogram import log_mel_spectrogram, num_mel_frames
from .ragged_rows import padded_with_mask, with_mask
from .whisper_log_mel import num_whisper_frames, whisper_log_mel


# What the speech tokenizer and the speaker encoder listen to.
ENCODER_SAMPLING_RATE = 16000
# One window of the filter banks at that rate.
_SHORTEST_SAMPLES = 400
# Rate at which upstream loads a prompt for its spectrogram, whatever the model's own.
_UPSTREAM_SAMPLING_RATE = 24000


class CosyVoiceFeatureExtractor(SequenceFeatureExtractor):
    r"""Three views of a recording: Whisper's log-mel frames for the speech tokenizer, Kaldi's filter banks without
    their mean for the speaker encoder, the vocoder's mel spectrogram for the flow.

    Args:
        feature_size (`int`): mel bins of the flow.
        sampling_rate (`int`): Hz of the model's waveforms, at which the mel spectrogram is computed.
        fft_length, hop_length (`int`): of it, in samples.
        high_freq (`float`, *optional*): upper edge of its filters in Hz; `None` = half of the sampling rate.
        tokenizer_mel_bins, speaker_mel_bins (`int`): of the other two.
    """

    model_input_names = ["prompt_features", "prompt_fbank", "prompt_mel"]

    def __init__(
        self,
        feature_size: int = 80,
        sampling_rate: int = 24000,
        padding_value: float = 0.0,
        fft_length: int = 1920,
        hop_length: int = 480,
        high_freq: float | None = 8000.0,
        tokenizer_mel_bins: int = 128,
        speaker_mel_bins: int = 80,
        **kwargs,
    ) -> None:
        super().__init__(feature_size, sampling_rate, padding_value, **kwargs)
        self.fft_length, self.hop_length, self.high_freq = fft_length, hop_length, high_freq
        self.tokenizer_mel_bins, self.speaker_mel_bins = tokenizer_mel_bins, speaker_mel_bins

    def __call__(
        self,
        audio: np.ndarray | Tensor | Sequence[float] | Sequence[np.ndarray] | Sequence[Tensor],
        sampling_rate: int | Sequence[int],
        compatibility: str | None = None,
    ) -> BatchFeature:
        """
        Args:
            audio: a recording or a list of them, floats in [-1, 1] or integers; several channels are averaged.
            sampling_rate (`int` or one for each recording): Hz, from 16000 (or that of a model with a lower one).
            compatibility (`"upstream"`, *optional*): take the mel spectrogram of a waveform at 24 kHz as if it had
                the model's own rate, which is wrong for version 1.

        Returns:
            `prompt_features` `(b, t, tokenizer_mel_bins)`, 100 frames a second; `prompt_fbank` `(b, t',
            speaker_mel_bins)`; `prompt_mel` `(b, t'', feature_size)`; each float32 with a mask of its name and
            `_mask`, int64, 1 = real.

        Raises:
            AudioError: NaN, a shape that is no waveform, or see [`check_prompt`].
        """
        recordings = self._recordings(audio, sampling_rate)
        mel_rate = _UPSTREAM_SAMPLING_RATE if compatibility == "upstream" else self.sampling_rate
        low = [resample_hann_sinc(waveform, rate, ENCODER_SAMPLING_RATE) for waveform, rate in recordings]
        full = [resample_hann_sinc(waveform, rate, mel_rate) for waveform, rate in recordings]
        data = self.tokenizer_features("prompt_features", low)
        data |= padded_with_mask("prompt_fbank", [self.speaker_features(waveform) for waveform in low])
        counts = torch.tensor([len(waveform) for waveform in full])
        mel = log_mel_spectrogram(
            pad_sequence(full, batch_first=True),
            counts,
            sampling_rate=self.sampling_rate,
            fft_length=self.fft_length,
            hop_length=self.hop_length,
            num_mel_bins=self.feature_size,
            high_freq=self.high_freq,
        )
        data |= with_mask("prompt_mel", mel, num_mel_frames(counts, self.hop_length))
        return BatchFeature(data)

    def _recordings(
        self, audio: np.ndarray | Tensor | Sequence, sampling_rate: int | Sequence[int]
    ) -> list[tuple[Tensor, int]]:
        """Each recording and its rate, checked."""
        waveforms = mono_waveforms(audio)
        rates = [sampling_rate] * len(waveforms) if isinstance(sampling_rate, int) else list(sampling_rate)
        if len(rates) != len(waveforms):
            raise AudioError(f"sampling_rate: expected {len(waveforms)}, one for each recording, got {len(rates)}")
        for waveform, rate in zip(waveforms, rates, strict=True):
            self.check_prompt(waveform, rate)
        return list(zip(waveforms, rates, strict=True))

    def check_prompt(self, waveform: Tensor, sampling_rate: int) -> None:
        """Refuse recordings that no prompt can be made of.

        Raises:
            AudioError: a rate under 16 kHz (or under that of a model with a lower one), or less than 25 ms.
        """
        lowest = min(ENCODER_SAMPLING_RATE, self.sampling_rate)
        if sampling_rate < lowest:
            raise AudioError(f"sampling_rate: expected at least {lowest}, got {sampling_rate}")
        if len(waveform) * ENCODER_SAMPLING_RATE < _SHORTEST_SAMPLES * sampling_rate:
            raise AudioError(f"audio: expected at least 25 ms, got {1000 * len(waveform) / sampling_rate:.1f} ms")

    def tokenizer_features(self, name: str, waveforms: list[Tensor]) -> dict[str, Tensor]:
        """Whisper's log-mel frames of waveforms at 16 kHz, and their mask."""
        counts = torch.tensor([len(waveform) for waveform in waveforms])
        features = whisper_log_mel(pad_sequence(waveforms, batch_first=True), counts, self.tokenizer_mel_bins)
        return with_mask(name, features, num_whisper_frames(counts))

    def speaker_features(self, waveform: Tensor) -> Tensor:
        """Filter banks `(t, speaker_mel_bins)` of a waveform at 16 kHz, minus their mean."""
        frames = kaldi_fbank(waveform[None], num_mel_bins=self.speaker_mel_bins)[0]
        return frames - frames.mean(dim=0)

    def source_features(
        self, audio: np.ndarray | Tensor | Sequence[np.ndarray] | Sequence[Tensor], sampling_rate: int | Sequence[int]
    ) -> BatchFeature:
        """`source_features` and their mask: what voice conversion reads of the speech that it keeps."""
        recordings = self._recordings(audio, sampling_rate)
        low = [resample_hann_sinc(waveform, rate, ENCODER_SAMPLING_RATE) for waveform, rate in recordings]
        return BatchFeature(self.tokenizer_features("source_features", low))


CosyVoiceFeatureExtractor.register_for_auto_class()
