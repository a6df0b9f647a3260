"""Conversion of CosyVoice's language models: both directions, trainers' checkpoints, hostile and wrong packs."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_cosyvoice_lm import build

from hf_speechllm.upstream.checkpoints import read_state_dict
from hf_speechllm.upstream.errors import ConversionError, UnsafeArtifactError
from hf_speechllm.upstream.hyperpyyaml import read_hyperpyyaml


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "conversion"))
import cosyvoice_lm as conversion  # noqa: E402


GOLDEN = Path(__file__).parent / "golden" / "cosyvoice"
every_version = pytest.mark.parametrize("version", (1, 2, 3))


def copy_of(version: int, folder: Path) -> Path:
    """A pack that may be changed."""
    pack = folder / "pack"
    shutil.copytree(GOLDEN / f"v{version}_lm", pack)
    return pack


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def yaml_of(pack: Path) -> Path:
    return next(pack.glob("cosyvoice*.yaml"))


def change_weights(pack: Path, change) -> None:
    state = torch.load(pack / "llm.pt", weights_only=True)
    change(state)
    torch.save(state, pack / "llm.pt")


@every_version
def test_there_and_back_is_identical(version, tmp_path):
    """Upstream → ours → upstream: every tensor and setting; and → ours again: every byte of the weights."""
    pack = GOLDEN / f"v{version}_lm"
    report = conversion.convert(pack, tmp_path / "ours")
    assert set(report["inputs"]) >= {"llm.pt", yaml_of(pack).name} and "model.safetensors" in report["outputs"]
    back = conversion.restore(tmp_path / "ours", tmp_path / "pack")
    assert "llm.pt" in back["outputs"]
    before, after = (read_state_dict(folder / "llm.pt") for folder in (pack, tmp_path / "pack"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    conversion.convert(tmp_path / "pack", tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    if version > 1:
        head, table = (after[f"llm.model.{name}.weight"] for name in ("lm_head", "model.embed_tokens"))
        assert head.data_ptr() == table.data_ptr()
        qwen = load_file(tmp_path / "pack" / "CosyVoice-BlankEN" / "model.safetensors")
        assert torch.equal(qwen["model.embed_tokens.weight"], table) and "lm_head.weight" not in qwen
        # What upstream's file holds beyond its own storage would be a whole table more.
        assert (tmp_path / "pack" / "llm.pt").stat().st_size < 1.5 * (pack / "llm.pt").stat().st_size


@every_version
def test_our_model_goes_to_upstream_and_back(version, tmp_path):
    model = build(version)
    model.save_pretrained(tmp_path / "ours")
    conversion.restore(tmp_path / "ours", tmp_path / "pack")
    conversion.convert(tmp_path / "pack", tmp_path / "again")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "again"))
    assert one.keys() == two.keys()
    used = model.config.vocab_size if version == 1 else conversion_rows(model.config)
    for name, tensor in one.items():
        rows = used if name == "model.embed_tokens.weight" else None
        assert torch.equal(tensor[:rows], two[name][:rows]), name


def conversion_rows(config) -> int:
    return config.text_vocab_size + config.num_speech_rows + config.num_condition_rows


@every_version
def test_trainers_checkpoints_and_other_files_of_weights(version, tmp_path):
    pack = copy_of(version, tmp_path)
    change_weights(pack, lambda state: state.update(epoch=3, step=torch.tensor(7)))
    (pack / "llm.pt").rename(pack / "llm.rl.pt")
    conversion.convert(pack, tmp_path / "rl", "llm.rl.pt")
    conversion.convert(GOLDEN / f"v{version}_lm", tmp_path / "plain")
    one, two = (tmp_path / name / "model.safetensors" for name in ("rl", "plain"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("version", "change", "message"),
    [
        (1, lambda state: state.pop("llm_decoder.bias"), "lm_head.bias"),
        (1, lambda state: state.update({"extra.weight": torch.zeros(1)}), "extra.weight"),
        (1, lambda state: state.update({"llm.encoders.0.conv.weight": torch.zeros(1)}), "llm.encoders.0.conv.weight"),
        (
            1,
            lambda state: state.update({"llm_embedding.weight": torch.zeros(3, 32)}),
            r"llm_embedding.weight.*\(2, 32\)",
        ),
        (2, lambda state: state.pop("llm_embedding.weight"), "llm_embedding.weight"),
        (2, lambda state: state.pop("llm_decoder.bias"), "lm_head.bias"),
        (2, lambda state: state.update({"llm.model.lm_head.weight": torch.zeros(64, 32)}), "lm_head.weight"),
        (
            2,
            lambda state: state.update({"speech_embedding.weight": torch.zeros(42, 32)}),
            r"speech_embedding.*\(43, 32\)",
        ),
        (2, lambda state: state.update({"llm.model.model.layers.0.extra": torch.zeros(1)}), "layers.0.extra"),
        (3, lambda state: state.update({"llm_embedding.weight": torch.zeros(2, 32)}), "llm_embedding.weight"),
        (3, lambda state: state.update({"llm_decoder.bias": torch.zeros(240)}), "lm_head.bias"),
        (3, lambda state: state.update({"llm_decoder.weight": torch.zeros(240, 32).long()}), "type"),
        (3, lambda state: state.update({"llm_decoder.weight": torch.full((240, 32), float("nan"))}), "not finite"),
    ],
)
def test_wrong_weights_are_named(version, change, message, tmp_path):
    pack = copy_of(version, tmp_path)
    change_weights(pack, change)
    with pytest.raises(ConversionError, match=message):
        conversion.convert(pack, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("version", "old", "new", "message"),
    [
        (1, "TransformerLM", "OtherLM", "OtherLM"),
        (1, "static_chunk_size: 1\n    sampling", "static_chunk_size: 4\n    sampling", "llm.llm.static_chunk_size"),
        (1, "use_cnn_module: False", "use_cnn_module: True", "text_encoder.use_cnn_module"),
        (1, "'rel_pos_espnet'", "'abs_pos'", "pos_enc_layer_type"),
        (1, "input_layer: 'linear'", "input_layer: 'conv2d'", "input_layer"),
        (1, "lsm_weight: 0.0", "lsm_weight: 2.0", "lsm_weight"),
        (1, "text_token_size: 60", "text_tokens: 60", "text_token"),
        (1, "spk_embed_dim: 192", "spk_embed_dim: 192\n    dream: 1", "llm.dream"),
        (2, "mix_ratio: [5, 15]", "mix_ratio: [5, 0]", "mix_ratio"),
        (2, "llm_input_size: 32", "llm_input_size: 16", "llm_input_size"),
        (2, "ras_sampling", "greedy_sampling", "greedy_sampling"),
        (2, "tau_r", "tau", "tau"),
        (3, "Qwen2Encoder", "Qwen3Encoder", "Qwen3Encoder"),
        (3, "speech_token_size: 40", "speech_token_size: -1", "speech_token_size"),
    ],
)
def test_wrong_settings_are_named(version, old, new, message, tmp_path):
    pack = copy_of(version, tmp_path)
    edit(yaml_of(pack), old, new)
    with pytest.raises(ConversionError, match=message):
        conversion.convert(pack, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"num_key_value_heads": 3}, "num_attention_heads"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"quantization_config": {}}, "quantization_config"),
    ],
)
def test_wrong_qwen_settings_are_named(change, message, tmp_path):
    pack = copy_of(2, tmp_path)
    path = pack / "CosyVoice-BlankEN" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConversionError, match=message):
        conversion.convert(pack, tmp_path / "out")


def test_hostile_and_damaged_files(tmp_path):
    pack = copy_of(1, tmp_path)
    data = (pack / "llm.pt").read_bytes()

    class Runs:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    for content in (data[: len(data) // 2], b"", b"PK\x03\x04" + data[4:100]):
        (pack / "llm.pt").write_bytes(content)
        with pytest.raises(ConversionError, match=r"llm\.pt"):
            conversion.convert(pack, tmp_path / "out")
    torch.save({"weight": Runs()}, pack / "llm.pt")
    with pytest.raises(UnsafeArtifactError):
        conversion.convert(pack, tmp_path / "out")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()
    edit(yaml_of(pack), "sample_rate: 22050", "sample_rate: !!python/object/apply:os.system ['true']")
    with pytest.raises(UnsafeArtifactError):
        conversion.convert(pack, tmp_path / "out")
    yaml_of(pack).unlink()
    with pytest.raises(ConversionError, match="no single yaml"):
        conversion.convert(pack, tmp_path / "out")


def test_only_language_models_go_back(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ConversionError, match="model_type"):
        conversion.restore(tmp_path, tmp_path / "pack")


def test_every_option_of_the_published_yaml_is_read(tmp_path):
    """Activations, layers of the input, chunks and biases that the recipes do not use but the classes know."""
    pack = copy_of(1, tmp_path)
    edit(
        yaml_of(pack),
        "static_chunk_size: 1\n    llm",
        "static_chunk_size: 0\n        activation_type: 'gelu'\n    llm",
    )
    edit(yaml_of(pack), "'linear_legacy'", "'linear'\n        key_bias: False\n        activation_type: 'swish'")
    edit(yaml_of(pack), "lsm_weight: 0.0", "lsm_weight: 0.1")
    edit(yaml_of(pack), "length_normalized_loss: True", "length_normalized_loss: False")
    config = conversion.read_config(read_hyperpyyaml(yaml_of(pack)), yaml_of(pack), pack)
    assert (config.text_encoder_chunk_size, config.text_encoder_hidden_act, config.hidden_act) == (0, "gelu", "silu")
    assert (config.rectify_input, config.key_bias, config.text_encoder_key_bias) == (False, False, True)
    assert (config.label_smoothing, config.length_normalized_loss) == (0.1, False)
    again = tmp_path / "again.yaml"
    again.write_text(conversion.upstream_yaml(config))
    assert conversion.read_config(read_hyperpyyaml(again), again, pack).to_dict() == config.to_dict()
