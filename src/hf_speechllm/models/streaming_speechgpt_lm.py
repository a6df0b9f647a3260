"""Text and sound of an answer while the model writes it.

`UnitStreamer` hands token ids from `generate`, in a thread of its own, to whoever reads them. `UnitSpeaker` turns
units that come one by one into the samples that the vocoder gives for all of them: the duration predictor sees two
units to each side and the generator so many frames, so that what lies further inside cannot change any more.
"""

import math
import queue
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from .answers_speechgpt_lm import SpeechGptAnswer


# Units to each side that the two convolutions of kernel 3 of the duration predictor see.
_DURATION_CONTEXT = 2
# Kernel of the first and the last convolution of a HiFi-GAN.
_OUTER_KERNEL = 7


@dataclass(frozen=True)
class SpeechGptPiece:
    """What has arrived since the piece before.

    Args:
        text (`str`): more of the text, tags such as `[ta]` included.
        units (`list[int]`): more units.
        audio (`(samples,)`, float32, *optional*): more sound; sound comes later than its units.
        answer ([`SpeechGptAnswer`], *optional*): the whole answer, in the last piece only.
    """

    text: str = ""
    units: list[int] = field(default_factory=list)
    audio: Tensor | None = None
    answer: SpeechGptAnswer | None = None

    @property
    def is_last(self) -> bool:
        return self.answer is not None


class UnitStreamer(BaseStreamer):
    """Ids from `generate(streamer=...)` for another thread, which iterates over them one at a time.

    Args:
        timeout (`float`, *optional*): seconds after which a wait for the next id fails with `queue.Empty`.
    """

    def __init__(self, timeout: float | None = None) -> None:
        self._ids: queue.Queue[int | BaseException | None] = queue.Queue()
        self._timeout = timeout
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        """Called by `generate`: first with the prompt, then with each new id."""
        if value.dim() > 1 and value.shape[0] > 1:
            raise ValueError(f"streaming: expected one sequence, got a batch of {value.shape[0]}")
        if self._is_prompt:
            self._is_prompt = False
            return
        for index in value.flatten().tolist():
            self._ids.put(index)

    def end(self) -> None:
        """Called by `generate` when it is done."""
        self._ids.put(None)

    def fail(self, error: BaseException) -> None:
        """Passes an error of the generating thread on to the reader."""
        self._ids.put(error)

    def __iter__(self) -> Iterator[int]:
        while (item := self._ids.get(timeout=self._timeout)) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item


class TextPieces:
    """Decodes a growing sequence of ids: what can be said for sure, piece by piece.

    The state of one answer; make a new object for each.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._given = 0

    def push(self, index: int | None) -> str:
        """More text after one more id; `None` ends a stretch of text and gives what was held back."""
        if index is not None:
            self._ids.append(index)
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if index is None:
            piece, self._ids, self._given = text[self._given :], [], 0
            return piece
        # The bytes of a character may come one by one.
        if text.endswith("\ufffd") or len(text) <= self._given:
            return ""
        piece, self._given = text[self._given :], len(text)
        return piece


class UnitSpeaker:
    """Sound of one utterance whose units come one by one.

    The samples of all calls of [`push`] together are those of the vocoder for all units together. The state of one
    answer; make a new object for each.

    Args:
        vocoder: a unit vocoder: `vocoder(unit_ids, durations=...)` with `waveform` and `durations` in its output,
            `config.hifigan_config`, `config.duration_hidden_size`.
        voice: options of every call, e.g. `speaker_id`.
    """

    def __init__(self, vocoder: PreTrainedModel, **voice) -> None:
        self._vocoder, self._voice = vocoder, voice
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
        if self._vocoder.config.duration_hidden_size:
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
