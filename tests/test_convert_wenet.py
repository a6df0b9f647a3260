"""WeNet packs to model folders and back: bit-equal weights, refusals by name, nothing partial after a failure."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hf_speechllm.models.modeling_wenet_u2pp import WenetU2ppForSpeechRecognition
from hf_speechllm.models.processing_wenet_u2pp import WenetU2ppProcessor
from hf_speechllm.upstream.checkpoints import read_state_dict
from hf_speechllm.upstream.errors import ConversionError, UnsafeArtifactError
from hf_speechllm.upstream.staging import sha256_of_files


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "conversion"))

import convert_wenet  # noqa: E402
from convert_wenet import convert_wenet_pack, export_wenet_pack, main  # noqa: E402


GOLDEN = Path(__file__).parent / "golden" / "wenet"
CASES = ["u2pp_conformer_tiny", "u2pp_moe_tiny", "conformer_bn_bpe_old_tiny"]
PACK_FILES = ["final.pt", "train.yaml", "units.txt", "global_cmvn"]


@pytest.fixture
def pack(tmp_path):
    return copy_pack(tmp_path, "u2pp_conformer_tiny")


def copy_pack(tmp_path: Path, case: str) -> Path:
    folder = tmp_path / "pack"
    folder.mkdir()
    for name in PACK_FILES:
        shutil.copyfile(GOLDEN / case / name, folder / name)
    return folder


def edit_yaml(folder: Path, **changes: object) -> None:
    """Sets `section__key=value` (or `key=value`); `...` removes the key."""
    path = folder / "train.yaml"
    configs = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name, value in changes.items():
        *sections, key = name.split("__")
        target = configs
        for section in sections:
            target = target.setdefault(section, {})
        if value is ...:
            del target[key]
        else:
            target[key] = value
    path.write_text(yaml.safe_dump(configs, allow_unicode=True), encoding="utf-8")


def edit_state(folder: Path, edit) -> None:
    state = {name: tensor.clone() for name, tensor in read_state_dict(folder / "final.pt").items()}
    edit(state)
    torch.save(state, folder / "final.pt")


def assert_refused(tmp_path: Path, folder: Path, *words: str, error: type[Exception] = ConversionError) -> None:
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(error) as refusal:
        convert_wenet_pack(folder, tmp_path / "out")
    for word in words:
        assert word in str(refusal.value)
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_bit_equal(tmp_path, case):
    report = convert_wenet_pack(GOLDEN / case, tmp_path / "out")
    export_wenet_pack(tmp_path / "out", tmp_path / "pack")
    convert_wenet_pack(tmp_path / "pack", tmp_path / "again")
    first, second = (sha256_of_files(tmp_path / name) for name in ("out", "again"))
    del first["conversion_report.json"], second["conversion_report.json"]
    assert first == second == report["outputs"]
    assert json.loads((tmp_path / "out" / "conversion_report.json").read_text(encoding="utf-8")) == report
    assert {"model.safetensors", "config.json", "tokenizer.json", "processor_config.json"} <= set(first)
    assert {"modeling_wenet_u2pp.py", "tokenization_wenet_u2pp.py", "feature_extraction_kaldi_fbank.py"} <= set(first)

    original, written = (read_state_dict(path / "final.pt") for path in (GOLDEN / case, tmp_path / "pack"))
    kept = {name for name in original if not re.search(r"(^|\.)pe$|concat_linear", name)}
    assert set(written) == kept
    assert set(report["ignored_weights"]) == set(original) - kept
    for name in kept:
        tensor = original[name].to(torch.int64) if name.endswith("num_batches_tracked") else original[name]
        assert torch.equal(written[name], tensor), name
    assert (tmp_path / "pack" / "units.txt").read_bytes() == (GOLDEN / case / "units.txt").read_bytes()
    model = WenetU2ppForSpeechRecognition.from_pretrained(tmp_path / "out")
    assert report["parameters"] == model.num_parameters()


@pytest.mark.parametrize("case", CASES[:2])
def test_converted_model_reproduces_upstream(tmp_path, case):
    convert_wenet_pack(GOLDEN / case, tmp_path / "out")
    expected = load_file(GOLDEN / case / "io.safetensors")
    model = WenetU2ppForSpeechRecognition.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        output = model(expected["feat0"][None]).encoder_last_hidden_state[0]
    torch.testing.assert_close(output, expected["encoder_out_full"][0, : len(output)], rtol=1e-4, atol=1e-4)
    assert len(output) == expected["encoder_lens"][0]
    assert torch.equal(model.model.encoder.cmvn.mean, expected["cmvn_mean"])


def test_processor_and_configuration(tmp_path):
    convert_wenet_pack(GOLDEN / "u2pp_conformer_tiny", tmp_path / "out")
    processor = WenetU2ppProcessor.from_pretrained(tmp_path / "out")
    assert processor.feature_extractor.dither == 1.0
    assert processor.feature_extractor.window_type == "povey"
    assert (processor.subsampling_rate, processor.right_context) == (4, 6)
    assert processor.tokenizer("的一").input_ids == [3, 4]
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    for field, value in {
        "vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 3, "intermediate_size": 40, "conv_kernel_size": 8,
        "conv_causal": True, "use_dynamic_chunk": True, "decoder_layers": 2, "right_decoder_layers": 1,
        "reverse_weight": 0.3, "ctc_weight": 0.3, "label_smoothing": 0.1, "hidden_act": "silu",
        "decoder_hidden_act": "relu", "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 0,
    }.items():  # fmt: skip
        assert config[field] == value, field


def test_flat_yaml(tmp_path):
    report = convert_wenet_pack(GOLDEN / "conformer_bn_bpe_old_tiny", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (39, 39, 0)
    assert config["conv_norm_type"] == "batch_norm" and config["right_decoder_layers"] == 0
    assert report["yaml_generation"] == "flat" and report["cmvn"] == "state dict"
    assert any("no *.model" in warning for warning in report["warnings"])


@pytest.mark.parametrize("case", ["u2pp_conformer_tiny", "conformer_bn_bpe_old_tiny"])
def test_cmvn_from_the_file(tmp_path, case):
    folder = copy_pack(tmp_path, case)
    edit_state(folder, lambda state: [state.pop(f"encoder.global_cmvn.{name}") for name in ("mean", "istd")])
    assert convert_wenet_pack(folder, tmp_path / "out")["cmvn"] == "file"
    convert_wenet_pack(GOLDEN / case, tmp_path / "direct")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "direct")]
    assert weights[0] == weights[1]
    (folder / "global_cmvn").unlink()
    assert_refused(tmp_path, folder, "global_cmvn")


def test_without_cmvn(tmp_path, pack):
    edit_state(pack, lambda state: [state.pop(f"encoder.global_cmvn.{name}") for name in ("mean", "istd")])
    edit_yaml(pack, cmvn=..., cmvn_conf=...)
    assert convert_wenet_pack(pack, tmp_path / "out")["cmvn"] == "none"
    export_wenet_pack(tmp_path / "out", tmp_path / "back")
    assert not (tmp_path / "back" / "global_cmvn").exists()
    assert convert_wenet_pack(tmp_path / "back", tmp_path / "again")["cmvn"] == "none"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "whisper"}, ["key: model", "whisper"]),
        ({"model": "transducer"}, ["key: model", "transducer"]),
        ({"encoder": "squeezeformer"}, ["key: encoder", "squeezeformer"]),
        ({"decoder": "sanm_decoder"}, ["key: decoder", "sanm_decoder"]),
        ({"ctc": "other"}, ["key: ctc", "other"]),
        ({"tokenizer": "whisper"}, ["key: tokenizer", "whisper"]),
        ({"encoder_conf__pos_enc_layer_type": "rope_pos"}, ["encoder_conf.pos_enc_layer_type", "rope_pos"]),
        ({"encoder_conf__input_layer": "conv1d2"}, ["encoder_conf.input_layer", "conv1d2"]),
        ({"encoder_conf__selfattention_layer_type": "shaw_rel_selfattn"}, ["shaw_rel_selfattn"]),
        ({"encoder_conf__concat_after": True}, ["encoder_conf.concat_after", "True"]),
        ({"encoder_conf__surprise": 1}, ["unknown key", "encoder_conf.surprise"]),
        ({"decoder_conf__surprise": 1}, ["unknown key", "decoder_conf.surprise"]),
        ({"decoder_conf__src_attention": False}, ["decoder_conf.src_attention"]),
        ({"decoder_conf__src_query_bias": False}, ["decoder_conf.src_query_bias"]),
        ({"model_conf__surprise": 1}, ["unknown key", "model_conf.surprise"]),
        ({"dataset_conf__surprise": 1}, ["unknown key", "dataset_conf.surprise"]),
        ({"dataset_conf__feats_type": "mfcc"}, ["dataset_conf.feats_type", "mfcc"]),
        ({"dataset_conf__fbank_conf__surprise": 1}, ["unknown key", "dataset_conf.fbank_conf.surprise"]),
        ({"dataset_conf__fbank_conf__num_mel_bins": 40}, ["num_mel_bins", "40"]),
        ({"tokenizer_conf__surprise": 1}, ["unknown key", "tokenizer_conf.surprise"]),
        ({"cmvn_conf__surprise": 1}, ["unknown key", "cmvn_conf.surprise"]),
        ({"surprise": {"a": 1}}, ["unknown key", "key: surprise"]),
        ({"lora_conf": {}}, ["unknown key", "lora_conf"]),
        ({"encoder_conf": [1]}, ["not a mapping", "encoder_conf"]),
        ({"encoder_conf__output_size": 17}, ["ctc.ctc_lo.weight", "17"]),
        ({"encoder_conf__output_size": "16"}, ["encoder_conf.output_size", "'16'"]),
        ({"encoder_conf__num_blocks": 10**9}, ["encoder_conf.num_blocks"]),
        ({"encoder_conf__num_blocks": 10**6}, ["encoder.encoders", "1000000"]),
        ({"encoder_conf__linear_units": 41}, ["feed_forward.w_1.weight", "41"]),
        ({"encoder_conf__cnn_module_kernel": 2**22}, ["depthwise_conv"]),
        ({"encoder_conf__attention_heads": 3}, ["heads"]),
        ({"encoder_conf__attention_heads": True}, ["encoder_conf.attention_heads", "True"]),
        ({"encoder_conf__causal": "yes"}, ["encoder_conf.causal", "'yes'"]),
        ({"encoder_conf__dropout_rate": 1.5}, ["encoder_conf.dropout_rate", "1.5"]),
        ({"encoder_conf__mlp_type": "moe"}, ["experts"]),
        ({"encoder_conf__use_cnn_module": False}, ["unknown weight", "conv"]),
        ({"encoder_conf__macaron_style": False}, ["unknown weight", "macaron"]),
        ({"encoder_conf__cnn_module_norm": "batch_norm"}, ["missing", "running_mean"]),
        ({"encoder_conf__query_bias": False}, ["unknown weight", "bias"]),
        ({"encoder_conf__head_dim": 4}, ["head"]),
        ({"decoder_conf__r_num_blocks": 2}, ["decoder.right_decoder.decoders", "2"]),
        ({"decoder_conf__num_blocks": 1}, ["decoder.left_decoder.decoders"]),
        ({"decoder_conf__tie_word_embedding": True}, ["tied weights differ"]),
        ({"decoder": "transformer", "decoder_conf__r_num_blocks": ..., "model_conf__reverse_weight": 0.0}, ["right_"]),
        ({"output_dim": 25, "vocab_size": 25}, ["output_dim 25", "24"]),
        ({"output_dim": 25}, ["vocab_size", "25", "24"]),
        ({"output_dim": ...}, ["output_dim"]),
        ({"input_dim": ...}, ["input_dim"]),
        ({"vocab_size": 30}, ["vocab_size"]),
        ({"ctc_conf__ctc_blank_id": 1}, ["<blank>"]),
        ({"tokenizer_conf__special_tokens__<sos>": 24}, ["24"]),
        ({"tokenizer_conf__special_tokens__<unk>": 99}, ["99"]),
        ({"tokenizer_conf__non_lang_syms_path": "x/syms.txt"}, ["non_lang_syms_path"]),
        ({"tokenizer": "bpe"}, ["*.model"]),
        ({"is_json_cmvn": 3, "cmvn_conf": ...}, ["is_json_cmvn"]),
    ],
)  # fmt: skip
def test_refused_configurations(tmp_path, pack, changes, words):
    edit_yaml(pack, **changes)
    assert_refused(tmp_path, pack, *words)


def rename(state, old, new):
    state[new] = state.pop(old)


WEIGHT = "encoder.encoders.1.self_attn.linear_q.weight"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda state: state.pop(WEIGHT), ["missing", "layers.1.self_attn.q_proj.weight"]),
        (lambda state: rename(state, WEIGHT, WEIGHT + "x"), ["self_attn"]),
        (lambda state: state.update({"surprise.weight": torch.ones(1)}), ["unknown weight", "surprise.weight"]),
        (lambda state: state.update({"decoder.output_layer.bias": torch.ones(24)}), ["same meaning"]),
        (lambda state: state.update({WEIGHT: state[WEIGHT].T[:8]}), ["shape", "q_proj.weight", "(8, 16)"]),
        (lambda state: state.update({WEIGHT: state[WEIGHT].double()}), ["floating point types"]),
        (lambda state: state.update({WEIGHT: state[WEIGHT].long()}), ["type", "q_proj.weight"]),
        (lambda state: state.pop("ctc.ctc_lo.weight"), ["ctc.ctc_lo.weight"]),
        (lambda state: state.pop("encoder.global_cmvn.istd"), ["encoder.global_cmvn.istd"]),
        (
            lambda state: rename(state, "encoder.global_cmvn.mean", "encoder.global_cmvn.meen"),
            ["encoder.global_cmvn.mean"],
        ),
        (lambda state: state.update({WEIGHT: state[WEIGHT] * float("nan")}), ["not finite", WEIGHT]),
        (lambda state: state.clear(), ["no tensors"]),
    ],
)
def test_refused_weights(tmp_path, pack, edit, words):
    edit_state(pack, edit)
    assert_refused(tmp_path, pack, *words)


@pytest.mark.parametrize("edit", [
    lambda state: state.pop("encoder.encoders.0.feed_forward.experts.1.w_2.bias"),
    lambda state: rename(state, *(f"encoder.encoders.0.feed_forward_macaron.experts.{e}.w_1.weight" for e in (3, 4))),
    lambda state: state.update({"decoder.left_decoder.decoders.0.feed_forward.experts.0.w_1.weight": torch.ones(2)}),
])  # fmt: skip
def test_refused_experts(tmp_path, edit):
    folder = copy_pack(tmp_path, "u2pp_moe_tiny")
    edit_state(folder, edit)
    assert_refused(tmp_path, folder, "expert")


@pytest.mark.parametrize("name", ["final.pt", "train.yaml", "units.txt"])
@pytest.mark.parametrize("damage", ["missing", "empty", "half", "binary"])
def test_damaged_files(tmp_path, pack, name, damage):
    data = (pack / name).read_bytes()
    (pack / name).unlink()
    if damage != "missing":
        (pack / name).write_bytes({"empty": b"", "half": data[: len(data) // 2], "binary": b"\xff\xfe" * 50}[damage])
    assert_refused(tmp_path, pack)


def test_hostile_pack(tmp_path, pack):
    (pack / "train.yaml").write_text("encoder: !!python/object/apply:os.system ['true']\n")
    assert_refused(tmp_path, pack, "tag", error=UnsafeArtifactError)


def test_paths_in_the_yaml_stay_in_the_pack(tmp_path, pack):
    (tmp_path / "secret.txt").write_text("<blank> 0\n")
    edit_yaml(pack, tokenizer_conf__symbol_table_path="../secret.txt", cmvn_conf__cmvn_file="/etc/passwd")
    report = convert_wenet_pack(pack, tmp_path / "out")
    assert sorted(report["inputs"]) == ["final.pt", "train.yaml", "units.txt"]


def test_no_partial_output(tmp_path, pack, monkeypatch):
    """Every failing write, rename or flush leaves neither the output nor a temporary folder."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(ConversionError, match="not empty"):
        convert_wenet_pack(pack, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "x"
    shutil.rmtree(tmp_path / "out")

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    for owner, name in ((os, "fsync"), (os, "rename"), (WenetU2ppProcessor, "save_pretrained")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            with pytest.raises(OSError, match="No space"):
                convert_wenet_pack(pack, tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["pack"]


def test_bpe_pack_round_trip(tmp_path, pack):
    sentencepiece = pytest.importorskip("sentencepiece", reason="trains the model of the pack")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["THE CAT SAT ON THE MAT", "THE DOG SAW THE CAT"]),
        model_prefix=str(pack / "train_unigram"),
        vocab_size=20, model_type="unigram", minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_file=str(pack / "train_unigram.model"))
    (pack / "train_unigram.vocab").unlink()
    pieces = [processor.id_to_piece(i) for i in range(3, len(processor))]
    units = (["<blank>", "<unk>", "<sos/eos>", *pieces] + [f"x{i}" for i in range(24)])[:24]
    (pack / "units.txt").write_text("".join(f"{unit} {i}\n" for i, unit in enumerate(units)), encoding="utf-8")
    edit_yaml(pack, tokenizer="bpe", tokenizer_conf__bpe_path="data/lang/train_unigram.model")
    convert_wenet_pack(pack, tmp_path / "out")
    tokenizer = WenetU2ppProcessor.from_pretrained(tmp_path / "out").tokenizer
    assert tokenizer("the cat").input_ids == [units.index(piece) for piece in processor.encode_as_pieces("THE CAT")]
    export_wenet_pack(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / "bpe.model").read_bytes() == (pack / "train_unigram.model").read_bytes()
    convert_wenet_pack(tmp_path / "back", tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    (tmp_path / "out" / convert_wenet.BPE_MODEL_NAME).unlink()
    with pytest.raises(ConversionError, match="sentencepiece model is missing"):
        export_wenet_pack(tmp_path / "out", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_command_line(tmp_path, pack, capsys):
    assert main([str(pack), str(tmp_path / "out")]) == 0
    assert json.loads(capsys.readouterr().out)["converter"] == "wenet"
    assert main(["--reverse", str(tmp_path / "out"), str(tmp_path / "back")]) == 0
    capsys.readouterr()
    assert main([str(tmp_path / "absent"), str(tmp_path / "other")]) == 2
    assert "error: pack is not a directory" in capsys.readouterr().err
