"""Answers that are decoded together, a token at a time: each is what it is alone, whoever joins or leaves."""

import pytest
import torch
from tiny_cosyvoice_lm import build, row_alone, sentences

from hf_speechllm.models.ras_sampling import RasSettings
from hf_speechllm.models.speech_token_batch import SpeechTokenBatch
from hf_speechllm.models.speech_token_generation import SpeechTokenOptions


every_version = pytest.mark.parametrize("version", (1, 2, 3))
RATIOS = {"min_token_text_ratio": 3.0, "max_token_text_ratio": 6.0}


def expected(model, inputs: dict, **options) -> list[list[int]]:
    """What `generate_speech_tokens` says for each sentence alone."""
    rows = []
    for row in range(3):
        generator = torch.Generator().manual_seed(row)
        output = model.generate_speech_tokens(**row_alone(inputs, row), **options, generator=generator)
        rows.append(output.token_ids[0].tolist())
    return rows


def add(batch: SpeechTokenBatch, inputs: dict, rows: list[int]) -> list[int]:
    """Sentences of these numbers begin."""
    lists = [
        [inputs[f"{name}_ids"][row][inputs[f"{name}_mask"][row].bool()].tolist() for row in rows]
        for name in ("text", "prompt_text", "prompt_speech")
    ]
    speaker = {
        name: inputs[name][rows] for name in ("speaker_embedding", "speaker_mask") if inputs.get(name) is not None
    }
    return batch.add(*lists, **speaker, generators=[torch.Generator().manual_seed(row) for row in rows])


def finish(batch: SpeechTokenBatch, said: dict[int, list[int]]) -> None:
    while len(batch):
        for handle, token in batch.step()[0].items():
            said.setdefault(handle, []).append(token)


@every_version
@pytest.mark.parametrize(
    "options",
    (
        {},
        {"do_sample": False},
        {"compatibility": "upstream"},
        {"sampling": RasSettings(window=4, top_k=40, threshold=0.5), "temperature": 1.3, "min_token_text_ratio": 0.0},
    ),
)
def test_together_as_alone(version, options):
    model, inputs = build(version), sentences(version)
    options = {**RATIOS, **options}
    batch, said = SpeechTokenBatch(model, SpeechTokenOptions(**options)), {}
    handles = add(batch, inputs, [0, 1, 2])
    finish(batch, said)
    assert [said.get(handle, []) for handle in handles] == expected(model, inputs, **options)


@every_version
def test_answers_join_and_leave(version):
    """A longer prompt and a shorter one join in the middle; one is taken out before it is read, one while it runs."""
    model, inputs = build(version), sentences(version)
    batch, said = SpeechTokenBatch(model, SpeechTokenOptions(**RATIOS)), {}

    def steps(count: int) -> list[int]:
        ended = []
        for _ in range(count):
            tokens, over = batch.step()
            ended += over
            for handle, token in tokens.items():
                said.setdefault(handle, []).append(token)
        return ended

    (second,) = add(batch, inputs, [1])
    assert steps(2) == []
    first, unread, third = (add(batch, inputs, [row])[0] for row in (0, 1, 2))
    batch.remove(unread)
    assert steps(3)[:1] == [unread]
    (again,) = add(batch, inputs, [0])
    steps(2)
    batch.remove(first)
    # The widest row has left; so have its columns.
    finish(batch, said)
    rows = expected(model, inputs, **RATIOS)
    assert [said[second], said[third], said[again]] == [rows[1], rows[2], rows[0]]
    assert unread not in said and said[first] == rows[0][:5]
    assert batch.step() == ({}, [])


@every_version
def test_an_answer_without_room_ends_at_once(version):
    model, inputs = build(version), sentences(version)
    batch = SpeechTokenBatch(model, SpeechTokenOptions(max_token_text_ratio=0.25, min_token_text_ratio=0.0))
    handles = add(batch, inputs, [0, 1])
    tokens, ended = batch.step()
    # 6 tokens of text allow one of speech, 3 none.
    assert set(tokens) <= {handles[0]} and ended == handles and len(batch) == 0


def test_what_is_refused():
    model, inputs = build(3), sentences(3)
    with pytest.raises(ValueError, match="compatibility: expected None or 'upstream', got 'other'"):
        SpeechTokenOptions(compatibility="other")
    with pytest.raises(ValueError, match="endofprompt"):
        SpeechTokenBatch(model).add([[1]], [[]], [[]])
    batch = SpeechTokenBatch(model)
    add(batch, inputs, [0])
    with pytest.raises(ValueError, match="speech_ids: expected 0..39, got 40"):
        batch.add([[62]], [[]], [[40]])
    assert len(batch) == 1
