"""A small HuBERT with CTC, and the units of its hidden states, as a user makes them."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import HubertConfig, HubertForCTC, Wav2Vec2Processor


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "training"))

import extract_units  # noqa: E402
import fit_kmeans  # noqa: E402
import train_unit_encoder  # noqa: E402

from hf_speechllm.cpu_inference import has_bfloat16_products  # noqa: E402
from hf_speechllm.data.augmentation import AugmentationConfig  # noqa: E402
from hf_speechllm.data.manifests import read_manifest  # noqa: E402
from hf_speechllm.data.waveform_dataset import SpeechWaveformDataset, collate_waveforms  # noqa: E402
from hf_speechllm.models.feature_extraction_kaldi_fbank import KaldiFbankFeatureExtractor  # noqa: E402
from hf_speechllm.train.run_config import load_run_config  # noqa: E402
from hf_speechllm.train.trainer import SpeechTrainingArguments  # noqa: E402


RECIPE = ROOT / "training" / "recipes" / "speechgpt_units" / "digits.yaml"
CONFIG = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": [8, 8],
    "conv_stride": [20, 16],
    "conv_kernel": [20, 16],
    "feat_extract_norm": "layer",
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "apply_spec_augment": False,
    "ctc_loss_reduction": "mean",
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
    train_unit_encoder.main(
        [
            *("--model.config", json.dumps(CONFIG), "--data_dir", str(clips), "--data.train", "[train.jsonl]"),
            *("--speeds", "[0.9, 1.0, 1.1]", "--join_weights", "[0.5, 0.5]", "--use_cpu", "true"),
            *("--disable_tqdm", "true", "--schedule", "transformers", "--learning_rate", "0.005"),
            *("--max_items_per_batch", "4", "--output_dir", str(run), *options),
        ]
    )
    return run


def test_a_resumed_run_ends_as_one_that_was_not_stopped(clips, tmp_path):
    options = ("--save_strategy", "steps", "--save_steps", "2", "--max_steps", "4")
    whole = train(clips, tmp_path / "whole", *options)
    (tmp_path / "parts").mkdir()
    (whole / "checkpoint-2").rename(tmp_path / "parts" / "checkpoint-2")
    parts = train(clips, tmp_path / "parts", *options, "--resume", "true")
    expected, found = (load_file(run / "model.safetensors") for run in (whole, parts))
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)


def test_training_codebook_and_units_follow_each_other(clips, tmp_path):
    options = ("--data.validation", "[train.jsonl]", "--save_strategy", "no", "--max_steps", "60")
    run = train(clips, tmp_path / "run", *options)
    summary = json.loads((run / "training_summary.json").read_text())
    assert summary["eval_loss"] < summary["train_loss"] and 0 <= summary["eval_wer"] <= 100
    assert isinstance(HubertForCTC.from_pretrained(run), HubertForCTC)
    assert Wav2Vec2Processor.from_pretrained(run).tokenizer.get_vocab()["a"] == 5
    # From there on, and not from nothing.
    again = train(clips, tmp_path / "again", *options[:-1], "1", "--pretrained", str(run), "--learning_rate", "0")
    assert torch.equal(*(load_file(folder / "model.safetensors")["lm_head.weight"] for folder in (run, again)))

    fit_kmeans.main(
        [str(run), str(tmp_path / "units"), "--data", str(clips / "train.jsonl"), "--layer", "1", "--num_units", "6"]
    )
    output = tmp_path / "out" / "units.parquet"
    extract_units.main([str(tmp_path / "units"), str(clips / "train.jsonl"), str(output), "--batch_seconds", "1"])
    rows = list(Dataset.from_parquet(str(output)))
    assert [row["key"] for row in rows] == [f"{number}.wav" for number in range(12)]
    assert [row["text"] for row in rows] == list("abc") * 4 and {row["speaker"] for row in rows} == {"x"}
    for row in rows:
        samples = soundfile.info(clips / row["audio"]).frames
        assert sum(row["durations"]) == (((samples - 20) // 20 + 1) - 16) // 16 + 1
        assert all(first != second for first, second in zip(row["units"], row["units"][1:], strict=False))
        assert set(row["units"]) <= set(range(6))
    options = [str(tmp_path / "units"), str(clips / "train.jsonl"), str(output), "--bfloat16"]
    with pytest.raises(SystemExit):
        extract_units.main([*options, "--device", "cuda"])
    if has_bfloat16_products():
        extract_units.main(options)
        rounded = list(Dataset.from_parquet(str(output)))
        assert [sum(row["durations"]) for row in rounded] == [sum(row["durations"]) for row in rows]
        same = [one["units"] == other["units"] for one, other in zip(rounded, rows, strict=True)]
        assert sum(same) >= len(same) // 2


def test_an_item_depends_on_seed_epoch_and_index_alone(clips):
    from transformers import Wav2Vec2CTCTokenizer

    vocabulary = clips / "vocab.json"
    vocabulary.write_text(json.dumps({"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "a": 5, "b": 6, "c": 7}))
    parts = (KaldiFbankFeatureExtractor(), Wav2Vec2CTCTokenizer(str(vocabulary)))
    augmentation = AugmentationConfig(join_weights=[0.0, 1.0], noise_probability=1.0)
    first, second = (
        SpeechWaveformDataset(read_manifest(clips / "train.jsonl"), *parts, augmentation, seed=3) for _ in "ab"
    )
    second[(1, 5)]
    items = [data[(2, 7)] for data in (first, second)]
    assert torch.equal(items[0]["input_values"], items[1]["input_values"])
    assert abs(float(items[0]["input_values"].mean())) < 1e-4
    assert abs(float(items[0]["input_values"].std()) - 1) < 1e-3
    assert len(items[0]["labels"]) == 3  # two letters and the space between them
    assert not torch.equal(items[0]["input_values"][:1000], first[(3, 7)]["input_values"][:1000])
    batch = collate_waveforms([first[(0, 0)], first[(0, 1)]])
    lengths = [first[(0, index)]["input_values"].numel() for index in (0, 1)]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert batch["input_values"].shape == (2, max(lengths))


def test_the_recipe_is_valid(monkeypatch, tmp_path):
    monkeypatch.setenv("SYNTHETIC_DIGITS", str(tmp_path))
    run = load_run_config(RECIPE)
    assert run.training.keys() <= SpeechTrainingArguments.__dataclass_fields__.keys()
    assert run.model.config.keys() <= HubertConfig().to_dict().keys()
    HubertConfig(**run.model.config)
