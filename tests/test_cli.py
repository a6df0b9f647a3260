"""The command line, run in this process; one test starts the installed console script."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import WORDS, speech_like
from typer.testing import CliRunner

import hf_speechllm
from hf_speechllm import cpu_inference
from hf_speechllm.audio import load_audio
from hf_speechllm.cli import app
from hf_speechllm.subtitles import cues, to_srt, to_vtt


runner = CliRunner()


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("audio")
    paths = []
    for number, (seconds, rate) in enumerate(((2.0, 16000), (1.2, 8000))):
        paths.append(folder / f"recording{number}.wav")
        soundfile.write(paths[-1], speech_like(seconds, rate, seed=number), rate, subtype="PCM_16")
    return paths


def run(*arguments: object, code: int = 0, **options):
    result = runner.invoke(app, [str(argument) for argument in arguments], **options)
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_transcribe_text(tiny_model_dir, recordings):
    result = run("transcribe", recordings[0], "--model", tiny_model_dir)
    assert result.stdout.endswith("\n") and set(result.stdout.split()) <= set(WORDS) and result.stdout.split()
    many = run("transcribe", *recordings, "--model", tiny_model_dir, "--batch-size", 2)
    assert many.stdout.splitlines()[0] == f"{recordings[0]}\t{result.stdout.strip()}"
    assert len(many.stdout.splitlines()) == 2


def test_transcribe_text_with_times(tiny_model_dir, recordings):
    lines = run("transcribe", recordings[0], "--model", tiny_model_dir, "--timestamps").stdout.splitlines()
    assert [line.split()[2] for line in lines[1:]] == lines[0].split()
    assert all(float(line.split()[0]) < float(line.split()[1]) for line in lines[1:])


def test_transcribe_json(tiny_model_dir, recordings):
    result = run("transcribe", *recordings, "--model", tiny_model_dir, "--format", "json", "--timestamps")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["file"] for row in rows] == [str(path) for path in recordings]
    assert set(rows[0]) == {"file", "text", "chunks", "confidence"}
    assert " ".join(chunk["text"] for chunk in rows[0]["chunks"]) == rows[0]["text"]
    plain = run("transcribe", recordings[0], "--model", tiny_model_dir, "--format", "json")
    assert set(json.loads(plain.stdout)) == {"file", "text", "confidence"}


def test_transcribe_subtitles(tiny_model_dir, recordings):
    srt = run("transcribe", recordings[0], "--model", tiny_model_dir, "--format", "srt").stdout
    assert srt.startswith("1\n00:00:0") and " --> 00:00:0" in srt
    vtt = run("transcribe", recordings[0], "--model", tiny_model_dir, "--format", "vtt").stdout
    assert vtt.startswith("WEBVTT\n\n00:00:0")
    result = run("transcribe", *recordings, "--model", tiny_model_dir, "--format", "srt", code=2)
    assert "takes one file, got 2" in result.stderr


def test_transcribe_options_reach_the_model(tiny_model_dir, recordings, tmp_path):
    def text(*arguments):
        return run("transcribe", recordings[0], "--model", tiny_model_dir, *arguments).stdout

    phrases = tmp_path / "hotwords.txt"
    texts = {text("--decoding", "ctc_greedy"), text("--decoding", "attention"), text()}
    for word in WORDS:
        phrases.write_text(f"{word}\n\n{word} {word}\n", encoding="utf-8")
        texts.add(text("--decoding", "ctc_prefix_beam_search", "--hotwords", phrases, "--num-beams", "4"))
    assert len(texts) > 1
    assert run("transcribe", recordings[0], "-m", tiny_model_dir, "--decoding", "magic", code=2).stderr


@pytest.mark.parametrize("has_units", (True, False))
def test_bfloat16_products_are_asked_for(tiny_model_dir, recordings, monkeypatch, has_units):
    """What the processor of the moment has must not matter here: the switch itself is tested."""
    packed = []
    monkeypatch.setattr(cpu_inference, "has_bfloat16_products", lambda: has_units)
    monkeypatch.setattr(cpu_inference, "pack_linear_weights", lambda model: packed.append(torch.float32))
    monkeypatch.setattr(cpu_inference, "use_bfloat16_products", lambda model: packed.append(torch.bfloat16))
    arguments = ("transcribe", recordings[0], "--model", tiny_model_dir)
    run(*arguments)
    result = run(*arguments, "--bfloat16", code=0 if has_units else 2)
    run("stream", recordings[0], "--model", tiny_model_dir, "--bfloat16", code=result.exit_code)
    assert packed == [torch.float32] + [torch.bfloat16] * (2 * has_units)
    if not has_units:
        assert result.stderr == "error: --bfloat16: this processor has neither AMX nor AVX512-BF16\n"
    refused = run(*arguments, "--bfloat16", "--device", "meta", code=2)
    assert refused.stderr == "error: --bfloat16: expected --device cpu, got meta\n"


def test_transcribe_output_file(tiny_model_dir, recordings, tmp_path):
    output = tmp_path / "out.txt"
    result = run("transcribe", recordings[0], "--model", tiny_model_dir, "--output", output)
    assert result.stdout == ""
    assert output.read_text(encoding="utf-8") == run("transcribe", recordings[0], "--model", tiny_model_dir).stdout
    assert [path.name for path in tmp_path.iterdir()] == ["out.txt"]


def test_bad_audio_is_one_line_and_the_others_are_transcribed(tiny_model_dir, recordings, tmp_path):
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"RIFF....")
    result = run("transcribe", broken, recordings[0], "--model", tiny_model_dir, code=1)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "broken.wav: cannot be read as audio" in errors[0]
    assert "Traceback" not in result.output
    assert result.stdout.startswith(str(recordings[0]))
    output = tmp_path / "out.txt"
    run("transcribe", broken, "--model", tiny_model_dir, "--output", output, code=2)
    assert not output.exists()


def test_bad_model_is_one_line(recordings, tmp_path):
    result = run("transcribe", recordings[0], "--model", tmp_path / "nowhere", code=2)
    assert result.stderr.startswith("error: ") and len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-m", "nowhere/at/all"), "nowhere/at/all: cannot be loaded"),
        (("-m", "./nowhere"), "./nowhere: expected the folder of a model, or a Hub id; there is no such folder"),
        (("-m", "empty"), "empty: not a model folder: expected config.json in it"),
        (
            ("-m", "bert"),
            "bert: config.json: model_type: expected funasr_paraformer or funasr_sensevoice or wenet_u2pp",
        ),
        (("-o", "nowhere/out.txt"), "--output: nowhere/out.txt: expected an existing folder, got nowhere"),
        (("--device", "gpu9"), "--device: expected one that torch has here, such as cpu, got 'gpu9'"),
        (("--hotwords", "latin.txt"), "--hotwords: latin.txt: expected UTF-8 text, got byte 0xe9"),
        (("--vad", "bert"), "bert: config.json: model_type: expected funasr_fsmn_vad, got bert"),
        (("--punctuation", "bert"), "bert: config.json: model_type: expected funasr_ct_transformer, got bert"),
    ],
)
def test_wrong_input_is_one_line(tiny_model_dir, recordings, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    error = run("transcribe", recordings[0], "-m", tiny_model_dir, *arguments, code=2).stderr
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.wav", "no such file"),
        ("folder.wav", "expected a file, got a folder"),
        ("noise.wav", "cannot be read as audio: expected audio (WAV), got what libsndfile cannot decode"),
        ("noise.aac", "which libsndfile reads here, got AAC"),
    ],
)
def test_what_is_no_audio_is_named(tiny_model_dir, tmp_path, name, message):
    (tmp_path / "folder.wav").mkdir()
    for noise in ("noise.wav", "noise.aac"):
        (tmp_path / noise).write_bytes(b"no audio")
    error = run("transcribe", tmp_path / name, "-m", tiny_model_dir, code=2).stderr
    assert error.startswith(f"error: {tmp_path / name}: ") and message in error and error.count("\n") == 1


def test_mp3_without_its_decoder_says_so(tmp_path, monkeypatch):
    """libsndfile before 1.1 has none, and says that the file does not exist."""
    monkeypatch.setattr(soundfile, "available_formats", lambda: {"WAV": "", "FLAC": ""})
    (tmp_path / "speech.mp3").write_bytes(b"no audio")
    with pytest.raises(ValueError, match="expected one of FLAC, WAV, which libsndfile reads here, got MP3"):
        load_audio(tmp_path / "speech.mp3")


def test_stream_wav(tiny_model_dir, recordings):
    lines = run("stream", recordings[0], "--model", tiny_model_dir, "--chunk-size", 4).stdout.splitlines()
    kinds = [line.split("\t")[0] for line in lines]
    assert kinds[-1] == "final" and kinds.count("final") == 1 and kinds.count("partial") >= 2
    assert set(lines[-1].split("\t")[1].split()) <= set(WORDS)


def test_stream_raw_equals_stream_wav(tiny_model_dir, recordings):
    samples, _ = soundfile.read(recordings[0], dtype="int16")
    raw = run("stream", "-", "--model", tiny_model_dir, "--chunk-size", 4, input=samples.tobytes())
    wav = run("stream", recordings[0], "--model", tiny_model_dir, "--chunk-size", 4)
    assert raw.stdout == wav.stdout
    empty = run("stream", "-", "--model", tiny_model_dir, input=b"")
    assert empty.stdout == "final\t\n"


def test_stream_refuses_other_files(tiny_model_dir, tmp_path):
    path = tmp_path / "float.wav"
    soundfile.write(path, np.zeros(1600), 16000, subtype="FLOAT")
    assert "expected 16-bit PCM, got FLOAT" in run("stream", path, "--model", tiny_model_dir, code=2).stderr
    assert "no such file" in run("stream", tmp_path / "x.wav", "--model", tiny_model_dir, code=2).stderr


def test_info(tiny_model_dir):
    facts = dict(line.split(None, 1) for line in run("info", tiny_model_dir).stdout.splitlines())
    assert facts["model_type"] == "wenet_u2pp"
    assert facts["vocabulary"] == "13" and facts["streaming"] == "True" and int(facts["parameters"]) > 1000


def test_console_script_helps_without_loading_models():
    script = shutil.which("hf-speechllm", path=str(Path(sys.executable).parent))
    assert script is not None
    start = time.monotonic()
    done = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=60)
    elapsed = time.monotonic() - start
    assert done.returncode == 0 and "transcribe" in done.stdout
    probe = (
        "import sys; sys.argv = ['hf-speechllm']; import hf_speechllm.cli; "
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    loaded = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60)
    assert loaded.stdout.strip() == "[]", f"--help took {elapsed:.1f} s"
    assert run("--version").stdout.strip() == hf_speechllm.__version__


WORD_TIMES = [
    {"text": "one", "timestamp": (0.0, 0.4)},
    {"text": "two", "timestamp": (0.5, 0.9)},
    {"text": "three", "timestamp": (2.0, 2.4)},
    {"text": "a<b", "timestamp": (3661.25, 3661.5)},
]


def test_cues_split_at_pauses_and_lengths():
    assert cues(WORD_TIMES)[:2] == [(0.0, 0.9, "one two"), (2.0, 2.4, "three")]
    long = [{"text": "word", "timestamp": (0.1 * i, 0.1 * i + 0.1)} for i in range(40)]
    assert max(len(text) for _, _, text in cues(long)) <= 42
    slow = [{"text": "w", "timestamp": (0.7 * i, 0.7 * i + 0.5)} for i in range(40)]
    assert max(end - start for start, end, _ in cues(slow)) <= 6.0
    assert cues([{"text": c, "timestamp": (0, 0.1)} for c in "你好"]) == [(0, 0.1, "你好")]


def test_subtitle_formats():
    assert to_srt(WORD_TIMES) == (
        "1\n00:00:00,000 --> 00:00:00,900\none two\n\n2\n00:00:02,000 --> 00:00:02,400\nthree\n\n"
        "3\n01:01:01,250 --> 01:01:01,500\na<b\n"
    )
    assert to_vtt(WORD_TIMES[3:]) == "WEBVTT\n\n01:01:01.250 --> 01:01:01.500\na&lt;b\n"
    assert to_srt([]) == "" and to_vtt([]) == "WEBVTT\n\n"
