"""Whisper's log-mel spectrogram, batched: what the speech tokenizers of CosyVoice read.

Source: https://arxiv.org/abs/2212.04356, openai-whisper `whisper/audio.py`. 25 ms windows every 10 ms at 16 kHz, power
spectrum, Slaney's mel scale, decimal logarithm with a floor 8 below the clip's own maximum.

Shape legend: `b` batch, `n` samples, `t` frames, `m` mel bins.
"""

import torch
from torch import Tensor

from .mel_spectrogram import slaney_mel_filters
from .reflected_edges import reflect_edges


WHISPER_SAMPLING_RATE = 16000
WHISPER_HOP_LENGTH = 160
_FFT_LENGTH = 400
_MEL_FLOOR = 1e-10
_DYNAMIC_RANGE = 8.0


def num_whisper_frames(num_samples: Tensor) -> Tensor:
    """Frames of so many samples: as many hops of 160 as fit."""
    return num_samples // WHISPER_HOP_LENGTH


def whisper_log_mel(waveforms: Tensor, num_samples: Tensor | None = None, num_mel_bins: int = 128) -> Tensor:
    """Log-mel spectrograms of a batch of waveforms; an item of a batch equals the item alone.

    The floor is that of an item's own frames, and both ends are mirrored at the item's own end.

    Args:
        waveforms (`Tensor` of shape `(b, n)`): float samples in [-1, 1] at 16 kHz.
        num_samples (`Tensor` of shape `(b,)`, int64, *optional*): samples of each item; default all `n`.

    Returns:
        `Tensor` of shape `(b, n // 160, num_mel_bins)`, float32; 0 after an item's own frames
        ([`num_whisper_frames`]).
    """
    waveforms = waveforms.float()
    frames = waveforms.shape[1] // WHISPER_HOP_LENGTH
    if frames == 0:
        return waveforms.new_zeros(len(waveforms), 0, num_mel_bins)
    padded = reflect_edges(waveforms, num_samples, _FFT_LENGTH // 2)
    window = torch.hann_window(_FFT_LENGTH, device=waveforms.device)
    spectrum = torch.stft(padded, _FFT_LENGTH, WHISPER_HOP_LENGTH, window=window, center=False, return_complex=True)
    # Upstream drops the last frame, which is centred on the end.
    power = spectrum[..., :frames].abs().square().transpose(1, 2)
    filters = slaney_mel_filters(num_mel_bins, _FFT_LENGTH, WHISPER_SAMPLING_RATE).to(waveforms.device)
    log_mel = (power @ filters).clamp_min(_MEL_FLOOR).log10()
    if num_samples is None:
        peak = log_mel.amax(dim=(1, 2), keepdim=True)
        return (torch.maximum(log_mel, peak - _DYNAMIC_RANGE) + 4.0) / 4.0
    own = num_whisper_frames(num_samples.to(waveforms.device))
    real = (torch.arange(frames, device=waveforms.device) < own[:, None])[..., None]
    peak = log_mel.masked_fill(~real, -torch.inf).amax(dim=(1, 2), keepdim=True)
    log_mel = (torch.maximum(log_mel, peak - _DYNAMIC_RANGE) + 4.0) / 4.0
    return log_mel.masked_fill(~real, 0.0)
