"""SpeechTokenizer packs to model folders and back, and what is refused on the way."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_speechtokenizer import tiny_codec
from transformers import AutoFeatureExtractor, AutoModel


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "conversion"))
try:
    from convert_speechtokenizer import (
        convert_speechtokenizer_pack,
        export_speechtokenizer_pack,
        main,
        weight_names,
    )
finally:
    sys.path.remove(str(ROOT / "conversion"))

from hf_speechllm.upstream.errors import ConversionError, UnsafeArtifactError  # noqa: E402


GOLDEN = ROOT / "tests" / "golden" / "speechgpt"
CASES = {"speechtokenizer_elu": "SpeechTokenizer.pt", "speechtokenizer_snake_identity": "ckpt.dev"}


@pytest.fixture(params=sorted(CASES))
def pack(request, tmp_path) -> Path:
    """A copy of a golden pack to tamper with."""
    folder = tmp_path / "pack"
    folder.mkdir()
    for name in ("config.json", CASES[request.param]):
        shutil.copyfile(GOLDEN / request.param / name, folder / name)
    return folder


@pytest.fixture
def one_pack(tmp_path) -> Path:
    folder = tmp_path / "pack"
    folder.mkdir()
    for name in ("config.json", "SpeechTokenizer.pt"):
        shutil.copyfile(GOLDEN / "speechtokenizer_elu" / name, folder / name)
    return folder


def weights_file(pack: Path) -> Path:
    return next(pack / name for name in CASES.values() if (pack / name).is_file())


def edit_config(pack: Path, **changes) -> None:
    """Set keys; `None` as `...` removes one."""
    path = pack / "config.json"
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}), encoding="utf-8")


def edit_weights(pack: Path, change) -> None:
    path = weights_file(pack)
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def refused(pack: Path, tmp_path: Path, message: str, kind: type = ConversionError) -> None:
    with pytest.raises(kind, match=message):
        convert_speechtokenizer_pack(pack, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["pack"], "something was left behind"


# -- there and back ---------------------------------------------------------------------------------------------------
def test_round_trip_is_identical(pack, tmp_path):
    """Pack -> folder -> pack -> folder: the same tensors upstream, the same bytes here."""
    report = convert_speechtokenizer_pack(pack, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "conversion_report.json").read_text(encoding="utf-8")) == report
    assert set(report["inputs"]) == {"config.json", weights_file(pack).name} and report["warnings"] == []
    assert "mel_loss_lambdas" in report["ignored_keys"] and "strides" not in report["ignored_keys"]
    assert export_speechtokenizer_pack(tmp_path / "model", tmp_path / "again")["warnings"] == []
    before = torch.load(weights_file(pack), weights_only=True)
    after = torch.load(tmp_path / "again" / "SpeechTokenizer.pt", weights_only=True)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    convert_speechtokenizer_pack(tmp_path / "again", tmp_path / "model2")
    for path in (tmp_path / "model").iterdir():
        if path.name != "conversion_report.json":
            assert (tmp_path / "model2" / path.name).read_bytes() == path.read_bytes(), path.name


def test_our_own_model_survives_the_way_through_upstream(tmp_path):
    model = tiny_codec(num_residual_layers=2, num_lstm_layers=2, hidden_act="snake", upsampling_ratios=[3, 2])
    model.save_pretrained(tmp_path / "model")
    export_speechtokenizer_pack(tmp_path / "model", tmp_path / "pack")
    convert_speechtokenizer_pack(tmp_path / "pack", tmp_path / "again")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "again"))
    assert first.keys() == second.keys() == set(weight_names(model.config).values())
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    config = AutoModel.from_pretrained(tmp_path / "again").config
    expected = {key: value for key, value in model.config.to_dict().items() if key not in ("_name_or_path", "dtype")}
    assert {key: config.to_dict()[key] for key in expected} == expected


def test_folder_is_complete(one_pack, tmp_path):
    convert_speechtokenizer_pack(one_pack, tmp_path / "model")
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "model")
    assert extractor.sampling_rate == 16000 and extractor.feature_size == 1
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"modeling_speechtokenizer.py", "seanet.py", "residual_vector_quantizer.py", "config.json"} <= names


def test_trainer_and_data_parallel_names(one_pack, tmp_path):
    """`SpeechTokenizer_best_dev.pt` of upstream's trainer, with the prefix of several processes."""
    state = torch.load(one_pack / "SpeechTokenizer.pt", weights_only=True)
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, one_pack / "SpeechTokenizer_best_dev.pt")
    (one_pack / "SpeechTokenizer.pt").unlink()
    convert_speechtokenizer_pack(one_pack, tmp_path / "model")


# -- configurations that are refused ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surprise": 1}, "unknown key .*config.json; key: surprise"),
        ({"n_q": ...}, "key is missing .*key: n_q"),
        ({"strides": ...}, "bad value .*key: strides"),
        ({"strides": [8, "5"]}, r"bad value .*key: strides\[1\]"),
        ({"strides": [2] * 17}, r"key: strides; expected: a list of 1..16 integers"),
        ({"n_filters": True}, "bad value .*key: n_filters"),
        ({"n_filters": 0}, "bad value .*key: n_filters"),
        ({"bidirectional": "yes"}, "bad value .*key: bidirectional; expected: true or false"),
        ({"activation": "LeakyReLU"}, "not supported .*key: activation"),
        ({"n_q": 100000}, "bad value .*key: n_q; expected: at most 256"),
        ({"n_residual_layers": 1000}, "bad value .*key: n_residual_layers"),
        ({"sampling_rate": 8000}, "sampling rates disagree .*expected: 16000; actual: 8000"),
        ({"lstm_layers": 0}, "contradictory configuration .*use_bidirectional_lstm"),
        ({"dimension": 17}, "shape .*key: (decoder.model.0|encoder.model.15).*"),
        ({"n_q": 5}, r"weight is missing .*key: quantizer.vq.layers.4._codebook"),
        ({"n_q": 3}, r"unknown weight .*key: quantizer.vq.layers.3._codebook"),
        ({"codebook_size": 1 << 24}, r"shape .*_codebook"),
        ({"n_filters": 1 << 16, "strides": [2] * 8}, "bad value .*key: strides; expected: .* at most 1048576"),
        ({"strides": [5000, 5, 4, 2]}, "bad value .*key: strides; expected: at most 4096 each"),
        ({"n_filters": 1 << 20}, "bad value .*key: n_filters; expected: at most 65536"),
    ],
)
def test_configuration_is_refused(one_pack, tmp_path, changes, message):
    edit_config(one_pack, **changes)
    refused(one_pack, tmp_path, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "root of the document is not a mapping"),
        ("{", "not valid JSON"),
        ('{"n_q": 1, "n_q": 2}', "key occurs twice"),
        ('{"n_q": NaN}', "not a finite number"),
        ("[" * 100_000, "not valid JSON"),
        ("", "file is empty"),
    ],
)
def test_json_is_refused(one_pack, tmp_path, text, message):
    (one_pack / "config.json").write_text(text, encoding="utf-8")
    refused(one_pack, tmp_path, message)


# -- weights that are refused -----------------------------------------------------------------------------------------
def test_unknown_missing_and_misshapen_weights(pack, tmp_path):
    name, intact = "decoder.model.0.conv.conv.weight_v", weights_file(pack).read_bytes()
    for change, message in (
        (
            lambda state: state.update({"extra.weight": torch.zeros(2)}),
            r"unknown weight .*key: extra.weight; actual: \(2,\)",
        ),
        (lambda state: state.pop(name), f"weight is missing .*key: {name}"),
        (lambda state: state.update({name: state[name][:, :-1].clone()}), f"shape .*key: {name}; expected: "),
        (lambda state: state.update({name: state[name].double()}), "type of weights .*expected: float32"),
    ):
        edit_weights(pack, change)
        refused(pack, tmp_path, message)
        weights_file(pack).write_bytes(intact)


def test_damaged_and_hostile_weights(one_pack, tmp_path):
    path = one_pack / "SpeechTokenizer.pt"
    intact = path.read_bytes()

    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"encoder.model.0.conv.conv.bias": Bomb()}, path)
    refused(one_pack, tmp_path, "callable that no state dict needs", UnsafeArtifactError)
    path.write_bytes(intact)
    edit_weights(one_pack, lambda state: state["encoder.model.0.conv.conv.bias"].fill_(float("nan")))
    refused(one_pack, tmp_path, "weight is not finite .*encoder.model.0.conv.conv.bias", UnsafeArtifactError)
    for size in (0, 10, len(intact) // 2, len(intact) - 1):
        path.write_bytes(intact[:size])
        refused(one_pack, tmp_path, "file is empty|zip", ConversionError)
    path.unlink()
    path.mkdir()
    refused(one_pack, tmp_path, "not a regular file", UnsafeArtifactError)


def test_weights_are_one_file(one_pack, tmp_path):
    shutil.copyfile(one_pack / "SpeechTokenizer.pt", one_pack / "ckpt.dev")
    refused(one_pack, tmp_path, "no single file of weights")
    for name in ("SpeechTokenizer.pt", "ckpt.dev"):
        (one_pack / name).unlink()
    refused(one_pack, tmp_path, "expected: one of SpeechTokenizer.pt, ckpt.dev, SpeechTokenizer_best_dev.pt")
    with pytest.raises(ConversionError, match="pack is not a directory"):
        convert_speechtokenizer_pack(one_pack / "config.json", tmp_path / "out")


# -- the way back -----------------------------------------------------------------------------------------------------
def test_export_refuses_what_upstream_cannot_have(tmp_path):
    model = tiny_codec()
    model.remove_weight_norm()
    model.save_pretrained(tmp_path / "folded")
    with pytest.raises(ConversionError, match="weight norm was folded"):
        export_speechtokenizer_pack(tmp_path / "folded", tmp_path / "pack")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "encodec"}', encoding="utf-8")
    with pytest.raises(ConversionError, match="another model .*expected: speechtokenizer; actual: encodec"):
        export_speechtokenizer_pack(tmp_path / "other", tmp_path / "pack")
    tiny_codec(codebook_decay=0.9).save_pretrained(tmp_path / "decay")
    warnings = export_speechtokenizer_pack(tmp_path / "decay", tmp_path / "pack")["warnings"]
    assert warnings == ["codebook_decay: upstream always has 0.99, the model 0.9"]
    with pytest.raises(ConversionError, match="output directory is not empty"):
        export_speechtokenizer_pack(tmp_path / "decay", tmp_path / "pack")


def test_command_line(one_pack, tmp_path, capsys):
    assert main([str(one_pack), str(tmp_path / "model")]) == 0
    assert json.loads(capsys.readouterr().out)["model_type"] == "speechtokenizer"
    assert main(["--reverse", str(tmp_path / "model"), str(tmp_path / "pack2")]) == 0
    assert {path.name for path in (tmp_path / "pack2").iterdir()} == {"config.json", "SpeechTokenizer.pt"}
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err.startswith("error: pack is not a directory")
