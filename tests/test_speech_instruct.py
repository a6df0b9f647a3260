"""SpeechInstruct: what its rows say, and that they depend on nothing but the input and the seed."""

import json
import random
import re

import pytest
from datasets import Dataset, load_dataset

from hf_speechllm.data.speech_instruct import (
    FORMATS,
    SpokenText,
    chain_rows,
    chain_turn,
    cross_modal_rows,
    shuffled,
    write_data_set,
)
from hf_speechllm.data.task_descriptions import RECOGNITION_DESCRIPTIONS, SYNTHESIS_DESCRIPTIONS
from hf_speechllm.models.answers_speechgpt_lm import parse_answer
from hf_speechllm.models.prompts_speechgpt_lm import META_INSTRUCTION
from hf_speechllm.models.unit_string import parse_unit_string
from hf_speechllm.train.text_tokenizer import train_byte_bpe


def spoken(count: int, seed: int = 0) -> list[SpokenText]:
    rng = random.Random(seed)
    words = ("one", "two", "three")
    return [
        SpokenText(
            key=f"clip{index}",
            text=" ".join(rng.choice(words) for _ in range(rng.randint(1, 3))),
            units=tuple(rng.randrange(20) for _ in range(rng.randint(2, 9))),
            speaker="anna" if index % 3 else "ben",
        )
        for index in range(count)
    ]


class TestTaskDescriptions:
    def test_there_are_forty_different_ones_of_each_kind(self):
        for descriptions in (RECOGNITION_DESCRIPTIONS, SYNTHESIS_DESCRIPTIONS):
            assert len(set(descriptions)) == len(descriptions) == 40
            assert all(text[-1] in ".?" and text[0].isupper() for text in descriptions)
        assert not set(RECOGNITION_DESCRIPTIONS) & set(SYNTHESIS_DESCRIPTIONS)


class TestCrossModal:
    def test_each_utterance_becomes_one_request_that_can_be_read_back(self):
        items = spoken(40)
        rows = cross_modal_rows(items, seed=3)
        assert [row["keys"] for row in rows] == [[item.key] for item in items]
        assert {task for row in rows for task in row["tasks"]} == {"recognition", "synthesis"}
        for row, item in zip(rows, items, strict=True):
            assert row["prefix"] == META_INSTRUCTION
            match = re.fullmatch(
                r"\[Human\]: (.+?) This is input: (.+)<eoh> \[SpeechGPT\]: (.+)<eoa> ", row["plain_text"]
            )
            description, asked, answered = match.groups()
            if row["tasks"] == ["recognition"]:
                assert description in RECOGNITION_DESCRIPTIONS
                assert (tuple(parse_unit_string(asked)), answered) == (item.units, item.text)
            else:
                assert description in SYNTHESIS_DESCRIPTIONS
                assert (asked, tuple(parse_unit_string(answered))) == (item.text, item.units)

    def test_rows_are_the_same_for_the_same_seed_only(self):
        items = spoken(30)
        assert cross_modal_rows(items, seed=1) == cross_modal_rows(items, seed=1)
        assert cross_modal_rows(items, seed=1) != cross_modal_rows(items, seed=2)

    @pytest.mark.parametrize("probability, task", [(0.0, "synthesis"), (1.0, "recognition")])
    def test_the_probability_decides(self, probability, task):
        rows = cross_modal_rows(spoken(20), recognition_probability=probability)
        assert {name for row in rows for name in row["tasks"]} == {task}

    def test_only_the_speakable_are_spoken(self):
        items = spoken(30)
        rows = cross_modal_rows(items, recognition_probability=0.0, speakable=lambda item: item.speaker == "ben")
        for row, item in zip(rows, items, strict=True):
            assert row["tasks"] == ["synthesis" if item.speaker == "ben" else "recognition"]

    def test_turns_are_packed_up_to_the_limit_and_none_is_lost(self):
        items, count = spoken(60), len
        limit = len(META_INSTRUCTION) + 400
        single, packed = cross_modal_rows(items), cross_modal_rows(items, count_tokens=count, max_tokens=limit)
        assert "".join(row["plain_text"] for row in packed) == "".join(row["plain_text"] for row in single)
        assert [key for row in packed for key in row["keys"]] == [item.key for item in items]
        assert all(len(row["prefix"] + row["plain_text"]) <= limit for row in packed)
        assert max(len(row["tasks"]) for row in packed) > 1
        # No dialogue had room for the turn that begins the next.
        turns = iter(row["plain_text"] for row in single)
        starts = []
        for row in packed:
            starts.append([next(turns) for _ in row["tasks"]])
        for row, following in zip(packed, starts[1:], strict=False):
            assert len(row["prefix"] + row["plain_text"] + following[0]) > limit

    def test_a_turn_that_is_too_long_stands_alone(self):
        rows = cross_modal_rows(spoken(5), count_tokens=len, max_tokens=1)
        assert [len(row["tasks"]) for row in rows] == [1] * 5

    def test_contradictions_are_refused(self):
        with pytest.raises(ValueError, match="recognition_probability: expected 0..1, got 1.5"):
            cross_modal_rows(spoken(1), recognition_probability=1.5)
        with pytest.raises(ValueError, match="expected both or neither"):
            cross_modal_rows(spoken(1), max_tokens=100)


class TestChains:
    @pytest.mark.parametrize("style", ["released", "paper"])
    @pytest.mark.parametrize("chain_format", FORMATS)
    def test_every_format_can_be_read_back(self, chain_format, style):
        question, answer = spoken(2, seed=5)
        (row,) = chain_rows([(question, answer)], formats=[chain_format], style=style)
        found = parse_answer(row["plain_text"])
        assert row["format"] == chain_format and row["key"] == question.key
        assert found.text == answer.text
        assert tuple(found.units) == (answer.units if chain_format.endswith("speech") else ())
        if chain_format.startswith("speech"):
            assert tuple(found.question_units) == question.units
            assert found.transcript == question.text
        else:
            assert question.text in found.question and not found.question_units

    def test_the_formats_are_drawn(self):
        pairs = list(zip(spoken(60, 1), spoken(60, 2), strict=True))
        rows = chain_rows(pairs, seed=4)
        assert {row["format"] for row in rows} == set(FORMATS)
        assert rows == chain_rows(pairs, seed=4) != chain_rows(pairs, seed=5)

    def test_an_unknown_format_is_refused(self):
        with pytest.raises(ValueError, match="format: expected one of .*, got 'speech_to_song'"):
            chain_turn("speech_to_song", *spoken(2))


class TestWriting:
    def test_splits_load_as_they_were_written(self, tmp_path):
        rows = {"train": cross_modal_rows(spoken(20)), "validation": cross_modal_rows(spoken(7, 9))}
        for split, content in rows.items():
            write_data_set(content, tmp_path, split, {"sources": ["a.parquet"], "seed": 0})
        for split, content in rows.items():
            assert list(Dataset.from_parquet(str(tmp_path / "data" / f"{split}.parquet"))) == content
            assert json.loads((tmp_path / "data" / f"{split}.json").read_text())["rows"] == len(content)
        loaded = load_dataset(str(tmp_path), cache_dir=str(tmp_path / "cache"))
        assert {split: len(part) for split, part in loaded.items()} == {"train": 20, "validation": 7}
        card = (tmp_path / "README.md").read_text()
        assert "## train" in card and "## validation" in card and "- rows: 20" in card

    def test_shuffling_depends_on_the_seed_alone(self):
        items = list(range(50))
        assert sorted(shuffled(items, 1)) == items and shuffled(items, 1) == shuffled(items, 1) != shuffled(items, 2)


class TestTextTokenizer:
    def test_any_text_comes_back(self):
        tokenizer = train_byte_bpe(["one two three"] * 5, 280)
        assert tokenizer.convert_tokens_to_ids(["<pad>", "<s>", "</s>"]) == [0, 1, 2]
        for text in ("one two", "  spaces  ", "Köln 你好 🙂\n", "unseen words!"):
            ids = tokenizer(text).input_ids
            assert ids[0] == tokenizer.bos_token_id
            assert tokenizer.decode(ids[1:]) == text
        assert len(tokenizer(" two").input_ids) < len(tokenizer(" own").input_ids)

    def test_a_vocabulary_without_room_for_the_bytes_is_refused(self):
        with pytest.raises(ValueError, match="vocab_size: expected at least 259"):
            train_byte_bpe(["a"], 100)
