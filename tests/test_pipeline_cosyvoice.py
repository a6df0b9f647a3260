"""The text-to-speech pipeline of CosyVoice."""

import numpy as np
import pytest
import torch
from tiny_cosyvoice import recording, tiny_cosyvoice, tiny_processor
from transformers import pipeline

from hf_speechllm.models.pipeline_cosyvoice import CosyVoiceTextToSpeechPipeline


LIMITS = {"max_token_text_ratio": 4.0, "min_token_text_ratio": 2.0}
LONG = " ".join(f"this is sentence {word} of a rather long text, as you see." for word in ("one", "two", "three"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cosyvoice")
    model, processor = tiny_cosyvoice(2), tiny_processor(2)
    prompt = model.encode_prompt(**processor.prompt_features([recording(0.6)], 24000))
    processor.add_speaker("tone", prompt, "yes no")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def speak(folder) -> CosyVoiceTextToSpeechPipeline:
    speak = pipeline("text-to-speech", model=str(folder), trust_remote_code=True)
    speak.processor.normalizer = None
    return speak


def test_text_becomes_audio(speak):
    assert type(speak).__name__ == "CosyVoiceTextToSpeechPipeline"
    result = speak("hello", speaker="tone", seed=1, **LIMITS)
    assert result["sampling_rate"] == 24000 and result["audio"].dtype == np.float32
    assert result["audio"].ndim == 1 and len(result["audio"]) > 1000 and np.isfinite(result["audio"]).all()
    again = speak("hello", speaker="tone", seed=1, **LIMITS)
    assert np.array_equal(result["audio"], again["audio"])


def test_options_per_text(speak):
    """A list of texts, each with a voice of its own; each as it is alone."""
    items = [
        {"text": "hello", "speaker": "tone"},
        {"text": "you", "prompt_audio": recording(0.5, 2), "sampling_rate": 24000},
        {"text": "low", "speaker": "tone", "instruct": "calm"},
    ]
    together = speak(items, seed=4, **LIMITS)
    for item, result in zip(items, together, strict=True):
        assert np.array_equal(result["audio"], speak(item, seed=4, **LIMITS)["audio"])


def test_long_texts_are_spoken_sentence_by_sentence(speak):
    one = {"speaker": "tone", "mode": "cross_lingual", "seed": 2, **LIMITS}
    whole = speak(LONG, **one)["audio"]
    sentences = speak.processor.split_text(LONG)
    assert len(sentences) > 1
    inputs = speak.processor(sentences, speaker="tone", mode="cross_lingual", normalize=False)
    generators = [torch.Generator().manual_seed(2 + row) for row in range(len(sentences))]
    output = speak.model.generate(**inputs, generator=generators, **LIMITS)
    pieces = [row[mask.bool()] for row, mask in zip(output.waveform, output.waveform_mask, strict=True)]
    np.testing.assert_allclose(whole, torch.cat(pieces).numpy(), atol=1e-6)
    # Computed one at a time it is the same.
    np.testing.assert_allclose(speak(LONG, max_batch_size=1, **one)["audio"], whole, atol=2e-5)


def test_nothing_to_say(speak):
    for text in ("", "?!", "   "):
        assert speak(text, speaker="tone")["audio"].shape == (0,)


def test_voice_conversion(speak):
    result = speak({"source_audio": recording(0.7, 1), "speaker": "tone", "sampling_rate": 24000}, seed=0)
    # 25 tokens a second, two frames of 240 samples each.
    assert len(result["audio"]) == 18 * 2 * 240


def test_stream_gives_the_same_audio(speak):
    options = {"speaker": "tone", "seed": 5, **LIMITS}
    pieces = list(speak.stream("hello you", **options))
    assert len(pieces) > 1
    # A stream has chunked attention, the default has not.
    whole = speak("hello you", streaming=True, **{**options})["audio"]
    assert np.concatenate(pieces).shape == whole.shape
    assert list(speak.stream("", **options)) == []


def test_several_texts_stream_together(speak, monkeypatch):
    """Each is what it is alone, sentence by sentence, whatever its length."""
    monkeypatch.setattr(
        speak.processor, "split_text", lambda text, normalize: [part for part in text.split("|") if part]
    )
    options = {"speaker": "tone", "seed": 5, **LIMITS}
    texts = ["hello|and you", "", {"text": "why", "speaker": "tone", "mode": "cross_lingual"}]
    pieces = list(speak.stream_batch(texts, **options))
    assert all(len(row) == 3 and any(len(piece) for piece in row) for row in pieces)
    for number, text in enumerate(texts):
        alone = np.concatenate([np.zeros(0, dtype=np.float32), *speak.stream(text, **options)])
        together = np.concatenate([row[number] for row in pieces])
        assert together.shape == alone.shape
        np.testing.assert_allclose(together, alone, atol=1e-5)
    with pytest.raises(ValueError, match="compatibility: expected the same for all texts"):
        next(speak.stream_batch(["a", {"text": "b", "compatibility": "upstream"}], **options))


def test_speed(speak):
    options = {"speaker": "tone", "seed": 1, "do_sample": False, **LIMITS}
    slow, fast = (speak("hello", speed=speed, **options)["audio"] for speed in (1.0, 2.0))
    assert len(fast) == len(slow) // 2 // 240 * 240


def test_constructor_takes_a_folder_or_objects(folder, speak):
    built = CosyVoiceTextToSpeechPipeline(str(folder), speaker="tone", seed=1, **LIMITS)
    built.processor.normalizer = None
    assert np.array_equal(built("hello")["audio"], speak("hello", speaker="tone", seed=1, **LIMITS)["audio"])
    with pytest.raises(ValueError, match="expected a CosyVoiceProcessor"):
        CosyVoiceTextToSpeechPipeline(tiny_cosyvoice(2))
    with pytest.raises(ValueError, match="inputs: expected text and any of"):
        speak({"text": "a", "speakers": "tone"})
    with pytest.raises(ValueError, match="max_batch_size"):
        speak("a", speaker="tone", max_batch_size=0)
