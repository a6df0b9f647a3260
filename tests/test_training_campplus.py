"""A small speaker encoder, trained as a user trains it."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from tiny_s3_tokenizer import CAMPPLUS_SIZES, tiny_campplus
from transformers import AutoFeatureExtractor, AutoModel

import hf_speechllm  # noqa: F401  registers the model families


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "training"))

import train_speaker_encoder  # noqa: E402

from hf_speechllm.data.augmentation import AugmentationConfig  # noqa: E402
from hf_speechllm.data.manifests import ManifestError  # noqa: E402
from hf_speechllm.data.speaker_crops import (  # noqa: E402
    SpeakerCropDataset,
    SpeakerRecordings,
    read_speaker_sources,
)
from hf_speechllm.models.configuration_campplus import CampplusConfig  # noqa: E402
from hf_speechllm.models.feature_extraction_kaldi_fbank import KaldiFbankFeatureExtractor  # noqa: E402
from hf_speechllm.models.modeling_campplus import CampplusModel  # noqa: E402
from hf_speechllm.train.run_config import load_run_config  # noqa: E402
from hf_speechllm.train.speaker_classifier import (  # noqa: E402
    SpeakerClassifier,
    angular_margin_logits,
    initialize_convolutions,
)
from hf_speechllm.train.trainer import SpeechTrainingArguments  # noqa: E402


RECIPE = ROOT / "training" / "recipes" / "campplus" / "digits.yaml"
CONFIG = {**CAMPPLUS_SIZES, "initializer_range": 0.02}
# Where the two resonances of a speaker lie, in Hz.
PITCHES = {"low": (300, 1100), "middle": (700, 2300), "high": (1500, 4000), "stranger": (450, 3100)}


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Three speakers for training and validation, and a fourth who is only in the validation set."""
    folder = tmp_path_factory.mktemp("voices")
    rng = np.random.default_rng(0)
    for split, names, count in (("train", ("low", "middle", "high"), 6), ("validation", tuple(PITCHES), 3)):
        rows = []
        for speaker in names:
            for number in range(count):
                samples = int(16000 * rng.uniform(0.3, 0.7))
                time = np.arange(samples) / 16000
                # The features have no mean: what never changes is not heard.
                loudness = np.sin(2 * np.pi * rng.uniform(4, 6) * time) ** 2
                wave = loudness * sum(
                    0.2 * np.sin(2 * np.pi * rng.uniform(0.97, 1.03) * hz * time) for hz in PITCHES[speaker]
                )
                name = f"{split}_{speaker}_{number}.wav"
                soundfile.write(folder / name, wave + 0.003 * rng.standard_normal(samples), 16000)
                rows.append({"audio": name, "text": "la", "speaker": speaker, "duration": samples / 16000})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def train(clips: Path, run: Path, *options: str) -> dict:
    train_speaker_encoder.main(
        [
            *("--model.config", json.dumps(CONFIG), "--data_dir", str(clips), "--data.train", "[train.jsonl]"),
            *("--data.validation", "[validation.jsonl]", "--join_weights", "[0.5, 0.5]", "--use_cpu", "true"),
            *("--disable_tqdm", "true", "--schedule", "transformers", "--learning_rate", "0.01"),
            *(
                "--crop_seconds",
                "0.4",
                "--max_items_per_batch",
                "6",
                "--save_strategy",
                "no",
                "--output_dir",
                str(run),
            ),
            *options,
        ]
    )
    return json.loads((run / "training_summary.json").read_text(encoding="utf-8"))


def test_trains_and_saves_the_encoder_alone(clips, tmp_path):
    summary = train(clips, tmp_path, "--max_steps", "40", "--margin", "0.1", "--scale", "15")
    assert (summary["speakers"], summary["classes"], summary["utterances"]) == (3, 3, 18)
    assert summary["eval_accuracy"] == 100.0
    assert summary["eval_eer"] < 25.0
    # One stranger alone makes no pairs of two.
    assert "eval_eer_unseen" not in summary
    encoder = AutoModel.from_pretrained(tmp_path)
    assert isinstance(encoder, CampplusModel) and encoder.num_parameters() == summary["parameters"]
    assert not any("centres" in name for name in load_file(tmp_path / "model.safetensors"))
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path)
    recordings = SpeakerRecordings(
        read_speaker_sources(["validation.jsonl"], str(clips)), ["high", "low", "middle"], extractor.sampling_rate
    )
    items = [recordings[index] for index in range(len(recordings))]
    with torch.no_grad():
        found = encoder(**extractor([item["waveform"] for item in items], sampling_rate=16000)).embeddings
    labels = torch.stack([item["label"] for item in items])
    assert labels.tolist() == [1] * 3 + [2] * 3 + [0] * 3 + [3] * 3
    # What was reported is what the saved encoder does.
    figures = train_speaker_encoder.verification_metrics(found, labels, labels, 3)
    assert figures["eer"] == pytest.approx(summary["eval_eer"]) and figures["accuracy"] == 100.0


def test_a_resumed_run_ends_as_one_that_was_not_stopped(clips, tmp_path):
    options = ("--save_strategy", "steps", "--save_steps", "2", "--max_steps", "4", "--speeds", "[0.9, 1.0]")
    options += ("--speeds_are_speakers", "true", "--average_checkpoints", "2")
    summary = train(clips, tmp_path / "whole", *options)
    assert summary["classes"] == 6 and summary["averaged"] == ["checkpoint-2", "checkpoint-4"]
    (tmp_path / "parts").mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "parts" / "checkpoint-2")
    train(clips, tmp_path / "parts", *options, "--resume", "true")
    expected, found = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_goes_on_from_a_trained_encoder(clips, tmp_path):
    tiny_campplus().save_pretrained(tmp_path / "first")
    train(
        *(clips, tmp_path / "second", "--model.config", "{}", "--pretrained", str(tmp_path / "first")),
        *("--max_steps", "1", "--learning_rate", "0", "--weight_decay", "0"),
    )
    before, after = (load_file(tmp_path / run / "model.safetensors") for run in ("first", "second"))
    assert before.keys() == after.keys()
    assert all(
        torch.equal(before[name], after[name]) for name in before if "running" not in name and "num" not in name
    )


def test_a_source_without_speakers_is_named(clips, tmp_path):
    row = {"audio": str(clips / "train_low_0.wav"), "text": "la"}
    (tmp_path / "nobody.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(ManifestError, match=r"nobody\.jsonl.*expected a speaker"):
        train(clips, tmp_path / "run", "--data.train", f"[train.jsonl, {tmp_path / 'nobody.jsonl'}]")
    named = {"path": str(tmp_path / "nobody.jsonl"), "columns": {"speaker": "somebody"}}
    assert [item.speaker for item in read_speaker_sources([named], None)] == ["somebody"]


def crops(clips: Path, **changes) -> SpeakerCropDataset:
    utterances = read_speaker_sources(["train.jsonl"], str(clips))
    augmentation = AugmentationConfig(speeds=[0.8, 1.0], join_weights=[0.5, 0.5], gain_db=(-6, 6))
    arguments = {"crop_samples": 12000, "augmentation": augmentation, "speeds_are_speakers": True, **changes}
    return SpeakerCropDataset(utterances, ["high", "low", "middle"], KaldiFbankFeatureExtractor(), **arguments)


def test_crops_depend_on_seed_epoch_and_item_alone(clips):
    dataset = crops(clips)
    again = crops(clips)
    again.set_epoch(3)
    items = [dataset[(1, index)] for index in range(len(dataset))]
    for index in reversed(range(len(dataset))):
        item = again[(1, index)]
        assert torch.equal(item["waveform"], items[index]["waveform"]) and item["label"] == items[index]["label"]
    assert {item["waveform"].shape for item in items} == {(12000,)}
    assert not torch.equal(dataset[(2, 0)]["waveform"], items[0]["waveform"])
    assert set(dataset.lengths(1).tolist()) == {1 + (12000 - 400) // 160}


def test_speeds_make_classes_and_move_the_pitch(clips):
    """The strongest frequency of a crop tells the speaker and the speed."""
    dataset = crops(clips, augmentation=AugmentationConfig(speeds=[0.8, 1.0]))
    seen = set()
    for epoch in range(4):
        for index in range(len(dataset)):
            item = dataset[(epoch, index)]
            speaker, speed = divmod(int(item["label"]), dataset.variants)
            lowest = PITCHES[["high", "low", "middle"][speaker]][0] * [0.8, 1.0][speed]
            spectrum = torch.fft.rfft(item["waveform"] * torch.hann_window(12000)).abs()
            around = spectrum[int(lowest * 0.95 * 0.75) : int(lowest * 1.05 * 0.75) + 1]
            assert around.max() > 0.5 * spectrum[: int(lowest * 1.2 * 0.75)].max()
            assert around.max() > 0.25 * spectrum.max()
            seen.add(int(item["label"]))
    assert seen == set(range(6))


def test_short_recordings_are_repeated(clips):
    dataset = crops(clips, crop_samples=30000, augmentation=AugmentationConfig(), speeds_are_speakers=False)
    whole, item = dataset.waveform(0), dataset[(0, 0)]["waveform"].numpy()
    assert len(whole) < 15000
    np.testing.assert_array_equal(item, np.resize(whole, 30000))


@pytest.mark.parametrize("margin", [0.0, 0.2, 1.0])
def test_angular_margin(margin):
    angles = torch.linspace(0.01, math.pi - 0.01, 50, dtype=torch.float64)
    cosines = torch.stack([angles.cos(), torch.full_like(angles, 0.3)], dim=1)
    logits = angular_margin_logits(cosines, torch.zeros(50, dtype=torch.long), scale=8.0, margin=margin)
    torch.testing.assert_close(logits[:, 1], 8 * cosines[:, 1])
    inside = angles + margin < math.pi
    torch.testing.assert_close(logits[inside, 0], 8 * (angles + margin).cos()[inside])
    assert (logits[1:, 0] < logits[:-1, 0]).all()


def test_gradient_of_a_perfect_match_is_finite():
    cosines = torch.tensor([[1.0, -1.0]], requires_grad=True)
    angular_margin_logits(cosines, torch.tensor([0]), 30.0, 0.2).sum().backward()
    assert cosines.grad.isfinite().all()


def test_classifier_refuses_what_makes_no_sense():
    for changes, name in (({"num_classes": 1}, "num_classes"), ({"scale": 0.0}, "scale"), ({"margin": 1.6}, "margin")):
        with pytest.raises(ValueError, match=name):
            SpeakerClassifier(tiny_campplus(), **{"num_classes": 3, **changes})


def test_the_signal_survives_new_convolutions():
    """Ten convolutions without a norm between them."""
    torch.manual_seed(0)
    encoder = CampplusModel(CampplusConfig(**{**CONFIG, "num_head_blocks": [2, 2]}))
    features = 3 * torch.randn(4, 60, 16)
    mask = torch.ones(4, 1, 1, 60)
    with torch.no_grad():
        faded = encoder.head(features, mask).std()
        initialize_convolutions(encoder)
        assert faded < 0.01 and 0.5 < encoder.head(features, mask).std() < 100


def test_the_recipe_is_readable(monkeypatch):
    monkeypatch.setenv("SYNTHETIC_DIGITS", "synthetic")
    run = load_run_config(RECIPE)
    names = set(train_speaker_encoder.SpeakerArguments.__dataclass_fields__)
    train_speaker_encoder.SpeakerArguments(**{k: v for k, v in run.training.items() if k in names})
    SpeechTrainingArguments("unused", **{k: v for k, v in run.training.items() if k not in names})
    parameters = CampplusModel(CampplusConfig(**run.model.config)).num_parameters()
    assert 100_000 < parameters < 400_000
