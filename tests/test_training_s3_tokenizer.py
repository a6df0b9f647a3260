"""Training of a small S3 tokenizer, as a user does it."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from transformers import AutoFeatureExtractor, AutoModel

from hf_speechllm.models.modeling_s3_tokenizer import S3TokenizerForCTC, S3TokenizerModel


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "training"))

import train_s3_tokenizer  # noqa: E402


CONFIG = {
    **{"num_mel_bins": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "fsmn_kernel_size": 3, "fsq_size": 4, "codebook_size": 81},
    **{"num_recognition_layers": 1, "initializer_range": 0.1, "conv1_stride": 1},
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Twelve tones of 0.3 to 0.5 s of one speaker; the letter is the pitch."""
    folder = tmp_path_factory.mktemp("tones")
    rng, rows = np.random.default_rng(0), []
    for number in range(12):
        samples = int(16000 * rng.uniform(0.3, 0.5))
        tone = 0.3 * np.sin(2 * np.pi * (300 + 700 * (number % 3)) * np.arange(samples) / 16000)
        soundfile.write(folder / f"{number}.wav", tone, 16000)
        rows.append({"audio": f"{number}.wav", "text": "abc"[number % 3], "speaker": "x", "duration": samples / 16000})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def train(clips: Path, run: Path, *options: str) -> Path:
    train_s3_tokenizer.main(
        [
            *("--model.config", json.dumps(CONFIG), "--data_dir", str(clips), "--data.train", "[train.jsonl]"),
            *("--speeds", "[1.0]", "--join_weights", "[0.5, 0.5]", "--use_cpu", "true"),
            *("--disable_tqdm", "true", "--schedule", "transformers", "--learning_rate", "0.01"),
            *("--max_items_per_batch", "6", "--output_dir", str(run), *options),
        ]
    )
    return run


def test_a_resumed_run_ends_as_one_that_was_not_stopped(clips, tmp_path):
    """Also where quantisation begins after the resumption."""
    options = ("--save_strategy", "steps", "--save_steps", "2", "--max_steps", "4", "--unquantized_steps", "3")
    whole = train(clips, tmp_path / "whole", *options)
    (tmp_path / "parts").mkdir()
    (whole / "checkpoint-2").rename(tmp_path / "parts" / "checkpoint-2")
    parts = train(clips, tmp_path / "parts", *options, "--resume", "true")
    expected, found = (load_file(run / "recogniser" / "model.safetensors") for run in (whole, parts))
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)


def test_tokens_tell_the_tones_apart(clips, tmp_path):
    options = ("--data.validation", "[train.jsonl]", "--save_strategy", "no", "--max_steps", "80")
    run = train(clips, tmp_path / "run", *options, "--unquantized_steps", "30")
    summary = json.loads((run / "training_summary.json").read_text())
    assert summary["eval_loss"] < summary["train_loss"] and 0 <= summary["eval_wer"] <= 100
    assert 1 < summary["eval_code_perplexity"] <= 81 * summary["eval_code_use"] + 1e-6
    tokenizer, extractor = AutoModel.from_pretrained(run), AutoFeatureExtractor.from_pretrained(run)
    assert isinstance(tokenizer, S3TokenizerModel)
    assert summary["tokenizer_parameters"] == tokenizer.num_parameters()
    waveforms = [soundfile.read(clips / f"{number}.wav", dtype="float32")[0] for number in range(3)]
    tokens = tokenizer.encode(**extractor(waveforms, sampling_rate=16000))
    heard = [set(row[mask].tolist()) for row, mask in zip(tokens.token_ids, tokens.token_mask, strict=True)]
    assert len({frozenset(row) for row in heard}) == 3
    # From there on, and not from nothing.
    start = ("--model.pretrained", str(run / "recogniser"), "--learning_rate", "0")
    again = train(clips, tmp_path / "again", *options[:-1], "1", *start)
    one, other = (S3TokenizerForCTC.from_pretrained(folder / "recogniser") for folder in (run, again))
    assert torch.equal(one.ctc_head.weight, other.ctc_head.weight)


def test_code_use():
    assert train_s3_tokenizer.code_use(torch.tensor([5, 5, 0, 0])) == pytest.approx(
        {"code_use": 0.5, "code_perplexity": 2.0}
    )
    assert train_s3_tokenizer.code_use(torch.zeros(4)) == pytest.approx({"code_use": 0.0, "code_perplexity": 1.0})
