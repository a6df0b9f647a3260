"""Speech tokens while the text still arrives, with the language model of CosyVoice 2 and 3.

Upstream: `inference_bistream` of `cosyvoice/llm/llm.py`. The sequence is that of the training layout with two streams:
blocks of 5 text and 15 speech tokens, each ended by *fill*, with which the model asks for more text. The prompt's text
and speech fill the first blocks. When the text ends, what is left of it and the task token follow, and speech until
its end.

Default behaviour differs from upstream where upstream leaves that layout; `compatibility="upstream"` follows it:

* a text that ends while the model waits after *fill*: upstream feeds its last input a second time;
* a text so short that the prompt's speech is not used up: upstream drops the rest of that speech;
* version 3 without prompt speech: upstream starts to speak before the first block of text;
* the tokens that end an answer cannot be drawn while there is more text, and of those after *fill* only the end can
  at last. Upstream forbids one of them and fails with a `ValueError` when another is drawn.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from .modeling_cosyvoice_lm import CosyVoiceLmForCausalLM
from .prompts_cosyvoice_lm import speech_token_ids, text_token_ids
from .ras_sampling import RasSettings, ras_probabilities


@dataclass
class SpeechTextStream:
    """The state of one answer: it goes into each call and comes out changed. One per stream, nothing is shared.

    Args:
        next_ids: ids of the vocabulary that the model has not read yet. last_ids: what it read last.
        text_ids: text that waits for its block.
        prompt_speech_ids: speech of the prompt that waits for its block, as ids of the vocabulary.
        history: tokens drawn so far, from 0, *fill* included.
        next_fill: length of the history at which *fill* is due.
        awaits_text: whether a block of text must come before more speech.
        num_text (`int`): tokens of text that were pushed; the prompt's do not count.
        num_speech (`int`): tokens of speech given out.
        finished: the end was reached.
        sampling, temperature, do_sample, generator, compatibility, max_token_text_ratio: as in `start_text_stream`.
    """

    next_ids: list[int]
    text_ids: list[int]
    prompt_speech_ids: list[int]
    next_fill: int
    awaits_text: bool
    sampling: RasSettings
    do_sample: bool
    temperature: float
    max_token_text_ratio: float | None
    generator: torch.Generator | None
    compatibility: str | None
    cache: Cache | None = None
    last_ids: list[int] = field(default_factory=list)
    history: list[int] = field(default_factory=list)
    num_text: int = 0
    num_speech: int = 0
    finished: bool = False
    logits: list[Tensor] | None = None


def start_text_stream(
    model: CosyVoiceLmForCausalLM,
    prompt_text_ids: Sequence[int] = (),
    prompt_speech_ids: Sequence[int] = (),
    do_sample: bool = True,
    sampling: RasSettings | None = None,
    temperature: float = 1.0,
    max_token_text_ratio: float | None = 20.0,
    generator: torch.Generator | None = None,
    compatibility: str | None = None,
    output_logits: bool = False,
) -> SpeechTextStream:
    """A new answer.

    Args:
        prompt_text_ids, prompt_speech_ids: of the prompt's audio, speech from 0. In version 3 the text must contain
            `<|endofprompt|>`; all up to there is the instruction and comes first.
        do_sample, sampling, temperature, generator: see `generate_speech_tokens`.
        max_token_text_ratio (`float`, *optional*): the answer ends after so many tokens per token of text; None, as
            upstream: never.
        compatibility (`"upstream"`, *optional*): see the head of this file.
        output_logits (`bool`): keep the logits `(rows,)` of every step in `logits`.

    Raises:
        ValueError: an id out of range, a version 3 prompt without `<|endofprompt|>`, an unknown `compatibility`.
    """
    config = model.config
    if compatibility not in (None, "upstream"):
        raise ValueError(f"compatibility: expected None or 'upstream', got {compatibility!r}")
    next_ids = [config.start_token_id]
    text = text_token_ids(config, prompt_text_ids)
    if config.version == 3:
        if config.end_of_prompt_id not in text:
            raise ValueError(f"prompt_text_ids: expected <|endofprompt|> (id {config.end_of_prompt_id})")
        instruction = text.index(config.end_of_prompt_id) + 1
        next_ids, text = [*next_ids, *text[:instruction]], text[instruction:]
    speech = speech_token_ids(config, prompt_speech_ids)
    block = config.mix_ratio[1]
    return SpeechTextStream(
        next_ids=next_ids,
        text_ids=text,
        prompt_speech_ids=speech,
        next_fill=(len(speech) // block + 1) * block - len(speech),
        # With prompt speech, the blocks of the prompt come first and end with speech.
        awaits_text=not speech and (len(next_ids) == 1 or compatibility is None),
        sampling=model.default_sampling if sampling is None else sampling,
        do_sample=do_sample,
        temperature=temperature,
        max_token_text_ratio=max_token_text_ratio,
        generator=generator,
        compatibility=compatibility,
        logits=[] if output_logits else None,
    )


def push_text(model: CosyVoiceLmForCausalLM, stream: SpeechTextStream, text_ids: Sequence[int]) -> Iterator[int]:
    """More text; gives the speech tokens (from 0) that it allows, as they are made.

    The ids are taken one by one, so that how they are divided into calls changes nothing. The iterator must be used
    up before the next call.

    Raises:
        ValueError: an id out of range, or an answer that has ended.
    """
    if stream.finished:
        raise ValueError("stream: expected one that has not ended")
    text_part, speech_part = model.config.mix_ratio
    for token in text_token_ids(model.config, text_ids):
        stream.text_ids.append(token)
        stream.num_text += 1
        while stream.prompt_speech_ids and len(stream.text_ids) >= text_part:
            stream.next_ids += [*stream.text_ids[:text_part], *stream.prompt_speech_ids[:speech_part]]
            del stream.text_ids[:text_part], stream.prompt_speech_ids[:speech_part]
        if stream.prompt_speech_ids:
            continue
        if stream.awaits_text:
            if len(stream.text_ids) < text_part:
                continue
            stream.next_ids += stream.text_ids[:text_part]
            del stream.text_ids[:text_part]
            stream.awaits_text = False
        yield from _speak_until_fill(model, stream)


def finish_text(model: CosyVoiceLmForCausalLM, stream: SpeechTextStream) -> Iterator[int]:
    """The text has ended; gives the speech tokens (from 0) up to the end of the answer."""
    if stream.finished:
        raise ValueError("stream: expected one that has not ended")
    config = model.config
    upstream = stream.compatibility == "upstream"
    if upstream and stream.history and stream.history[-1] == _fill(model):
        # The cache has it already.
        stream.next_ids = stream.last_ids
    rest = [] if upstream else stream.prompt_speech_ids
    stream.next_ids += [*stream.text_ids, config.task_token_id, *rest]
    stream.text_ids, stream.prompt_speech_ids = [], []
    end = config.end_token_id - config.first_speech_token_id
    allowed = None if upstream else end
    while _may_go_on(stream):
        token = _step(model, stream, allowed)
        stream.history.append(token)
        if token == end:
            break
        if token >= config.speech_vocab_size:
            raise ValueError(f"stream: expected speech or the end, the model said {token}")
        stream.num_speech += 1
        stream.next_ids = speech_token_ids(config, [token])
        yield token
    stream.finished = True


def _speak_until_fill(model: CosyVoiceLmForCausalLM, stream: SpeechTextStream) -> Iterator[int]:
    config, fill = model.config, _fill(model)
    while True:
        due = len(stream.history) == stream.next_fill
        token = _step(model, stream, fill, forced=fill if due else None)
        if token == fill:
            stream.next_fill = len(stream.history) + config.mix_ratio[1] + 1
        stream.history.append(token)
        if token == fill:
            stream.awaits_text = True
            return
        if token >= config.speech_vocab_size:
            raise ValueError(f"stream: expected speech or fill, the model said {token}")
        stream.num_speech += 1
        stream.next_ids = speech_token_ids(config, [token])
        yield token


@torch.no_grad()
def _step(
    model: CosyVoiceLmForCausalLM, stream: SpeechTextStream, allowed: int | None, forced: int | None = None
) -> int:
    """Reads what is to be read and draws a token (from 0).

    Args:
        allowed: the only one beyond the codebook that may be drawn; None, at upstream's end: all of them.
        forced: taken instead of a drawn one.
    """
    if stream.cache is None:
        stream.cache = DynamicCache(config=model.config)
    output = model(
        input_ids=torch.tensor([stream.next_ids], device=model.device),
        past_key_values=stream.cache,
        use_cache=True,
        logits_to_keep=1,
        speech_logits_only=True,
    )
    stream.last_ids, stream.next_ids = stream.next_ids, []
    logits = output.logits[:, -1].float()
    if stream.logits is not None:
        stream.logits.append(logits[0].clone())
    if forced is not None:
        return forced
    size = model.config.speech_vocab_size
    if stream.compatibility == "upstream":
        if allowed is not None:
            logits[:, size] = float("-inf")
    else:
        kept = logits[:, allowed].clone()
        logits[:, size:] = float("-inf")
        logits[:, allowed] = kept
    if not stream.do_sample:
        return int(logits.argmax())
    history = torch.tensor([stream.history], dtype=torch.long, device=logits.device)
    probabilities = ras_probabilities(logits / stream.temperature, history, stream.sampling)
    return int(torch.multinomial(probabilities, 1, generator=stream.generator))


def _fill(model: CosyVoiceLmForCausalLM) -> int:
    return model.config.fill_token_id - model.config.first_speech_token_id


def _may_go_on(stream: SpeechTextStream) -> bool:
    if stream.max_token_text_ratio is None:
        return True
    return stream.num_speech < int(stream.num_text * stream.max_token_text_ratio)
