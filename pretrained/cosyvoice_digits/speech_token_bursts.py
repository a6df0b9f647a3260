"""Speech tokens of one text a few at a time, for audio that comes out while the rest is still to be said.

What `generate_speech_tokens` gives for the same arguments and the same random numbers, as an iterator instead of a
loop: nothing runs between two bursts, so that the flow and the vocoder work in the same thread.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from .ras_sampling import RasSettings, RepetitionAwareSampling, SeededDraw
from .speech_length_limits import MinimumSpeechLength
from .speech_token_generation import SpeechTokenGenerationMixin


def generate_speech_bursts(
    lm: SpeechTokenGenerationMixin,
    sizes: Iterable[int],
    text_ids: list[int],
    prompt_text_ids: list[int],
    prompt_speech_ids: list[int],
    speaker_embedding: Tensor | None = None,
    reads_speaker: bool = True,
    min_token_text_ratio: float = 2.0,
    max_token_text_ratio: float = 20.0,
    do_sample: bool = True,
    sampling: RasSettings | None = None,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    compatibility: str | None = None,
) -> Iterator[list[int]]:
    """Bursts of tokens from 0, up to the end of the answer.

    Args:
        sizes: of the bursts; the last one may be shorter, and none is empty.
        text_ids, prompt_text_ids, prompt_speech_ids: without padding. speaker_embedding (`(1, size)`), reads_speaker:
            whether the model is told it. The others: see `generate_speech_tokens`.

    Raises:
        ValueError: ids out of range, an unknown `compatibility`.
    """
    if compatibility not in (None, "upstream"):
        raise ValueError(f"compatibility: expected None or 'upstream', got {compatibility!r}")
    vocabulary = lm.speech_vocabulary
    speaker_mask = torch.tensor([int(reads_speaker)], device=lm.device)
    inputs = lm._speech_prompt([text_ids], [prompt_text_ids], [prompt_speech_ids], speaker_embedding, speaker_mask)
    mask = inputs.pop("attention_mask")
    maximum, minimum = int(len(text_ids) * max_token_text_ratio), int(len(text_ids) * min_token_text_ratio)
    masked = [vocabulary.upstream_masked] if compatibility == "upstream" else list(vocabulary.stops)
    processors = [MinimumSpeechLength(torch.tensor([minimum]), masked)]
    if do_sample:
        settings = lm.default_sampling if sampling is None else sampling
        place = {"first_token_id": vocabulary.first, "num_tokens": vocabulary.rows}
        processors.append(RepetitionAwareSampling(settings, 0, temperature=temperature, **place))
        if generator is not None:
            processors.append(SeededDraw(generator, **place))
    history = torch.zeros(1, 0, dtype=torch.long, device=lm.device)
    cache = DynamicCache(config=lm.config)
    for size in sizes:
        burst: list[int] = []
        while len(burst) < size and history.shape[1] < maximum:
            with torch.no_grad():
                output = lm(**inputs, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
            scores = output.logits[:, -1].float()
            for processor in processors:
                scores = processor(history, scores)
            drawn = scores.argmax(-1, keepdim=True)
            if do_sample and generator is None:
                drawn = torch.multinomial(scores.softmax(dim=-1), 1)
            token = int(drawn) - vocabulary.first
            if not 0 <= token < vocabulary.size:
                maximum = 0
                break
            burst.append(token)
            history, inputs = torch.cat([history, drawn], dim=1), {"input_ids": drawn}
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        if burst:
            yield burst
        if history.shape[1] >= maximum:
            return
