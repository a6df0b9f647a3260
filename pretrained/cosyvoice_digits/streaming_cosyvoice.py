"""Speech while it is made: audio comes out before the text has been spoken to its end, and before it has come in.

Upstream (`CosyVoice2Model.tts` of `cosyvoice/cli/model.py`) computes the flow over the whole history for each piece,
and a thread waits for tokens 100 ms at a time. Here every part keeps what it needs of the past:

* the language model makes tokens in bursts; its cache lives through them;
* the flow of versions 2 and 3 keeps keys, values and the edges of its convolutions for every Euler step, and gives
  exactly the frames that it gives in one pass with chunked attention. That of version 1 looks both ways: it makes
  overlapping pieces, as upstream;
* the vocoder keeps the edges of its convolutions and its phase, and gives exactly the samples of one pass.

Several streams share the work of the language model and of the flow ([`SpeechStreamBatch`]); each is what it is alone.
No thread, no shared state: a stream is an iterator over state of its own.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .modeling_cosyvoice import CosyVoiceForTextToWaveform, CosyVoicePrompt
from .row_noise import Generators, split_generators
from .silent_tokens import SilentRun, drop_long_silence
from .speech_rows import SpeechRows
from .speech_token_batch import SpeechTokenBatch
from .speech_token_generation import SpeechTokenOptions
from .streaming_cosyvoice_lm import finish_text, push_text, start_text_stream


_PROMPT_INPUTS = (
    *("prompt_features", "prompt_features_mask", "prompt_fbank", "prompt_fbank_mask", "prompt_mel", "prompt_mel_mask"),
    *("prompt_speech_ids", "prompt_speech_mask", "speaker_embedding"),
)


class SpeechStream:
    """Tokens of one answer in, waveform out; the state of flow and vocoder.

    Args:
        model: used and not changed. prompt: the voice, one row.
        flow_generator, vocoder_generator (*optional*): of what is random in the flow (version 1) and the vocoder.
        num_steps, compatibility, num_left_chunks, cache_dtype: see [`SpeechRows`].
    """

    def __init__(
        self,
        model: CosyVoiceForTextToWaveform,
        prompt: CosyVoicePrompt,
        num_steps: int = 10,
        flow_generator: torch.Generator | None = None,
        vocoder_generator: torch.Generator | None = None,
        compatibility: str | None = None,
        num_left_chunks: int = -1,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        self._rows = SpeechRows(model, num_steps, compatibility, num_left_chunks, cache_dtype)
        self._rows.add([0], prompt, [flow_generator], [vocoder_generator])

    def push(self, speech_ids: Sequence[int], is_last: bool = False) -> Tensor:
        """The samples `(1, n)` that are settled with these tokens; `n` may be 0.

        Args:
            speech_ids: from 0. is_last: there are no more.
        """
        return self._rows.push({0: list(speech_ids)}, [0] if is_last else [])[0][None]


@dataclass
class SpeechPiece:
    """
    Args:
        waveform (`(n,)`, float32): the next samples of a stream; `n` may be 0.
        is_last (`bool`): whether the stream has ended with them.
    """

    waveform: Tensor
    is_last: bool


@dataclass
class _Row:
    """A stream of a batch: tokens that wait for the flow, and how many silent ones have come in a row."""

    tokens: list[int] = field(default_factory=list)
    run: SilentRun = field(default_factory=SilentRun)
    is_complete: bool = False


class SpeechStreamBatch:
    """Streams that are computed together; streams may join while others run.

    The language model decodes all rows in one batch and the flow of versions 2 and 3 steps them in one; the vocoder,
    and the flow of version 1, take one row after the other. A row that has ended costs nothing any more. What a row
    gives does not depend on the others: neither on their number nor on when they came.

    Args:
        model: used and not changed.
        chunk_tokens (`int`, *optional*): speech tokens of every row that are made in a step; by default until the flow
            can give frames of every row.
        num_steps, compatibility: as in `generate`.
        num_left_chunks, cache_dtype: what the flow of versions 2 and 3 keeps of the past, see its `start_stream`.
        lm_kwargs: the fields of [`SpeechTokenOptions`], as in `generate`.

    Raises:
        ValueError: options out of range.

    Example:

    ```python
    >>> batch = SpeechStreamBatch(model)
    >>> (handle,) = batch.add(processor("Some text.", speaker="me"))
    >>> while len(batch):
    ...     for handle, piece in batch.step().items():
    ...         send(handle, piece.waveform)
    ```
    """

    def __init__(
        self,
        model: CosyVoiceForTextToWaveform,
        chunk_tokens: int | None = None,
        num_steps: int = 10,
        compatibility: str | None = None,
        num_left_chunks: int = -1,
        cache_dtype: torch.dtype | None = None,
        **lm_kwargs: Any,
    ) -> None:
        if chunk_tokens is not None and chunk_tokens < 1:
            raise ValueError(f"chunk_tokens: expected at least 1, got {chunk_tokens}")
        self.model, self.chunk_tokens = model, chunk_tokens
        self._lm = SpeechTokenBatch(model.lm, SpeechTokenOptions(compatibility=compatibility, **lm_kwargs))
        self._sound = SpeechRows(model, num_steps, compatibility, num_left_chunks, cache_dtype)
        self._rows: dict[int, _Row] = {}
        self._handles = 0
        # The stream of each answer of the language model.
        self._of_answer: dict[int, int] = {}

    def __len__(self) -> int:
        """Streams that have not ended."""
        return len(self._rows)

    @torch.no_grad()
    def add(self, inputs: dict[str, Tensor], generator: Generators = None) -> list[int]:
        """Begin a stream for every row.

        Args:
            inputs: of the model's `generate`; texts or, for voice conversion, recordings.
            generator (*optional*): one for each row, with which a row is the same in every batch and alone; or one
                that seeds one for each.

        Returns:
            a number for each stream, by which [`step`] and [`remove`] know it.

        Raises:
            ValueError: no or two kinds of input, inputs of different numbers of rows, or no voice.
        """
        if (inputs.get("input_ids") is None) == (inputs.get("source_features") is None):
            raise ValueError("input: expected either input_ids or source_features")
        count = len(next(iter(inputs.values())))
        for name, value in inputs.items():
            if len(value) != count:
                raise ValueError(f"{name}: expected {count} rows, got {len(value)}")
        for_lm, for_flow, for_vocoder = _generators_of_rows(generator, count)
        prompt = self.model.read_prompt(count, **{name: inputs.get(name) for name in _PROMPT_INPUTS})
        handles, answers = list(range(self._handles, self._handles + count)), []
        if inputs.get("source_features") is not None:
            tokens, mask = self.model.encode_speech(inputs["source_features"], inputs["source_features_mask"])
            rows = [_Row(ids[real.bool()].tolist(), is_complete=True) for ids, real in zip(tokens, mask, strict=True)]
        else:
            rows = [_Row() for _ in handles]
            answers = self._ask(inputs, prompt, for_lm)
        try:
            self._sound.add(handles, prompt, for_flow, for_vocoder)
        except ValueError:
            # A request that is refused leaves nothing behind.
            for answer in answers:
                self._lm.remove(answer)
            raise
        self._of_answer |= dict(zip(answers, handles, strict=False))
        self._handles += count
        self._rows |= dict(zip(handles, rows, strict=True))
        return handles

    @torch.no_grad()
    def step(self) -> dict[int, SpeechPiece]:
        """The next piece of every stream; one that ends with it is forgotten."""
        self._speak()
        last = [handle for handle, row in self._rows.items() if row.is_complete]
        waveforms = self._sound.push({handle: row.tokens for handle, row in self._rows.items()}, last)
        pieces = {handle: SpeechPiece(waveforms[handle], handle in last) for handle in self._rows}
        self._rows = {handle: row for handle, row in self._rows.items() if not row.is_complete}
        for row in self._rows.values():
            row.tokens = []
        return pieces

    def remove(self, handle: int) -> None:
        """Stop a stream before its end.

        Raises:
            KeyError: no such stream, or one that has ended.
        """
        del self._rows[handle]
        self._sound.remove([handle])
        for answer, stream in list(self._of_answer.items()):
            if stream == handle:
                del self._of_answer[answer]
                self._lm.remove(answer)

    def _ask(
        self, inputs: dict[str, Tensor], prompt: CosyVoicePrompt, generators: Sequence[torch.Generator | None]
    ) -> list[int]:
        """Begin answers of the language model; its numbers for them."""
        text = _ids(inputs, "input_ids", "attention_mask")
        count = len(text)
        before = _ids(inputs, "prompt_input_ids", "prompt_attention_mask") or [[] for _ in text]
        speech = [
            row[real.bool()].tolist() if reads else []
            for row, real, reads in zip(
                prompt.speech_ids, prompt.speech_mask, _flags(inputs, "lm_reads_prompt_speech", count), strict=True
            )
        ]
        speaker_mask = torch.tensor(_flags(inputs, "lm_reads_speaker", count), device=self.model.device).long()
        return self._lm.add(text, before, speech, prompt.speaker_embedding, speaker_mask, generators)

    def _speak(self) -> None:
        """Let the language model go on until every stream has enough for its next piece, or has ended."""
        needed = self._sound.mel_rows.tokens_to_next_piece()
        if self.chunk_tokens is not None:
            needed = dict.fromkeys(needed, self.chunk_tokens)
        model, silent = self.model, self.model.silent_token_ids
        while any(not row.is_complete and len(row.tokens) < needed[handle] for handle, row in self._rows.items()):
            tokens, ended = self._lm.step()
            for answer, token in tokens.items():
                row = self._rows[self._of_answer[answer]]
                limit = model.config.lm_config.max_silent_run if silent else 0
                row.tokens += drop_long_silence([token], silent, limit, row.run) if silent else [token]
            for answer in ended:
                # One that was removed before it began is not known any more.
                if answer in self._of_answer:
                    self._rows[self._of_answer.pop(answer)].is_complete = True


def stream_speech(
    model: CosyVoiceForTextToWaveform,
    inputs: dict[str, Tensor],
    chunk_tokens: int | None = None,
    num_steps: int = 10,
    generator: torch.Generator | None = None,
    compatibility: str | None = None,
    **options: Any,
) -> Iterator[Tensor]:
    """Pieces of the waveform of one text.

    Args:
        inputs: of the model's `generate`, one row; voice conversion too. For several rows: [`stream_speech_batch`].
        generator: as in `generate`.
        others: see [`SpeechStreamBatch`].

    Yields:
        `(1, n)` float32, `n` ≥ 1. Together they are the waveform of `generate(..., streaming=True)` (versions 2 and 3)
        for the same tokens and the same draws.

    Raises:
        ValueError: more than one row, options out of range.
    """
    _check_one_row(inputs)
    generators = None if generator is None else [generator]
    for (piece,) in stream_speech_batch(model, inputs, chunk_tokens, num_steps, generators, compatibility, **options):
        if len(piece.waveform):
            yield piece.waveform[None]


def stream_speech_batch(
    model: CosyVoiceForTextToWaveform,
    inputs: dict[str, Tensor],
    chunk_tokens: int | None = None,
    num_steps: int = 10,
    generator: Generators = None,
    compatibility: str | None = None,
    **options: Any,
) -> Iterator[list[SpeechPiece]]:
    """Pieces of the waveforms of several texts, which are computed together.

    Args:
        inputs: of the model's `generate`, any number of rows, which may differ in voice and mode.
        generator: see [`SpeechStreamBatch.add`].
        others: see [`SpeechStreamBatch`].

    Yields:
        the next [`SpeechPiece`] of every row, in the order of the rows. Those of a row together are the waveform of
        `generate(..., streaming=True)` (versions 2 and 3). After its last piece a row has pieces without samples,
        with `is_last`, until all rows have ended.

    Example:

    ```python
    >>> for pieces in stream_speech_batch(model, inputs):
    ...     for row, piece in enumerate(pieces):
    ...         play(row, piece.waveform)
    ```
    """
    batch = SpeechStreamBatch(model, chunk_tokens, num_steps, compatibility, **options)
    handles = batch.add(inputs, generator)
    ended = SpeechPiece(torch.zeros(0, device=model.device), True)
    while len(batch):
        pieces = batch.step()
        if any(len(piece.waveform) or piece.is_last for piece in pieces.values()):
            yield [pieces.get(handle, ended) for handle in handles]


@torch.no_grad()
def stream_text_to_speech(
    model: CosyVoiceForTextToWaveform,
    text_ids: Iterable[Sequence[int]],
    inputs: dict[str, Tensor],
    num_steps: int = 10,
    generator: torch.Generator | None = None,
    compatibility: str | None = None,
    num_left_chunks: int = -1,
    cache_dtype: torch.dtype | None = None,
    **lm_kwargs: Any,
) -> Iterator[Tensor]:
    """Pieces of the waveform while the text arrives (versions 2 and 3).

    Args:
        text_ids: pieces of the text as ids, as they come, of another model for instance.
        inputs: of the model's `generate`, one row; its text is not used.
        others: see [`SpeechStreamBatch`]; `lm_kwargs` are those of `start_text_stream`.

    Yields:
        `(1, n)` float32, `n` ≥ 1.

    Raises:
        ValueError: version 1, whose language model was not trained for it; more than one row.
    """
    if model.config.version == 1:
        raise ValueError("version: expected 2 or 3 for a text that arrives in pieces, got 1")
    _check_one_row(inputs)
    prompt = model.read_prompt(1, **{name: inputs.get(name) for name in _PROMPT_INPUTS})
    for_lm, for_flow, for_vocoder = split_generators(generator, 3)
    stream = SpeechStream(model, prompt, num_steps, for_flow, for_vocoder, compatibility, num_left_chunks, cache_dtype)
    speech = prompt.speech_ids[0][prompt.speech_mask[0].bool()].tolist()
    (before,) = _ids(inputs, "prompt_input_ids", "prompt_attention_mask") or [[]]
    (reads_speech,) = _flags(inputs, "lm_reads_prompt_speech", 1)
    state = start_text_stream(
        model.lm,
        before,
        speech if reads_speech else [],
        generator=for_lm,
        compatibility=compatibility,
        **lm_kwargs,
    )

    def bursts() -> Iterator[list[int]]:
        for piece in text_ids:
            yield list(push_text(model.lm, state, piece))
        for token in finish_text(model.lm, state):
            yield [token]

    silent, run = model.silent_token_ids, SilentRun()
    for tokens in bursts():
        if silent:
            tokens = list(drop_long_silence(tokens, silent, model.config.lm_config.max_silent_run, run))
        waveform = stream.push(tokens)
        if waveform.shape[1]:
            yield waveform
    waveform = stream.push([], is_last=True)
    if waveform.shape[1]:
        yield waveform


def _generators_of_rows(generator: Generators, count: int) -> list[list[torch.Generator | None]]:
    """For language model, flow and vocoder, those of the rows."""
    if generator is None:
        return [[None] * count] * 3
    if isinstance(generator, torch.Generator):
        generator = split_generators(generator, count)
    if len(generator) != count:
        raise ValueError(f"generator: expected one for each of {count} rows, got {len(generator)}")
    return split_generators(generator, 3)


def _ids(inputs: dict[str, Tensor], name: str, mask_name: str) -> list[list[int]]:
    """The real ids of each row; no rows where the input is absent."""
    if inputs.get(name) is None:
        return []
    mask = inputs.get(mask_name)
    if mask is None:
        return inputs[name].tolist()
    return [row[real.bool()].tolist() for row, real in zip(inputs[name], mask, strict=True)]


def _flags(inputs: dict[str, Tensor], name: str, count: int) -> list[bool]:
    """Yes for every row where the input is absent."""
    return [True] * count if inputs.get(name) is None else inputs[name].bool().tolist()


def _check_one_row(inputs: dict[str, Tensor]) -> None:
    for name, value in inputs.items():
        if len(value) != 1:
            raise ValueError(f"{name}: expected one row for a stream, got {len(value)}")
