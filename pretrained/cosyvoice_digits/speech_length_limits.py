"""Limits on the length of generated speech that differ from row to row of a batch."""

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria


class MinimumSpeechLength(LogitsProcessor):
    """Forbids the stop tokens in rows that are shorter than their minimum.

    Args:
        minimum (`(batch,)`, int64): tokens.
        stop_token_ids (`list[int]`): what may not come before.
        prompt_length (`int`): ids of `input_ids` that are no part of the answer.
    """

    def __init__(self, minimum: Tensor, stop_token_ids: list[int], prompt_length: int = 0) -> None:
        self.minimum = minimum
        self.stops = slice(stop_token_ids[0], stop_token_ids[-1] + 1)
        self.prompt_length = prompt_length
        if list(range(self.stops.start, self.stops.stop)) != list(stop_token_ids):
            raise ValueError(f"stop_token_ids: expected ids in a row, got {stop_token_ids}")

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        early = self.minimum.to(scores.device) > input_ids.shape[1] - self.prompt_length
        scores = scores.clone()
        scores[:, self.stops] = scores[:, self.stops].masked_fill(early[:, None], float("-inf"))
        return scores


class MaximumSpeechLength(StoppingCriteria):
    """Ends rows that have reached their maximum.

    Args:
        maximum (`(batch,)`, int64): tokens.
        prompt_length (`int`): ids of `input_ids` that are no part of the answer.
    """

    def __init__(self, maximum: Tensor, prompt_length: int = 0) -> None:
        self.maximum = maximum
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        return torch.as_tensor(
            input_ids.shape[1] - self.prompt_length >= self.maximum.to(input_ids.device), device=input_ids.device
        )
