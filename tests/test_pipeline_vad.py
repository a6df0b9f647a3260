"""Recognition with a detector of speech and a punctuation model: where audio is cut, and how it is joined."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import speech_like
from tiny_funasr_fsmn_vad import bursts, tiny_detector
from transformers import (
    AutoModelForSpeechSeq2Seq,
    AutoModelForTokenClassification,
    AutoProcessor,
    AutoTokenizer,
)
from typer.testing import CliRunner

from hf_speechllm.cli import app
from hf_speechllm.models.pipeline_speech_recognition import SpeechRecognitionPipeline, _join_texts


TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent / "conversion"))

from convert_funasr import convert_funasr_pack  # noqa: E402


SECONDS = (0, 1, 1, 0, 0, 1, 0, 0, 1, 1, 1, 0)


class Upper:
    """A punctuation model to see through."""

    def punctuate(self, text: str, tokenizer: str) -> str:
        return f"{text.upper()}{tokenizer}"


@pytest.fixture(scope="module")
def recognise(tiny_model_dir):
    processor = AutoProcessor.from_pretrained(tiny_model_dir)
    return SpeechRecognitionPipeline(
        model=AutoModelForSpeechSeq2Seq.from_pretrained(tiny_model_dir),
        processor=processor,
        feature_extractor=processor.feature_extractor,
        tokenizer=processor.tokenizer,
        device="cpu",
    )


@pytest.fixture(scope="module")
def vad():
    return tiny_detector()


@pytest.fixture(scope="module")
def vad_dir(vad, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vad") / "tiny"
    vad.save_pretrained(folder)
    vad.new_feature_extractor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def audio():
    return bursts(SECONDS)


def test_pieces_are_recognised_alone_and_joined(recognise, vad, audio):
    segments = vad.speech_segments(audio)
    assert len(segments) == 3
    result = recognise(audio, vad=vad, return_timestamps="word", return_confidence=True)
    alone = [recognise(audio[round(s * 16000) : round(e * 16000)], return_timestamps="word") for s, e in segments]
    assert result["text"] == " ".join(part["text"] for part in alone) and all(part["text"] for part in alone)
    expected = [
        (chunk["text"], *(start + time for time in chunk["timestamp"]))
        for part, (start, _) in zip(alone, segments, strict=True)
        for chunk in part["chunks"]
    ]
    assert [chunk["text"] for chunk in result["chunks"]] == [text for text, _, _ in expected]
    np.testing.assert_allclose(
        [chunk["timestamp"] for chunk in result["chunks"]], [t[1:] for t in expected], atol=2e-3
    )
    assert 0 < result["confidence"] <= 1 and all("confidence" in chunk for chunk in result["chunks"])


def test_batches_go_by_length_and_change_nothing(recognise, vad, audio):
    expected = recognise(audio, vad=vad, return_timestamps="char")
    for batch_size in (2, 3, 8):
        assert recognise(audio, vad=vad, return_timestamps="char", batch_size=batch_size) == expected
    lengths = [len(item["input_features"][0]) for item in recognise.preprocess(audio, vad=vad)]
    assert len(lengths) == 3 and lengths == sorted(lengths, reverse=True) and len(set(lengths)) == 3
    other = bursts((1, 0, 0, 1, 1, 1, 0), seed=5)
    both = recognise([audio, other], vad=vad, return_timestamps="char", batch_size=4)
    assert both == [expected, recognise(other, vad=vad, return_timestamps="char")]


def test_nothing_but_silence(recognise, vad):
    quiet = 1e-4 * np.random.default_rng(0).standard_normal(32000).astype(np.float32)
    for samples in (quiet, np.zeros(10, dtype=np.float32), np.zeros(0, dtype=np.float32)):
        result = recognise(samples, vad=vad, return_timestamps="word", return_confidence=True)
        assert result == {"text": "", "chunks": [], "confidence": 0.0}


def test_another_rate_of_the_detector(recognise, audio):
    slow = tiny_detector(sampling_rate=8000)
    cut = recognise(audio, vad=slow, return_timestamps="word")
    whole = recognise(audio, vad=tiny_detector(), return_timestamps="word")
    assert cut["text"] and abs(cut["chunks"][0]["timestamp"][0] - whole["chunks"][0]["timestamp"][0]) < 1.0
    assert cut["chunks"][-1]["timestamp"][1] <= len(SECONDS)


def test_long_pieces_are_windowed(recognise, audio, monkeypatch):
    """A detector that finds no pause in three minutes: its piece is cut like audio without one."""
    long = np.tile(speech_like(10), 18)
    expected = recognise(long, return_timestamps="word")

    class Everything:
        config = tiny_detector().config

        def speech_segments(self, waveform, sampling_rate):
            return [(0.0, len(waveform) / sampling_rate)]

    assert recognise(long, vad=Everything(), return_timestamps="word") == expected
    assert expected["chunks"][-1]["timestamp"][1] > 170


def test_a_folder_is_loaded(recognise, vad, vad_dir, audio, tiny_model_dir):
    expected = recognise(audio, vad=vad)
    assert recognise(audio, vad=str(vad_dir)) == recognise(audio, vad=vad_dir) == expected
    fixed = SpeechRecognitionPipeline(
        model=recognise.model,
        processor=recognise.processor,
        feature_extractor=recognise.feature_extractor,
        tokenizer=recognise.tokenizer,
        vad=str(vad_dir),
        punctuation=(Upper(), "!"),
    )
    assert fixed(audio) == {"text": expected["text"].upper() + "!", "raw_text": expected["text"]}


def test_two_ways_to_cut_are_refused(recognise, vad, audio):
    with pytest.raises(ValueError, match="chunk_length_s: with `vad`"):
        recognise(audio, vad=vad, chunk_length_s=10)


def test_punctuation_changes_the_text_alone(recognise, audio):
    plain = recognise(audio, return_timestamps="word")
    marked = recognise(audio, return_timestamps="word", punctuation=(Upper(), "."))
    assert marked == {**plain, "text": plain["text"].upper() + ".", "raw_text": plain["text"]}


def test_texts_are_joined_as_they_are_written():
    assert _join_texts(["one", "two", "", "三", "四", "five", "six"]) == "one two三四five six"
    assert _join_texts([]) == _join_texts(["", ""]) == ""


def test_command_line(tiny_model_dir, vad_dir, recognise, vad, audio, tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, audio, 16000, subtype="FLOAT")
    arguments = ["transcribe", str(path), "--model", str(tiny_model_dir), "--vad", str(vad_dir), "--format", "json"]
    result = CliRunner().invoke(app, [*arguments, "--timestamps"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    expected = recognise(audio, vad=vad, return_timestamps="word", return_confidence=True)
    assert answer["text"] == expected["text"]
    assert [tuple(chunk["timestamp"]) for chunk in answer["chunks"]] == [c["timestamp"] for c in expected["chunks"]]
    for extra, message in ((["--chunk-length", "5"], "--chunk-length"), (["--punctuation", "nowhere"], "nowhere")):
        refused = CliRunner().invoke(app, [*arguments, *extra])
        assert refused.exit_code != 0 and refused.stderr.startswith("error: ") and message in refused.stderr


def hour(folder: str, vad_folder: str) -> dict:
    """Runs in a process of its own, so that its peak of memory is its own."""
    import resource
    import time

    from transformers import pipeline

    torch.set_num_threads(1)
    recognise = pipeline(
        "automatic-speech-recognition", model=folder, trust_remote_code=True, device="cpu", vad=vad_folder
    )
    options = {"decoding": "ctc_greedy", "return_timestamps": "word", "batch_size": 8}
    minute = bursts((0, 1, 1, 1, 1, 0, 0, 1, 1, 0) * 6)
    recognise(np.tile(minute, 2), **options)
    audio = np.tile(minute, 60)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    result = recognise(audio, **options)
    return {
        "times": [chunk["timestamp"] for chunk in result["chunks"]],
        "words": len(result["text"].split()),
        "seconds": time.perf_counter() - start,
        "growth_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024,
    }


@pytest.mark.slow
def test_an_hour(tiny_model_dir, vad_dir):
    """Time and memory stay bounded: the pipeline holds one copy of the hour (220 MiB) and what a batch needs."""
    command = [sys.executable, str(Path(__file__).resolve()), str(tiny_model_dir), str(vad_dir)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    times = np.array(report["times"])
    assert report["words"] == len(times) > 500
    assert (np.diff(times[:, 0]) >= 0).all() and times.min() >= 0 and times.max() <= 3600
    assert set((times[:, 0] // 60).astype(int)) == set(range(60))
    assert report["seconds"] < 180 and report["growth_mib"] < 340, report


if __name__ == "__main__":
    print(json.dumps(hour(*sys.argv[1:])))


@pytest.fixture(scope="module")
def golden_packs(tmp_path_factory) -> dict[str, Path]:
    """Converted FunASR packs, by the name of their case."""
    work = tmp_path_factory.mktemp("packs")
    converted = {}
    for case in ("funasr/seaco_hotword", "funasr/sensevoice_tiny", "funasr_helpers/ct_transformer_tiny"):
        pack = TESTS / "golden" / case
        converted[pack.name] = work / pack.name
        convert_funasr_pack(pack, work / pack.name)
    return converted


@pytest.mark.parametrize("case", ["seaco_hotword", "sensevoice_tiny"])
def test_pieces_of_other_recognisers(golden_packs, case, vad, audio):
    """Paraformer and SenseVoice: each piece gives what it gives alone, at its own place."""
    processor = AutoProcessor.from_pretrained(golden_packs[case])
    recognise = SpeechRecognitionPipeline(
        model=AutoModelForSpeechSeq2Seq.from_pretrained(golden_packs[case]),
        processor=processor,
        feature_extractor=processor.feature_extractor,
        tokenizer=processor.tokenizer,
        device="cpu",
    )
    segments = vad.speech_segments(audio)
    result = recognise(audio, vad=vad, return_timestamps="char", batch_size=3)
    alone = [recognise(audio[round(s * 16000) : round(e * 16000)], return_timestamps="char") for s, e in segments]
    expected = [
        (chunk["text"], *(start + time for time in chunk["timestamp"]))
        for part, (start, _) in zip(alone, segments, strict=True)
        for chunk in part["chunks"]
    ]
    assert expected and [chunk["text"] for chunk in result["chunks"]] == [text for text, _, _ in expected]
    np.testing.assert_allclose(
        [chunk["timestamp"] for chunk in result["chunks"]], [times[1:] for times in expected], atol=2e-3
    )


def test_command_line_punctuates(golden_packs, vad_dir, audio, tmp_path):
    wav = tmp_path / "talk.wav"
    soundfile.write(wav, audio, 16000)
    model, punctuation = golden_packs["seaco_hotword"], golden_packs["ct_transformer_tiny"]
    options = ["--model", str(model), "--vad", str(vad_dir), "--format", "json"]
    plain = CliRunner().invoke(app, ["transcribe", str(wav), *options])
    assert plain.exit_code == 0, plain.output
    done = CliRunner().invoke(app, ["transcribe", str(wav), *options, "--punctuation", str(punctuation)])
    assert done.exit_code == 0, done.output
    raw = json.loads(plain.stdout)["text"]
    network = AutoModelForTokenClassification.from_pretrained(punctuation)
    assert json.loads(done.stdout)["text"] == network.punctuate(raw, AutoTokenizer.from_pretrained(punctuation))
