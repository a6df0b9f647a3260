"""Streams of a complete CosyVoice: the pieces are the whole, however they are cut, and each stream is on its own."""

import pytest
import torch
from tiny_cosyvoice import recording, tiny_cosyvoice, tiny_processor
from torch import Tensor

from hf_speechllm.models.modeling_cosyvoice import CosyVoiceForTextToWaveform
from hf_speechllm.models.streaming_cosyvoice import SpeechStream, stream_speech, stream_text_to_speech


LIMITS = {"max_token_text_ratio": 5.0, "min_token_text_ratio": 3.0}


@pytest.fixture(scope="module")
def models() -> dict[int, CosyVoiceForTextToWaveform]:
    return {version: tiny_cosyvoice(version) for version in (1, 2, 3)}


def inputs_of(version: int, text: str = "hello you there", **options) -> dict[str, Tensor]:
    options = {"prompt_audio": recording(0.9), "prompt_text": "yes no", "sampling_rate": 24000, **options}
    return dict(tiny_processor(version)(text, **options))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("chunk_tokens", [None, 1, 7, 1000])
def test_the_pieces_are_the_whole(models, version, chunk_tokens):
    model, inputs = models[version], inputs_of(version)
    whole = model.generate(**inputs, streaming=True, generator=seeded(), **LIMITS)
    pieces = list(stream_speech(model, inputs, chunk_tokens=chunk_tokens, generator=seeded(), **LIMITS))
    assert len(pieces) > (1 if chunk_tokens != 1000 else 0) and all(piece.shape[1] for piece in pieces)
    streamed = torch.cat(pieces, dim=1)
    assert streamed.shape == whole.waveform.shape
    torch.testing.assert_close(streamed, whole.waveform, atol=1e-5, rtol=0)


@pytest.mark.parametrize("version", [2, 3])
def test_a_stream_without_sampling_and_without_a_prompt(models, version):
    model = models[version]
    inputs = inputs_of(version, prompt_text=None, prompt_audio=recording(0.5))
    whole = model.generate(**inputs, streaming=True, do_sample=False, generator=seeded(), **LIMITS)
    pieces = stream_speech(model, inputs, do_sample=False, generator=seeded(), **LIMITS)
    torch.testing.assert_close(torch.cat(list(pieces), dim=1), whole.waveform, atol=1e-5, rtol=0)


def test_version_1_speaks_the_same_tokens_in_overlapping_pieces(models):
    """Its flow looks both ways: as long as one piece is enough, the stream is the whole."""
    model, inputs = models[1], inputs_of(1)
    whole = model.generate(**inputs, generator=seeded(), **LIMITS)
    streamed = torch.cat(list(stream_speech(model, inputs, generator=seeded(), **LIMITS)), dim=1)
    assert streamed.shape == whole.waveform.shape and torch.isfinite(streamed).all()


@pytest.mark.parametrize("version", [1, 2, 3])
def test_converted_speech_streams_too(models, version):
    model = models[version]
    arguments = {"source_audio": recording(1.4, 1), "prompt_audio": recording(0.7), "sampling_rate": 24000}
    inputs = dict(tiny_processor(version)(**arguments))
    options = {} if version == 1 else {"streaming": True}
    whole = model.generate(**inputs, generator=seeded(), **options).waveform
    streamed = torch.cat(list(stream_speech(model, inputs, generator=seeded())), dim=1)
    assert streamed.shape == whole.shape
    if version != 1:
        torch.testing.assert_close(streamed, whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("version", [2, 3])
def test_text_may_come_in_pieces(models, version):
    """How the text is cut changes nothing."""
    model, inputs = models[version], inputs_of(version, text="x")
    text = tiny_processor(version).tokenizer("hello you there, one two")["input_ids"]
    cuts = ([text], [[token] for token in text], [text[:7], [], text[7:9], text[9:]])
    waves = [
        torch.cat(
            list(stream_text_to_speech(model, cut, inputs, generator=seeded(), **{"max_token_text_ratio": 5.0})), 1
        )
        for cut in cuts
    ]
    assert waves[0].shape[1] > 0
    for wave in waves[1:]:
        torch.testing.assert_close(wave, waves[0], atol=1e-5, rtol=0)


def test_streams_are_independent(models):
    """Two streams take turns; each is what it is alone."""
    model = models[2]
    both = [inputs_of(2), inputs_of(2, text="well", prompt_audio=recording(0.6, 2))]
    alone = [
        torch.cat(list(stream_speech(model, one, generator=seeded(n), **LIMITS)), 1) for n, one in enumerate(both)
    ]
    streams = [stream_speech(model, one, generator=seeded(n), **LIMITS) for n, one in enumerate(both)]
    heard: list[list[Tensor]] = [[], []]
    waiting = [0, 1]
    while waiting:
        for number in list(waiting):
            piece = next(streams[number], None)
            if piece is None:
                waiting.remove(number)
            else:
                heard[number].append(piece)
    for pieces, expected in zip(heard, alone, strict=True):
        assert torch.equal(torch.cat(pieces, 1), expected)


def test_tokens_of_another_source_can_be_played(models):
    """Flow and vocoder alone, fed by whoever makes tokens."""
    model, inputs = models[2], inputs_of(2)
    whole = model.generate(**inputs, streaming=True, generator=seeded(), **LIMITS)
    names = ("prompt_features", "prompt_fbank", "prompt_mel")
    prompt = model.encode_prompt(**{f"{n}{part}": inputs[f"{n}{part}"] for n in names for part in ("", "_mask")})
    generators = [seeded(seed) for seed in (1, 2)]
    one, other = SpeechStream(model, prompt, vocoder_generator=generators[0]), None
    ids = whole.speech_ids[0].tolist()
    pieces = [one.push(ids[:10]), one.push(ids[10:11]), one.push(ids[11:], is_last=True)]
    other = SpeechStream(model, prompt, vocoder_generator=seeded(1))
    torch.testing.assert_close(torch.cat(pieces, 1), other.push(ids, is_last=True), atol=1e-5, rtol=0)


def test_what_cannot_stream_is_said(models):
    with pytest.raises(ValueError, match="expected 2 or 3 for a text that arrives in pieces"):
        next(stream_text_to_speech(models[1], [[1]], inputs_of(1)))
    inputs = tiny_processor(2)(["a", "b"], prompt_audio=recording(0.5), sampling_rate=24000)
    with pytest.raises(ValueError, match="expected one row"):
        next(stream_speech(models[2], dict(inputs)))
    with pytest.raises(ValueError, match="chunk_tokens: expected at least 1"):
        next(stream_speech(models[2], inputs_of(2), chunk_tokens=0))
