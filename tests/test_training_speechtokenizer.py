"""The training script of SpeechTokenizer from its recipe, tiny: new, resumed, fine-tuned."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from safetensors.torch import load_file
from test_gan_training import tiny_teacher
from transformers import AutoFeatureExtractor, AutoModel


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "training"))
try:
    import train_asr  # noqa: F401  the script imports it when it runs
    import train_speechtokenizer
finally:
    sys.path.remove(str(ROOT / "training"))

RECIPE = ROOT / "training" / "recipes" / "speechtokenizer" / "digits.yaml"
CODEC = (
    "{num_filters: 2, upsampling_ratios: [5, 4, 2], hidden_size: 8, num_lstm_layers: 1, num_quantizers: 2, "
    "codebook_size: 8, kmeans_iterations: 5}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A teacher, and recordings of tones."""
    root = tmp_path_factory.mktemp("codec_training")
    tiny_teacher().save_pretrained(root / "teacher")
    lines = []
    for index in range(6):
        time = torch.arange(5000) / 16000
        tone = 0.4 * torch.sin(2 * torch.pi * (150 + 60 * index) * time) * torch.sin(2 * torch.pi * 3 * time)
        soundfile.write(root / f"{index}.wav", tone.numpy(), 16000)
        lines.append(json.dumps({"audio": f"{index}.wav", "text": ""}))
    (root / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def train(folder: Path, run: str, *options: str) -> list[dict]:
    """Run the recipe; the lines of its log."""
    train_speechtokenizer.main(
        [
            *(str(RECIPE), "--output_dir", str(folder / run), "--teacher", str(folder / "teacher")),
            *("--data.train", f"[{folder}/train.jsonl]", "--data.validation", f"[{folder}/train.jsonl]"),
            *("--crop_seconds", "0.15", "--batch_size", "2", "--progress_bar", "false", "--eval_utterances", "2"),
            *("--logging_steps", "4", "--warmup_steps", "0", "--adversarial_start_step", "8", "--save_steps", "8"),
            *("--eval_steps", "8", *options),
        ]
    )
    return [json.loads(line) for line in (folder / run / "log.jsonl").read_text().splitlines()]


NEW = ("--model.config", CODEC, "--learning_rate", "0.003", "--max_steps", "16")


def test_new_codec_learns_and_resumes(folder, capsys):
    log = train(folder, "whole", *NEW)
    losses = [line for line in log if "mel" in line]
    assert losses[-1]["mel"] < 0.9 * losses[0]["mel"], [line["mel"] for line in losses]
    assert "distillation" in losses[0] and "adversarial" in losses[-1] and "adversarial" not in losses[0]
    evaluations = [line["eval_mel"] for line in log if "eval_mel" in line]
    assert len(evaluations) == 2 and evaluations[1] < evaluations[0]
    summary = json.loads((folder / "whole" / "training_summary.json").read_text())
    assert summary["steps"] == 16 and summary["recordings"] == 6 and summary["eval_mel"] == evaluations[-1]
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == summary

    model = AutoModel.from_pretrained(folder / "whole").eval()
    extractor = AutoFeatureExtractor.from_pretrained(folder / "whole")
    assert model.config.semantic_hidden_size == 6 and all(level.inited for level in model.quantizer.levels)
    audio, rate = soundfile.read(folder / "0.wav", dtype="float32")
    inputs = extractor(audio, sampling_rate=rate, return_tensors="pt")
    with torch.no_grad():
        assert model.decode(model.encode(**inputs).audio_codes).audio_values.shape == (1, 1, 5000)

    # The same run, as if it had been killed after step 8.
    first = folder / "stopped"
    shutil.copytree(folder / "whole", first)
    shutil.rmtree(first / "checkpoint-16")
    (first / "model.safetensors").unlink()
    assert train(folder, "stopped", *NEW, "--resume", "true") == log
    expected = load_file(folder / "whole" / "model.safetensors")
    for name, tensor in load_file(first / "model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name


def test_fine_tuning_and_t_axis_without_discriminators(folder):
    new = (*NEW[:-1], "4", "--save_steps", "0")
    train(folder, "start", *new)
    options = ("--pretrained", str(folder / "start"), "--model.config", "{dead_code_threshold: 0.5}")
    others = ("--distillation", "t_axis", "--teacher_layer", "2", "--discriminators", "[]", "--max_steps", "4")
    log = train(folder, "tuned", *options, *others)
    assert "distillation" in log[0] and "discriminator" not in log[-1]
    tuned = AutoModel.from_pretrained(folder / "tuned")
    assert tuned.config.dead_code_threshold == 0.5 and tuned.config.codebook_size == 8
    before = AutoModel.from_pretrained(folder / "start").state_dict()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in tuned.state_dict().items())
    tuned.remove_weight_norm()
    tuned.save_pretrained(folder / "folded")
    with pytest.raises(ValueError, match="use_weight_norm: expected true for training"):
        train(folder, "never", "--pretrained", str(folder / "folded"), "--model.config", "{}")
