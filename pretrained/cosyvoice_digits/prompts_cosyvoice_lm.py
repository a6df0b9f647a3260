"""Sequences of the language model of CosyVoice 2 and 3, as ids of its one vocabulary."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .configuration_cosyvoice_lm import CosyVoiceLmConfig


def speech_prompt(config: CosyVoiceLmConfig, text_ids: Sequence[int], speech_ids: Sequence[int] = ()) -> list[int]:
    """What precedes the speech that is to be generated: `[start, text, task, prompt speech]`.

    Args:
        text_ids: prompt (or instruction) text and text, in this order.
        speech_ids: of the prompt's audio, `0..speech_vocab_size - 1`.

    Raises:
        ValueError: an id out of range, or in version 3 a text without `<|endofprompt|>`.
    """
    if config.version == 3 and config.end_of_prompt_id not in text_ids:
        raise ValueError(f"text_ids: expected <|endofprompt|> (id {config.end_of_prompt_id}) in a version 3 text")
    return [
        config.start_token_id,
        *text_token_ids(config, text_ids),
        config.task_token_id,
        *speech_token_ids(config, speech_ids),
    ]


def text_token_ids(config: CosyVoiceLmConfig, ids: Sequence[int]) -> list[int]:
    """Text ids, checked. Raises `ValueError` for one that the text embedding has no row for."""
    return _checked("text", ids, config.text_vocab_size)


def speech_token_ids(config: CosyVoiceLmConfig, ids: Sequence[int]) -> list[int]:
    """Speech ids from 0 as ids of the vocabulary. Raises `ValueError` for one outside of the codebook."""
    return [config.first_speech_token_id + token for token in _checked("speech", ids, config.speech_vocab_size)]


def _checked(name: str, ids: Sequence[int], size: int) -> list[int]:
    ids = [int(token) for token in ids]
    for token in ids:
        if not 0 <= token < size:
            raise ValueError(f"{name}_ids: expected 0..{size - 1}, got {token}")
    return ids


def batch_prompts(prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Prompts of different lengths as one batch, padded on the left.

    Returns:
        ids and attention mask (1 = real), `(batch, longest)` int64.
    """
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad_token_id, dtype=torch.long)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask
