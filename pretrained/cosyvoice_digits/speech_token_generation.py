"""Generation of speech tokens from text, the same for all versions of CosyVoice's language model.

Upstream decodes one sentence at a time (`inference` of `cosyvoice/llm/llm.py`). Here the generation loop of
transformers decodes a batch: prompts are padded on the left, every row has its own minimum and maximum length, and
repetition-aware sampling is one logits processor. [`SpeechTokenOptions`] is how answers are limited and drawn, here
and where they are made a token at a time (`speech_token_batch.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.utils import ModelOutput

from .ras_sampling import RasSettings, RepetitionAwareSampling, SeededDraw
from .speech_length_limits import MaximumSpeechLength, MinimumSpeechLength


@dataclass(frozen=True)
class SpeechVocabulary:
    """Where speech is among the logits.

    Args:
        first (`int`): id of speech token 0.
        size (`int`): entries of the codebook.
        rows (`int`): ids from `first` on that have logits.
        stops (`tuple[int, ...]`): ids that end an answer.
        upstream_masked (`int`): the only id that upstream forbids while an answer is too short.
    """

    first: int
    size: int
    rows: int
    stops: tuple[int, ...]
    upstream_masked: int

    @property
    def compact(self) -> "SpeechVocabulary":
        """The same where there are logits for speech only, those of `first` in front."""
        stops = tuple(token - self.first for token in self.stops)
        return SpeechVocabulary(0, self.size, self.rows, stops, self.upstream_masked - self.first)


@dataclass(frozen=True)
class SpeechTokenOptions:
    """How long answers may be, and how their tokens are chosen.

    Args:
        min_token_text_ratio, max_token_text_ratio (`float`): limits of the answer, in speech tokens per token of the
            text, rounded down.
        do_sample (`bool`): sample, otherwise take the most probable token.
        sampling ([`RasSettings`], *optional*): those of the model's configuration by default.
        temperature (`float`): of the sampling.
        compatibility (`"upstream"`, *optional*): until the minimum is reached, forbid only the token that upstream
            forbids.

    Raises:
        ValueError: an unknown `compatibility`.
    """

    min_token_text_ratio: float = 2.0
    max_token_text_ratio: float = 20.0
    do_sample: bool = True
    sampling: RasSettings | None = None
    temperature: float = 1.0
    compatibility: str | None = None

    def __post_init__(self) -> None:
        if self.compatibility not in (None, "upstream"):
            raise ValueError(f"compatibility: expected None or 'upstream', got {self.compatibility!r}")

    def limits(self, text_ids: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
        """The smallest and the largest number of tokens of each answer."""
        lengths = [len(row) for row in text_ids]
        return tuple(
            [int(n * ratio) for n in lengths] for ratio in (self.min_token_text_ratio, self.max_token_text_ratio)
        )

    def processors(
        self,
        vocabulary: SpeechVocabulary,
        default_sampling: RasSettings,
        minimum: Sequence[int],
        prompt_length: int = 0,
        generator: torch.Generator | Sequence[torch.Generator | None] | None = None,
    ) -> LogitsProcessorList:
        """What makes choices of logits.

        Args:
            vocabulary: where speech is among the logits. default_sampling: where the options have none.
            minimum: tokens of each answer before it may end.
            prompt_length (`int`): ids in front of the answer, in what the processors are given as history.
            generator (*optional*): one for the batch or one per row; with it, only the drawn token stays possible.
        """
        masked = [vocabulary.upstream_masked] if self.compatibility == "upstream" else list(vocabulary.stops)
        processors = LogitsProcessorList([MinimumSpeechLength(torch.tensor(minimum), masked, prompt_length)])
        if self.do_sample:
            sampling = default_sampling if self.sampling is None else self.sampling
            place = {"first_token_id": vocabulary.first, "num_tokens": vocabulary.rows}
            processors.append(RepetitionAwareSampling(sampling, prompt_length, temperature=self.temperature, **place))
            if generator is not None:
                generators = generator if isinstance(generator, torch.Generator) else list(generator)
                processors.append(SeededDraw(generators, **place))
        return processors


@dataclass
class CosyVoiceSpeechTokens(ModelOutput):
    """Generated speech.

    Args:
        token_ids (`(batch, tokens)`, int64): `0..speech_vocab_size - 1`, padded on the right with 0.
        token_mask (`(batch, tokens)`, int64): 1 = real.
        logits (`(batch, steps, rows)`, *optional*): raw logits of every step, the one that ended the answer included.
    """

    token_ids: Tensor | None = None
    token_mask: Tensor | None = None
    logits: Tensor | None = None


class SpeechTokenGenerationMixin(GenerationMixin):
    """Adds `generate_speech_tokens` to a model that has `speech_vocabulary` and `build_speech_prompt`."""

    def build_speech_prompt(
        self,
        text_ids: list[list[int]],
        prompt_text_ids: list[list[int]],
        prompt_speech_ids: list[list[int]],
        speaker_embedding: Tensor | None,
        speaker_mask: Tensor | None,
    ) -> dict[str, Tensor]:
        """What precedes the answers, as inputs of `forward` and of `generate`: `input_ids` `(batch, longest)` or
        `inputs_embeds` `(batch, longest, size)`, padded on the left, and `attention_mask` `(batch, longest)`.

        Args:
            text_ids, prompt_text_ids, prompt_speech_ids: of each row, without padding.
            speaker_embedding, speaker_mask: see [`generate_speech_tokens`].

        Raises:
            ValueError: ids out of range.
        """
        raise NotImplementedError

    @torch.no_grad()
    def generate_speech_tokens(
        self,
        text_ids: Tensor,
        text_mask: Tensor | None = None,
        prompt_text_ids: Tensor | None = None,
        prompt_text_mask: Tensor | None = None,
        prompt_speech_ids: Tensor | None = None,
        prompt_speech_mask: Tensor | None = None,
        speaker_embedding: Tensor | None = None,
        speaker_mask: Tensor | None = None,
        min_token_text_ratio: float = 2.0,
        max_token_text_ratio: float = 20.0,
        do_sample: bool = True,
        sampling: RasSettings | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        compatibility: str | None = None,
        output_logits: bool = False,
        **generate_kwargs,
    ) -> CosyVoiceSpeechTokens:
        """
        Args:
            text_ids (`(batch, any)`, int64), text_mask (same, 1 = real, *optional*): what is to be said.
            prompt_text_ids, prompt_text_mask (*optional*): text of the prompt's audio, or the instruction.
            prompt_speech_ids, prompt_speech_mask (*optional*): tokens of the prompt's audio, from 0.
            speaker_embedding (`(batch, 192)`, *optional*), speaker_mask (`(batch,)`, 1 = has one, *optional*): of
                version 1; ignored by the others.
            min_token_text_ratio, max_token_text_ratio (`float`): limits of the answer, in speech tokens per token of
                `text_ids`, rounded down.
            do_sample (`bool`): sample, otherwise take the most probable token.
            sampling ([`RasSettings`], *optional*): those of the configuration by default.
            temperature (`float`): of the sampling.
            generator (*optional*): one for the batch, or one per row, with which a row draws what it draws alone; the
                global random numbers by default.
            compatibility (`"upstream"`, *optional*): until the minimum is reached, forbid only the token that upstream
                forbids (number `speech_vocab_size`); others that end an answer may still be drawn, which in version 3
                includes the end itself.
            output_logits (`bool`): also return logits.
            generate_kwargs: of `generate`, as `cache_implementation="static"` or a `streamer`.

        Raises:
            ValueError: ids out of range, an unknown `compatibility`.
        """
        options = SpeechTokenOptions(
            min_token_text_ratio, max_token_text_ratio, do_sample, sampling, temperature, compatibility
        )
        text = _rows(text_ids, text_mask)
        nothing: list[list[int]] = [[] for _ in text]
        before = nothing if prompt_text_ids is None else _rows(prompt_text_ids, prompt_text_mask)
        speech = nothing if prompt_speech_ids is None else _rows(prompt_speech_ids, prompt_speech_mask)
        minimum, maximum = options.limits(text)
        vocabulary = self.speech_vocabulary
        if max(maximum) < 1:
            empty = torch.zeros(len(text), 0, dtype=torch.long, device=self.device)
            return CosyVoiceSpeechTokens(empty, empty, empty.new_zeros(len(text), 0, vocabulary.rows).float())

        inputs = self.build_speech_prompt(text, before, speech, speaker_embedding, speaker_mask)
        length = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
        processors = options.processors(vocabulary, self.default_sampling, minimum, length, generator)
        # After SeededDraw one token is left, and drawing it again would only cost time.
        drawn_here = do_sample and generator is None
        output = self.generate(
            **inputs,
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList([MaximumSpeechLength(torch.tensor(maximum), length)]),
            max_new_tokens=max(maximum),
            min_length=0,
            do_sample=drawn_here,
            **({"temperature": 1.0, "top_k": 0, "top_p": 1.0} if drawn_here else {}),
            num_beams=1,
            eos_token_id=list(vocabulary.stops),
            pad_token_id=self.config.pad_token_id,
            output_logits=output_logits,
            return_dict_in_generate=True,
            **generate_kwargs,
        )
        tokens = output.sequences[:, length:] - vocabulary.first
        stopped = ((tokens >= vocabulary.size) | (tokens < 0)).cumsum(dim=1) > 0
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        mask = ~stopped & (steps < torch.tensor(maximum, device=tokens.device)[:, None])
        width = int(mask.sum(dim=1).max())
        tokens, mask = tokens[:, :width].masked_fill(~mask[:, :width], 0), mask[:, :width].long()
        logits = None
        if output_logits:
            first = vocabulary.first
            logits = torch.stack([step[:, first : first + vocabulary.rows] for step in output.logits], dim=1)
        return CosyVoiceSpeechTokens(token_ids=tokens, token_mask=mask, logits=logits)

    @property
    def default_sampling(self) -> RasSettings:
        """Sampling as the configuration says."""
        config = self.config
        return RasSettings(config.ras_top_p, config.ras_top_k, config.ras_window, config.ras_threshold)


def _rows(ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    """The real ids of each row."""
    if mask is None:
        return ids.tolist()
    return [row[real].tolist() for row, real in zip(ids, mask.bool(), strict=True)]
