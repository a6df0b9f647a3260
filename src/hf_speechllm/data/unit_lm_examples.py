"""Texts of the three SpeechGPT stages as training examples: ids and labels for `SFTTrainer`, pairs for `DPOTrainer`.

Stage 1 reads lines of units, without any instruction; stages 2 and 3 read a meta instruction (`prefix`) and a dialogue
(`text`). What is tokenised how follows upstream (0nutation/SpeechGPT, `speechgpt/src/train/ma_pretrain.py`,
`cm_sft.py`, `com_sft.py`). Labels are -100 where nothing is learnt. TRL takes rows with `input_ids` and `labels` as
they are: it appends no end token to them and cuts them only at its `max_length` (set that to `None`).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict

from transformers import PreTrainedTokenizerBase

from ..models.unit_string import unit_string


IGNORED = -100


class UnitLmExample(TypedDict):
    """`input_ids`, `attention_mask` (1 = real) and `labels` (-100 = not learnt) of one example, equally long."""

    input_ids: list[int]
    attention_mask: list[int]
    labels: list[int]


def tokenize_lines(tokenizer: PreTrainedTokenizerBase, lines: Iterable[str]) -> list[list[int]]:
    """Ids of each line of stage 1: what the tokenizer itself puts before a text (`<s>`), and no end token."""
    lines = list(lines)
    return tokenizer(lines).input_ids if lines else []


def group_into_blocks(lines: Iterable[Sequence[int]], block_size: int) -> list[UnitLmExample]:
    """Lines of ids one after another, cut into blocks of `block_size` that are learnt completely.

    The remainder is dropped, unless it is all there is: then it is the only block, shorter than the others.

    Raises:
        ValueError: a block of less than one token.
    """
    if block_size < 1:
        raise ValueError(f"block_size: expected at least 1, got {block_size}")
    ids = [index for line in lines for index in line]
    total = len(ids) // block_size * block_size if len(ids) >= block_size else len(ids)
    blocks = [ids[start : start + block_size] for start in range(0, total, block_size)]
    return [{"input_ids": block, "attention_mask": [1] * len(block), "labels": list(block)} for block in blocks]


def pretraining_blocks(
    tokenizer: PreTrainedTokenizerBase, lines: Iterable[str], block_size: int
) -> list[UnitLmExample]:
    """Stage 1: lines of units such as `<sosp><12><7><eosp>` as blocks of `block_size` tokens."""
    return group_into_blocks(tokenize_lines(tokenizer, lines), block_size)


def pretraining_columns(
    batch: Mapping[str, Sequence[str]], tokenizer: PreTrainedTokenizerBase, block_size: int, column: str = "text"
) -> dict[str, list[list[int]]]:
    """[`pretraining_blocks`] for `datasets.map(batched=True, remove_columns=...)`; a batch drops its remainder."""
    blocks = pretraining_blocks(tokenizer, batch[column], block_size)
    return {key: [block[key] for block in blocks] for key in UnitLmExample.__annotations__}


def instruction_example(
    tokenizer: PreTrainedTokenizerBase,
    prefix: str,
    text: str,
    max_length: int,
    assistant_only: bool = False,
    assistant: str = "[SpeechGPT]",
    human: str = "[Human]",
) -> UnitLmExample:
    """Stages 2 and 3: `prefix + text` cut to `max_length`, with the end token appended where there is room for it.

    Args:
        prefix (`str`): the meta instruction. As many tokens as it has by itself are not learnt, which may be one more
            than it has in the whole: the first token of the dialogue swallows the line break before it.
        text (`str`): the dialogue.
        max_length (`int`): in tokens.
        assistant_only (`bool`): learn only the answers and the end token. Upstream learns the human's turns as well,
            whatever its option `train_on_inputs` says.
        assistant, human (`str`): what begins a turn; a colon follows.

    Raises:
        ValueError: `assistant_only`, and no turn of the assistant in `text`; or `max_length` is less than 1.
    """
    if max_length < 1:
        raise ValueError(f"max_length: expected at least 1, got {max_length}")
    encoded = tokenizer(prefix + text, return_offsets_mapping=assistant_only)
    ids = list(encoded.input_ids[:max_length])
    ends = len(ids) < max_length and ids[-1:] != [tokenizer.eos_token_id]
    labels = list(ids)
    if assistant_only:
        answers = _answer_spans(prefix, text, assistant, human)
        for position, (start, end) in enumerate(encoded.offset_mapping[:max_length]):
            if not any(first <= start and end <= last and start < end for first, last in answers):
                labels[position] = IGNORED
    hidden = min(len(tokenizer(prefix).input_ids), len(labels)) if prefix else 0
    labels[:hidden] = [IGNORED] * hidden
    if ends:
        ids.append(tokenizer.eos_token_id)
        labels.append(tokenizer.eos_token_id)
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def preference_row(
    prompt: str, chosen: str | Sequence[int], rejected: str | Sequence[int], end: str = ""
) -> dict[str, str]:
    """A row for `DPOTrainer`, as SpeechAlign (https://arxiv.org/abs/2404.05600) pairs them: real against generated.

    Args:
        prompt (`str`): everything before the answer. It should not end in a space: a unit token swallows it, and the
            prompt's ids would not begin the ids of the whole.
        chosen, rejected (`str` or `Sequence[int]`): answers, or their units: those of a recording, and those that the
            model itself generated for the same prompt.
        end (`str`): put after both.
    """
    answers = {"chosen": chosen, "rejected": rejected}
    texts = {key: (value if isinstance(value, str) else unit_string(value)) + end for key, value in answers.items()}
    return {"prompt": prompt.rstrip(" "), **texts}


def _answer_spans(prefix: str, text: str, assistant: str, human: str) -> list[tuple[int, int]]:
    """Characters of `prefix + text` from behind the colon of each answer to the next turn of the human."""
    pattern = re.compile(rf"{re.escape(assistant)}\s*:(.*?)(?={re.escape(human)}|\Z)", re.DOTALL)
    spans = [(len(prefix) + match.start(1), len(prefix) + match.end(1)) for match in pattern.finditer(text)]
    if not spans:
        raise ValueError(f"text: expected a turn that begins with {assistant!r}, got {text[:80]!r}")
    return spans
