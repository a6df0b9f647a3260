"""SenseVoice packs to model folders and back, and what is refused on the way."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCTC, AutoProcessor


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "conversion"))
try:
    from convert_sensevoice import convert_sensevoice_pack, export_sensevoice_pack
finally:
    sys.path.remove(str(ROOT / "conversion"))

from hf_speechllm.upstream.errors import ConversionError  # noqa: E402
from hf_speechllm.upstream.nnet_mvn import read_nnet_mvn  # noqa: E402


CASE = ROOT / "tests" / "golden" / "funasr" / "sensevoice_tiny"
PACK_FILES = ("am.mvn", "config.yaml", "configuration.json", "model.pt", "tiny_spectok.bpe.model")


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "model"
    convert_sensevoice_pack(CASE, folder)
    return folder


@pytest.fixture
def pack(tmp_path) -> Path:
    """A copy of the golden pack to tamper with."""
    folder = tmp_path / "pack"
    folder.mkdir()
    for name in PACK_FILES:
        shutil.copyfile(CASE / name, folder / name)
    return folder


def state_of(pack: Path) -> dict[str, torch.Tensor]:
    return torch.load(pack / "model.pt", weights_only=True)


def edit_yaml(pack: Path, change) -> None:
    path = pack / "config.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(yaml.safe_dump(content), encoding="utf-8")


def test_report_and_special_ids(converted):
    report = json.loads((converted / "conversion_report.json").read_text(encoding="utf-8"))
    assert report["upstream_model"] == "SenseVoiceSmall" and report["parameters"] == 109_668
    assert set(report["inputs"]) == set(PACK_FILES) - {"configuration.json"}
    assert {"model.safetensors", "tokenizer.json", "sanm.py", "upstream_bpe.model"} <= set(report["outputs"])
    assert "encoder_conf.pos_enc_class" in report["ignored_keys"] and "model_conf" not in report["ignored_keys"]
    # The tiny vocabulary is not the published one, for which upstream's code has the ids.
    assert any("<|zh|> is unit 3; upstream's code takes 24884" in warning for warning in report["warnings"])

    special = json.loads((CASE / "case.json").read_text(encoding="utf-8"))["special_ids"]
    config = AutoModelForCTC.from_pretrained(converted).config
    for table in ("language", "emotion", "event", "textnorm"):
        found = getattr(config, f"{table}_token_ids")
        assert found and all(special[f"<|{name}|>"] == unit for name, unit in found.items())
    assert config.num_hidden_layers == 5 and config.num_timestamp_prediction_layers == 2
    assert config.num_prompts == 16 and config.input_size == 560


def test_processor_has_the_front_end_of_the_pack(converted):
    extractor = AutoProcessor.from_pretrained(converted).feature_extractor
    shift, scale = read_nnet_mvn(CASE / "am.mvn")
    assert torch.equal(torch.tensor(extractor.cmvn_mean), -shift)
    assert torch.equal(torch.tensor(extractor.cmvn_inverse_std), scale)
    assert (extractor.lfr_m, extractor.lfr_n, extractor.window_type, extractor.dither) == (7, 6, "hamming", 0.0)


def test_there_and_back_again(converted, tmp_path):
    """Model folder → pack → model folder is identical, and the pack's weights are the golden ones."""
    report = export_sensevoice_pack(converted, tmp_path / "pack")
    assert set(report["outputs"]) == {"am.mvn", "bpe.model", "config.yaml", "configuration.json", "model.pt"}
    ours, theirs = state_of(tmp_path / "pack"), state_of(CASE)
    assert sorted(ours) == sorted(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (tmp_path / "pack" / "bpe.model").read_bytes() == (CASE / "tiny_spectok.bpe.model").read_bytes()
    written = yaml.safe_load((tmp_path / "pack" / "config.yaml").read_text(encoding="utf-8"))
    golden = yaml.safe_load((CASE / "config.yaml").read_text(encoding="utf-8"))
    for section in ("encoder_conf", "model_conf", "frontend_conf"):
        shared = set(written[section]) & set(golden[section])
        assert len(shared) > 3 and all(written[section][key] == golden[section][key] for key in shared)

    convert_sensevoice_pack(tmp_path / "pack", tmp_path / "again")
    for path in converted.iterdir():
        if path.is_file() and path.name != "conversion_report.json":
            assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_checkpoint_of_a_trainer(pack, tmp_path, converted):
    """Wrapped weights under `module.`, and keys that a training run adds to the configuration."""
    wrapped = {f"module.{name}": tensor for name, tensor in state_of(pack).items()}
    torch.save({"epoch": 3, "state_dict": wrapped, "optimizer": {}}, pack / "model.pt")
    edit_yaml(
        pack,
        lambda c: c.update(
            optim="adamw", optim_conf={"lr": 2e-5}, train_conf={"max_epoch": 1}, vocab_size=132, seed=0
        ),
    )
    convert_sensevoice_pack(pack, tmp_path / "out")
    one, other = (load_file(folder / "model.safetensors") for folder in (converted, tmp_path / "out"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def change_weights(change):
    def tamper(pack):
        state = state_of(pack)
        change(state)
        torch.save(state, pack / "model.pt")

    return tamper


def change_yaml(*keys, value):
    def tamper(pack):
        def change(content):
            for key in keys[:-1]:
                content = content.setdefault(key, {})
            content[keys[-1]] = value

        edit_yaml(pack, change)

    return tamper


def rename_tag(pack):
    path = pack / "tiny_spectok.bpe.model"
    path.write_bytes(path.read_bytes().replace(b"<|woitn|>", b"<|w0itn|>"))


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (change_weights(lambda s: s.pop("encoder.tp_norm.bias")), "layers.4.final_layernorm.bias"),
        (change_weights(lambda s: s.update(extra=torch.zeros(1))), "unknown weight.*extra"),
        (change_weights(lambda s: s.update({"encoder.encoders.0.odd": torch.zeros(1)})), "encoders.0.odd"),
        (change_weights(lambda s: s.update({"ctc.ctc_lo.bias": torch.zeros(3)})), "shape.*ctc_head.bias"),
        (change_weights(lambda s: s.update({"ctc.ctc_lo.weight": torch.zeros(3, 32)})), "ctc.ctc_lo.weight"),
        (change_weights(lambda s: s.update({"embed.weight": torch.zeros(16, 80)})), "embed.weight"),
        (change_weights(lambda s: s.update({"embed.weight": torch.zeros(9, 560)})), "language_prompt_ids.ja"),
        (change_weights(lambda s: s.update({"ctc.ctc_lo.bias": torch.zeros(132).double()})), "types of weights"),
        (
            change_weights(lambda s: s.update({"encoder.encoders.1.self_attn.linear_q_k_v.bias": torch.zeros(95)})),
            "encoders.1.self_attn.linear_q_k_v.bias",
        ),
        (change_yaml("encoder_conf", "num_blocks", value=4), "disagree.*encoder.encoders"),
        (change_yaml("encoder_conf", "tp_blocks", value=0), "disagree.*encoder.tp_encoders"),
        (change_yaml("encoder_conf", "kernel_size", value=9), "fsmn_block"),
        (change_yaml("encoder_conf", "surprise", value=1), "unknown key.*encoder_conf.surprise"),
        (change_yaml("encoder_conf", "attention_heads", value=0), "encoder_conf.attention_heads"),
        (change_yaml("encoder_conf", "attention_heads", value=5), "contradictory"),
        (change_yaml("encoder_conf", "concat_after", value=True), "not supported.*concat_after"),
        (change_yaml("encoder", value="SANMEncoder"), "not supported.*encoder"),
        (change_yaml("model", value="Paraformer"), "not supported.*model"),
        (change_yaml("surprise", value=1), "unknown key.*surprise"),
        (change_yaml("ctc_conf", "dropout_rate", value=0.5), "ctc_conf.dropout_rate"),
        (change_yaml("frontend_conf", "upsacle_samples", value=False), "upsacle_samples"),
        (change_yaml("frontend_conf", "window", value="hann"), "frontend_conf.window"),
        (change_yaml("frontend_conf", "n_mels", value=40), "am.mvn|embed.weight"),
        (change_yaml("input_size", value=80), "input_size"),
        (change_yaml("model_conf", "blank_id", value=500), "blank"),
        (rename_tag, "tags are missing.*woitn"),
        (lambda pack: (pack / "am.mvn").unlink(), "am.mvn"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_left(pack, tmp_path, tamper, message):
    tamper(pack)
    with pytest.raises(ConversionError, match=message):
        convert_sensevoice_pack(pack, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pack"]


def test_export_needs_the_sentencepiece_model(converted, tmp_path):
    shutil.copytree(converted, tmp_path / "model")
    (tmp_path / "model" / "upstream_bpe.model").unlink()
    with pytest.raises(ConversionError, match="upstream_bpe.model"):
        export_sensevoice_pack(tmp_path / "model", tmp_path / "pack")
    with pytest.raises(ConversionError, match="config.json"):
        export_sensevoice_pack(CASE, tmp_path / "pack")
    assert not (tmp_path / "pack").exists()
