"""The training script of CosyVoice's flows from its recipes, tiny: new, resumed, fine-tuned, with LoRA."""

import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from tiny_cosyvoice_flow import NO_DROPOUT, TINY, tiny_flow
from transformers import AutoFeatureExtractor, AutoModel

from hf_speechllm.data.cosyvoice_flow_examples import TokenMelDataset, collate_token_mels, tokenized_recordings
from hf_speechllm.data.manifests import ManifestError
from hf_speechllm.models.feature_extraction_cosyvoice_mel import CosyVoiceMelFeatureExtractor


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "training"))
try:
    import train_flow
finally:
    sys.path.remove(str(ROOT / "training"))

RECIPES = ROOT / "training" / "recipes" / "cosyvoice_flow"
# 25 tokens and 50 mel frames a second at 8 kHz.
MEL = "{sampling_rate: 8000, fft_length: 640, hop_length: 160, high_freq: 4000.0}"
EXTRACTOR = {"feature_size": 8, "sampling_rate": 8000, "fft_length": 640, "hop_length": 160, "high_freq": 4000.0}


def tone(token: int, samples: int) -> np.ndarray:
    time = np.arange(samples) / 8000
    return (0.4 * np.sin(2 * np.pi * (200 + 110 * token) * time)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Recordings in which every token is a tone; one has some samples fewer than its tokens say."""
    root = tmp_path_factory.mktemp("flow_training")
    generator = np.random.default_rng(0)
    rows = []
    for index in range(8):
        tokens = np.repeat(generator.integers(0, 30, 5), generator.integers(2, 5, 5)).tolist()
        audio = np.concatenate([tone(token, 320) for token in tokens])[: -100 if index == 3 else None]
        soundfile.write(root / f"{index}.wav", audio, 8000)
        speaker = generator.standard_normal(6).round(3).tolist()
        row = {"text": "x", "speech_token": tokens, "utt_embedding": speaker, "spk_embedding": speaker}
        rows.append(json.dumps(row | {"wav": f"{index}.wav"}))
    (root / "train.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (root / "validation.jsonl").write_text("\n".join(rows[:3]) + "\n", encoding="utf-8")
    return root


def train(folder: Path, run: str, recipe: str, *options: str) -> dict:
    """Run a recipe; its summary."""
    train_flow.main(
        [
            *(str(RECIPES / f"{recipe}.yaml"), "--output_dir", str(folder / run), "--data_dir", str(folder)),
            *("--data.train", "[train.jsonl]", "--data.validation", "[validation.jsonl]"),
            *("--data.feature_extractor", MEL, "--use_cpu", "true", "--disable_tqdm", "true"),
            *("--max_frames_per_batch", "150", "--eval_spectrograms", "2", "--warmup_steps", "0"),
            *("--logging_steps", "4", "--eval_strategy", "steps", "--eval_steps", "8", "--min_frames", "1"),
            *("--save_strategy", "steps", "--save_steps", "8", "--average_checkpoints", "0"),
            *("--gradient_accumulation_steps", "1", *options),
        ]
    )
    return json.loads((folder / run / "training_summary.json").read_text(encoding="utf-8"))


def new_model(version: int, **changes) -> tuple[str, ...]:
    fields = TINY[version] | NO_DROPOUT[version] | changes
    number = "" if version == 1 else version
    return ("--model.model_type", f"cosyvoice{number}_flow", "--model.config", json.dumps(fields))


def logged(folder: Path, run: str, name: str) -> list[float]:
    state = json.loads((folder / run / "trainer_state.json").read_text(encoding="utf-8"))
    return [entry[name] for entry in state["log_history"] if name in entry]


# Version 1 has 25 Hz here as well, and 50 frames for them: its frames per token are not whole, 86 for 25.
@pytest.mark.parametrize("version", [1, 2, 3])
def test_new_flow_learns(version, folder):
    options = new_model(version, **({"input_frame_rate": 25} if version == 1 else {}))
    recipe = "digits" if version == 2 else "v2"
    schedule = ("--learning_rate", "0.01", "--lr_scheduler_type", "constant", "--max_steps", "48")
    summary = train(folder, f"new{version}", recipe, *options, *schedule)
    losses = logged(folder, f"new{version}", "eval_loss")
    assert losses[-1] < 0.75 * losses[0], losses
    assert summary["eval_mel_l1"] == logged(folder, f"new{version}", "eval_mel_l1")[-1] > 0
    assert summary["recordings"] == 8 and summary["trained_parameters"] == summary["parameters"]
    model = AutoModel.from_pretrained(folder / f"new{version}")
    assert model.config.model_type == f"cosyvoice{'' if version == 1 else version}_flow"
    extractor = AutoFeatureExtractor.from_pretrained(folder / f"new{version}")
    assert extractor.hop_length == 160 and extractor.feature_size == 8


def test_resumed_run_equals_an_uninterrupted_one(folder):
    options = (*new_model(2), "--learning_rate", "0.003", "--max_steps", "16")
    train(folder, "whole", "digits", *options)
    shutil.copytree(folder / "whole", folder / "cut", ignore=shutil.ignore_patterns("checkpoint-16", "model*"))
    train(folder, "cut", "digits", *options, "--resume", "true")
    whole, cut = (load_file(folder / run / "model.safetensors") for run in ("whole", "cut"))
    for name, tensor in whole.items():
        assert torch.equal(tensor, cut[name]), name


def test_fine_tuning_and_lora(folder):
    tiny_flow(3).save_pretrained(folder / "pretrained")
    options = (
        "--model.pretrained",
        str(folder / "pretrained"),
        "--max_steps",
        "8",
        "--load_best_model_at_end",
        "false",
    )
    train(folder, "tuned", "speaker", *options, "--model.freeze", r"['^embed_tokens\.']", "--learning_rate", "0.003")
    before, after = (load_file(folder / run / "model.safetensors") for run in ("pretrained", "tuned"))
    assert torch.equal(before["embed_tokens.weight"], after["embed_tokens.weight"])
    assert not torch.equal(before["estimator.out_proj.weight"], after["estimator.out_proj.weight"])

    summary = train(folder, "lora", "speaker_lora", *options, "--lora.rank", "2", "--learning_rate", "0.01")
    assert summary["trained_parameters"] < summary["parameters"] / 4
    merged = load_file(folder / "lora" / "merged" / "model.safetensors")
    changed = {name for name, tensor in merged.items() if not torch.equal(tensor, before[name])}
    assert merged.keys() == before.keys() and changed
    assert all(name.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2") for name in changed)
    assert (folder / "lora" / "adapter_model.safetensors").is_file()


def test_the_checkpoint_with_the_best_spectrograms_is_kept(folder):
    """With a learning rate that ruins the model after its first steps, which is what the recipes guard against."""
    tiny_flow(3).save_pretrained(folder / "pretrained")
    options = ("--pretrained", str(folder / "pretrained"), "--lora.rank", "2", "--max_steps", "16")
    train(folder, "best", "speaker_lora", *options, "--learning_rate", "2", "--seed", "1")
    distances = logged(folder, "best", "eval_mel_l1")
    best = min((8, 16), key=lambda step: distances[step // 8 - 1])
    kept, first = (
        load_file(folder / "best" / name / "adapter_model.safetensors") for name in (".", f"checkpoint-{best}")
    )
    assert distances[0] != distances[1] and distances[2] == min(distances[:2])
    assert kept.keys() == first.keys() and all(torch.equal(kept[name], first[name]) for name in kept)


def test_models_that_are_no_flow(folder):
    with pytest.raises(ValueError, match="model_type: expected one of"):
        train(folder, "wrong", "digits", "--model.model_type", "wenet_u2pp")


# -- data -------------------------------------------------------------------------------------------------------------
def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]


def test_tokens_and_frames_go_together(folder):
    recordings = tokenized_recordings(rows_of(folder), str(folder))
    dataset = TokenMelDataset(recordings, CosyVoiceMelFeatureExtractor(**EXTRACTOR), 2, 25)
    for index, recording in enumerate(recordings):
        item = dataset[0, index]
        # The audio that is some samples short is padded to whole tokens.
        assert item["speech_token_ids"].tolist() == list(recording.speech_ids)
        assert item["mel"].shape == (2 * len(recording.speech_ids), 8) and item["mel"].dtype == torch.float32
        assert dataset.lengths(0)[index] == len(item["mel"])
    # More tokens than audio: both are cut.
    longer = [type(recordings[0])(item.audio, item.speech_ids * 2, item.speaker_embedding) for item in recordings]
    item = TokenMelDataset(longer, CosyVoiceMelFeatureExtractor(**EXTRACTOR), 2, 25)[0]
    assert len(item["speech_token_ids"]) == len(recordings[0].speech_ids) and 2 * len(item["speech_token_ids"]) == len(
        item["mel"]
    )
    # Version 1 keeps what it is given.
    unaligned = TokenMelDataset(longer, CosyVoiceMelFeatureExtractor(**EXTRACTOR), None, 25)[0]
    assert len(unaligned["speech_token_ids"]) == 2 * len(recordings[0].speech_ids)


def test_batches_are_padded_behind(folder):
    recordings = tokenized_recordings(rows_of(folder), str(folder))
    dataset = TokenMelDataset(recordings, CosyVoiceMelFeatureExtractor(**EXTRACTOR), 2, 25, keep_mels=False)
    items = [dataset[index] for index in range(3)]
    batch = collate_token_mels(items)
    for row, item in enumerate(items):
        frames, tokens = len(item["mel"]), len(item["speech_token_ids"])
        assert torch.equal(batch["mel"][row, :frames], item["mel"]) and not batch["mel"][row, frames:].any()
        assert batch["mel_mask"][row].sum() == frames and batch["speech_token_mask"][row].sum() == tokens
        assert torch.equal(batch["speech_token_ids"][row, :tokens], item["speech_token_ids"])
        assert torch.equal(batch["speaker_embedding"][row], item["speaker_embedding"])


def test_audio_inside_the_row(folder):
    row = rows_of(folder)[0]
    content = (folder / row.pop("wav")).read_bytes()
    inside, outside = (
        TokenMelDataset(tokenized_recordings([entry], str(folder)), CosyVoiceMelFeatureExtractor(**EXTRACTOR), 2, 25)[
            0
        ]
        for entry in ({**row, "audio_data": content}, {**row, "audio": "0.wav"})
    )
    assert torch.equal(inside["mel"], outside["mel"])
    assert io.BytesIO(content).getvalue()[:4] == b"RIFF"


def test_rows_and_extractors_that_do_not_fit(folder):
    row = rows_of(folder)[0]
    for column in ("speech_token", "utt_embedding", "wav"):
        with pytest.raises(ManifestError, match="row 0: expected speech_token, utt_embedding and one of"):
            tokenized_recordings([{**row, column: None}], str(folder))
    recordings = tokenized_recordings([row], str(folder))
    with pytest.raises(ValueError, match="expected 50 frames per second"):
        TokenMelDataset(recordings, CosyVoiceMelFeatureExtractor(**{**EXTRACTOR, "hop_length": 200}), 2, 25)
    with pytest.raises(ValueError, match="expected at least one of 1 recordings"):
        TokenMelDataset(recordings, CosyVoiceMelFeatureExtractor(**EXTRACTOR), 2, 25, max_frames=3)
