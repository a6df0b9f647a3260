"""Flows of CosyVoice packs to model folders and back, what is refused on the way, and the golden cases."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_cosyvoice_flow import tiny_flow
from transformers import AutoModel


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "conversion"))
try:
    from cosyvoice_flow import (
        ROTARY_BUFFER,
        convert,
        convert_weights,
        main,
        read_config,
        restore,
        restore_weights,
        weight_names,
    )
finally:
    sys.path.remove(str(ROOT / "conversion"))

from hf_speechllm.upstream.errors import ConversionError, UnsafeArtifactError  # noqa: E402
from hf_speechllm.upstream.hyperpyyaml import read_hyperpyyaml  # noqa: E402


GOLDEN = ROOT / "tests" / "golden" / "cosyvoice"
YAMLS = {1: "cosyvoice.yaml", 2: "cosyvoice2.yaml", 3: "cosyvoice3.yaml"}
# How many expected values each golden case holds, the stream's beside upstream's own.
CASES = {"v1_flow": 34, "v2_flow": 19, "v3_flow": 19}
every_version = pytest.mark.parametrize("version", sorted(YAMLS))


def copy_pack(version: int, folder: Path) -> Path:
    folder.mkdir()
    for name in (YAMLS[version], "flow.pt"):
        shutil.copyfile(GOLDEN / f"v{version}_flow" / name, folder / name)
    return folder


@pytest.fixture(params=sorted(YAMLS))
def version(request) -> int:
    return request.param


@pytest.fixture
def pack(version, tmp_path) -> Path:
    """A golden pack to tamper with."""
    return copy_pack(version, tmp_path / "pack")


def yaml_of(pack: Path) -> Path:
    return next(pack / name for name in YAMLS.values() if (pack / name).is_file())


def edit_yaml(pack: Path, old: str, new: str) -> None:
    path = yaml_of(pack)
    text = path.read_text(encoding="utf-8")
    assert old in text, old
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def edit_weights(pack: Path, change) -> None:
    state = torch.load(pack / "flow.pt", weights_only=True)
    change(state)
    torch.save(state, pack / "flow.pt")


def refused(pack: Path, message: str, kind: type = ConversionError) -> None:
    with pytest.raises(kind, match=message):
        convert(pack, pack.parent / "out")
    assert [path.name for path in pack.parent.iterdir()] == ["pack"], "something was left behind"


# -- there and back ---------------------------------------------------------------------------------------------------
def test_round_trip_is_identical(pack, tmp_path):
    """Pack -> folder -> pack: the same tensors; and the same folder again."""
    report = convert(pack, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "conversion_report.json").read_text(encoding="utf-8")) == report
    assert set(report["inputs"]) == {yaml_of(pack).name, "flow.pt"}
    assert "flow.only_mask_loss" in report["ignored_keys"]
    restore(tmp_path / "model", tmp_path / "again")
    before = torch.load(pack / "flow.pt", weights_only=True)
    after = torch.load(tmp_path / "again" / "flow.pt", weights_only=True)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) and tensor.dtype == after[name].dtype, name
    shutil.copyfile(yaml_of(pack), tmp_path / "again" / yaml_of(pack).name)
    convert(tmp_path / "again", tmp_path / "model2")
    for path in (tmp_path / "model").iterdir():
        if path.name != "conversion_report.json":
            assert (tmp_path / "model2" / path.name).read_bytes() == path.read_bytes(), path.name


@every_version
@pytest.mark.parametrize("changes", [{}, {"more": True}], ids=["plain", "options"])
def test_our_own_model_survives_the_way_through_upstream(version, changes, tmp_path):
    """Also with options that no golden pack has."""
    options = {
        1: {"macaron_style": True, "key_bias": False, "estimator_channels": [16, 8, 8], "num_regulator_layers": 2},
        2: {"macaron_style": True, "key_bias": False, "estimator_channels": [8, 16], "num_upsampled_layers": 4},
        3: {"estimator_num_hidden_layers": 3, "num_lookahead_tokens": 2},
    }
    model = tiny_flow(version, **(options[version] if changes else {}))
    state = restore_weights(model.state_dict(), model.config)
    weights = convert_weights(state, model.config, tmp_path / "flow.pt")
    assert weights.keys() == model.state_dict().keys() == set(weight_names(model.config).values())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_folder_is_complete(pack, version, tmp_path):
    convert(pack, tmp_path / "model")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    number = "" if version == 1 else version
    assert {f"modeling_cosyvoice{number}_flow.py", "flow_matching.py", "model.safetensors", "config.json"} <= names
    model, loading = AutoModel.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert model.config.model_type == f"cosyvoice{number}_flow"
    assert not any(loading[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    # What transformers would write for the same model.
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").read_bytes() == (
        tmp_path / "model" / "model.safetensors"
    ).read_bytes()


def test_checkpoints_of_a_trainer(pack, tmp_path):
    """`epoch` and `step` beside the weights."""
    convert(pack, tmp_path / "model")
    edit_weights(pack, lambda state: state.update(epoch=3, step=1000))
    convert(pack, tmp_path / "trained")
    first, second = (tmp_path / name / "model.safetensors" for name in ("model", "trained"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.slow
@every_version
def test_published_sizes(version):
    """The configuration of upstream's recipe, as far as the flow goes, makes the model of the published file."""
    path = Path(__file__).parent / "golden" / "cosyvoice" / f"v{version}_flow" / YAMLS[version]
    config = type(read_config(read_hyperpyyaml(path), path, path.parent))()
    keys, parameters = {1: (1185, 104_874_752), 2: (1121, 112_549_360), 3: (330, 332_257_120)}[version]
    names = weight_names(config)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    # Version 3's file also has the 32 rotary frequencies, which are computed here.
    extra = 32 if version == 3 else 0
    assert len(names) + (1 if extra else 0) == keys
    assert sum(tensor.numel() for tensor in model.state_dict().values()) + extra == parameters


def test_options_of_the_yaml(tmp_path):
    pack = copy_pack(1, tmp_path / "pack")
    edit_yaml(pack, "t_scheduler: 'cosine'", "t_scheduler: 'linear'")
    edit_yaml(pack, "inference_cfg_rate: 0.7", "inference_cfg_rate: 0.25")
    edit_yaml(pack, "input_frame_rate: 50", "input_frame_rate: 25")
    edit_yaml(pack, "act_fn: 'gelu'", "act_fn: 'gelu-approximate'")
    path = yaml_of(pack)
    config = read_config(read_hyperpyyaml(path), path, pack)
    assert (config.time_schedule, config.guidance_scale, config.input_frame_rate) == ("linear", 0.25, 25)
    assert config.estimator_hidden_act == "gelu_pytorch_tanh" and config.num_frames(25) == 86


# -- what is refused --------------------------------------------------------------------------------------------------
def test_weights_that_do_not_fit(pack):
    state = torch.load(pack / "flow.pt", weights_only=True)
    edit_weights(pack, lambda state: state.update(stranger=torch.zeros(2)))
    refused(pack, "unknown weight.*stranger")
    torch.save({name: value for name, value in state.items() if name != "input_embedding.weight"}, pack / "flow.pt")
    refused(pack, "weight is missing.*input_embedding.weight")
    torch.save({**state, "spk_embed_affine_layer.bias": torch.zeros(3)}, pack / "flow.pt")
    refused(pack, "shape.*spk_embed_affine_layer.bias")
    torch.save({**state, "spk_embed_affine_layer.bias": torch.zeros(80, dtype=torch.long)}, pack / "flow.pt")
    refused(pack, "type of a weight.*spk_embed_affine_layer.bias")
    broken = state["input_embedding.weight"].clone()
    broken[0, 0] = float("nan")
    torch.save({**state, "input_embedding.weight": broken}, pack / "flow.pt")
    refused(pack, "not finite.*input_embedding.weight", UnsafeArtifactError)


def test_rotary_frequencies_of_another_base(tmp_path):
    pack = copy_pack(3, tmp_path / "pack")
    edit_weights(pack, lambda state: state.update({ROTARY_BUFFER: 0.5 * state[ROTARY_BUFFER]}))
    refused(pack, f"not supported.*{ROTARY_BUFFER}")
    edit_weights(pack, lambda state: state.pop(ROTARY_BUFFER))
    refused(pack, f"weight is missing.*{ROTARY_BUFFER}")


class _Bomb:
    def __reduce__(self):
        return (os.system, ("touch exploded",))


def test_hostile_and_damaged_files(pack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"x": _Bomb()}, pack / "flow.pt")
    refused(pack, "callable", UnsafeArtifactError)
    (pack / "flow.pt").write_bytes(pickle.dumps(_Bomb()))
    refused(pack, "flow.pt", UnsafeArtifactError)
    content = (GOLDEN / "v2_flow" / "flow.pt").read_bytes()
    (pack / "flow.pt").write_bytes(content[: len(content) // 2])
    refused(pack, "flow.pt", UnsafeArtifactError)
    (pack / "flow.pt").unlink()
    refused(pack, "flow.pt")


@pytest.mark.parametrize(
    "version, old, new, message",
    [
        (1, "vocab_size: 50", "vocab_sise: 50", "unknown key.*flow.vocab_sise"),
        (1, "MaskedDiffWithXvec", "MaskedDiff", "class.*flow"),
        (1, "encoder.ConformerEncoder", "encoder.TransformerEncoder", "class.*flow.encoder"),
        (1, "use_cnn_module: False", "use_cnn_module: True", "not supported.*flow.encoder.use_cnn_module"),
        (1, "input_layer: 'linear'", "input_layer: 'conv2d'", "not supported.*flow.encoder.input_layer"),
        (1, "num_blocks: 2", "num_blocks: 100000", "flow.encoder.num_blocks.*at most"),
        (1, "num_blocks: 2", "num_blocks: two", "bad value.*flow.encoder.num_blocks"),
        (1, "channels: [16, 16]", "channels: 16", "bad value.*flow.decoder.estimator.channels"),
        (1, "channels: [16, 16]", "channels: [16, 12]", "contradictory.*estimator_channels"),
        (1, "channels: 80", "channels: 40", "not supported.*flow.length_regulator.channels"),
        (1, "solver: 'euler'", "solver: 'midpoint'", "not supported.*solver"),
        (1, "attention_heads: 4", "attention_heads: 5", "contradictory.*hidden_size"),
        (2, "token_mel_ratio: 2", "token_mel_ratio: 4", "not supported.*flow.token_mel_ratio"),
        (2, "in_channels: 320", "in_channels: 240", "not supported.*flow.decoder.estimator.in_channels"),
        (2, "training_cfg_rate: 0.2", "training_cfg_rate: 2", "bad value.*training_cfg_rate"),
        (2, "act_fn: 'gelu'", "act_fn: 'snake'", "not supported.*act_fn"),
        (3, "dim: 32", "dim: 40", "contradictory.*estimator_hidden_size"),
        (3, "dim: 32\n", "long_skip_connection: True\n            dim: 32\n", "not supported.*long_skip_connection"),
        (3, "mu_dim: 80", "mu_dim: 60", "not supported.*flow.decoder.estimator.mu_dim"),
        (3, "ff_mult: 2", "ff_mult: lots", "bad value.*flow.decoder.estimator.ff_mult"),
        (3, "flow: !new:", "flow: !name:", "no object to build.*flow"),
    ],
)
def test_settings_that_are_no_flow(version, old, new, message, tmp_path):
    pack = copy_pack(version, tmp_path / "pack")
    edit_yaml(pack, old, new)
    refused(pack, message)


def test_folders_that_are_no_pack(tmp_path):
    with pytest.raises(ConversionError, match="not a directory"):
        convert(tmp_path / "nothing", tmp_path / "out")
    pack = copy_pack(1, tmp_path / "pack")
    shutil.copyfile(GOLDEN / "v2_flow" / YAMLS[2], pack / YAMLS[2])
    refused(pack, "no single yaml")
    with pytest.raises(ConversionError, match="another model"):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
        restore(tmp_path / "other", tmp_path / "back")


def test_command_line(tmp_path, capsys):
    pack = copy_pack(3, tmp_path / "pack")
    assert main([str(pack), str(tmp_path / "model")]) == 0
    assert json.loads(capsys.readouterr().out)["model_type"] == "cosyvoice3_flow"
    assert main(["--reverse", str(tmp_path / "model"), str(tmp_path / "back")]) == 0
    capsys.readouterr()
    assert main([str(pack), str(tmp_path / "model")]) == 2
    assert "output directory is not empty" in capsys.readouterr().err


# -- parity -----------------------------------------------------------------------------------------------------------
def check_parity(*cases: Path) -> tuple[int, list[dict], str]:
    """Exit status, the printed JSON lines, and what went to stderr."""
    command = [sys.executable, str(ROOT / "conversion" / "check_parity.py"), *map(str, cases)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=250)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return done.returncode, lines, done.stderr


def test_golden_cases_pass():
    status, lines, errors = check_parity(*(GOLDEN / name for name in CASES))
    assert status == 0, errors
    *values, total = lines
    assert total == {"total": sum(CASES.values()), "passed": sum(CASES.values()), "failed": 0}
    for name, count in CASES.items():
        assert sum(line["case"] == name for line in values) == count


def test_tampered_cases_are_noticed(tmp_path):
    """A changed tensor and one that nobody checks; nothing else fails."""
    changed = {"v1_flow": "chunk2.feat", "v2_flow": "train.pred", "v3_flow": "est.out_streaming"}
    for name, tensor in changed.items():
        shutil.copytree(GOLDEN / name, tmp_path / name)
        tensors = load_file(tmp_path / name / "io.safetensors")
        tensors[tensor].view(-1)[0] += 0.01
        save_file(tensors | {"unheard_of": tensors[tensor].clone()}, tmp_path / name / "io.safetensors")
    status, lines, errors = check_parity(*(tmp_path / name for name in changed))
    assert status == 1, errors
    for name, tensor in changed.items():
        failed = [line["name"] for line in lines if line.get("case") == name and line.get("pass") is False]
        assert sorted(failed) == sorted([tensor, "unheard_of"])
