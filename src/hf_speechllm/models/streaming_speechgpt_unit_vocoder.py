"""Sound of a unit vocoder while its units come one by one.

The samples are those that the vocoder gives for all units at once: the duration predictor sees two units to each side
and the generator so many frames, so that what lies further inside cannot change any more.
"""

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel


# Units to each side that the two convolutions of kernel 3 of the duration predictor see.
_DURATION_CONTEXT = 2
# Kernel of the first and the last convolution of a HiFi-GAN.
_OUTER_KERNEL = 7


class UnitVocoderStream:
    """Sound of one utterance whose units come one by one.

    The samples of all calls of [`push`] together are those of the vocoder for all units together. The state of one
    answer; make a new object for each.

    Args:
        vocoder: a `SpeechGptUnitVocoderModel`.
        predict_durations: whether the model finds the durations, or each unit is one frame; default: if it can.
        voice: other options of every call, e.g. `speaker_id`.
    """

    def __init__(self, vocoder: PreTrainedModel, predict_durations: bool | None = None, **voice) -> None:
        if predict_durations is None:
            predict_durations = bool(vocoder.config.duration_hidden_size)
        self._vocoder, self._predict_durations, self._voice = vocoder, predict_durations, voice
        self._reach = generator_reach(vocoder.config.hifigan_config)
        self._hop = math.prod(vocoder.config.hifigan_config.upsample_rates)
        self._units: list[int] = []
        self._durations: list[int] = []
        # One unit per frame, as far as durations are known; those before `_first` are no longer needed.
        self._frames: list[int] = []
        self._first = 0
        self._spoken = 0

    @torch.no_grad()
    def push(self, units: list[int], is_last: bool = False) -> Tensor:
        """More samples `(samples,)`, float32, after more units; `is_last` gives the rest."""
        self._units += units
        self._settle_durations(is_last)
        known = self._first + len(self._frames)
        ready = known if is_last else known - self._reach
        if ready <= self._spoken:
            return torch.zeros(0)
        start = max(self._first, self._spoken - self._reach)
        frames = torch.tensor([self._frames[start - self._first :]], device=self._vocoder.device)
        output = self._vocoder(frames, durations=torch.ones_like(frames), return_dict=True, **self._voice)
        waveform = output.waveform[0, : int(output.lengths[0])].float().cpu()
        offset = (self._spoken - start) * self._hop
        # Where kernels and rates differ by an odd number the last frame is a few samples longer.
        end = None if is_last else (ready - start) * self._hop
        self._spoken = ready
        kept = max(self._first, self._spoken - self._reach)
        del self._frames[: kept - self._first]
        self._first = kept
        return waveform[offset:end]

    def _settle_durations(self, is_last: bool) -> None:
        """Durations of the units whose neighbours are there."""
        known, total = len(self._durations), len(self._units)
        settled = total if is_last else total - _DURATION_CONTEXT
        if settled <= known:
            return
        if self._predict_durations:
            start = max(0, known - _DURATION_CONTEXT)
            window = torch.tensor([self._units[start:]], device=self._vocoder.device)
            mask = torch.ones_like(window, dtype=torch.bool)
            found = self._vocoder.frames_of(self._vocoder.predict_log_durations(window, mask))[0]
            new = found[known - start : settled - start].tolist()
        else:
            new = [1] * (settled - known)
        for unit, duration in zip(self._units[known:settled], new, strict=True):
            self._frames += [unit] * duration
        self._durations += new


def generator_reach(config) -> int:
    """How many frames to each side a sample of a HiFi-GAN may depend on, rounded up.

    From the last layer to the first: a convolution adds half of its dilated kernel, an upsampling layer divides.

    Args:
        config (`SpeechT5HifiGanConfig`).
    """
    outer = (_OUTER_KERNEL - 1) // 2
    reach = outer
    for rate, kernel in zip(config.upsample_rates[::-1], config.upsample_kernel_sizes[::-1], strict=True):
        reach += max(
            sum((size - 1) // 2 * (dilation + 1) for dilation in dilations)
            for size, dilations in zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True)
        )
        reach = -(-(reach + kernel) // rate)
    return reach + outer
