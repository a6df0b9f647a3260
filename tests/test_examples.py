"""What the documentation shows is run: the README's Python blocks in order, and the demo."""

import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import WORDS
from tiny_cosyvoice import tiny_cosyvoice, tiny_processor
from tiny_speechgpt_lm import build_units, build_vocoder, save_folder
from tiny_speechtokenizer import tiny_codec
from transformers import Wav2Vec2FeatureExtractor

import hf_speechllm
from hf_speechllm.hub.refresh import code_files, refresh_code
from hf_speechllm.shipped import shipped_model_path


ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def named_folders(tmp_path_factory) -> dict[str, Path]:
    """Tiny models for the folders that the README only names."""
    root = tmp_path_factory.mktemp("named")
    folders = {name: root / name.lower() for name in ("LM", "UNITS", "VOCODER", "SPEECHTOKENIZER", "COSYVOICE")}
    save_folder(folders["LM"])
    build_units().save_pretrained(folders["UNITS"])
    Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True).save_pretrained(folders["UNITS"])
    build_vocoder().save_pretrained(folders["VOCODER"])
    tiny_codec(num_quantizers=8).save_pretrained(folders["SPEECHTOKENIZER"])
    tiny_cosyvoice(2).save_pretrained(folders["COSYVOICE"])
    tiny_processor(2).save_pretrained(folders["COSYVOICE"])
    # With random weights nothing ends an answer.
    (folders["LM"] / "generation_config.json").write_text('{"max_new_tokens": 20, "eos_token_id": 2}')
    return folders


def test_readme_blocks_run(tiny_model_dir, named_folders, tmp_path, monkeypatch, capsys):
    """With the tiny models in place of the shipped one and of those that are only named, and without the upload."""
    pytest.importorskip("peft")
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) == 10
    monkeypatch.chdir(ROOT)
    namespace = {"torch": torch}
    for block in blocks:
        code = block.replace("pretrained/u2pp_moe_digits", str(tiny_model_dir))
        code = code.replace('"OUT"', repr(str(tmp_path / "out")))
        for name, folder in named_folders.items():
            code = code.replace(f'"{name}"', repr(str(folder)))
        for name in ("voice.wav", "speech.wav"):
            code = code.replace(name, str(EXAMPLES / "audio" / "seven_three_one_nine.wav"))
        code = code.replace("question.wav", str(EXAMPLES / "audio" / "seven_three_one_nine.wav"))
        code = code.replace("input_values)", "torch.tensor(audio)[None])")
        code = re.sub(r"^push_folder\(.*$", "", code, flags=re.M)
        if "export_model" in block:
            # What LoRA trained is merged before it is exported.
            namespace["model"] = namespace["model"].merge_and_unload()
        exec(compile(code, "README.md", "exec"), namespace)
    assert {"text", "units", "dialogue"} <= namespace["answer"].keys() and namespace["piece"].is_last
    assert namespace["codes"].shape[:2] == (1, 8) and namespace["waveform"].shape[-1] >= len(namespace["audio"])
    printed = capsys.readouterr().out
    assert set(re.findall(r"[a-z]+", printed)) <= set(WORDS) and len(printed.splitlines()) > 3
    assert (tmp_path / "out" / "README.md").is_file()


def test_demo_prints_words_times_and_partials(tiny_model_dir, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--model", str(tiny_model_dir)])
    runpy.run_path(str(EXAMPLES / "demo.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    recordings = sorted((EXAMPLES / "audio").glob("*.wav"))
    assert [line for line in lines if line.endswith(".wav")] == [path.name for path in recordings]
    assert sum(" s  partial  " in line for line in lines) >= 2 and sum(" s  final    " in line for line in lines) == 1
    assert any(re.match(r"\s+\d+\.\d\d -\s+\d+\.\d\d s  (" + "|".join(WORDS) + ")$", line) for line in lines)


def test_shipped_model_transcribes_the_example_recordings():
    """File names are the transcripts; at most one word in eight may be wrong, in full context and streamed."""
    from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

    from hf_speechllm.audio import load_audio
    from hf_speechllm.cli import stream_text

    jiwer = pytest.importorskip("jiwer")
    folder = shipped_model_path()
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder).eval()
    references, whole, streamed = [], [], []
    for path in sorted((EXAMPLES / "audio").glob("*.wav")):
        audio = load_audio(path, 16000)
        ids = model.generate(**processor(audio=audio, sampling_rate=16000, return_tensors="pt"))
        references.append(path.stem.replace("_", " "))
        whole.append(processor.batch_decode(ids, skip_special_tokens=True)[0])
        streamed.append([text for text, is_final in stream_text(model, processor, [audio], 16) if is_final][0])
    assert jiwer.wer(references, whole) <= 1 / 8, whole
    assert jiwer.wer(references, streamed) <= 1 / 8, streamed


def test_shipped_folder_carries_the_code_of_the_package():
    folder, package = shipped_model_path(), Path(hf_speechllm.__file__).parent / "models"
    needed = code_files(folder)
    assert "modeling_wenet_u2pp.py" in needed and "pipeline_speech_recognition.py" in needed
    assert {path.name for path in folder.glob("*.py")} == needed, "refresh the folder with `make pretrained`"
    stale = [name for name in needed if (folder / name).read_bytes() != (package / name).read_bytes()]
    assert not stale, f"{stale}: refresh them with `make pretrained`"


def test_refresh_restores_a_folder(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(shipped_model_path(), folder)
    (folder / "ctc.py").unlink()
    (folder / "leftover.py").touch()
    (folder / "conformer.py").write_text("# old", encoding="utf-8")
    refresh_code(folder)
    expected = {path.name: path.read_bytes() for path in shipped_model_path().glob("*.py")}
    assert {path.name: path.read_bytes() for path in folder.glob("*.py")} == expected


def test_blocks_about_cosyvoice_run(named_folders, tmp_path, monkeypatch):
    """docs/cosyvoice.md, with a tiny model, a recording of the examples, and text ids that come one by one."""
    blocks = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs" / "cosyvoice.md").read_text(encoding="utf-8"), re.M | re.S
    )
    assert len(blocks) == 3
    folder = Path(shutil.copytree(named_folders["COSYVOICE"], tmp_path / "out"))
    monkeypatch.chdir(tmp_path)
    shutil.copy(EXAMPLES / "audio" / "seven_three_one_nine.wav", tmp_path / "voice.wav")
    namespace: dict[str, object] = {}
    for number, block in enumerate(blocks):
        code = block.replace('"OUT"', repr(str(folder)))
        if number == 1:
            speak = namespace["speak"]
            namespace |= {"model": speak.model, "processor": speak.processor}
            code = code.replace('{"me": 0.5, "other": 0.5}', '{"me": 0.5}')
        if number == 2:
            speak.processor.speakers["other"] = speak.processor.speakers["me"]
            inputs = dict(speak.processor("x", speaker="me"))
            namespace |= {"inputs": inputs, "text_ids_as_they_come": [[1], [2, 3]]}
        exec(compile(code, "cosyvoice.md", "exec"), namespace)
    assert namespace["piece"].is_last and (folder / "speakers.safetensors").is_file()
    assert next(namespace["stream_text_to_speech"](speak.model, [[1]], inputs)).shape[0] == 1
