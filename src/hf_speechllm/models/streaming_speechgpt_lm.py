"""Text and sound of an answer while the model writes it.

`UnitStreamer` hands token ids from `generate`, in a thread of its own, to whoever reads them, and `TextPieces` makes
text of them. Sound comes from the vocoder's own stream.
"""

import queue
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from .answers_speechgpt_lm import SpeechGptAnswer


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
