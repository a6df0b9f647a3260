"""A saved language model of CosyVoice speaks where the package is not installed, and a fine-tune of it as well."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_cosyvoice_lm import build, row_alone, sentences

from hf_speechllm.hub import clean_process


ELSEWHERE = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("clean_process", sys.argv[1])
clean_process = importlib.util.module_from_spec(spec)
spec.loader.exec_module(clean_process)
sys.meta_path.insert(0, clean_process.PackageBlocker())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM
torch.set_num_threads(1)
auto = AutoModel if sys.argv[5] == "1" else AutoModelForCausalLM
model = auto.from_pretrained(sys.argv[2], trust_remote_code=True).eval()
inputs = load_file(sys.argv[3])
spoken = model.generate_speech_tokens(**inputs, max_token_text_ratio=5, do_sample=False, output_logits=True)
save_file({"ids": spoken.token_ids.contiguous(), "logits": spoken.logits.contiguous()}, sys.argv[4])
model.save_pretrained(sys.argv[6])
print(json.dumps({"class": type(model).__module__}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", (1, 2, 3))
def test_speaks_without_the_package(version, tmp_path):
    model = build(version)
    model.save_pretrained(tmp_path / "model")
    inputs = row_alone(sentences(version), 0)
    expected = model.generate_speech_tokens(**inputs, max_token_text_ratio=5, do_sample=False, output_logits=True)
    save_file(inputs, tmp_path / "inputs.safetensors")
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE, encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
    files = [tmp_path / "model", tmp_path / "inputs.safetensors", tmp_path / "out.safetensors"]
    arguments = [tmp_path / "elsewhere.py", clean_process.__file__, *files, version, tmp_path / "again"]
    done = subprocess.run(
        [sys.executable, "-I", *map(str, arguments)],
        env={**environment, "HF_HOME": str(tmp_path / "c"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.strip().splitlines()[-1])["class"].startswith("transformers_modules.")
    found = load_file(tmp_path / "out.safetensors")
    assert torch.equal(found["ids"], expected.token_ids) and torch.equal(found["logits"], expected.logits)
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names == {path.name for path in (tmp_path / "again").iterdir()}
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == (
        tmp_path / "again" / "model.safetensors"
    ).read_bytes()
