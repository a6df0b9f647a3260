"""Texts of the three stages as ids and labels. (Upstream's own values: `test_parity_speechgpt_prompts.py`.)"""

import pytest
from datasets import Dataset
from tiny_speechgpt_lm import build_tokenizer

from hf_speechllm.data.unit_lm_examples import (
    IGNORED,
    group_into_blocks,
    instruction_example,
    preference_row,
    pretraining_blocks,
    pretraining_columns,
    tokenize_lines,
)


PREFIX = "You are a tiny model.\n"
TEXT = (
    "[Human]: say a<eoh>. [SpeechGPT]: yes<eoa>. [Human]: <sosp><7><eosp><eoh>. [SpeechGPT]: no; [ua] <sosp><8><eosp>"
)


def learnt(example: dict) -> list[str]:
    tokenizer = build_tokenizer()
    return [tokenizer.convert_ids_to_tokens(label) for label in example["labels"] if label != IGNORED]


def test_blocks_drop_the_remainder():
    blocks = group_into_blocks([[1, 2, 3], [4, 5], [6, 7, 8]], 3)
    assert [block["input_ids"] for block in blocks] == [[1, 2, 3], [4, 5, 6]]
    assert all(block["labels"] == block["input_ids"] and block["attention_mask"] == [1, 1, 1] for block in blocks)
    assert blocks[0]["labels"] is not blocks[0]["input_ids"]


def test_too_few_tokens_are_one_short_block():
    """Upstream's rule: it drops a remainder only behind a complete block."""
    assert [block["input_ids"] for block in group_into_blocks([[1, 2]], 3)] == [[1, 2]]
    assert group_into_blocks([], 3) == []
    with pytest.raises(ValueError, match="block_size"):
        group_into_blocks([[1]], 0)


def test_lines_begin_with_bos_and_do_not_end():
    tokenizer = build_tokenizer()
    ids = tokenize_lines(tokenizer, ["<sosp><1><eosp>", "<sosp><2><3><eosp>"])
    assert [[tokenizer.convert_ids_to_tokens(i) for i in line] for line in ids] == [
        ["<s>", "<sosp>", "<1>", "<eosp>"],
        ["<s>", "<sosp>", "<2>", "<3>", "<eosp>"],
    ]
    assert tokenize_lines(tokenizer, []) == []


def test_columns_for_datasets():
    tokenizer = build_tokenizer()
    lines = ["<sosp><1><2><eosp>"] * 5
    data = Dataset.from_dict({"text": lines}).map(
        pretraining_columns,
        batched=True,
        remove_columns=["text"],
        fn_kwargs={"tokenizer": tokenizer, "block_size": 4},
    )
    assert data.column_names == ["input_ids", "attention_mask", "labels"]
    assert data["input_ids"][:] == [block["input_ids"] for block in pretraining_blocks(tokenizer, lines, 4)]


def test_upstream_masks_the_prefix_only():
    example = instruction_example(build_tokenizer(), PREFIX, TEXT, 500)
    hidden = len(build_tokenizer()(PREFIX).input_ids)
    assert example["labels"][:hidden] == [IGNORED] * hidden
    assert example["labels"][hidden:] == example["input_ids"][hidden:]
    # Alone the prefix has a token for its last line break, which [Human] swallows in the whole: that is hidden too.
    assert learnt(example)[:3] == ["▁", ":", "▁s"] and learnt(example)[-1] == "</s>"
    assert len(example["attention_mask"]) == len(example["labels"]) and set(example["attention_mask"]) == {1}


def test_assistant_only_learns_every_answer_and_the_end():
    example = instruction_example(build_tokenizer(), PREFIX, TEXT, 500, assistant_only=True)
    words = "".join(learnt(example)).replace("▁", " ").split()
    assert words == ["yes<eoa>.", "no;", "[ua]<sosp><8><eosp></s>"]
    whole = instruction_example(build_tokenizer(), PREFIX, TEXT, 500)
    assert example["input_ids"] == whole["input_ids"]


def test_truncated_examples_have_no_end():
    tokenizer = build_tokenizer()
    whole = instruction_example(tokenizer, PREFIX, TEXT, 500)["input_ids"]
    for assistant_only in (False, True):
        for length in range(1, len(whole) + 2):
            cut = instruction_example(tokenizer, PREFIX, TEXT, length, assistant_only)
            assert cut["input_ids"] == whole[:length]
            assert len(cut["labels"]) == len(cut["input_ids"]) == len(cut["attention_mask"])
    with pytest.raises(ValueError, match="max_length"):
        instruction_example(tokenizer, PREFIX, TEXT, 0)


def test_an_end_that_is_there_is_not_repeated():
    example = instruction_example(build_tokenizer(), "", "[Human]: a<eoh> [SpeechGPT]: b</s>", 500)
    assert example["input_ids"].count(2) == 1 and IGNORED not in example["labels"]


def test_assistant_only_needs_an_answer():
    with pytest.raises(ValueError, match=r"\[SpeechGPT\]"):
        instruction_example(build_tokenizer(), PREFIX, "[Human]: hello", 500, assistant_only=True)


def test_another_assistant():
    text = "[Human]: a<eoh>\n[MMGPT]: b<eos>"
    example = instruction_example(build_tokenizer(), "", text, 500, assistant_only=True, assistant="[MMGPT]")
    assert "".join(learnt(example)).replace("▁", " ").split() == ["b<eos></s>"]


def test_preferences():
    row = preference_row("[SpeechGPT]: ", [1, 2], "<sosp><3><eosp>", end="<eoa>")
    assert row == {"prompt": "[SpeechGPT]:", "chosen": "<sosp><1><2><eosp><eoa>", "rejected": "<sosp><3><eosp><eoa>"}
