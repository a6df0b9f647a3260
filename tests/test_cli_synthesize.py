"""`hf-speechllm synthesize`, run in this process."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
from tiny_cosyvoice import recording, tiny_cosyvoice, tiny_processor
from typer.testing import CliRunner

from hf_speechllm.cli import app


runner = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny synthesiser that knows one voice, and recordings `prompt.wav` and `source.wav` beside it."""
    path = tmp_path_factory.mktemp("cli")
    model, processor = tiny_cosyvoice(2), tiny_processor(2)
    prompt = model.encode_prompt(**processor.prompt_features([recording(0.6)], 24000))
    processor.add_speaker("tone", prompt, "yes no")
    model.save_pretrained(path / "model")
    processor.save_pretrained(path / "model")
    soundfile.write(path / "prompt.wav", recording(0.5, 2).numpy(), 24000)
    soundfile.write(path / "source.wav", recording(0.7, 1).numpy(), 24000)
    return path


def run(*arguments: object, code: int = 0, **options):
    result = runner.invoke(app, ["synthesize", *map(str, arguments)], **options)
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_text_in_a_known_voice(folder, tmp_path):
    first, second = tmp_path / "a.wav", tmp_path / "b.wav"
    result = run("hello", "-m", folder / "model", "-o", first, "--seed", 1)
    assert "using the voice 'tone'" in result.stderr and "s of audio" in result.stderr
    run("hello", "-m", folder / "model", "-o", second, "--seed", 1, "--speaker", "tone")
    audio, rate = soundfile.read(first)
    assert rate == 24000 and len(audio) > 1000 and np.array_equal(audio, soundfile.read(second)[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.wav", "b.wav"]
    run("-", "-m", folder / "model", "-o", second, "--seed", 1, input="hello")
    assert np.array_equal(audio, soundfile.read(second)[0])


def test_voices_are_listed(folder):
    assert run("-m", folder / "model", "--speakers").stdout == "tone\n"


def test_the_voice_of_a_recording(folder, tmp_path):
    prompt = ("--prompt-audio", folder / "prompt.wav", "--prompt-text", "one")
    run("hello", "-m", folder / "model", "-o", tmp_path / "a.wav", "--seed", 1, *prompt)
    run("hello", "-m", folder / "model", "-o", tmp_path / "b.wav", "--seed", 1, *prompt, "--speed", 2)
    slow, fast = (soundfile.info(tmp_path / name).frames for name in ("a.wav", "b.wav"))
    assert 0 < fast <= slow // 2
    source = ("--source-audio", folder / "source.wav")
    run("-m", folder / "model", "-o", tmp_path / "c.wav", *source, *prompt[:2])
    assert soundfile.info(tmp_path / "c.wav").frames == 18 * 2 * 240


def test_stream_writes_what_it_says(folder, tmp_path):
    arguments = ("hello you", "-m", folder / "model", "--seed", 1, "--speaker", "tone", "--stream")
    run(*arguments, "-o", tmp_path / "a.wav")
    raw = run(*arguments, "-o", "-").stdout_bytes
    audio, _ = soundfile.read(tmp_path / "a.wav", dtype="int16")
    assert len(raw) == 2 * len(audio) > 0
    # The two round to 16 bits each in its own way.
    assert np.abs(np.frombuffer(raw, "<i2").astype(int) - audio).max() <= 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected TEXT, or --source-audio, got neither"),
        (("hello", "--source-audio", "a.wav"), "expected TEXT, or --source-audio, got both"),
        (("",), "TEXT: expected words, got ''"),
        ((" , ",), "TEXT: expected words, got ' , '"),
        (("hello", "--stream", "--speed", "2"), "--speed: a stream cannot change it"),
        (("hello", "--speaker", "nobody"), "speaker: expected one of ['tone'], got 'nobody'"),
        (("hello", "--prompt-audio", "missing.wav"), "missing.wav: no such file"),
        (("hello", "--prompt-audio", "prompt.wav", "--mode", "zero_shot"), "prompt_text: expected what the recording"),
        (("hello", "--mode", "karaoke"), "mode: expected one of"),
        (("hello", "-o", "nowhere/a.wav"), "--output: nowhere/a.wav: expected an existing folder, got nowhere"),
        (("hello", "--device", "gpu9"), "--device: expected one that torch has here, such as cpu, got 'gpu9'"),
        (("hello", "-m", "/nowhere"), "/nowhere: expected the folder of a model, or a Hub id"),
        (("hello", "-m", "prompt.wav"), "prompt.wav: expected the folder of a model, or a Hub id; it is a file"),
    ],
)
def test_mistakes_are_one_line(folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    result = run("-m", folder / "model", "-o", tmp_path / "a.wav", *arguments, code=2)
    assert result.stderr.startswith(f"error: {message}") and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_another_kind_of_model_is_refused(tiny_model_dir, tmp_path):
    result = run("hello", "-m", tiny_model_dir, "-o", tmp_path / "a.wav", code=2)
    assert result.stderr == f"error: {tiny_model_dir}: config.json: model_type: expected cosyvoice, got wenet_u2pp\n"
