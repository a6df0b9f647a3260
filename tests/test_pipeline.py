"""The speech recognition pipeline: inputs, times, chunking, batching, options."""

import io

import numpy as np
import pytest
import soundfile
import torch
from conftest import WORDS, speech_like
from transformers import (
    AutomaticSpeechRecognitionPipeline,
    AutoModelForCTC,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    pipeline,
)

import hf_speechllm  # noqa: F401
from hf_speechllm.models.feature_extraction_kaldi_fbank import AudioError
from hf_speechllm.models.pipeline_speech_recognition import SpeechRecognitionPipeline


@pytest.fixture(scope="module")
def processor(tiny_model_dir):
    return AutoProcessor.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="module")
def recognise(tiny_model_dir, processor):
    return SpeechRecognitionPipeline(
        model=AutoModelForSpeechSeq2Seq.from_pretrained(tiny_model_dir),
        processor=processor,
        feature_extractor=processor.feature_extractor,
        tokenizer=processor.tokenizer,
        device="cpu",
    )


@pytest.fixture(scope="module")
def audio():
    return speech_like(2.5)


def wav(samples: np.ndarray, rate: int = 16000, subtype: str = "FLOAT") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV", subtype=subtype)
    return buffer.getvalue()


def test_stock_factory_finds_the_class_in_the_configuration(tiny_model_dir, recognise, audio):
    found = pipeline("automatic-speech-recognition", model=str(tiny_model_dir), trust_remote_code=True, device="cpu")
    assert type(found).__name__ == "SpeechRecognitionPipeline"
    assert found(audio) == recognise(audio)
    assert "SpeechRecognitionPipeline" in repr(found)


def test_text_equals_generate(recognise, processor, audio):
    features = processor(audio=audio, sampling_rate=16000, return_tensors="pt")
    expected = processor.batch_decode(recognise.model.generate(**features), skip_special_tokens=True)[0]
    assert recognise(audio) == {"text": expected}
    assert len(expected.split()) >= 3 and set(expected.split()) <= set(WORDS)


def test_every_kind_of_input_gives_the_same_text(recognise, audio, tmp_path):
    expected = recognise(audio)["text"]
    path = tmp_path / "a.wav"
    path.write_bytes(wav(audio))
    inputs = [
        str(path),
        path,
        wav(audio),
        io.BytesIO(wav(audio)),
        torch.from_numpy(audio),
        audio.astype(np.float64),
        np.stack([audio, audio]),
        {"array": audio, "sampling_rate": 16000, "path": "elsewhere.wav"},
        {"raw": audio, "sampling_rate": 16000},
        {"bytes": wav(audio), "path": None},
        {"bytes": None, "path": str(path)},
        wav(np.stack([audio, audio], axis=1)),
    ]
    for given in inputs:
        assert recognise(given)["text"] == expected, type(given)
    assert recognise(inputs[7])["text"] == expected, "the caller's dictionary was changed"


def test_integers_are_scaled(recognise, audio):
    integers = np.round(audio * 32767).astype(np.int16)
    floats = integers.astype(np.float32) / 32768
    assert recognise(integers) == recognise(floats)
    assert recognise(wav(integers, subtype="PCM_16")) == recognise(floats)


@pytest.mark.parametrize("rate", [8000, 44100])
def test_other_rates_are_resampled(recognise, rate):
    from hf_speechllm.audio import load_audio

    content = wav(speech_like(2.0, rate), rate)
    expected = recognise(load_audio(content, 16000))
    assert recognise(content) == expected
    assert recognise({"array": speech_like(2.0, rate), "sampling_rate": rate}) == expected


def test_word_times_are_ordered_and_cover_the_text(recognise, audio):
    result = recognise(audio, return_timestamps="word")
    assert " ".join(chunk["text"] for chunk in result["chunks"]) == result["text"]
    times = [time for chunk in result["chunks"] for time in chunk["timestamp"]]
    assert times == sorted(times) and times[0] >= 0 and times[-1] <= 2.5 + 0.05
    assert all(start < end for start, end in (chunk["timestamp"] for chunk in result["chunks"]))
    assert recognise(audio, return_timestamps=True) == result


def test_char_times_are_those_of_the_tokens(recognise, processor, audio):
    chunks = recognise(audio, return_timestamps="char")["chunks"]
    features = processor(audio=audio, sampling_rate=16000, return_tensors="pt")
    output = recognise.model.generate(**features, return_timestamps=True, return_dict_in_generate=True)
    expected = output.token_timestamps[0, : int(output.sequences_lengths[0])]
    np.testing.assert_allclose([chunk["timestamp"] for chunk in chunks], expected.numpy(), atol=1e-3)


def test_confidence_when_asked(recognise, audio):
    result = recognise(audio, return_timestamps="word", return_confidence=True)
    assert 0 < result["confidence"] <= 1
    assert result["confidence"] == pytest.approx(
        np.mean([chunk["confidence"] for chunk in result["chunks"]]), abs=1e-6
    )
    assert "confidence" not in recognise(audio)


def test_batch_equals_single(recognise):
    recordings = [speech_like(seconds, seed=seed) for seed, seconds in enumerate((2.0, 0.01, 1.1, 2.7, 0.6))]
    single = [recognise(recording, return_timestamps="word") for recording in recordings]
    for batch_size in (2, 3, 5):
        assert recognise(recordings, batch_size=batch_size, return_timestamps="word") == single
    assert list(recognise((r for r in recordings), batch_size=2, return_timestamps="word")) == single
    assert len({result["text"] for result in single}) >= 4


def test_one_window_equals_no_window(recognise, audio):
    assert recognise(audio, chunk_length_s=30, return_timestamps="word") == recognise(audio, return_timestamps="word")


def test_windows_join_their_own_parts(recognise, processor):
    """Every window is recognised alone; the tokens whose middle lies in its own part make up the result."""
    recording = speech_like(5.0, seed=3)
    frame, chunk, stride = 640, 50 * 640, 10 * 640
    tokens, times, start = [], [], 0
    while True:
        is_last = start + chunk >= len(recording)
        features = processor(audio=recording[start : start + chunk], sampling_rate=16000, return_tensors="pt")
        output = recognise.model.generate(**features, return_timestamps=True, return_dict_in_generate=True)
        spans = output.token_timestamps[0, : int(output.sequences_lengths[0])].tolist()
        for token, (begin, end) in zip(output.sequences[0].tolist(), spans, strict=False):
            middle = (begin + end) / 2
            if (start == 0 or middle >= stride / 16000) and (is_last or middle < (chunk - stride) / 16000):
                tokens.append(token)
                times.append((begin + start / 16000, end + start / 16000))
        if is_last:
            break
        start += chunk - 2 * stride
    seconds, overlap = chunk / 16000, stride / 16000
    assert recognise._align_to == frame
    result = recognise(recording, chunk_length_s=seconds, stride_length_s=overlap, return_timestamps="char")
    assert result["text"] == processor.batch_decode([tokens], skip_special_tokens=True)[0]
    np.testing.assert_allclose([chunk["timestamp"] for chunk in result["chunks"]], times, atol=1e-3)
    batched = recognise(
        [recording, recording[:20000]],
        batch_size=3,
        chunk_length_s=seconds,
        stride_length_s=(overlap, overlap),
        return_timestamps="char",
    )
    assert batched[0] == result
    assert batched[1] == recognise(recording[:20000], return_timestamps="char")


@pytest.mark.parametrize("num_samples", [0, 1, 160, 399, 400, 800])
def test_too_short_audio_gives_an_empty_text(recognise, num_samples):
    result = recognise(np.zeros(num_samples, dtype=np.float32), return_timestamps="word", return_confidence=True)
    assert result == {"text": "", "confidence": 0.0, "chunks": []}


def test_silence_and_full_scale_are_defined(recognise):
    for recording in (np.zeros(16000, dtype=np.float32), np.sign(speech_like(1.0)), np.full(16000, 0.5, np.float32)):
        assert set(recognise(recording)["text"].split()) <= set(WORDS)


@pytest.mark.parametrize("decoding", ["ctc_greedy", "ctc_prefix_beam_search", "attention", "attention_rescoring"])
def test_decoding_options_reach_generate(recognise, processor, audio, decoding):
    options = {"decoding": decoding, "decoding_chunk_size": 4, "num_left_chunks": 2, "blank_penalty": 1.5}
    if decoding != "ctc_greedy":
        options["num_beams"] = 3
    features = processor(audio=audio, sampling_rate=16000, return_tensors="pt")
    ids = recognise.model.generate(**features, **options)
    expected = processor.batch_decode(ids, skip_special_tokens=True)[0]
    assert recognise(audio, **options)["text"] == expected
    assert recognise(audio, generate_kwargs=options)["text"] == expected


def test_hotwords_reach_generate(recognise, processor, audio):
    options = {"decoding": "ctc_prefix_beam_search", "hotwords_score": 12.0}
    features = processor(audio=audio, sampling_rate=16000, return_tensors="pt")
    without = recognise(audio, decoding="ctc_prefix_beam_search")["text"]
    changed = 0
    for word in WORDS:
        ids = recognise.model.generate(**features, hotwords=processor.hotword_ids([word]), **options)
        text = recognise(audio, hotwords=[word], **options)["text"]
        assert text == processor.batch_decode(ids, skip_special_tokens=True)[0]
        changed += text != without
    assert changed > 0
    assert recognise(audio, hotwords=[], decoding="ctc_prefix_beam_search")["text"] == without


def test_extra_entries_come_back(recognise, audio):
    result = recognise({"array": audio, "sampling_rate": 16000, "key": "utterance-1"})
    assert result["key"] == ["utterance-1"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.full(8000, np.nan, np.float32), "NaN or infinite"),
        (np.full(8000, np.inf, np.float32), "NaN or infinite"),
        (np.zeros((2, 3, 400), np.float32), "expected 1 or 2 dimensions"),
        (b"no audio", "cannot be read as audio"),
        ("https://example.invalid/a.wav", "no such file"),
        ({"array": np.zeros(8000, np.float32)}, "needs `sampling_rate`"),
        ({"array": np.zeros(8000, np.float32), "sampling_rate": 0}, "expected a positive integer"),
        ({"text": "a"}, "expected `array`, `raw`, `bytes` or `path`"),
        (3.0, "expected a path, bytes, a file, an array or a dictionary, got float"),
    ],
)
def test_bad_audio_raises(recognise, given, message):
    with pytest.raises(AudioError, match=message):
        recognise(given)


def test_bad_options_raise(recognise, audio):
    with pytest.raises(ValueError, match="return_timestamps: expected 'char', 'word' or a bool, got 'segment'"):
        recognise(audio, return_timestamps="segment")
    with pytest.raises(ValueError, match="hotwords: expected a list"):
        recognise(audio, hotwords="three")
    with pytest.raises(ValueError, match="num_return_sequences"):
        recognise(audio, num_return_sequences=2)
    with pytest.raises(ValueError, match="expected more than both strides together"):
        recognise(audio, chunk_length_s=1.0, stride_length_s=0.6)


@pytest.fixture(scope="module")
def stock(tiny_model_dir):
    """transformers' own class around a model object: it takes the argmax of `logits` as CTC frames."""
    model = AutoModelForCTC.from_pretrained(tiny_model_dir).eval()
    processor = AutoProcessor.from_pretrained(tiny_model_dir)
    return pipeline(
        "automatic-speech-recognition",
        model=model,
        tokenizer=processor.tokenizer,
        feature_extractor=processor.feature_extractor,
    )


def test_stock_pipeline_on_a_model_object_is_greedy_ctc(stock, recognise):
    assert type(stock) is AutomaticSpeechRecognitionPipeline
    waves = [speech_like(2.0), speech_like(0.8)]
    expected = [recognise(wave, decoding="ctc_greedy")["text"] for wave in waves]
    assert any(expected)
    assert [stock(np.array(wave))["text"] for wave in waves] == expected
    # Padded frames read blank, so a batch gives what each item gives alone.
    assert [result["text"] for result in stock([np.array(wave) for wave in waves], batch_size=2)] == expected


def test_stock_pipeline_gives_times(stock, recognise, audio):
    result = stock(np.array(audio), return_timestamps="word")
    assert " ".join(chunk["text"].strip() for chunk in result["chunks"]) == result["text"]
    ends = [chunk["timestamp"][1] for chunk in result["chunks"]]
    assert ends == sorted(ends) and 0 < ends[-1] <= len(audio) / 16000 + 0.04
