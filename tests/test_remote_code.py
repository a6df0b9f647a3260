"""A saved folder works where the package is not installed, again and again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build_tiny_model, build_tiny_processor
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCTC,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    AutoTokenizer,
)

from hf_speechllm.hub import clean_process
from hf_speechllm.hub.self_check import SelfCheckError, probe_signal, self_check


# Fine-tunes a folder by remote code, saves it, loads that, changes and saves it once more. Only transformers is there.
FINE_TUNE_TWICE = """
import importlib.util, json, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("clean_process", sys.argv[1])
clean_process = importlib.util.module_from_spec(spec)
spec.loader.exec_module(clean_process)
sys.meta_path.insert(0, clean_process.PackageBlocker())
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor
torch.set_num_threads(1)
source, *generations = map(Path, sys.argv[2:5])
audio = load_file(sys.argv[5])["audio"].numpy()
logits = []
for target in generations:
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(source, trust_remote_code=True)
    features = processor(audio=audio, sampling_rate=16000, return_tensors="pt", text="one two")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()
    model(**features).loss.backward()
    optimizer.step()
    model.eval().save_pretrained(target)
    processor.save_pretrained(target)
    del features["labels"]
    with torch.no_grad():
        logits.append(model(**features).logits.double().sum().item())
    source = target
print(json.dumps({"logits": logits, "module": type(model).__module__}))
"""


def run_isolated(*arguments: object, cache: Path) -> dict:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
    done = subprocess.run(
        [sys.executable, "-I", *map(str, arguments)],
        env={**environment, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_saved_folder_carries_code_and_auto_map(tiny_model_dir):
    config = json.loads((tiny_model_dir / "config.json").read_text(encoding="utf-8"))
    model = "modeling_wenet_u2pp.WenetU2ppForSpeechRecognition"
    assert config["auto_map"] == {
        "AutoConfig": "configuration_wenet_u2pp.WenetU2ppConfig",
        "AutoModel": model,
        "AutoModelForCTC": model,
        "AutoModelForSpeechSeq2Seq": model,
    }
    impl = config["custom_pipelines"]["automatic-speech-recognition"]["impl"]
    names = {path.name for path in tiny_model_dir.iterdir()}
    assert f"{impl.split('.')[0]}.py" in names, "the pipeline's file was not copied"
    assert {"model.safetensors", "processor_config.json", "tokenizer.json", "tokenization_wenet_u2pp.py"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]


def test_installed_package_needs_no_remote_code(tiny_model_dir):
    expected = build_tiny_model().state_dict()
    for auto_class in (AutoModel, AutoModelForCTC, AutoModelForSpeechSeq2Seq):
        model, loading = auto_class.from_pretrained(tiny_model_dir, output_loading_info=True)
        assert type(model).__module__ == "hf_speechllm.models.modeling_wenet_u2pp"
        assert not loading["missing_keys"] and not loading["unexpected_keys"]
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, expected[name]), name
    assert AutoConfig.from_pretrained(tiny_model_dir).model_type == "wenet_u2pp"
    assert type(AutoTokenizer.from_pretrained(tiny_model_dir)).__name__ == "WenetU2ppTokenizer"
    assert type(AutoProcessor.from_pretrained(tiny_model_dir)).__module__.startswith("hf_speechllm.")


def test_clean_process_gives_the_same(tiny_model_dir):
    """Logits and ids of a fresh process without the package equal ours; the pipeline runs there."""
    report = self_check(tiny_model_dir)
    assert report["max_logit_difference"] == 0.0
    assert report["class"].startswith("transformers_modules.") and report["pipeline"].startswith(
        "transformers_modules."
    )
    assert report["text"]


def test_self_check_names_what_is_missing(tiny_model_dir, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in tiny_model_dir.iterdir():
        if path.name != "conformer.py":
            (broken / path.name).write_bytes(path.read_bytes())
    with pytest.raises(SelfCheckError, match=r"conformer\.py"):
        self_check(broken)


def test_fine_tune_of_a_fine_tune_stays_complete(tiny_model_dir, tmp_path):
    save_file({"audio": probe_signal(16000)}, tmp_path / "audio.safetensors")
    first, second = tmp_path / "first", tmp_path / "second"
    script = tmp_path / "fine_tune.py"
    script.write_text(FINE_TUNE_TWICE, encoding="utf-8")
    report = run_isolated(
        script,
        clean_process.__file__,
        tiny_model_dir,
        first,
        second,
        tmp_path / "audio.safetensors",
        cache=tmp_path / "c",
    )
    assert report["module"].startswith("transformers_modules.")
    code = {path.name for path in tiny_model_dir.glob("*.py")}
    audio = load_file(tmp_path / "audio.safetensors")["audio"].numpy()
    for folder, expected in zip((first, second), report["logits"], strict=True):
        assert {path.name for path in folder.glob("*.py")} == code
        processor = AutoProcessor.from_pretrained(folder)
        features = processor(audio=audio, sampling_rate=16000, return_tensors="pt")
        with torch.no_grad():
            logits = AutoModelForSpeechSeq2Seq.from_pretrained(folder).eval()(**features).logits
        assert logits.double().sum().item() == pytest.approx(expected, rel=1e-9)
    assert report["logits"][0] != report["logits"][1]
    assert self_check(second)["text"] is not None


def test_code_of_a_folder_is_that_of_the_package(tiny_model_dir):
    room = Path(clean_process.__file__).parents[1] / "models"
    for path in tiny_model_dir.glob("*.py"):
        assert path.read_bytes() == (room / path.name).read_bytes(), path.name


def test_saving_again_changes_nothing(tiny_model_dir, tmp_path):
    model = AutoModelForSpeechSeq2Seq.from_pretrained(tiny_model_dir)
    model.save_pretrained(tmp_path)
    build_tiny_processor().save_pretrained(tmp_path)
    for path in tiny_model_dir.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name
