"""Pitch, the losses of the vocoder's training, and the training script on a few clips of tones."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from tiny_cosyvoice_hift import SIZES, VERSIONS, tiny_hift
from transformers import AutoFeatureExtractor, AutoModel

from hf_speechllm.models.feature_extraction_cosyvoice_mel import CosyVoiceMelFeatureExtractor
from hf_speechllm.train.adversarial_losses import relativistic_loss
from hf_speechllm.train.discriminators import build_discriminators
from hf_speechllm.train.pitch import squared_difference, track_pitch
from hf_speechllm.train.vocoder_step import VocoderStep, resynthesis_metrics


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "training"))
try:
    import train_vocoder
finally:
    sys.path.remove(str(ROOT / "training"))


def voice(frequency: np.ndarray | float, samples: int, rate: int = 24000) -> torch.Tensor:
    """Eight harmonics of a frequency in Hz, constant or one per sample, in a little noise."""
    phase = 2 * np.pi * np.cumsum(np.broadcast_to(frequency, samples) / rate)
    tone = sum(np.sin(number * phase + number) / number for number in range(1, 9))
    return torch.from_numpy(0.1 * tone + 0.001 * np.random.default_rng(0).standard_normal(samples)).float()


# -- pitch ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("frequency", [70.0, 123.0, 220.0, 431.0, 690.0])
@pytest.mark.parametrize("rate, hop", [(24000, 480), (22050, 256)])
def test_pitch_of_a_steady_voice(frequency, rate, hop):
    found = track_pitch(voice(frequency, rate, rate)[None], rate, hop)
    assert found.shape == (1, rate // hop)
    assert (found[0, 3:-3] - frequency).abs().max() < 0.005 * frequency


def test_pitch_of_a_gliding_voice_and_its_pauses():
    time = np.arange(48000) / 24000
    frequency = 100 + 80 * time
    waveform = voice(frequency, 48000)
    waveform[20000:30000] = 0.0
    found = track_pitch(waveform[None], 24000, 480)[0]
    centres = torch.from_numpy(frequency[np.arange(100) * 480 + 240]).float()
    voiced = torch.ones(100, dtype=torch.bool)
    voiced[39:64] = voiced[:2] = voiced[-2:] = False
    assert (found - centres)[voiced].abs().max() < 1.5
    assert not found[43:61].any()


def test_noise_and_silence_have_no_pitch():
    noise = 0.1 * torch.randn(2, 24000, generator=torch.Generator().manual_seed(0))
    assert not track_pitch(noise, 24000, 480).any()
    assert not track_pitch(torch.zeros(1, 24000), 24000, 480).any()
    assert not track_pitch(1e-4 * voice(150.0, 24000)[None], 24000, 480).any(), "quieter than -50 dB"
    assert track_pitch(torch.zeros(3, 100), 24000, 480).shape == (3, 0)
    with pytest.raises(ValueError, match="lowest, highest"):
        track_pitch(noise, 24000, 480, highest=20000.0)


def test_difference_function_by_hand():
    pieces = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    found = squared_difference(pieces, 30, 20)
    expected = torch.stack([(pieces[:, :30] - pieces[:, lag : lag + 30]).square().sum(dim=1) for lag in range(21)], 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# -- losses -----------------------------------------------------------------------------------------------------------
def test_relativistic_loss_by_hand():
    high, low = torch.tensor([[0.1, 0.2, 0.9]]), torch.tensor([[0.0, 0.3, 0.1]])
    # Leads 0.1, -0.1, 0.8; one is behind the median of 0.1, by 0.2.
    assert relativistic_loss([high], [low], 0.5) == pytest.approx(0.04)
    assert relativistic_loss([high, high], [low, low], 0.03) == pytest.approx(0.06), "no more than the margin each"
    assert relativistic_loss([torch.ones(4)], [torch.zeros(4)], 0.04) == 0, "nothing is behind"


def test_spectrogram_discriminators():
    judges = build_discriminators(["mrsd"], shrink=8)
    waveform = torch.randn(2, 4800, generator=torch.Generator().manual_seed(0), requires_grad=True)
    output = judges.judge(waveform)
    assert len(output.scores) == 3 and [len(features) for features in output.features] == [6, 6, 6]
    # 513 frequencies are halved three times; 40 hops of 120 give 41 frames.
    assert output.scores[0].shape == (2, 41 * 65) and output.features[0][0].shape == (2, 4, 41, 513)
    sum(score.sum() for score in output.scores).backward()
    assert torch.isfinite(waveform.grad).all() and waveform.grad.abs().sum() > 0
    torch.testing.assert_close(judges.judge(waveform[:, None]).scores[2], output.scores[2])
    assert torch.isfinite(judges.judge(torch.zeros(1, 4800)).scores[0]).all()


def test_step_and_metrics():
    model = tiny_hift(1).train()
    hop = model.config.hop_length
    extractor = CosyVoiceMelFeatureExtractor(20, 22050, fft_length=4 * hop, hop_length=hop)
    step = VocoderStep(extractor)
    waveform = torch.stack([voice(200.0, 40 * hop, 22050), voice(90.0, 40 * hop, 22050)])
    mel, f0 = step.inputs(waveform)
    expected = extractor(list(waveform))["input_features"]
    torch.testing.assert_close(mel, expected, rtol=0, atol=1e-5)
    assert f0.shape == (2, 40) and (f0[0, 10:-10] - 200).abs().max() < 2
    output = step(model, {"waveform": waveform})
    assert output.fake.shape == output.real.shape and set(output.losses) == {"mel", "f0"}
    sum(output.losses.values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    metrics = resynthesis_metrics([waveform[0], waveform[1, : 5 * hop + 3], waveform[0, :3]], step)
    with torch.no_grad():
        first, second = metrics(model.eval()), metrics(model)
    assert first == second and set(first) == {"mel_l1", "f0_l1", "voicing_error"} and first["mel_l1"] > 0


# -- the script -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Eight voices, one of them shorter than a crop."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for number in range(8):
        samples = 2000 if number == 3 else 9000 + 700 * number
        soundfile.write(folder / f"{number}.wav", voice(100.0 + 20 * number, samples, 22050).numpy(), 22050)
        rows.append({"file_name": f"{number}.wav", "transcription": "x"})
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder


def options(data: Path, output: Path, version: int, **changes) -> list[str]:
    settings = {
        "model.model_type": "cosyvoice3_hift" if version == 3 else "cosyvoice_hift",
        "model.config": {**SIZES, **VERSIONS[version], "sampling_rate": 22050 if version == 1 else 24000},
        "data.train": ["."],
        "data.validation": ["."],
        "data_dir": str(data),
        "output_dir": str(output),
        "crop_frames": 40,
        "discriminator_shrink": 16,
        "eval_utterances": 2,
        "eval_seconds": 0.2,
        "max_steps": 6,
        "batch_size": 2,
        "adversarial_start_step": 2,
        "relativistic_weight": 1.0,
        "learning_rate": 0.001,
        "logging_steps": 2,
        "eval_steps": 3,
        "save_steps": 4,
        "use_cpu": True,
        "progress_bar": False,
        **changes,
    }
    return [part for key, value in settings.items() for part in (f"--{key}", json.dumps(value))]


@pytest.mark.parametrize("version", [1, 3])
def test_script_trains_and_resumes(data, tmp_path, version):
    """Six steps at once are four and two more; the model that is done is folded, and trains on."""
    train_vocoder.main(options(data, tmp_path / "once", version))
    log = [json.loads(line) for line in (tmp_path / "once" / "log.jsonl").read_text().splitlines()]
    trained = [line for line in log if "loss" in line]
    assert "adversarial" not in trained[0] and {"adversarial", "relativistic", "mel", "f0"} <= trained[-1].keys()
    assert {"eval_mel_l1", "eval_f0_l1", "eval_voicing_error"} <= log[-1].keys()
    train_vocoder.main(options(data, tmp_path / "twice", version, max_steps=4, schedule="constant"))
    train_vocoder.main(options(data, tmp_path / "straight", version, schedule="constant"))
    train_vocoder.main(options(data, tmp_path / "twice", version, schedule="constant", resume=True))
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "twice"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)

    done = AutoModel.from_pretrained(tmp_path / "once").eval()
    assert not done.config.weight_norm and done.config.model_type.startswith("cosyvoice")
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "once")
    assert extractor.hop_length == done.config.hop_length
    assert (extractor.high_freq is None) == done.config.is_causal
    changes = {"pretrained": str(tmp_path / "once"), "max_steps": 2, "fold_weight_norm": False, "model.config": {}}
    train_vocoder.main(options(data, tmp_path / "more", version, **changes))
    assert AutoModel.from_pretrained(tmp_path / "more").config.weight_norm


def test_script_refuses_what_does_not_fit(data, tmp_path):
    with pytest.raises(ValueError, match="model_type"):
        train_vocoder.main(options(data, tmp_path / "run", 1) + ["--model.model_type", "cosyvoice_flow"])
    with pytest.raises(ValueError, match="feature_extractor.hop_length"):
        train_vocoder.main(options(data, tmp_path / "run", 1) + ["--data.feature_extractor", '{"hop_length": 100}'])


def test_loss_falls(data, tmp_path):
    """Spectrogram and pitch alone, thirty steps."""
    changes = {"max_steps": 30, "discriminators": [], "eval_steps": 0, "save_steps": 0, "logging_steps": 10}
    train_vocoder.main(options(data, tmp_path / "run", 1, **changes, learning_rate=0.003))
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["mel"] < 0.9 * log[0]["mel"] and log[-1]["f0"] < log[0]["f0"]


@pytest.mark.parametrize("name", ["kerstin", "finetune"])
def test_recipes_are_readable(name):
    from hf_speechllm.train.gan_trainer import GanTrainingArguments
    from hf_speechllm.train.run_config import ModelArguments, load_run_config

    run = load_run_config(
        ROOT / "training" / "recipes" / "cosyvoice_hift" / f"{name}.yaml", kind=train_vocoder.VocoderRun
    )
    GanTrainingArguments("run", **run.training)
    assert build_discriminators(run.vocoder.discriminators, 16)
    if run.model.config:
        model = train_vocoder.build_vocoder(run.model)
        assert train_vocoder.build_extractor(model, ModelArguments(), {}).fft_length == 1920
