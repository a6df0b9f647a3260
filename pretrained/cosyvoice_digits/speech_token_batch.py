"""Speech tokens of several answers, a token of each at a time; answers may join and leave while others go on.

What `generate_speech_tokens` gives for each of them alone with the same options and generator, for audio that comes
out while the rest is still to be said: nothing runs between two steps, so that the flow and the vocoder work in the
same thread.

The rows of the cache end in the same column; what is in front of a shorter one is masked. Only distances between
columns count in the networks (or the positions that are given), so that padding moves nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from .speech_token_generation import SpeechTokenGenerationMixin, SpeechTokenOptions


@dataclass
class _Answer:
    """One row: its limits, its random numbers, and the tokens so far."""

    handle: int
    minimum: int
    maximum: int
    generator: torch.Generator | None
    tokens: list[int] = field(default_factory=list)


class SpeechTokenBatch:
    """Answers that a language model makes together.

    Args:
        lm: used and not changed.
        options: the same for all answers.
    """

    def __init__(self, lm: SpeechTokenGenerationMixin, options: SpeechTokenOptions | None = None) -> None:
        self.lm = lm
        self.options = SpeechTokenOptions() if options is None else options
        self._handles = 0
        # Prompts that the model has not read, with their answers; then those that it has, and what they read next.
        self._new: list[tuple[dict[str, Tensor], list[_Answer]]] = []
        self._answers: list[_Answer] = []
        self._cache: DynamicCache | None = None
        self._mask = torch.zeros(0, 0, dtype=torch.long)
        self._next_ids = torch.zeros(0, 1, dtype=torch.long)

    def __len__(self) -> int:
        """Answers that have not ended."""
        return len(self._answers) + sum(len(answers) for _, answers in self._new)

    def add(
        self,
        text_ids: list[list[int]],
        prompt_text_ids: list[list[int]],
        prompt_speech_ids: list[list[int]],
        speaker_embedding: Tensor | None = None,
        speaker_mask: Tensor | None = None,
        generators: Sequence[torch.Generator | None] | None = None,
    ) -> list[int]:
        """Begin an answer for every row; the model reads the prompts at the next step.

        Args:
            text_ids, prompt_text_ids, prompt_speech_ids: of each row, without padding.
            speaker_embedding, speaker_mask: see `generate_speech_tokens`.
            generators: one per row; torch's own random numbers where there is none.

        Returns:
            a number for each answer, by which the other calls know it.

        Raises:
            ValueError: ids out of range.
        """
        limits = self.options.limits(text_ids)
        generators = [None] * len(text_ids) if generators is None else generators
        inputs = self.lm.build_speech_prompt(
            text_ids, prompt_text_ids, prompt_speech_ids, speaker_embedding, speaker_mask
        )
        handles = range(self._handles, self._handles + len(text_ids))
        self._handles += len(text_ids)
        answers = [_Answer(*row) for row in zip(handles, *limits, generators, strict=True)]
        self._new.append((inputs, answers))
        return list(handles)

    def remove(self, handle: int) -> None:
        """Stop an answer before its end. One whose prompt has not been read ends with the next step."""
        self._keep([row for row, answer in enumerate(self._answers) if answer.handle != handle])
        for _, answers in self._new:
            for answer in answers:
                if answer.handle == handle:
                    answer.maximum = 0

    @torch.no_grad()
    def step(self) -> tuple[dict[int, int], list[int]]:
        """One more token of every answer.

        Returns:
            the tokens, from 0, and the answers that have ended with this step, with or without a last token.
        """
        logits = [self._decode()] if self._answers else []
        logits += self._read_new()
        if not logits:
            return {}, []
        drawn = self._draw(torch.cat(logits))
        vocabulary = self.lm.speech_vocabulary
        tokens, going_on, ended = {}, [], []
        for row, (answer, token) in enumerate(zip(self._answers, drawn.tolist(), strict=True)):
            is_speech = 0 <= token < vocabulary.size and answer.maximum > 0
            if is_speech:
                answer.tokens.append(token)
                tokens[answer.handle] = token
            if is_speech and len(answer.tokens) < answer.maximum:
                going_on.append(row)
            else:
                ended.append(answer.handle)
        self._next_ids = drawn[:, None] + vocabulary.first
        self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
        self._keep(going_on)
        return tokens, ended

    def _decode(self) -> Tensor:
        """Logits `(b, rows)` behind the tokens of the step before."""
        return self._logits({"input_ids": self._next_ids}, self._mask, self._cache)

    def _read_new(self) -> list[Tensor]:
        """Logits behind the prompts of answers that have come, which then belong to the batch."""
        logits = []
        for inputs, answers in self._new:
            mask, cache = inputs.pop("attention_mask"), DynamicCache(config=self.lm.config)
            logits.append(self._logits(inputs, mask, cache))
            self._join(mask, cache)
            self._answers += answers
        self._new = []
        return logits

    def _logits(self, inputs: dict[str, Tensor], mask: Tensor, cache: DynamicCache) -> Tensor:
        (new,) = inputs.values()
        # Version 1 knows distances only, and ignores positions.
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, mask.shape[1] - new.shape[1] :]
        output = self.lm(
            **inputs,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            speech_logits_only=True,
        )
        return output.logits[:, -1].float()

    def _draw(self, logits: Tensor) -> Tensor:
        """Tokens `(b,)` from 0."""
        options, default = self.options, self.lm.default_sampling
        # Of the past only the window of the sampling is needed; -1 is no token.
        window = (default if options.sampling is None else options.sampling).window
        rows = [([-1] * window + answer.tokens)[len(answer.tokens) :] for answer in self._answers]
        history = torch.tensor(rows, dtype=torch.long, device=logits.device)
        minimum = [answer.minimum - len(answer.tokens) + window for answer in self._answers]
        generators = [answer.generator for answer in self._answers]
        processors = options.processors(self.lm.speech_vocabulary.compact, default, minimum, 0, generators)
        # The last of them has drawn.
        return processors(history, logits).argmax(dim=-1)

    def _join(self, mask: Tensor, cache: DynamicCache) -> None:
        """Rows `(b', s')` and their keys and values below those of the batch."""
        if self._cache is None:
            self._mask, self._cache = mask, cache
            return
        width = max(mask.shape[1], self._mask.shape[1])
        self._mask = torch.cat([_pad_left(rows, 1, width) for rows in (self._mask, mask)])
        for layer, new in zip(self._cache.layers, cache.layers, strict=True):
            layer.keys = torch.cat([_pad_left(keys, 2, width) for keys in (layer.keys, new.keys)])
            layer.values = torch.cat([_pad_left(values, 2, width) for values in (layer.values, new.values)])

    def _keep(self, rows: list[int]) -> None:
        """Leave only these rows, and no column that is padding in all of them."""
        if len(rows) == len(self._answers):
            return
        self._answers = [self._answers[row] for row in rows]
        if not rows:
            self._cache = None
            return
        index = torch.tensor(rows, device=self._mask.device)
        self._mask, self._next_ids = self._mask[index], self._next_ids[index]
        first = int(self._mask.any(dim=0).long().argmax())
        self._mask = self._mask[:, first:]
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys[index, :, first:], layer.values[index, :, first:]


def _pad_left(tensor: Tensor, dim: int, size: int) -> Tensor:
    """`tensor` with zeros in front of `dim`, up to `size`."""
    missing = size - tensor.shape[dim]
    return torch.nn.functional.pad(tensor, (0, 0) * (tensor.dim() - 1 - dim) + (missing, 0))
