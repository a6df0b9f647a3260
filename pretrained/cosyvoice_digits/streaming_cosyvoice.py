"""Speech while it is made: audio comes out before the text has been spoken to its end, and before it has come in.

Upstream (`CosyVoice2Model.tts` of `cosyvoice/cli/model.py`) computes the flow over the whole history for each piece,
and a thread waits for tokens 100 ms at a time. Here every part keeps what it needs of the past:

* the language model makes tokens in bursts; its cache lives through them;
* the flow of versions 2 and 3 keeps keys, values and the edges of its convolutions for every Euler step, and gives
  exactly the frames that it gives in one pass with chunked attention. That of version 1 looks both ways: it makes
  overlapping pieces, as upstream;
* the vocoder keeps the edges of its convolutions and its phase, and gives exactly the samples of one pass.

No thread, no shared state: a stream is an iterator over state of its own.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .modeling_cosyvoice import CosyVoiceForTextToWaveform, CosyVoicePrompt
from .row_noise import split_generators
from .silent_tokens import SilentRun, drop_long_silence
from .speech_token_bursts import generate_speech_bursts
from .streaming_cosyvoice_lm import finish_text, push_text, start_text_stream


_PROMPT_INPUTS = (
    *("prompt_features", "prompt_features_mask", "prompt_fbank", "prompt_fbank_mask", "prompt_mel", "prompt_mel_mask"),
    *("prompt_speech_ids", "prompt_speech_mask", "speaker_embedding"),
)


class SpeechStream:
    """Tokens of one answer in, waveform out; the state of flow and vocoder.

    Args:
        model: used and not changed. prompt: the voice, one row.
        num_steps (`int`): Euler steps of the flow.
        flow_generator, vocoder_generator (*optional*): of what is random in the flow (version 1) and the vocoder.
        compatibility (`"upstream"`, *optional*): of the vocoder: overlapping pieces that are faded into each other.
    """

    def __init__(
        self,
        model: CosyVoiceForTextToWaveform,
        prompt: CosyVoicePrompt,
        num_steps: int = 10,
        flow_generator: torch.Generator | None = None,
        vocoder_generator: torch.Generator | None = None,
        compatibility: str | None = None,
    ) -> None:
        self.model = model
        options: dict[str, Any] = {"num_steps": num_steps}
        if model.config.version == 1:
            options["generator"] = flow_generator
        self.mel_state = model.flow.start_stream(
            prompt.speaker_embedding, prompt.speech_ids, prompt.speech_mask, prompt.mel, prompt.mel_mask, **options
        )
        self.wave_state = model.vocoder.start_stream(1, generator=vocoder_generator, compatibility=compatibility)

    def push(self, speech_ids: Sequence[int], is_last: bool = False) -> Tensor:
        """The samples `(1, n)` that are settled with these tokens; `n` may be 0.

        Args:
            speech_ids: from 0. is_last: there are no more.
        """
        ids = torch.tensor([list(speech_ids)], dtype=torch.long, device=self.model.device)
        output, self.mel_state = self.model.flow.stream_mel(self.mel_state, ids, is_last=is_last)
        waveform, self.wave_state = self.model.vocoder.stream(output.mel, self.wave_state, is_last=is_last)
        return waveform


@torch.no_grad()
def stream_speech(
    model: CosyVoiceForTextToWaveform,
    inputs: dict[str, Tensor],
    chunk_tokens: int | None = None,
    num_steps: int = 10,
    generator: torch.Generator | None = None,
    compatibility: str | None = None,
    **lm_kwargs: Any,
) -> Iterator[Tensor]:
    """Pieces of the waveform of one text.

    Args:
        inputs: of the model's `generate`, one row; voice conversion too.
        chunk_tokens (`int`, *optional*): speech tokens that are made at a time; by default as many as let the flow
            give its next frames.
        num_steps, generator, compatibility, lm_kwargs: as in `generate`.

    Yields:
        `(1, n)` float32, `n` ≥ 1. Together they are the waveform of `generate(..., streaming=True)` (versions 2 and 3)
        for the same tokens and the same draws.
    """
    _check_one_row(inputs)
    prompt = model.read_prompt(1, **{name: inputs.get(name) for name in _PROMPT_INPUTS})
    for_lm, for_flow, for_vocoder = split_generators(generator, 3)
    stream = SpeechStream(model, prompt, num_steps, for_flow, for_vocoder, compatibility)
    if "source_features" in inputs:
        tokens, _ = model.encode_speech(inputs["source_features"], inputs["source_features_mask"])
        bursts: Iterable[list[int]] = [tokens[0].tolist()]
    else:
        speech = prompt.speech_ids[0][prompt.speech_mask[0].bool()].tolist()
        bursts = generate_speech_bursts(
            model.lm,
            _burst_sizes(model, len(speech), chunk_tokens),
            _ids(inputs, "input_ids", "attention_mask"),
            _ids(inputs, "prompt_input_ids", "prompt_attention_mask"),
            speech if _flag(inputs, "lm_reads_prompt_speech") else [],
            speaker_embedding=prompt.speaker_embedding,
            reads_speaker=_flag(inputs, "lm_reads_speaker"),
            generator=for_lm,
            compatibility=compatibility,
            **lm_kwargs,
        )
    yield from _play(stream, _without_long_silence(model, bursts))


@torch.no_grad()
def stream_text_to_speech(
    model: CosyVoiceForTextToWaveform,
    text_ids: Iterable[Sequence[int]],
    inputs: dict[str, Tensor],
    num_steps: int = 10,
    generator: torch.Generator | None = None,
    compatibility: str | None = None,
    **lm_kwargs: Any,
) -> Iterator[Tensor]:
    """Pieces of the waveform while the text arrives (versions 2 and 3).

    Args:
        text_ids: pieces of the text as ids, as they come, of another model for instance.
        inputs: of the model's `generate`, one row; its text is not used.
        others: as in [`stream_speech`]; `lm_kwargs` are those of `start_text_stream`.

    Raises:
        ValueError: version 1, whose language model was not trained for it.
    """
    if model.config.version == 1:
        raise ValueError("version: expected 2 or 3 for a text that arrives in pieces, got 1")
    _check_one_row(inputs)
    prompt = model.read_prompt(1, **{name: inputs.get(name) for name in _PROMPT_INPUTS})
    for_lm, for_flow, for_vocoder = split_generators(generator, 3)
    stream = SpeechStream(model, prompt, num_steps, for_flow, for_vocoder, compatibility)
    speech = prompt.speech_ids[0][prompt.speech_mask[0].bool()].tolist()
    state = start_text_stream(
        model.lm,
        _ids(inputs, "prompt_input_ids", "prompt_attention_mask"),
        speech if _flag(inputs, "lm_reads_prompt_speech") else [],
        generator=for_lm,
        compatibility=compatibility,
        **lm_kwargs,
    )

    def bursts() -> Iterator[list[int]]:
        for piece in text_ids:
            yield list(push_text(model.lm, state, piece))
        for token in finish_text(model.lm, state):
            yield [token]

    yield from _play(stream, _without_long_silence(model, bursts()))


def _play(stream: SpeechStream, bursts: Iterable[list[int]]) -> Iterator[Tensor]:
    for tokens in bursts:
        waveform = stream.push(tokens)
        if waveform.shape[1]:
            yield waveform
    waveform = stream.push([], is_last=True)
    if waveform.shape[1]:
        yield waveform


def _without_long_silence(model: CosyVoiceForTextToWaveform, bursts: Iterable[list[int]]) -> Iterator[list[int]]:
    silent, run = model.silent_token_ids, SilentRun()
    for tokens in bursts:
        yield list(drop_long_silence(tokens, silent, model.config.lm_config.max_silent_run, run)) if silent else tokens


def _burst_sizes(model: CosyVoiceForTextToWaveform, prompt_tokens: int, chunk_tokens: int | None) -> Iterator[int]:
    """How many tokens to make before the flow can go on: first to the end of the chunk in which the prompt ends, and
    the tokens that it looks ahead; then a chunk each."""
    if chunk_tokens is not None:
        if chunk_tokens < 1:
            raise ValueError(f"chunk_tokens: expected at least 1, got {chunk_tokens}")
        while True:
            yield chunk_tokens
    if model.config.version == 1:
        first = chunk = 2 * model.config.flow_config.input_frame_rate
        first += model.flow.stream_overlap_tokens
    else:
        chunk = model.flow.chunk_tokens
        first = chunk - prompt_tokens % chunk + model.config.flow_config.num_lookahead_tokens
    yield first
    while True:
        yield chunk


def _ids(inputs: dict[str, Tensor], name: str, mask_name: str) -> list[int]:
    """The real ids of the one row; none where the input is absent."""
    if inputs.get(name) is None:
        return []
    row, mask = inputs[name][0], inputs.get(mask_name)
    return (row if mask is None else row[mask[0].bool()]).tolist()


def _flag(inputs: dict[str, Tensor], name: str) -> bool:
    return name not in inputs or bool(inputs[name][0])


def _check_one_row(inputs: dict[str, Tensor]) -> None:
    for name, value in inputs.items():
        if len(value) != 1:
            raise ValueError(f"{name}: expected one row for a stream, got {len(value)}")
