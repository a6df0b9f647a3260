"""Feature extractor of the recognisers: waveform to Kaldi log-mel filter banks.

One class serves WeNet (80 mel bins; CMVN lives in the encoder) and FunASR (low-frame-rate stacking 7/6 and CMVN in the
front end). Nothing random happens unless the caller passes `dither=` together with a `generator`: upstream's command
line leaves the training value of dither on at inference, which makes its output random.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from transformers import BatchFeature, SequenceFeatureExtractor

from .kaldi_fbank import kaldi_fbank, low_frame_rate, num_fbank_frames, num_lfr_frames


# A float waveform in [-1, 1] is brought to the int16 scale that Kaldi features assume (`1 << 15` in WeNet).
_INT16_SCALE = 32768.0
# Samples beyond this are no audio, and their power spectrum would overflow float32.
_LARGEST_SAMPLE = 1e9


class AudioError(ValueError):
    """Audio that cannot be used: unreadable, non-finite, of an unexpected shape, dtype or sampling rate."""


def to_mono_waveform(audio: np.ndarray | torch.Tensor | Sequence[float]) -> torch.Tensor:
    """A mono float32 waveform in [-1, 1] from whatever callers hold.

    Args:
        audio: shape `(n,)`, `(1, n)`, `(n, 1)` or several channels, which are averaged (the longer axis is time).
            Integers are scaled by their type's range, floats are taken as they are.

    Returns:
        `Tensor` of shape `(n,)`, float32, on the CPU unless `audio` is a tensor on another device.

    Raises:
        AudioError: more than two dimensions, an unusable dtype, NaN, infinite or absurdly large samples.
    """
    if not isinstance(audio, torch.Tensor):
        array = np.asarray(audio)
        if array.dtype.kind not in "iuf":
            raise AudioError(f"audio: expected integer or float samples, got dtype {array.dtype}")
        if array.dtype == np.longdouble:
            array = array.astype(np.float64)
        # A copy: torch accepts neither negative strides nor read-only memory without a warning.
        audio = torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C", copy=True))
    audio = audio.detach()
    if audio.dtype == torch.uint8:
        waveform = (audio.float() - 128.0) / 128.0
    elif audio.dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
        # numpy's default integer is int64: such arrays hold int16 samples.
        bits = 16 if audio.dtype == torch.int64 else torch.iinfo(audio.dtype).bits
        waveform = audio.double().div(2.0 ** (bits - 1)).float()
    elif audio.is_floating_point():
        waveform = audio.float()
    else:
        raise AudioError(f"audio: expected integer or float samples, got dtype {audio.dtype}")
    if waveform.dim() == 2:
        channel_axis = 0 if waveform.shape[0] <= waveform.shape[1] else 1
        waveform = waveform.mean(dim=channel_axis) if waveform.numel() else waveform.flatten()
    if waveform.dim() != 1:
        raise AudioError(f"audio: expected 1 or 2 dimensions, got shape {tuple(audio.shape)}")
    if waveform.numel():
        # One pass without a temporary: an hour of audio is 220 MiB. NaN comes through.
        lowest, highest = (extreme.item() for extreme in waveform.aminmax())
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            raise AudioError("audio: contains NaN or infinite samples")
        if max(-lowest, highest) > _LARGEST_SAMPLE:
            raise AudioError(f"audio: expected samples in [-1, 1], got magnitudes beyond {_LARGEST_SAMPLE:g}")
    return waveform


def mono_waveforms(audio: np.ndarray | torch.Tensor | Sequence) -> list[torch.Tensor]:
    """One waveform (array, tensor or list of numbers) or a list of them, each as [`to_mono_waveform`] gives it."""
    is_batch = isinstance(audio, list | tuple) and len(audio) > 0 and not np.isscalar(audio[0])
    return [to_mono_waveform(item) for item in (audio if is_batch else [audio])]


class KaldiFbankFeatureExtractor(SequenceFeatureExtractor):
    r"""Log-mel filter banks as Kaldi computes them, with optional low-frame-rate stacking and CMVN.

    Args:
        feature_size (`int`, *optional*, defaults to 80): mel bins.
        sampling_rate (`int`, *optional*, defaults to 16000): rate in Hz that the model was trained on.
        padding_value (`float`, *optional*, defaults to 0.0): value of padded feature frames.
        frame_length_ms, frame_shift_ms (`float`): window and hop in milliseconds.
        window_type (`str`, *optional*, defaults to `"povey"`): `"povey"` (WeNet) or `"hamming"` (FunASR).
        dither (`float`, *optional*, defaults to 0.0): the pack's training value; applied only where a call asks for
            it.
        lfr_m, lfr_n (`int`): low-frame-rate stacking, 1/1 is off.
        cmvn_mean, cmvn_inverse_std (`list[float]`, *optional*): applied to the (stacked) features as
            `(x - mean) * inverse_std`. WeNet models keep theirs in the encoder instead.
    """

    model_input_names = ["input_features", "attention_mask"]

    def __init__(
        self,
        feature_size: int = 80,
        sampling_rate: int = 16000,
        padding_value: float = 0.0,
        frame_length_ms: float = 25.0,
        frame_shift_ms: float = 10.0,
        window_type: str = "povey",
        dither: float = 0.0,
        lfr_m: int = 1,
        lfr_n: int = 1,
        cmvn_mean: list[float] | None = None,
        cmvn_inverse_std: list[float] | None = None,
        **kwargs,
    ) -> None:
        kwargs.setdefault("return_attention_mask", True)
        super().__init__(feature_size=feature_size, sampling_rate=sampling_rate, padding_value=padding_value, **kwargs)
        self.frame_length_ms = frame_length_ms
        self.frame_shift_ms = frame_shift_ms
        self.window_type = window_type
        self.dither = dither
        self.lfr_m = lfr_m
        self.lfr_n = lfr_n
        self.cmvn_mean = cmvn_mean
        self.cmvn_inverse_std = cmvn_inverse_std
        if (cmvn_mean is None) != (cmvn_inverse_std is None):
            raise ValueError("cmvn_mean and cmvn_inverse_std: expected both or neither")

    @property
    def window_length(self) -> int:
        """Samples in one analysis window."""
        return int(self.sampling_rate * self.frame_length_ms * 0.001)

    @property
    def hop_length(self) -> int:
        """Samples between two windows."""
        return int(self.sampling_rate * self.frame_shift_ms * 0.001)

    def num_frames(self, num_samples: torch.Tensor) -> torch.Tensor:
        """Feature frames that `num_samples` samples give, after stacking."""
        frames = num_fbank_frames(num_samples, self.window_length, self.hop_length)
        return num_lfr_frames(frames, self.lfr_n)

    def __call__(
        self,
        raw_speech: np.ndarray | torch.Tensor | Sequence,
        sampling_rate: int | None = None,
        return_tensors: str | None = "pt",
        return_attention_mask: bool | None = True,
        dither: float | None = None,
        generator: torch.Generator | None = None,
        device: str | torch.device | None = None,
        padding: bool | str = True,
    ) -> BatchFeature:
        """Features of one waveform or a list of waveforms.

        Args:
            raw_speech: one waveform (array, tensor or list of numbers) or a list of waveforms; see
                [`to_mono_waveform`].
            sampling_rate: rate of `raw_speech` in Hz; must be the model's own.
            dither: standard deviation of the noise added for training; needs `generator`.
            device: where to compute; the features stay there. Defaults to the CPU.
            padding: kept for the callers of transformers; a batch is always padded to its longest item.

        Returns:
            [`BatchFeature`] with `input_features` `(batch, frames, lfr_m * feature_size)` float32 and `attention_mask`
            `(batch, frames)` int64, 1 = real frame. Audio shorter than a window has no real frame.

        Raises:
            AudioError: wrong sampling rate, or unusable samples.
        """
        if sampling_rate is not None and sampling_rate != self.sampling_rate:
            raise AudioError(f"sampling_rate: this extractor expects {self.sampling_rate} Hz, got {sampling_rate} Hz")
        waveforms = mono_waveforms(raw_speech)
        if device is not None:
            waveforms = [waveform.to(device) for waveform in waveforms]
        num_samples = torch.tensor([len(waveform) for waveform in waveforms], device=waveforms[0].device)
        padded = torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True)
        features = kaldi_fbank(
            padded * _INT16_SCALE,
            sampling_rate=self.sampling_rate,
            num_mel_bins=self.feature_size,
            frame_length_ms=self.frame_length_ms,
            frame_shift_ms=self.frame_shift_ms,
            window_type=self.window_type,
            dither=dither or 0.0,
            generator=generator,
        )
        frames = num_fbank_frames(num_samples, self.window_length, self.hop_length)
        features, frames = self.stack_and_normalize(features, frames)
        mask = torch.arange(features.shape[1], device=features.device) < frames[:, None]
        if not mask.all():
            features = features.masked_fill(~mask[..., None], self.padding_value)
        data = {"input_features": features}
        if return_attention_mask:
            data["attention_mask"] = mask.long()
        return BatchFeature(data, tensor_type=return_tensors)

    def stack_and_normalize(self, log_mel: torch.Tensor, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Low-frame-rate stacking and CMVN of log-mel `(batch, frames, feature_size)` with `frames` `(batch,)` real
        ones; the features and how many of them are real."""
        features = log_mel
        if self.lfr_m > 1 or self.lfr_n > 1:
            features = low_frame_rate(features, frames, self.lfr_m, self.lfr_n)
            frames = num_lfr_frames(frames, self.lfr_n)
        if self.cmvn_mean is not None:
            mean = torch.tensor(self.cmvn_mean, dtype=torch.float32, device=features.device)
            inverse_std = torch.tensor(self.cmvn_inverse_std, dtype=torch.float32, device=features.device)
            features = (features - mean) * inverse_std
        return features, frames


KaldiFbankFeatureExtractor.register_for_auto_class()
