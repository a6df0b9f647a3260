"""L1 distance of log-mel spectrograms at several resolutions.

Source: SpeechTokenizer, `speechtokenizer/trainer/loss.py`; with one resolution it is the loss of HiFi-GAN.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.audio_utils import mel_filter_bank


_FLOOR = 1e-5


class LogMelSpectrogram(nn.Module):
    """Natural logarithm of a mel spectrogram of magnitudes, floored at 1e-5.

    A frame does not reach over the ends by centring: both ends are reflected by (n_fft - hop_length) / 2 samples, so
    that hop_length * n samples give n frames.

    Args:
        sampling_rate: Hz. n_fft, hop_length: samples. win_length: of the Hann window; default `n_fft`.
        num_mels, f_min, f_max: of the filters, `f_max=None` is half of the sampling rate.
        mel_scale: `"htk"` as SpeechTokenizer, or `"slaney"` as HiFi-GAN; the filters have Slaney's norm in both.
    """

    def __init__(
        self,
        sampling_rate: int = 16000,
        n_fft: int = 1024,
        hop_length: int = 240,
        win_length: int | None = None,
        num_mels: int = 80,
        f_min: float = 0.0,
        f_max: float | None = None,
        mel_scale: str = "htk",
    ) -> None:
        super().__init__()
        self.n_fft, self.hop_length, self.win_length = n_fft, hop_length, win_length or n_fft
        with warnings.catch_warnings():
            # Short windows leave some filters empty, as they do upstream: a constant on both sides of the loss.
            warnings.filterwarnings("ignore", message="At least one mel filter")
            filters = mel_filter_bank(
                num_frequency_bins=n_fft // 2 + 1,
                num_mel_filters=num_mels,
                min_frequency=f_min,
                max_frequency=sampling_rate / 2 if f_max is None else f_max,
                sampling_rate=sampling_rate,
                norm="slaney",
                mel_scale=mel_scale,
            )
        self.register_buffer("filters", torch.from_numpy(filters).float().T.contiguous(), persistent=False)
        self.register_buffer("window", torch.hann_window(self.win_length), persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        """`(b, samples)` or `(b, 1, samples)` float → `(b, num_mels, frames)` float32. Computed in float32."""
        waveform = (waveform[:, 0] if waveform.dim() == 3 else waveform).float()
        edge = (self.n_fft - self.hop_length) // 2
        waveform = functional.pad(waveform[:, None], (edge, edge), mode="reflect")[:, 0]
        spectrum = torch.stft(
            waveform,
            self.n_fft,
            self.hop_length,
            self.win_length,
            self.window,
            center=False,
            return_complex=True,
        )
        # Upstream adds 1e-9, which also keeps the gradient of the absolute value away from zero.
        return (self.filters @ (spectrum.abs() + 1e-9)).clamp_min(_FLOOR).log()


class MultiScaleMelLoss(nn.Module):
    """Weighted sum of the mean absolute differences of [`LogMelSpectrogram`]s.

    The defaults are SpeechTokenizer's: windows of 1024, 512, 256 and 128 samples, weights 45, 1, 1, 1.

    Args:
        weights: one per resolution. n_fft, hop_length, win_length: of the first; each further one has half of it.
        sampling_rate, num_mels, f_min, f_max, mel_scale: see [`LogMelSpectrogram`].
    """

    def __init__(
        self,
        sampling_rate: int = 16000,
        weights: Sequence[float] = (45.0, 1.0, 1.0, 1.0),
        n_fft: int = 1024,
        hop_length: int = 240,
        win_length: int | None = None,
        num_mels: int = 80,
        f_min: float = 0.0,
        f_max: float | None = None,
        mel_scale: str = "htk",
    ) -> None:
        super().__init__()
        self.weights = tuple(weights)
        self.spectrograms = nn.ModuleList(
            LogMelSpectrogram(
                sampling_rate,
                n_fft >> scale,
                hop_length >> scale,
                (win_length or n_fft) >> scale,
                num_mels,
                f_min,
                f_max,
                mel_scale,
            )
            for scale in range(len(self.weights))
        )

    def scales(self, real: Tensor, fake: Tensor) -> Tensor:
        """The differences before weighting, float32 `(len(weights),)`.

        Args:
            real, fake: `(b, samples)` or `(b, 1, samples)`; of two lengths the common beginning counts.
        """
        terms = []
        for spectrogram in self.spectrograms:
            expected, actual = spectrogram(real), spectrogram(fake)
            frames = min(expected.shape[-1], actual.shape[-1])
            terms.append(functional.l1_loss(actual[..., :frames], expected[..., :frames]))
        return torch.stack(terms)

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """The weighted sum, a scalar."""
        scales = self.scales(real, fake)
        return (scales * scales.new_tensor(self.weights)).sum()
