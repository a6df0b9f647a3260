r"""Repetition-aware sampling (VALL-E 2, https://arxiv.org/abs/2406.05370) as CosyVoice does it.

Two steps (`cosyvoice/utils/common.py`): draw from the nucleus; if the drawn token occurred at least
`window * threshold` times among the last `window` ones, forbid it and draw again, from the whole distribution.

With `n` the normalised nucleus, `f` the full distribution and `R` the tokens that would be drawn again, the result has
the distribution

$$p(x) = n(x) [x \notin R] + f(x) \sum_{y \in R, y \ne x} \frac{n(y)}{1 - f(y)}$$

so one draw from `p` does the same for a whole batch. [`RepetitionAwareSampling`] turns logits into `log p`, for the
draw of the generation loop; `two_step_draw` draws twice, as upstream does, to the same random numbers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor


@dataclass(frozen=True)
class RasSettings:
    """
    Args:
        top_p (`float`), top_k (`int`): the nucleus: tokens by falling probability while those before sum to less than
            `top_p` and number less than `top_k`.
        window (`int`): last tokens in which repetitions count.
        threshold (`float`): share of the window from which on a token is a repetition.
    """

    top_p: float = 0.8
    top_k: int = 25
    window: int = 10
    threshold: float = 0.1


def nucleus(probabilities: Tensor, settings: RasSettings) -> tuple[Tensor, Tensor, Tensor]:
    """The candidates of the first draw.

    Args:
        probabilities (`(batch, tokens)`): each row sums to 1.

    Returns:
        by falling probability, ties by id, `(batch, min(top_k, tokens))` each: ids (int64), probabilities, and which
        of them are in the nucleus (bool).
    """
    values, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    values, ids = values[:, : settings.top_k], ids[:, : settings.top_k]
    before = values.cumsum(dim=-1).roll(1, dims=-1)
    before[:, 0] = 0.0
    return ids, values, before < settings.top_p


def repeated(history: Tensor, num_tokens: int, settings: RasSettings) -> Tensor:
    """`(batch, num_tokens)` bool: tokens that occur too often at the end of `history` `(batch, any)`, int64.

    Ids outside of `0..num_tokens - 1` count for nothing.
    """
    recent = history[:, max(history.shape[1] - settings.window, 0) :]
    inside = (recent >= 0) & (recent < num_tokens)
    counts = torch.zeros(history.shape[0], num_tokens, device=history.device)
    counts.scatter_add_(1, recent.clamp(0, num_tokens - 1), inside.to(counts.dtype))
    return counts >= settings.window * settings.threshold


def ras_probabilities(logits: Tensor, history: Tensor, settings: RasSettings) -> Tensor:
    """The distribution `p` of the head of this file.

    Args:
        logits (`(batch, tokens)`): of the next token; -inf is forbidden.
        history (`(batch, any)`, int64): tokens of this answer so far, oldest first.

    Returns:
        `(batch, tokens)` float32.
    """
    logits = logits.float()
    full = logits.softmax(dim=-1)
    ids, values, inside = nucleus(full, settings)
    values = values.masked_fill(~inside, 0.0)
    values = values / values.sum(dim=-1, keepdim=True)
    again = repeated(history, logits.shape[-1], settings).gather(1, ids) & inside
    redrawn = values.masked_fill(~again, 0.0)
    result = torch.zeros_like(full).scatter(1, ids, values - redrawn)

    # 1 - f(y) is at least 1/2 for all but the most probable token, for which it is computed from the others' logits.
    weight = redrawn[:, 1:] / (1.0 - full.gather(1, ids[:, 1:]))
    excluded = torch.zeros_like(full).scatter(1, ids[:, 1:], weight)
    result = result + full * (weight.sum(dim=-1, keepdim=True) - excluded).clamp_min(0.0)
    best, best_redrawn = ids[:, :1], redrawn[:, :1]
    others = logits.scatter(1, best, float("-inf"))
    alone = torch.isneginf(others.amax(dim=-1, keepdim=True))
    others = others.masked_fill(alone, 0.0).softmax(dim=-1).scatter(1, best, 0.0).masked_fill(alone, 0.0)
    result = result + best_redrawn * others
    # A token that is the only one allowed is drawn, repeated or not.
    return result.scatter_add(1, best, best_redrawn.masked_fill(~alone, 0.0))


def two_step_draw(
    logits: Tensor, history: list[int], settings: RasSettings, generator: torch.Generator | None = None
) -> int:
    """One token, drawn twice where upstream draws twice.

    Args:
        logits (`(tokens,)`): logits or log-probabilities of one item.
        history: tokens so far.
        generator: on the device of `logits`; the same state gives upstream's draws.
    """
    ids, values, inside = nucleus(logits.softmax(dim=-1)[None], settings)
    choice = torch.multinomial(values[inside], 1, replacement=True, generator=generator)
    token = int(ids[inside][choice])
    recent = history[-settings.window :]
    if recent.count(token) >= settings.window * settings.threshold:
        logits = logits.clone()
        logits[token] = float("-inf")
        token = int(torch.multinomial(logits.softmax(dim=-1), 1, replacement=True, generator=generator))
    return token


class RepetitionAwareSampling(LogitsProcessor):
    """Logits to the log-probabilities of repetition-aware sampling, for a whole batch at once.

    Args:
        settings ([`RasSettings`])
        prompt_length (`int`): ids of `input_ids` that are no part of the answer; repetitions there do not count.
        first_token_id, num_tokens (`int`): the slice of the vocabulary that has logits; the rest is never drawn.
        temperature (`float`): logits are divided by it first.
    """

    def __init__(
        self,
        settings: RasSettings,
        prompt_length: int = 0,
        first_token_id: int = 0,
        num_tokens: int | None = None,
        temperature: float = 1.0,
    ) -> None:
        if temperature <= 0.0:
            raise ValueError(f"temperature: expected more than 0, got {temperature}")
        self.settings = settings
        self.prompt_length = prompt_length
        self.tokens = slice(first_token_id, None if num_tokens is None else first_token_id + num_tokens)
        self.temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        history = input_ids[:, self.prompt_length :] - self.tokens.start
        probabilities = ras_probabilities(scores[:, self.tokens] / self.temperature, history, self.settings)
        result = torch.full_like(scores, float("-inf"))
        result[:, self.tokens] = probabilities.log().to(scores.dtype)
        return result


class SeededDraw(LogitsProcessor):
    """Draws from the scores with given generators, and leaves only the drawn token possible.

    The last processor of a loop: what the loop then draws is certain. With a generator per row, a row in a batch draws
    what it draws alone.

    Args:
        generators: one for all rows, or one per row; on the device of the scores.
        first_token_id, num_tokens (`int`): the slice of the vocabulary that can be drawn.
    """

    def __init__(
        self,
        generators: torch.Generator | list[torch.Generator],
        first_token_id: int = 0,
        num_tokens: int | None = None,
    ) -> None:
        self.generators = generators
        self.tokens = slice(first_token_id, None if num_tokens is None else first_token_id + num_tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        probabilities = scores[:, self.tokens].float().softmax(dim=-1)
        if isinstance(self.generators, torch.Generator):
            drawn = torch.multinomial(probabilities, 1, generator=self.generators)
        else:
            if len(self.generators) != scores.shape[0]:
                raise ValueError(
                    f"generator: expected one for each of {scores.shape[0]} rows, got {len(self.generators)}"
                )
            rows = zip(probabilities, self.generators, strict=True)
            drawn = torch.stack([torch.multinomial(row, 1, generator=generator) for row, generator in rows])
        return torch.full_like(scores, float("-inf")).scatter(1, drawn + self.tokens.start, 0.0)
