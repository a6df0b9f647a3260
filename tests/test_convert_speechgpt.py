"""Units and unit vocoders of SpeechGPT to model folders: golden values, reports, and what is refused on the way."""

import json
import shutil
import struct
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_speechgpt_readers import wrapped_array
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForTextToWaveform


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "conversion"))
try:
    from check_parity import check_case
    from convert_speechgpt import convert_speechgpt_pack
    from convert_speechgpt_units import parse_conv_layers
finally:
    sys.path.remove(str(ROOT / "conversion"))

from hf_speechllm.upstream.errors import ConversionError, UnsafeArtifactError  # noqa: E402
from hf_speechllm.upstream.fairseq_checkpoint import read_fairseq_checkpoint  # noqa: E402


GOLDEN = ROOT / "tests" / "golden" / "speechgpt"
UNITS, LJ, EXPRESSO = (
    GOLDEN / name for name in ("units_hubert_base_like", "vocoder_lj_dur", "vocoder_expresso_spk_style")
)
HUBERT_FILE, KMEANS_FILE = "mhubert_base_vp_en_es_fr_it3.pt", "mhubert_base_vp_en_es_fr_it3_L11_km1000.bin"


@pytest.mark.parametrize(("case", "count"), [(UNITS, 13), (LJ, 9), (EXPRESSO, 2)], ids=lambda value: str(value)[-20:])
def test_golden_values(case, count, capsys):
    assert check_case(case) == (count, 0), capsys.readouterr().out


@pytest.fixture
def pack(tmp_path, request) -> Path:
    """A copy of a golden pack to tamper with: `UNITS`, or what the test asks for."""
    source = getattr(request, "param", UNITS)
    folder = tmp_path / "pack"
    folder.mkdir()
    for path in source.iterdir():
        if path.name not in ("case.json", "io.safetensors"):
            shutil.copyfile(path, folder / path.name)
    return folder


def refuse(pack: Path, message: str, error: type = ConversionError, **options) -> None:
    with pytest.raises(error, match=message):
        convert_speechgpt_pack(pack, pack.parent / "out", **options)
    assert sorted(path.name for path in pack.parent.iterdir()) == ["pack"], "something was left behind"


# ---------------------------------------------------------------------------------------------------------------------
# Units


class Dictionary:
    """In the place of fairseq's."""


def write_hubert(pack: Path, change=None, **entries) -> None:
    """The golden checkpoint again after `change(model, model config, task config)`."""
    checkpoint = read_fairseq_checkpoint(UNITS / HUBERT_FILE)
    state = OrderedDict((name, tensor.clone()) for name, tensor in checkpoint.weights.items())
    model, task = dict(checkpoint.model_config), dict(checkpoint.task_config)
    if change is not None:
        change(state, model, task)
    content = {"args": None, "cfg": {"model": model, "task": task}, "model": state}
    torch.save({**content, "task_state": {"dictionaries": [Dictionary()]}, **entries}, pack / HUBERT_FILE)


def test_report_of_units(pack):
    report = convert_speechgpt_pack(pack, pack.parent / "out", layer=3)
    assert json.loads((pack.parent / "out" / "conversion_report.json").read_text()) == report
    assert (report["layer"], report["num_units"], report["model_type"]) == (3, 12, "speechgpt_units")
    assert set(report["inputs"]) == {HUBERT_FILE, KMEANS_FILE} and "model.safetensors" in report["outputs"]
    assert report["ignored_weights"] == ["final_proj.bias", "final_proj.weight", "label_embs_concat", "mask_emb"]
    assert report["warnings"] == [
        f"{KMEANS_FILE}: the name says layer 11 and 1000 clusters; taken: layer 3, 12 clusters"
    ]
    names = {path.name for path in (pack.parent / "out").iterdir()}
    assert {"config.json", "preprocessor_config.json", "modeling_speechgpt_units.py"} <= names
    assert not AutoFeatureExtractor.from_pretrained(pack.parent / "out").do_normalize


def test_layer_from_the_name(pack):
    (pack / KMEANS_FILE).rename(pack / "hubert_L2_km12.bin")
    report = convert_speechgpt_pack(pack, pack.parent / "out")
    assert report["layer"] == 2 and report["warnings"] == []
    assert AutoModel.from_pretrained(pack.parent / "out").config.layer == 2


def test_layer_that_nothing_tells(pack):
    (pack / KMEANS_FILE).rename(pack / "km.bin")
    refuse(pack, "the layer is not known")
    (pack / "km.bin").rename(pack / KMEANS_FILE)
    refuse(pack, r"no such layer .*expected: 1\.\.4; actual: 11")


def test_normalize_of_the_task(pack):
    write_hubert(pack, lambda state, model, task: task.update(normalize=True))
    convert_speechgpt_pack(pack, pack.parent / "out", layer=3)
    config = AutoModel.from_pretrained(pack.parent / "out").config
    assert config.normalize is True and config.normalize_eps == 1e-5


def test_weights_in_half_precision_are_computed_in_float32(pack):
    write_hubert(pack, lambda state, *_: state.update({name: tensor.half() for name, tensor in state.items()}))
    convert_speechgpt_pack(pack, pack.parent / "out", layer=3)
    assert AutoModel.from_pretrained(pack.parent / "out").dtype == torch.float32


def test_network_without_a_projection(pack):
    """Upstream has none where the convolutions are as wide as the transformer."""

    def widen(state, model, task):
        model["conv_feature_layers"] = "[(10,10,5)] + [(10,3,2)] * 4 + [(10,2,2)] + [(24,2,2)]"
        for name in ("post_extract_proj.weight", "post_extract_proj.bias"):
            del state[name]
        state["feature_extractor.conv_layers.6.0.weight"] = torch.randn(24, 10, 2)
        state["layer_norm.weight"], state["layer_norm.bias"] = torch.ones(24), torch.zeros(24)

    write_hubert(pack, widen)
    convert_speechgpt_pack(pack, pack.parent / "out", layer=3)
    model = AutoModel.from_pretrained(pack.parent / "out").eval()
    vectors = torch.randn(2, 5, 24)
    torch.testing.assert_close(
        model.hubert.feature_projection(vectors), torch.nn.functional.layer_norm(vectors, (24,)), atol=0, rtol=0
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state, model, task: model.update(unheard_of=1), "unknown key .*model.unheard_of"),
        (lambda state, model, task: task.update(unheard_of=1), "unknown key .*task.unheard_of"),
        (lambda state, model, task: model.update(_name="wav2vec2"), "model._name; expected: 'hubert'"),
        (lambda state, model, task: model.update(layer_type="conformer"), "model.layer_type"),
        (lambda state, model, task: model.update(pos_enc_type="rope"), "model.pos_enc_type"),
        (lambda state, model, task: model.update(activation_fn="swish"), "model.activation_fn"),
        (lambda state, model, task: model.update(encoder_layers="4"), "model.encoder_layers"),
        (
            lambda state, model, task: model.update(encoder_layers=10**6),
            "encoder.layers; expected: 1000000; actual: 4",
        ),
        (lambda state, model, task: model.update(encoder_ffn_embed_dim=41), "fc1.weight"),
        (
            lambda state, model, task: model.update(encoder_attention_heads=5),
            "contradictory configuration .*num_heads",
        ),
        (lambda state, model, task: model.update(conv_feature_layers="__import__('os')"), "conv_feature_layers"),
        (lambda state, model, task: model.update(conv_bias=True), "conv_layers.0.conv.bias; .*missing"),
        (lambda state, model, task: model.update(conv_pos=15), "pos_conv_embed"),
        (lambda state, model, task: model.update(extractor_mode="layer_norm"), "conv_layers.1.layer_norm"),
        (lambda state, model, task: model.update(conv_pos_batch_norm=True), "pos_conv.0.weight_g"),
        (lambda state, model, task: state.update(extra=torch.ones(2)), "unknown weight .*key: extra"),
        (lambda state, model, task: state.pop("encoder.layers.1.fc2.bias"), "layers.1.feed_forward.output_dense.bias"),
        (lambda state, model, task: state.update({"layer_norm.weight": torch.ones(3)}), "layer_norm.weight"),
        (lambda state, model, task: state.update(w=torch.tensor([float("inf")])), "not finite"),
    ],
)
def test_wrong_checkpoints(pack, change, message):
    write_hubert(pack, change)
    refuse(pack, message, layer=3)


def test_centres_of_another_network(pack):
    (pack / KMEANS_FILE).write_bytes(wrapped_array(b"K\x02K\x03\x86", tail=struct.pack("<6f", *range(6))))
    refuse(pack, r"centres are not of this network .*\(clusters, 24\); actual: \(2, 3\)", layer=3)


def test_files_of_units(pack):
    shutil.copyfile(pack / HUBERT_FILE, pack / "second.pt")
    refuse(pack, "no single fairseq checkpoint .*second.pt", layer=3)
    (pack / "second.pt").unlink()
    shutil.copyfile(pack / KMEANS_FILE, pack / "second.km")
    refuse(pack, "no single k-means model", layer=3)
    (pack / KMEANS_FILE).unlink()
    (pack / "second.km").unlink()
    refuse(pack, "not a pack of SpeechGPT")
    with pytest.raises(ConversionError, match="not a directory"):
        convert_speechgpt_pack(pack / HUBERT_FILE, pack.parent / "out")


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("[(512,10,5)] + [(512,3,2)] * 2 + [(512,2,2)]", [(512, 10, 5), (512, 3, 2), (512, 3, 2), (512, 2, 2)]),
        (" [(4, 3, 2), (5, 2, 1)]", [(4, 3, 2), (5, 2, 1)]),
        ("([(4,3,2)]*2)*2", [(4, 3, 2)] * 4),
    ],
)
def test_conv_layers(text, layers):
    assert parse_conv_layers(text, Path("file")) == layers


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "x",
        "[(1,2)]",
        "[(1,2,3.0)]",
        "[(1,2,0)]",
        "[(1,2,3)]*65",
        "[(1,2,3)]*10**9",
        "exit()",
        "(" * 900,
        "[" * 200,
    ],
)
def test_conv_layers_that_are_none(text):
    with pytest.raises(ConversionError, match="conv_feature_layers"):
        parse_conv_layers(text, Path("file"))


# ---------------------------------------------------------------------------------------------------------------------
# Vocoders

lj = pytest.mark.parametrize("pack", [LJ], indirect=True)
expresso = pytest.mark.parametrize("pack", [EXPRESSO], indirect=True)


def edit_config(pack: Path, **changes) -> None:
    content = json.loads((pack / "config.json").read_text())
    content |= changes
    (pack / "config.json").write_text(json.dumps({key: value for key, value in content.items() if value != "gone"}))


def edit_state(pack: Path, change) -> None:
    path = next(path for path in pack.iterdir() if path.name in ("g_00500000", "generator.pt"))
    state = torch.load(path, weights_only=True)["generator"]
    change(state)
    torch.save({"generator": state}, path)


@expresso
def test_report_and_names_of_voices(pack):
    report = convert_speechgpt_pack(pack, pack.parent / "out")
    assert report["model_type"] == "speechgpt_unit_vocoder" and report["ignored_weights"] == []
    assert set(report["inputs"]) == {"config.json", "generator.pt", "speakers.txt", "styles.txt"}
    assert "dist_config" in report["ignored_keys"] and "f0" not in report["ignored_keys"]
    model = AutoModelForTextToWaveform.from_pretrained(pack.parent / "out")
    assert model.config.speakers == [f"spk{n}" for n in range(5)]
    assert model.config.styles == ["default", "happy", "whisper", "sad"]
    tensors = load_file(EXPRESSO / "io.safetensors")
    wave = model.synthesize(tensors["code_frames"][0], speaker="spk3", style="whisper")
    torch.testing.assert_close(wave, tensors["waveform_frames"], atol=2e-5, rtol=0)


@lj
def test_dispatch_and_options(pack):
    refuse(pack, "--layer is for units", layer=3)
    shutil.copyfile(pack / "g_00500000", pack / "vocoder.pt")
    refuse(pack, "no single checkpoint")


@lj
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unheard_of": 1}, "unknown key .*unheard_of"),
        ({"model_in_dim": 17}, "contradictory .*model_in_dim"),
        ({"model_in_dim": "gone"}, "contradictory .*model_in_dim"),
        ({"multispkr": True}, "contradictory .*expected 32"),
        ({"num_embeddings": 41}, "dict.weight"),
        ({"upsample_rates": [5, 4, 4, 2]}, "ups; expected: 4; actual: 5|contradictory"),
        ({"upsample_rates": "x"}, "upsample_rates"),
        ({"upsample_rates": [5, 4, 4, 2, 0]}, "upsample_rates"),
        ({"upsample_kernel_sizes": [10, 8, 8, 4, 4]}, "upsampler.0.weight"),
        ({"resblock_kernel_sizes": [3, 5]}, "resblock_dilation_sizes"),
        ({"resblock_kernel_sizes": [3, 5, 9]}, "resblocks.2"),
        ({"resblock_dilation_sizes": [[1, 3]] * 3}, "resblock_dilation_sizes.0."),
        ({"upsample_initial_channel": 128}, "conv_pre"),
        ({"embedding_dim": "gone"}, "embedding_dim"),
        ({"sampling_rate": 0}, "sampling_rate"),
        ({"dur_predictor_params": {"encoder_embed_dim": 9}}, "dur_predictor_params|durations"),
        ({"dur_predictor_params": None}, "unknown weight .*dur_predictor"),
    ],
)
def test_wrong_vocoder_configurations(pack, changes, message):
    edit_config(pack, **changes)
    refuse(pack, message)


@lj
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.update(extra=torch.ones(1)), "unknown weight .*extra"),
        (lambda state: state.update({"style.weight": torch.ones(1, 1)}), "unknown weight .*style.weight"),
        (lambda state: state.pop("ups.1.bias"), "generator.upsampler.1.bias"),
        (lambda state: state.pop("ups.1.weight_g"), "unknown weight .*ups.1.weight_v"),
        (lambda state: state.pop("ups.1.weight_v"), "unknown weight .*ups.1.weight_g"),
        (lambda state: state["ups.1.weight_v"].zero_(), "no direction"),
        (lambda state: state.update({"ups.1.weight_g": torch.ones(3, 1, 1)}), "length of a normalised weight"),
        (lambda state: state.update({"dict.weight": torch.full((40, 16), float("nan"))}), "not finite"),
        (lambda state: state.update({"dur_predictor.proj.bias": torch.ones(2)}), "duration_predictor.proj.bias"),
    ],
)
def test_wrong_vocoder_weights(pack, change, message):
    edit_state(pack, change)
    refuse(pack, message)


@lj
def test_parts_that_upstream_builds_and_never_uses(pack):
    """A projection of speakers without `multispkr`, and pitch bins without `f0`."""
    edit_config(pack, embedder_params={"x": 1}, f0_quant_num_bin=8)
    edit_state(
        pack,
        lambda state: state.update(
            {
                "spkr.weight": torch.ones(16, 256),
                "spkr.bias": torch.ones(16),
                "f0_quant_embed.weight": torch.ones(8, 16),
            }
        ),
    )
    report = convert_speechgpt_pack(pack, pack.parent / "out")
    assert report["ignored_weights"] == ["f0_quant_embed.weight", "spkr.bias", "spkr.weight"]


@lj
def test_plain_weights_are_taken_as_they_are(pack):
    """A checkpoint whose weight norm has been removed."""

    def fold(state):
        for name in [name for name in state if name.endswith("weight_v")]:
            direction, length = state.pop(name), state.pop(name[:-1] + "g")
            state[name[:-2]] = direction * length / torch.norm_except_dim(direction, 2, 0)

    convert_speechgpt_pack(pack, pack.parent / "normal")
    edit_state(pack, fold)
    convert_speechgpt_pack(pack, pack.parent / "plain")
    normal, plain = (AutoModel.from_pretrained(pack.parent / name).state_dict() for name in ("normal", "plain"))
    for name, tensor in normal.items():
        torch.testing.assert_close(plain[name], tensor, atol=1e-6, rtol=1e-5)


@expresso
@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("speakers.txt", "a\nb\nc\nd\ne\nf\n", ConversionError),
        ("styles.txt", "a\na\n", ConversionError),
        ("styles.txt", "\ufeffa\n", UnsafeArtifactError),
        ("config.json", '{"upsample_rates": [1], "upsample_rates": [2]}', UnsafeArtifactError),
        ("config.json", '{"upsample_rates": NaN}', UnsafeArtifactError),
    ],
)
def test_wrong_text_files(pack, name, text, error):
    (pack / name).write_text(text, encoding="utf-8")
    refuse(pack, name, error)


@expresso
def test_hostile_vocoder(pack):
    torch.save({"generator": {"conv_pre.bias": Dictionary()}}, pack / "generator.pt")
    refuse(pack, "callable", UnsafeArtifactError)
