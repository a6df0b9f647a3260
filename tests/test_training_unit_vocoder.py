"""k-means, crops of units, and both training scripts on a few clips of noise."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from tiny_speechgpt_units import BASE, GENERATOR, tiny_units, tiny_vocoder
from transformers import AutoFeatureExtractor, AutoModel, HubertConfig, HubertForCTC, Wav2Vec2FeatureExtractor

from hf_speechllm.data.manifests import read_manifest
from hf_speechllm.data.unit_crops import UnitCropDataset, UnitUtterance, collate_unit_crops
from hf_speechllm.data.waveform_batches import waveform_batches
from hf_speechllm.models.pitch_scale import PitchScale
from hf_speechllm.train.kmeans import fit_kmeans, nearest_centres
from hf_speechllm.train.pitch import track_pitch


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "training"))
try:
    import fit_kmeans as fit_script
    import train_unit_vocoder
finally:
    sys.path.remove(str(ROOT / "training"))


# ---------------------------------------------------------------------------------------------------------------------
# k-means


def islands(seed: int = 0) -> torch.Tensor:
    """2000 points about ten places."""
    generator = torch.Generator().manual_seed(seed)
    places = 10 * torch.randn(10, 6, generator=generator)
    return (places[:, None] + 0.1 * torch.randn(10, 200, 6, generator=generator)).flatten(0, 1)


def test_kmeans_finds_what_is_there():
    points = islands()
    result = fit_kmeans(points, 10, batch_size=100, seed=3)
    assert result.counts.tolist() == [200] * 10 and result.perplexity == pytest.approx(10)
    assert result.inertia == pytest.approx(0.01 * 6, rel=0.1)
    means = torch.stack([points[nearest_centres(points, result.centres)[0] == n].mean(dim=0) for n in range(10)])
    torch.testing.assert_close(result.centres, means, atol=0.05, rtol=0)


def test_kmeans_is_as_good_as_that_of_scikit_learn():
    cluster = pytest.importorskip("sklearn.cluster")
    points = torch.randn(3000, 8, generator=torch.Generator().manual_seed(1)).cumsum(dim=1)
    ours = fit_kmeans(points, 20, batch_size=300, seed=0)
    theirs = cluster.MiniBatchKMeans(20, batch_size=300, n_init=3, random_state=0).fit(points.numpy())
    assert ours.inertia < 1.05 * theirs.inertia_ / len(points)


def test_kmeans_depends_on_the_seed_alone():
    points = torch.randn(500, 4)
    first, again, other = (fit_kmeans(points, 7, batch_size=64, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first.centres, again.centres) and not torch.equal(first.centres, other.centres)


def test_unused_centres_start_again():
    """Nine points in a far place, of which most batches have none."""
    points = torch.cat([torch.randn(2000, 3), torch.randn(9, 3) + 100])
    result = fit_kmeans(points, 30, batch_size=50, seed=0, patience=1000, max_epochs=10)
    assert int((result.counts == 0).sum()) <= 1


def test_points_that_cannot_be_divided():
    same = fit_kmeans(torch.ones(50, 2), 3, batch_size=10)
    assert same.inertia == 0 and same.counts.sum() == 50
    with pytest.raises(ValueError, match="at least 4 rows"):
        fit_kmeans(torch.ones(3, 2), 4)
    with pytest.raises(ValueError, match="finite"):
        fit_kmeans(torch.tensor([[1.0], [float("nan")]]), 1)


# ---------------------------------------------------------------------------------------------------------------------
# Data


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Twelve clips of two speakers and two styles, the ninth very short."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(12):
        samples = 900 if number == 8 else 4000 + 700 * number
        tone = np.sin(np.arange(samples) * 0.05 * (1 + number % 5)) * (np.arange(samples) // 900 % 2)
        soundfile.write(folder / f"{number}.wav", 0.3 * tone + 0.02 * rng.standard_normal(samples), 16000)
        row = {"file_name": f"{number}.wav", "transcription": "x", "speaker": "ab"[number % 2]}
        rows.append(row | {"style": "loud" if number % 3 == 0 else "calm"})
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder


@pytest.fixture(scope="module")
def units_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("units") / "model"
    tiny_units(num_units=15, normalize=True).save_pretrained(folder)
    return folder


def test_batches_have_every_utterance_once(data):
    utterances = read_manifest(data)
    batches = list(waveform_batches(utterances, 16000, batch_seconds=1.5))
    assert sorted(index for batch in batches for index in batch.indices) == list(range(12))
    assert len(batches) > 3 and all(batch.input_values.numel() <= 1.5 * 16000 for batch in batches)
    for batch in batches:
        for index, values, mask in zip(batch.indices, batch.input_values, batch.attention_mask, strict=True):
            samples, _ = soundfile.read(utterances[index].audio, dtype="float32")
            assert torch.equal(values[: mask.sum()], torch.from_numpy(samples)) and (values[mask.sum() :] == 0).all()


def test_crops_are_aligned_with_their_units(data):
    """A unit says the number of its frame, and a waveform is the number of its sample."""
    utterances = [
        UnitUtterance(item, 100 * number + torch.arange(10 + number), number % 2)
        for number, item in enumerate(read_manifest(data)[:4])
    ]
    dataset = UnitCropDataset(utterances, crop_frames=6, hop_length=320)
    for number, item in enumerate(utterances):
        dataset._waveforms[number] = np.arange(320 * len(item.unit_ids) + 50, dtype=np.float32)
    firsts = set()
    for epoch in range(20):
        crop = dataset[(epoch, 2)]
        first = int(crop["unit_ids"][0]) - 200
        assert crop["unit_ids"].tolist() == list(range(200 + first, 206 + first))
        assert crop["waveform"].tolist() == list(range(320 * first, 320 * (first + 6)))
        assert crop["speaker_id"] == 0 and crop["duration_labels"].tolist() == [1] * 12
        assert torch.equal(dataset[(epoch, 2)]["waveform"], crop["waveform"])
        firsts.add(first)
    assert len(firsts) > 3


def test_short_recordings_go_on_with_their_speaker(data):
    utterances = [
        UnitUtterance(item, torch.full((12,), number), number % 2)
        for number, item in enumerate(read_manifest(data)[:4])
    ]
    dataset = UnitCropDataset(utterances, crop_frames=40, gain_db=(-6.0, -6.0))
    crops = [dataset[(epoch, 1)] for epoch in range(8)]
    assert {unit for crop in crops for unit in crop["unit_ids"].tolist()} == {1, 3}
    for crop in crops:
        assert crop["waveform"].shape == (40 * 320,) and crop["duration_labels"].tolist() == [12]
    batch = collate_unit_crops([dataset[0], crops[0]])
    assert batch["unit_ids"].shape == (2, 40) and batch["duration_labels"].tolist() == [[12], [12]]
    with pytest.raises(ValueError, match="expected at least one of 1 recordings"):
        UnitCropDataset([UnitUtterance(utterances[0].utterance, torch.empty(0, dtype=torch.long))], 4)


def test_short_recordings_go_on_with_their_style(data):
    utterances = [
        UnitUtterance(item, torch.full((12,), number), 0, number % 2)
        for number, item in enumerate(read_manifest(data)[:4])
    ]
    crops = [UnitCropDataset(utterances, crop_frames=40)[(epoch, 1)] for epoch in range(8)]
    assert {unit for crop in crops for unit in crop["unit_ids"].tolist()} == {1, 3}
    assert collate_unit_crops(crops[:2])["style_id"].tolist() == [1, 1] and "f0" not in crops[0]


def test_pitch_becomes_bins_or_octaves():
    hz = torch.tensor([[0.0, 50.0, 100.0, 199.0], [201.0, 400.0, 799.0, 1000.0]])
    bins = PitchScale(100.0, 800.0, num_bins=4).encode(hz)
    assert bins.dtype == torch.int64 and bins.tolist() == [[0, 1, 1, 1], [2, 3, 3, 3]]
    octaves = PitchScale(100.0, 800.0).encode(torch.tensor([0.0, 50.0, 100.0, 200.0, 400.0, 1000.0]))
    assert octaves.dtype == torch.float32 and octaves.tolist() == pytest.approx([0, 1, 1, 2, 3, 4])


def test_crops_are_aligned_with_their_pitch(data):
    """A glide, whose pitch tells the frame; a unit says the number of its frame."""
    utterances = [UnitUtterance(read_manifest(data)[0], torch.arange(50))]
    scale = PitchScale(65.0, 800.0, num_bins=40)
    dataset = UnitCropDataset(utterances, crop_frames=6, gain_db=(-20.0, 0.0), pitch_scale=scale)
    phase = np.cumsum(np.linspace(100, 400, 50 * 320)) / 16000
    dataset._waveforms[0] = (0.5 * np.sin(2 * np.pi * phase)).astype(np.float32)
    expected = scale.encode(track_pitch(torch.from_numpy(dataset._waveforms[0])[None], 16000, 320)[0])
    # The middle of a frame, away from the ends of the recording.
    heard = scale.encode(torch.linspace(100, 400, 50 * 320)[160::320])
    assert (expected - heard)[3:-3].abs().max() <= 1 and len(expected.unique()) > 15
    for epoch in range(5):
        crop = dataset[(epoch, 0)]
        assert torch.equal(crop["f0"], expected[crop["unit_ids"]])
    assert collate_unit_crops([crop, crop])["f0"].shape == (2, 6)


def test_units_are_kept(data, units_folder, tmp_path, monkeypatch):
    model, utterances = AutoModel.from_pretrained(units_folder), read_manifest(data)
    cache = str(tmp_path / "folder" / "units.safetensors")
    units = train_unit_vocoder.frame_units([*utterances, utterances[3]], model, cache=cache)
    assert len(units) == 13 and torch.equal(units[3], units[12]) and len(units[8]) == 2
    samples, _ = soundfile.read(utterances[5].audio, dtype="float32")
    assert torch.equal(units[5], model.encode(torch.from_numpy(samples)[None]).unit_ids[0])
    monkeypatch.setattr(type(model), "encode", lambda *_: pytest.fail("the units were computed again"))
    again = train_unit_vocoder.frame_units([*utterances, utterances[3]], model, cache=cache)
    assert all(torch.equal(one, other) for one, other in zip(units, again, strict=True))
    monkeypatch.undo()
    with torch.no_grad():
        model.codebook.mul_(-1)
    other = train_unit_vocoder.frame_units([*utterances, utterances[3]], model, cache=cache)
    assert not all(torch.equal(one, new) for one, new in zip(units, other, strict=True)), "of another codebook"


# ---------------------------------------------------------------------------------------------------------------------
# Scripts


def test_fit_kmeans_script(data, tmp_path, capsys):
    """From a HuBERT with a CTC head to a units model; the same seed gives the same codebook."""
    torch.manual_seed(0)
    HubertForCTC(HubertConfig(**BASE, vocab_size=9)).save_pretrained(tmp_path / "ctc")
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(tmp_path / "ctc")
    options = ["--data", str(data), "--layer", "2", "--num_units", "8", "--batch_size", "50", "--batch_seconds", "2"]
    for name in ("one", "two"):
        fit_script.main([str(tmp_path / "ctc"), str(tmp_path / name), *options])
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert torch.equal(one["codebook"], two["codebook"]) and one["codebook"].shape == (8, 24)
    model = AutoModel.from_pretrained(tmp_path / "one")
    assert (model.config.layer, model.config.normalize, model.config.normalize_eps) == (2, True, 1e-7)
    assert len(model.hubert.encoder.layers) == 2 and model.config.hubert_config.hidden_dropout == 0
    assert not AutoFeatureExtractor.from_pretrained(tmp_path / "one").do_normalize
    assert str(tmp_path) not in (tmp_path / "one" / "config.json").read_text(), "no path in a configuration"
    summary = json.loads((tmp_path / "one" / "kmeans.json").read_text())
    frames = sum(model.config.num_frames(900 if n == 8 else 4000 + 700 * n) for n in range(12))
    assert summary["frames"] == frames and summary["inertia"] < summary["variance"]
    # The frames enter the network as it was trained to see them.
    wave = torch.from_numpy(soundfile.read(data / "3.wav", dtype="float32")[0])
    inputs = AutoFeatureExtractor.from_pretrained(tmp_path / "ctc")(
        wave.numpy(), sampling_rate=16000, return_tensors="pt"
    )
    ctc = HubertForCTC.from_pretrained(tmp_path / "ctc").eval()
    with torch.no_grad():
        expected = ctc.hubert(inputs["input_values"], output_hidden_states=True).hidden_states[2]
        torch.testing.assert_close(model(wave[None]).last_hidden_state, expected, atol=1e-5, rtol=1e-4)
    # A units model as the source: another codebook on the same network.
    fit_script.main([str(tmp_path / "one"), str(tmp_path / "three"), *options[:2], "--num_units", "5", "--seed", "4"])
    third = AutoModel.from_pretrained(tmp_path / "three")
    assert third.config.normalize_eps == 1e-7 and third.codebook.shape == (5, 24)
    with pytest.raises(SystemExit, match="--layer"):
        fit_script.main([str(tmp_path / "ctc"), str(tmp_path / "four"), *options[:2], "--num_units", "5"])


def test_frames_are_drawn_uniformly(data):
    model, utterances = tiny_units(), read_manifest(data)
    everything = fit_script.collect_frames(model, utterances, 10**6)
    some = fit_script.collect_frames(model, utterances, 60, seed=1)
    assert len(some) == 60 and torch.equal(some, fit_script.collect_frames(model, utterances, 60, seed=1))
    places = torch.cdist(some.double(), everything.double()).argmin(dim=1)
    assert len(set(places.tolist())) == 60 and places.float().mean() == pytest.approx(len(everything) / 2, rel=0.25)


def vocoder_options(data: Path, units_folder: Path, output: Path, *more: str, **fields: object) -> list[str]:
    config = {
        "embedding_size": 8,
        "duration_hidden_size": 8,
        "hifigan_config": {**GENERATOR, "upsample_initial_channel": 32, "initializer_range": 0.05},
        **fields,
    }
    source = f"[{{path: {data}}}]"
    options = {
        "units_model": units_folder,
        "output_dir": output,
        "model.config": json.dumps(config),
        "data.train": source,
        "data.validation": source,
        "speakers": "true",
        "crop_frames": 8,
        "discriminators": "[mpd]",
        "discriminator_shrink": 16,
        "eval_utterances": 3,
        "batch_size": 4,
        "learning_rate": "0.002",
        "logging_steps": 2,
        "eval_steps": 4,
        "save_steps": 4,
        "adversarial_start_step": 2,
        "progress_bar": "false",
        "use_cpu": "true",
    }
    return [part for name, value in options.items() for part in (f"--{name}", str(value))] + list(more)


# Loud enough from the first step that twenty teach it what its inputs are.
LOUD = {**GENERATOR, "upsample_initial_channel": 32, "initializer_range": 0.1}


def test_training_a_vocoder(data, units_folder, tmp_path, monkeypatch):
    """It learns, resumes to the same weights, and leaves a model with plain weights that speaks."""
    monkeypatch.syspath_prepend(str(ROOT / "training"))
    run = tmp_path / "run"
    train_unit_vocoder.main(vocoder_options(data, units_folder, run, "--max_steps", "8"))
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    mel = [line["mel"] for line in log if "mel" in line]
    assert mel[-1] < mel[0] and any("adversarial" in line for line in log)
    assert any("eval_duration_mse" in line and "eval_mel_l1" in line for line in log)
    model = AutoModel.from_pretrained(run)
    assert model.config.speakers == ["a", "b"] and model.config.num_units == 15 and not model.config.weight_norm
    assert model.synthesize([1, 2, 3], speaker="b").isfinite().all()
    assert AutoModel.from_pretrained(run / "checkpoint-8").config.weight_norm

    more = tmp_path / "more"
    train_unit_vocoder.main(
        vocoder_options(data, units_folder, more, "--max_steps", "1", "--model.pretrained", str(run))
    )
    assert AutoModel.from_pretrained(more).config.speakers == ["a", "b"]


@pytest.mark.parametrize("num_f0_bins", [8, 0])
def test_training_with_pitch(data, units_folder, tmp_path, monkeypatch, num_f0_bins):
    """The pitch of the recordings is learnt from, and what is saved speaks with a pitch in Hz."""
    monkeypatch.syspath_prepend(str(ROOT / "training"))
    run, more = tmp_path / "run", ["--max_steps", "20", "--adversarial_start_step", "16", "--eval_steps", "20"]
    fields = {"use_f0": True, "num_f0_bins": num_f0_bins, "f0_range": [70.0, 700.0], "hifigan_config": LOUD}
    train_unit_vocoder.main(vocoder_options(data, units_folder, run, *more, **fields))
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    mel = [line["mel"] for line in log if "mel" in line]
    assert np.isfinite(mel).all() and mel[-1] < 0.8 * mel[0]
    assert any(np.isfinite(line["eval_mel_l1"]) for line in log if "eval_mel_l1" in line)
    model = AutoModel.from_pretrained(run)
    assert model.config.f0_range == [70.0, 700.0] and model.pitch_scale == PitchScale(70.0, 700.0, num_f0_bins)
    low, high = (model.encode_f0(torch.tensor([[0.0, hz, hz]])) for hz in (100.0, 600.0))
    spoken = [model.synthesize([1, 2, 3], "a", predict_durations=False, f0=f0) for f0 in (low, high)]
    assert spoken[0].isfinite().all() and (spoken[0] - spoken[1]).abs().max() > 1e-3
    again = tmp_path / "again"
    train_unit_vocoder.main(
        vocoder_options(data, units_folder, again, "--max_steps", "1", "--model.pretrained", str(run))
    )
    assert AutoModel.from_pretrained(again).config.f0_range == [70.0, 700.0]


def test_training_with_styles(data, units_folder, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "training"))
    run = tmp_path / "run"
    more = ["--max_steps", "20", "--adversarial_start_step", "16", "--eval_steps", "20", "--styles", "true"]
    train_unit_vocoder.main(vocoder_options(data, units_folder, run, *more, hifigan_config=LOUD))
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    mel = [line["mel"] for line in log if "mel" in line]
    assert np.isfinite(mel).all() and mel[-1] < 0.8 * mel[0]
    model = AutoModel.from_pretrained(run)
    assert model.config.styles == ["calm", "loud"] and model.config.speakers == ["a", "b"]
    calm, loud = (model.synthesize([1, 2, 3], "a", name, predict_durations=False) for name in ("calm", "loud"))
    assert calm.isfinite().all() and (calm - loud).abs().max() > 1e-3


@pytest.mark.parametrize(
    "fields",
    [{}, {"use_f0": True}, {"use_f0": True, "num_f0_bins": 8}, {"num_styles": 2}, {"speaker_embedding_size": 5}],
)
def test_width_of_the_generator(fields):
    model = train_unit_vocoder.new_model({"embedding_size": 8, "hifigan_config": GENERATOR, **fields}, 15, 16000, None)
    assert model.config.hifigan_config.model_in_dim == model.config.input_size
    assert model.config.f0_range == ([65.0, 800.0] if fields.get("use_f0") else None)


def test_pitch_that_cannot_be_made():
    with pytest.raises(ValueError, match="f0_range: expected the lowest and the highest pitch in Hz, got None"):
        tiny_vocoder(use_f0=True, num_f0_bins=4).encode_f0(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="use_f0: expected true"):
        tiny_vocoder().encode_f0(torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"f0_range: expected .* got \[300, 200\]"):
        tiny_vocoder(use_f0=True, f0_range=[300, 200])
    with pytest.raises(ValueError, match="num_f0_bins: expected 0 or at least 2"):
        tiny_vocoder(use_f0=True, num_f0_bins=1, f0_range=[65.0, 800.0])


@pytest.mark.slow
def test_resumed_run_equals_an_uninterrupted_one(data, units_folder, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "training"))
    stopped = tmp_path / "stopped"
    train_unit_vocoder.main(vocoder_options(data, units_folder, stopped, "--max_steps", "4", "--schedule", "constant"))
    train_unit_vocoder.main(
        vocoder_options(data, units_folder, stopped, "--max_steps", "8", "--schedule", "constant", "--resume", "true")
    )
    whole = tmp_path / "whole"
    train_unit_vocoder.main(vocoder_options(data, units_folder, whole, "--max_steps", "8", "--schedule", "constant"))
    resumed, uninterrupted = (load_file(folder / "model.safetensors") for folder in (stopped, whole))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in uninterrupted.items())


def test_speaker_that_the_manifest_does_not_tell(data):
    utterances = read_manifest(data)[:1]
    with pytest.raises(ValueError, match="0.wav: speaker: expected one of .'b'., found 'a'"):
        train_unit_vocoder.unit_utterances(utterances, [torch.zeros(3).long()], ["b"])
    assert train_unit_vocoder.unit_utterances(utterances, [torch.zeros(3).long()], None)[0].speaker_id == 0


def test_style_that_the_manifest_does_not_tell(data):
    utterances = read_manifest(data)[:1]
    with pytest.raises(ValueError, match="0.wav: style: expected one of .'calm'., found 'loud'"):
        train_unit_vocoder.unit_utterances(utterances, [torch.zeros(3).long()], None, ["calm"])
    row = train_unit_vocoder.unit_utterances(utterances, [torch.zeros(3).long()], None, ["calm", "loud"])[0]
    assert (row.speaker_id, row.style_id) == (0, 1)
