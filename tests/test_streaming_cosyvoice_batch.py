"""Streams that are computed together: each is what it is alone, and what one pass gives."""

import pytest
import torch
from test_modeling_cosyvoice import with_speakers
from tiny_cosyvoice import recording, tiny_cosyvoice
from torch import Tensor

from hf_speechllm.models.modeling_cosyvoice import CosyVoiceForTextToWaveform
from hf_speechllm.models.streaming_cosyvoice import SpeechStreamBatch, stream_speech, stream_speech_batch


LIMITS = {"max_token_text_ratio": 4.0, "min_token_text_ratio": 3.0}
STEPS = {"num_steps": 2}
every_version = pytest.mark.parametrize("version", (1, 2, 3))


@pytest.fixture(scope="module")
def models() -> dict[int, CosyVoiceForTextToWaveform]:
    return {version: tiny_cosyvoice(version) for version in (1, 2, 3)}


@pytest.fixture(scope="module")
def processors(models):
    return {version: with_speakers(model) for version, model in models.items()}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixed(version: int) -> list[dict]:
    """Texts of 1 to 13 characters in all modes, with prompts of all lengths."""
    return [
        {"text": "hello you two", "mode": "zero_shot", "prompt_audio": recording(1.1, 1), "prompt_text": "no, 2"},
        {"text": "abc", "mode": "sft", "speaker": "plain"},
        {"text": "q", "mode": "cross_lingual", "speaker": "other"},
        {"text": "why", "mode": "instruct" if version == 1 else "instruct2", "speaker": "tone", "instruct": "low"},
    ]


def together(processor, rows: list[dict]) -> dict[str, Tensor]:
    names = sorted({name for row in rows for name in row})
    return dict(processor(**{name: [row.get(name) for row in rows] for name in names}, sampling_rate=24000))


def alone(model, processor, row: dict, seed: int, **options) -> Tensor:
    pieces = stream_speech(model, dict(processor(**row, sampling_rate=24000)), generator=seeded(seed), **options)
    return torch.cat([torch.zeros(1, 0), *pieces], dim=1)[0]


@every_version
def test_a_row_of_a_batch_is_the_row_alone_and_one_pass(models, processors, version):
    model, processor, rows = models[version], processors[version], mixed(version)
    inputs, options = together(processor, rows), {**LIMITS, **STEPS}
    if version == 1:  # whose first piece has 50 tokens and 20 after them
        options |= {"min_token_text_ratio": 6.0, "max_token_text_ratio": 6.5}
    pieces = list(stream_speech_batch(model, inputs, generator=[seeded(n) for n in range(4)], **options))
    assert len(pieces) > 1 and all(len(row) == 4 for row in pieces)
    whole = None
    if version != 1:
        whole = model.generate(**inputs, streaming=True, generator=[seeded(n) for n in range(4)], **options)
    for number, row in enumerate(rows):
        ends = [piece[number].is_last for piece in pieces]
        end = ends.index(True)
        assert all(ends[end:]) and not any(len(piece[number].waveform) for piece in pieces[end + 1 :])
        streamed = torch.cat([piece[number].waveform for piece in pieces])
        torch.testing.assert_close(streamed, alone(model, processor, row, number, **options), atol=1e-5, rtol=0)
        if whole is not None:
            expected = whole.waveform[number][whole.waveform_mask[number].bool()]
            torch.testing.assert_close(streamed, expected, atol=1e-5, rtol=0)


@every_version
def test_streams_join_a_running_batch(models, processors, version):
    """At any time; and a stopped one is gone."""
    model, processor, rows = models[version], processors[version], mixed(version)
    options = {"chunk_tokens": 7, **LIMITS, **STEPS}
    batch, heard = SpeechStreamBatch(model, **options), {}

    def step() -> None:
        for handle, piece in batch.step().items():
            heard.setdefault(handle, []).append(piece.waveform)

    handles = batch.add(together(processor, [rows[0]]), seeded(0))
    step()
    handles += batch.add(together(processor, rows[1:3]), [seeded(1), seeded(2)])
    (stopped,) = batch.add(together(processor, [rows[0]]), seeded(9))
    (unbegun,) = batch.add(together(processor, [rows[0]]), seeded(9))
    batch.remove(unbegun)
    step()
    batch.remove(stopped)
    handles += batch.add(together(processor, [rows[3]]), [seeded(3)])
    while len(batch):
        step()
    assert batch.step() == {} and unbegun not in heard
    for number, row in enumerate(rows):
        # A single generator, as that of the first row, seeds one for each.
        generator = [seeded(number)] if number else seeded(0)
        one = stream_speech_batch(model, together(processor, [row]), generator=generator, **options)
        expected = torch.cat([piece.waveform for (piece,) in one])
        torch.testing.assert_close(torch.cat(heard[handles[number]]), expected, atol=1e-5, rtol=0)


@every_version
def test_converted_speech_beside_texts(models, processors, version):
    model, processor = models[version], processors[version]
    converted = {"source_audio": recording(0.9, 1), "speaker": "tone"}
    batch, heard = SpeechStreamBatch(model, **LIMITS, **STEPS), {}
    text = {"text": "hello", "speaker": "plain"}
    batch.add(together(processor, [text]), [seeded(0)])
    batch.add(together(processor, [converted]), [seeded(1)])
    while len(batch):
        for handle, piece in batch.step().items():
            heard.setdefault(handle, []).append(piece.waveform)
    for number, row in enumerate((text, converted)):
        expected = alone(model, processor, row, number, **STEPS, **({} if number else LIMITS))
        torch.testing.assert_close(torch.cat(heard[number]), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("version", (2, 3))
def test_bounded_streams_are_one_pass_with_the_same_left_chunks(models, processors, version):
    model, processor, rows = models[version], processors[version], mixed(version)[:2]
    inputs, options = together(processor, rows), {"num_left_chunks": 1, **LIMITS, **STEPS}
    generators = [[seeded(0), seeded(1)] for _ in range(3)]
    whole = model.generate(**inputs, streaming=True, generator=generators[0], **options)
    pieces = list(stream_speech_batch(model, inputs, generator=generators[1], **options))
    for number in range(2):
        expected = whole.waveform[number][whole.waveform_mask[number].bool()]
        streamed = torch.cat([piece[number].waveform for piece in pieces])
        torch.testing.assert_close(streamed, expected, atol=1e-5, rtol=0)
    half = list(
        stream_speech_batch(model, inputs, generator=generators[2], cache_dtype=torch.float16, **LIMITS, **STEPS)
    )
    assert sum(len(piece[0].waveform) for piece in half) == int(whole.waveform_mask[0].sum())


def test_rows_that_have_ended_leave(models, processors):
    """Neither the language model nor the flow computes them any more."""
    model, rows = models[2], mixed(2)
    batch, sizes = SpeechStreamBatch(model, **LIMITS, **STEPS), []
    handle = model.lm.register_forward_pre_hook(
        lambda module, arguments, inputs: sizes.append(len(inputs["attention_mask"])), with_kwargs=True
    )
    batch.add(together(processors[2], rows), [seeded(n) for n in range(4)])
    while len(batch):
        batch.step()
        frames = batch._sound.mel_rows.state
        assert len(frames.frames if frames is not None else []) == len(batch)
    handle.remove()
    assert sizes[0] == 4 and sizes[-1] == 1 and sizes == sorted(sizes, reverse=True)


def test_a_refused_request_leaves_nothing_behind(models, processors):
    model, processor, rows = models[2], processors[2], mixed(2)
    good = together(processor, rows[1:2])
    batch, heard = SpeechStreamBatch(model, **LIMITS, **STEPS), []
    batch.add(good, [seeded(1)])
    request = {"input_ids": torch.ones(1, 3).long(), "speaker_embedding": torch.ones(1, 192)}
    # One is refused by the flow, where the language model has taken it; the other by the language model.
    unread = {"prompt_speech_ids": torch.full((1, 9), 99), "lm_reads_prompt_speech": torch.zeros(1)}
    for broken in (unread, {"input_ids": torch.full((1, 3), 999)}):
        with pytest.raises(ValueError, match="ids: expected"):
            batch.add({**request, **broken})
    while len(batch):
        heard += [piece.waveform for piece in batch.step().values()]
    expected = alone(model, processor, rows[1], 1, **LIMITS, **STEPS)
    torch.testing.assert_close(torch.cat(heard), expected, atol=1e-5, rtol=0)


def test_what_a_batch_refuses(models, processors):
    model, processor = models[2], processors[2]
    inputs = together(processor, mixed(2)[1:3])
    with pytest.raises(ValueError, match="generator: expected one for each of 2 rows, got 1"):
        SpeechStreamBatch(model).add(inputs, [seeded(0)])
    with pytest.raises(ValueError, match="expected either input_ids or source_features"):
        SpeechStreamBatch(model).add({"speaker_embedding": torch.ones(1, 192)})
    with pytest.raises(ValueError, match="lm_reads_speaker: expected 2 rows, got 1"):
        SpeechStreamBatch(model).add({**inputs, "lm_reads_speaker": torch.ones(1)})
    with pytest.raises(ValueError, match="expected -1 and None for version 1"):
        SpeechStreamBatch(models[1], num_left_chunks=1)
    with pytest.raises(ValueError, match="compatibility: expected None or 'upstream'"):
        SpeechStreamBatch(model, compatibility="other")
