"""`hift.pt` to model folders and back, and what is refused on the way."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_cosyvoice_hift import mel_of, noise_for, tiny_hift
from transformers import AutoFeatureExtractor, AutoModel


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "conversion"))
try:
    from cosyvoice_hift import convert, convert_weights, restore, restore_weights
finally:
    sys.path.remove(str(ROOT / "conversion"))

from hf_speechllm.upstream.errors import ConversionError, UnsafeArtifactError  # noqa: E402


GOLDEN = ROOT / "tests" / "golden" / "cosyvoice"
YAMLS = {1: "cosyvoice.yaml", 2: "cosyvoice2.yaml", 3: "cosyvoice3.yaml"}
MEL = """
feat_extractor: !name:matcha.utils.audio.mel_spectrogram
    n_fft: 1024
    num_mels: 80
    sampling_rate: !ref <sample_rate>
    hop_size: 256
    win_size: 1024
    fmin: 0
    fmax: {fmax}
    center: False
"""


def copy_pack(version: int, folder: Path) -> Path:
    folder.mkdir()
    for name in (YAMLS[version], "hift.pt"):
        shutil.copyfile(GOLDEN / f"v{version}_hift" / name, folder / name)
    return folder


@pytest.fixture(params=[1, 2, 3])
def pack(request, tmp_path) -> Path:
    """A copy of a golden pack."""
    return copy_pack(request.param, tmp_path / "pack")


@pytest.fixture
def first_pack(tmp_path) -> Path:
    """Version 1, to tamper with."""
    return copy_pack(1, tmp_path / "pack")


def edit_yaml(pack: Path, old: str, new: str) -> None:
    path = next(pack / name for name in YAMLS.values() if (pack / name).exists())
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def edit_weights(pack: Path, change) -> None:
    state = torch.load(pack / "hift.pt", weights_only=True)
    change(state)
    torch.save(state, pack / "hift.pt")


def refused(pack: Path, tmp_path: Path, message: str, kind: type = ConversionError) -> None:
    with pytest.raises(kind, match=message):
        convert(pack, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["pack"], "something was left behind"


# -- there and back ---------------------------------------------------------------------------------------------------
def test_round_trip_is_identical(pack, tmp_path):
    """Pack -> folder -> pack -> folder: the same tensors upstream, the same bytes here."""
    report = convert(pack, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "conversion_report.json").read_text(encoding="utf-8")) == report
    assert restore(tmp_path / "model", tmp_path / "again")["direction"] == "reverse"
    before = torch.load(pack / "hift.pt", weights_only=True)
    after = torch.load(tmp_path / "again" / "hift.pt", weights_only=True)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) and tensor.dtype == after[name].dtype, name
    yaml = next(path for path in pack.iterdir() if path.suffix == ".yaml")
    shutil.copyfile(yaml, tmp_path / "again" / yaml.name)
    convert(tmp_path / "again", tmp_path / "model2")
    for path in (tmp_path / "model").iterdir():
        if path.name != "conversion_report.json":
            assert (tmp_path / "model2" / path.name).read_bytes() == path.read_bytes(), path.name


def test_folder_is_complete(pack, tmp_path):
    convert(pack, tmp_path / "model")
    model, info = AutoModel.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "model")
    assert extractor.sampling_rate == model.config.sampling_rate
    assert extractor.hop_length == model.config.hop_length
    assert (extractor.high_freq is None) == model.config.is_causal
    # Saving what was loaded writes the same code and weights.
    model.save_pretrained(tmp_path / "saved")
    for path in (tmp_path / "saved").iterdir():
        assert path.read_bytes() == (tmp_path / "model" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("version", [1, 2, 3])
@torch.no_grad()
def test_our_own_models_survive_the_way_through_upstream(version):
    """As they are with magnitudes and directions; folded ones become normalised ones of the same weights."""
    model = tiny_hift(version)
    weights = model.state_dict()
    state = restore_weights(weights, model.config)
    back = convert_weights(state, model.config, Path("hift.pt"))
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in back)
    model.fold_weight_norm()
    folded = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    again = tiny_hift(version, seed=1)
    again.load_state_dict(convert_weights(restore_weights(folded, model.config), again.config, Path("hift.pt")))
    again.fold_weight_norm()
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, folded[name], rtol=1e-6, atol=1e-9, msg=name)


@torch.no_grad()
def test_folding_on_conversion(pack, tmp_path):
    """The same function, without a trace of magnitudes and directions."""
    convert(pack, tmp_path / "kept")
    convert(pack, tmp_path / "folded", fold_weight_norm=True)
    kept, folded = (AutoModel.from_pretrained(tmp_path / name).eval() for name in ("kept", "folded"))
    assert kept.config.weight_norm and not folded.config.weight_norm
    assert not [name for name in folded.state_dict() if "parametrizations" in name]
    kept.fold_weight_norm()
    for name, tensor in kept.state_dict().items():
        torch.testing.assert_close(folded.state_dict()[name], tensor, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("change", ["drop", "shape", "zero"])
def test_folding_names_half_a_weight(first_pack, tmp_path, change):
    name = "conv_pre.parametrizations.weight.original"

    def edit(state):
        if change == "drop":
            del state[f"{name}0"]
        elif change == "shape":
            state[f"{name}0"] = torch.ones(32)
        else:
            state[f"{name}1"][3] = 0.0

    edit_weights(first_pack, edit)
    with pytest.raises(ConversionError, match="conv_pre.parametrizations.weight.original1"):
        convert(first_pack, tmp_path / "out", fold_weight_norm=True)


def test_checkpoints_of_upstreams_training(first_pack, tmp_path):
    """`generator.` in front, discriminators beside, epoch and step."""
    convert(first_pack, tmp_path / "plain")

    def change(state):
        for name in list(state):
            state[f"generator.{name}"] = state.pop(name)
        state["discriminator.mpd.discriminators.0.conv_post.bias"] = torch.zeros(1)
        state |= {"epoch": 3, "step": 4000}

    edit_weights(first_pack, change)
    report = convert(first_pack, tmp_path / "trained")
    assert report["ignored_weights"] == ["discriminator.mpd.discriminators.0.conv_post.bias"]
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "trained"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_spectrograms_of_the_pack(first_pack, tmp_path):
    with (first_pack / "cosyvoice.yaml").open("a", encoding="utf-8") as file:
        file.write(MEL.format(fmax="7000"))
    convert(first_pack, tmp_path / "model")
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "model")
    assert (extractor.fft_length, extractor.hop_length, extractor.high_freq) == (1024, 256, 7000)
    edit_yaml(first_pack, "fmax: 7000", "fmax: null")
    convert(first_pack, tmp_path / "wide")
    assert AutoFeatureExtractor.from_pretrained(tmp_path / "wide").high_freq is None


def test_sizes_of_the_flow_decide_the_noise(tmp_path):
    """A complete pack of version 3 says what upstream draws before the vocoder's noise."""
    pack = copy_pack(3, tmp_path / "pack")
    convert(pack, tmp_path / "alone")
    flow = "flow: !new:cosyvoice.flow.flow.CausalMaskedDiffWithDiT\n    input_size: 4\n    output_size: 3\n"
    flow += "    spk_embed_dim: 5\n    vocab_size: 17\nhift:"
    edit_yaml(pack, "hift:", flow)
    convert(pack, tmp_path / "complete")
    alone, complete = (AutoModel.from_pretrained(tmp_path / name) for name in ("alone", "complete"))
    assert complete.config.layers_before_noise == [[17, 4], [5, 3]]
    assert not torch.equal(alone.fixed_noise.state, complete.fixed_noise.state)


# -- refused ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "old, new, message",
    [
        ("nb_harmonics: 8", "nb_harmonics: 8\n    nsf_gamma: 1", "unknown key .*hift.nsf_gamma"),
        ("HiFTGenerator", "HifiGenerator", "not supported .*key: hift;"),
        ("!new:cosyvoice.hifigan.generator", "!name:cosyvoice.hifigan.generator", "not supported"),
        ("ConvRNNF0Predictor", "CausalConvRNNF0Predictor", "hift.f0_predictor"),
        ("num_class: 1", "num_class: 2", "num_class"),
        ("hop_len: 4", "hop_len: four", "hop_len"),
        ("base_channels: 32", "base_channels: 3000000", "hidden_size"),
        ("base_channels: 32", "base_channels: 64", "shape"),
        ("upsample_rates: [8, 8]", "upsample_rates: [8, 8, 2]", "contradictory"),
        ("upsample_rates: [8, 8]", "upsample_rates: [8, eight]", "upsample_rates"),
        ("upsample_kernel_sizes: [16, 16]", "upsample_kernel_sizes: [16, 15]", "upsample_kernel_sizes"),
        ("cond_channels: 24", "cond_channels: 24\n        dropout: 0.1", "dropout"),
    ],
)
def test_wrong_yaml_is_named(first_pack, tmp_path, old, new, message):
    edit_yaml(first_pack, old, new)
    refused(first_pack, tmp_path, message)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("center: False", "center: True", "center"),
        ("win_size: 1024", "win_size: 800", "win_size"),
        ("hop_size: 256", "hop_size: 128", "hop_length"),
        ("fmin: 0", "fmin: 0\n    fmid: 1", "fmid"),
        ("mel_spectrogram", "mel_spectrograph", "feat_extractor"),
    ],
)
def test_wrong_spectrograms_are_named(first_pack, tmp_path, old, new, message):
    with (first_pack / "cosyvoice.yaml").open("a", encoding="utf-8") as file:
        file.write(MEL.format(fmax="8000").replace(old, new))
    refused(first_pack, tmp_path, message)


@pytest.mark.parametrize(
    "change, message, kind",
    [
        (lambda state: state.update({"conv_mid.bias": torch.zeros(3)}), "unknown weight .*conv_mid.bias", None),
        (lambda state: state.update({"resblocks.99.x": torch.zeros(3)}), "unknown weight .*resblocks.99.x", None),
        (lambda state: state.pop("conv_pre.bias"), "weight is missing .*conv_pre.bias", None),
        (lambda state: state.update({"conv_pre.bias": torch.zeros(3)}), "shape .*conv_pre.bias", None),
        (lambda state: state.update({"conv_pre.bias": torch.zeros(32).half()}), "type of weights", None),
        (lambda state: state["conv_pre.bias"].fill_(float("nan")), "not finite", UnsafeArtifactError),
        (lambda state: state.update({"conv_pre.bias": os.system}), "callable", UnsafeArtifactError),
    ],
)
def test_wrong_weights_are_named(first_pack, tmp_path, change, message, kind):
    edit_weights(first_pack, change)
    refused(first_pack, tmp_path, message, kind or ConversionError)


def test_damaged_and_missing_files(first_pack, tmp_path):
    data = (first_pack / "hift.pt").read_bytes()
    (first_pack / "hift.pt").write_bytes(data[: len(data) // 2])
    refused(first_pack, tmp_path, "zip", UnsafeArtifactError)
    (first_pack / "hift.pt").unlink()
    refused(first_pack, tmp_path, "cannot read file")
    (first_pack / "cosyvoice.yaml").unlink()
    refused(first_pack, tmp_path, "no single yaml")


def test_reverse_of_another_model_is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    with pytest.raises(ConversionError, match="another model"):
        restore(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_folded_folder_goes_back(tmp_path):
    """A model whose weights were folded is still a pack of upstream's names, with the same waveform."""
    pack = copy_pack(2, tmp_path / "pack")
    convert(pack, tmp_path / "model")
    model = AutoModel.from_pretrained(tmp_path / "model").eval()
    mel = torch.cat([mel_of(9)] * 4, dim=2)
    expected = model(mel, **noise_for(model, 9)).waveform
    model.fold_weight_norm()
    model.save_pretrained(tmp_path / "folded")
    restore(tmp_path / "folded", tmp_path / "back")
    names = torch.load(pack / "hift.pt", weights_only=True).keys()
    assert torch.load(tmp_path / "back" / "hift.pt", weights_only=True).keys() == names
    shutil.copyfile(pack / YAMLS[2], tmp_path / "back" / YAMLS[2])
    convert(tmp_path / "back", tmp_path / "again")
    again = AutoModel.from_pretrained(tmp_path / "again").eval()
    torch.testing.assert_close(again(mel, **noise_for(model, 9)).waveform, expected, rtol=0, atol=1e-3)
