"""FunASR packs to model folders and back: bit-equal weights, refusals by name, nothing partial after a failure."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_funasr_paraformer import VARIANTS, tiny_model

from hf_speechllm.models.feature_extraction_kaldi_fbank import KaldiFbankFeatureExtractor
from hf_speechllm.models.modeling_funasr_paraformer import FunasrParaformerForSpeechRecognition
from hf_speechllm.models.processing_funasr_paraformer import FunasrParaformerProcessor
from hf_speechllm.upstream.checkpoints import read_state_dict
from hf_speechllm.upstream.errors import ConversionError, UnsafeArtifactError
from hf_speechllm.upstream.funasr_tokens import build_paraformer_char_tokenizer
from hf_speechllm.upstream.nnet_mvn import read_nnet_mvn
from hf_speechllm.upstream.safetensors_file import write_safetensors
from hf_speechllm.upstream.staging import sha256_of_files


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "conversion"))

from convert_funasr import convert_funasr_pack, export_funasr_pack, main  # noqa: E402
from convert_wenet import convert_wenet_pack  # noqa: E402


GOLDEN = Path(__file__).parent / "golden" / "funasr"
CASES = ["paraformer_sanm_tiny", "bicif_timestamps_tiny", "seaco_hotword"]
PACK_FILES = ["model.pt", "config.yaml", "configuration.json", "am.mvn", "tokens.json", "seg_dict"]


@pytest.fixture
def pack(tmp_path):
    return copy_pack(tmp_path, "paraformer_sanm_tiny")


def copy_pack(tmp_path: Path, case: str) -> Path:
    folder = tmp_path / "pack"
    folder.mkdir()
    for name in PACK_FILES:
        if (GOLDEN / case / name).exists():
            shutil.copyfile(GOLDEN / case / name, folder / name)
    return folder


def edit_yaml(folder: Path, **changes: object) -> None:
    """Sets `section__key=value` (or `key=value`); `...` removes the key."""
    path = folder / "config.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name, value in changes.items():
        *sections, key = name.split("__")
        target = content
        for section in sections:
            target = target[section]
        if value is ...:
            del target[key]
        else:
            target[key] = value
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")


def edit_state(folder: Path, edit) -> None:
    state = {name: tensor.clone() for name, tensor in read_state_dict(folder / "model.pt").items()}
    edit(state)
    torch.save(state, folder / "model.pt")


def assert_refused(tmp_path: Path, folder: Path, *words: str, error: type[Exception] = ConversionError) -> None:
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(error) as refusal:
        convert_funasr_pack(folder, tmp_path / "out")
    for word in words:
        assert word in str(refusal.value)
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_bit_equal(tmp_path, case):
    report = convert_funasr_pack(GOLDEN / case, tmp_path / "out")
    back = export_funasr_pack(tmp_path / "out", tmp_path / "back")
    original, exported = (read_state_dict(folder / "model.pt") for folder in (GOLDEN / case, tmp_path / "back"))
    assert set(original) == set(exported)
    for name, tensor in original.items():
        assert torch.equal(tensor, exported[name]), name
    for one, other in zip(
        read_nnet_mvn(GOLDEN / case / "am.mvn"), read_nnet_mvn(tmp_path / "back" / "am.mvn"), strict=True
    ):
        assert torch.equal(one, other)
    tokens = [json.loads((folder / "tokens.json").read_text("utf-8")) for folder in (GOLDEN / case, tmp_path / "back")]
    assert tokens[0] == tokens[1]
    assert back["model"] == yaml.safe_load((GOLDEN / case / "config.yaml").read_text("utf-8"))["model"]
    again = convert_funasr_pack(tmp_path / "back", tmp_path / "again")
    assert again["outputs"] == report["outputs"]


@pytest.mark.parametrize("case", CASES)
def test_report_and_files(tmp_path, case):
    report = convert_funasr_pack(GOLDEN / case, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "conversion_report.json").read_text("utf-8")) == report
    sums = sha256_of_files(tmp_path / "out")
    del sums["conversion_report.json"]
    assert report["outputs"] == sums
    assert set(report["inputs"]) == {name for name in PACK_FILES if (GOLDEN / case / name).exists()}
    model = FunasrParaformerForSpeechRecognition.from_pretrained(tmp_path / "out")
    assert report["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert {"tokenizer.json", "processor_config.json", "modeling_funasr_paraformer.py"} <= set(sums)


def variant_folder(folder: Path, name: str) -> FunasrParaformerForSpeechRecognition:
    """A model folder with random weights, its own CMVN, and tokens `<blank> <s> </s> 一 … <unk>`."""
    model = tiny_model(name)
    config = model.config
    names = ["<blank>", "<s>", "</s>", *(chr(0x4E00 + i) for i in range(config.vocab_size - 4)), "<unk>"]
    tokenizer = build_paraformer_char_tokenizer({token: index for index, token in enumerate(names)})
    stack = config.stacked_frames if config.encoder_type == "sanm" else 1
    bins = config.input_size // (3 if config.encoder_type == "sanm" else 1)
    config.stacked_frames = stack
    size = config.input_size
    extractor = KaldiFbankFeatureExtractor(
        feature_size=bins,
        window_type="hamming",
        lfr_m=size // bins,
        lfr_n=stack,
        cmvn_mean=torch.linspace(1, 2, size).tolist(),
        cmvn_inverse_std=torch.linspace(0.3, 0.4, size).tolist(),
    )
    model.save_pretrained(folder)
    FunasrParaformerProcessor(extractor, tokenizer).save_pretrained(folder)
    return model


# What FunASR has no key for.
NOT_IN_FUNASR = {
    "dynamic threshold": "cif_dynamic_threshold",
    "wenet's conformer": "attention_type",
    "conformer, shifted": "conv_norm_type",
    "conformer, absolute": "conformer_style",
}


@pytest.mark.parametrize("name", list(VARIANTS))
def test_every_variant_goes_to_funasr_and_back(tmp_path, name):
    model = variant_folder(tmp_path / "model", name)
    try:
        export_funasr_pack(tmp_path / "model", tmp_path / "pack")
    except ConversionError as error:
        assert f"key: {NOT_IN_FUNASR[name]};" in str(error)
        assert not (tmp_path / "pack").exists()
        return
    assert name not in NOT_IN_FUNASR
    convert_funasr_pack(tmp_path / "pack", tmp_path / "out")
    again = FunasrParaformerForSpeechRecognition.from_pretrained(tmp_path / "out")
    expected = model.state_dict()
    assert set(again.state_dict()) == set(expected)
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == expected.keys()


def test_trainer_checkpoints_and_parallel_prefixes(tmp_path, pack):
    plain = convert_funasr_pack(pack, tmp_path / "plain")
    state = {f"module.{name}": tensor.clone() for name, tensor in read_state_dict(pack / "model.pt").items()}
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    torch.save({"epoch": 4, "state_dict": state, "optimizer": optimizer, "best": 0.5}, pack / "model.pt")
    wrapped = convert_funasr_pack(pack, tmp_path / "wrapped")
    assert wrapped["outputs"] == plain["outputs"]


def test_old_releases_are_found_by_name(tmp_path, pack):
    expected = convert_funasr_pack(pack, tmp_path / "expected")
    (pack / "configuration.json").unlink()
    (pack / "model.pt").rename(pack / "model.pb")
    tokens = json.loads((pack / "tokens.json").read_text("utf-8"))
    (pack / "tokens.json").unlink()
    (pack / "tokens.txt").write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
    report = convert_funasr_pack(pack, tmp_path / "out")
    assert report["outputs"] == expected["outputs"]
    assert set(report["inputs"]) == {"model.pb", "config.yaml", "am.mvn", "tokens.txt"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"encoder_conf__surprise": 1}, ["unknown key", "encoder_conf.surprise"]),
        ({"surprise": 1}, ["unknown key", "surprise"]),
        ({"model": "Whisper"}, ["not supported", "model", "Whisper"]),
        ({"encoder_conf__num_blocks": 4}, ["encoder.encoders", "expected: 3", "actual: 2"]),
        ({"encoder_conf__num_blocks": 1 << 23}, ["configuration and weights disagree"]),
        ({"encoder_conf__linear_units": 65}, ["feed_forward.w_1.weight"]),
        ({"encoder_conf__input_layer": "conv2d"}, ["encoder_conf.input_layer", "pe"]),
        ({"encoder_conf__attention_heads": 5}, ["contradictory", "num_attention_heads"]),
        ({"decoder_conf__att_layer_num": 1}, ["decoder.decoders"]),
        ({"decoder_conf__kernel_size": 13}, ["shape", "decoder.decoders.0.self_attn.fsmn_block.weight"]),
        ({"decoder_conf__num_blocks": 5}, ["decoder.decoders2", "expected: 3"]),
        ({"predictor_conf__idim": 16}, ["predictor_conf.idim", "expected: 32"]),
        ({"predictor": "CifPredictorV9"}, ["predictor", "CifPredictorV9"]),
        ({"predictor_conf__l_order": ...}, ["predictor_conf.l_order"]),
        ({"frontend_conf__lfr_m": 5}, ["am.mvn", "expected: 400"]),
        ({"frontend_conf__upsacle_samples": False}, ["frontend_conf.upsacle_samples"]),
        ({"tokenizer": "HuggingfaceTokenizer"}, ["tokenizer"]),
        ({"tokenizer_conf__unk_symbol": "<nobody>"}, ["unk_symbol", "<nobody>"]),
        ({"model_conf__predictor_bias": 2}, ["model_conf.predictor_bias", "0 or 1"]),
        ({"model_conf__ctc_weight": "high"}, ["model_conf.ctc_weight", "high"]),
        ({"model_conf__ctc_weight": 0.3}, ["weight is missing", "ctc.ctc_lo"]),
        ({"normalize": "utterance_mvn"}, ["normalize"]),
        ({"vocab_size": 63}, ["sizes disagree", "vocab_size"]),
        ({"decoder": "ContextualParaformerDecoder"}, ["decoder does not fit the model"]),
    ],
)
def test_configurations_that_the_model_does_not_have_are_named(tmp_path, pack, changes, words):
    edit_yaml(pack, **changes)
    assert_refused(tmp_path, pack, "config.yaml" if len(words) < 3 and "unknown" in words[0] else "", *words)


def test_weights_must_be_exactly_those_of_the_model(tmp_path, pack):
    name = "decoder.decoders.1.src_attn.linear_k_v.weight"
    edit_state(pack, lambda state: state.pop(name))
    assert_refused(tmp_path, pack, "weight is missing", name, "(64, 32)")
    edit_state(pack, lambda state: state.update({name: torch.zeros(63, 32)}))
    assert_refused(tmp_path, pack, "shape", name, "(64, 32)", "(63, 32)")
    edit_state(pack, lambda state: state.update({name: torch.zeros(64, 32), "decoder.extra.weight": torch.zeros(2)}))
    assert_refused(tmp_path, pack, "unknown weight", "decoder.extra.weight")
    edit_state(
        pack, lambda state: (state.pop("decoder.extra.weight"), state.update({name: torch.zeros(64, 32).long()}))
    )
    assert_refused(tmp_path, pack, "type", name)
    edit_state(pack, lambda state: state.update({name: torch.zeros(64, 32).half()}))
    assert_refused(tmp_path, pack, "floating point types")
    edit_state(pack, lambda state: state.update({name: torch.full((64, 32), float("nan"))}))
    assert_refused(tmp_path, pack, "not finite", name, error=UnsafeArtifactError)


def test_recomputed_tables_are_ignored_and_listed(tmp_path, pack):
    edit_state(pack, lambda state: state.update({"encoder.embed.pe": torch.zeros(1, 9, 560)}))
    assert convert_funasr_pack(pack, tmp_path / "out")["ignored_weights"] == ["encoder.embed.pe"]


def test_half_precision_stays(tmp_path, pack):
    edit_state(pack, lambda state: state.update({name: tensor.half() for name, tensor in state.items()}))
    convert_funasr_pack(pack, tmp_path / "out")
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float16}
    model = FunasrParaformerForSpeechRecognition.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float16


def test_nothing_is_left_behind_and_nothing_is_overwritten(tmp_path, pack):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(ConversionError, match="not empty"):
        convert_funasr_pack(pack, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_command_line(tmp_path, pack, capsys):
    assert main([str(pack), str(tmp_path / "out")]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "Paraformer"
    assert main(["--reverse", str(tmp_path / "out"), str(tmp_path / "back")]) == 0
    capsys.readouterr()
    assert main([str(pack), str(tmp_path / "out")]) == 2
    assert re.match(r"error: .*not empty", capsys.readouterr().err)
    done = subprocess.run(
        [sys.executable, str(ROOT / "conversion" / "convert_funasr.py"), str(tmp_path), str(tmp_path / "x")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "config.yaml" in done.stderr and "Traceback" not in done.stderr


def test_wenet_paraformer_pack(tmp_path):
    source = GOLDEN.parent / "wenet" / "paraformer_tiny"
    report = convert_wenet_pack(source, tmp_path / "out")
    assert report["model_type"] == "funasr_paraformer" and report["cmvn"] == "state dict"
    model = FunasrParaformerForSpeechRecognition.from_pretrained(tmp_path / "out")
    state = read_state_dict(source / "final.pt")
    assert torch.equal(model.model.predictor.alpha_proj2.weight, state["predictor.tp_output.weight"])
    fused = state["decoder.decoders.1.src_attn.linear_k_v.weight"]
    attention = model.model.decoder.layers[1].encoder_attn
    assert torch.equal(torch.cat([attention.k_proj.weight, attention.v_proj.weight]), fused)
    processor = FunasrParaformerProcessor.from_pretrained(tmp_path / "out")
    assert processor.feature_extractor.cmvn_mean == state["encoder.global_cmvn.mean"].tolist()
    assert processor.tokenizer.segmentation == "wenet" and model.config.layer_norm_eps == 1e-5
    folder = tmp_path / "pack"
    shutil.copytree(source, folder)
    content = yaml.safe_load((folder / "train.yaml").read_text("utf-8"))
    content["decoder_conf"]["surprise"] = 1
    (folder / "train.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(ConversionError, match=r"decoder_conf\.surprise"):
        convert_wenet_pack(folder, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_written_file_is_the_librarys(tmp_path):
    """Tensor by tensor gives the bytes that the library's writer gives, views and odd types included."""
    from safetensors.torch import save_file

    rows = torch.randn(6, 4)
    tensors = {
        "b.view": rows[2:4],
        "a": torch.randn(3, 2).half(),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 4),
        "ü": torch.randn(2, 3).t(),
        "flag": torch.tensor([True, False]),
        "bf": torch.randn(5).bfloat16(),
    }
    write_safetensors(tmp_path / "ours", tensors)
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in tensors.items()}, tmp_path / "theirs", {"format": "pt"}
    )
    ours, theirs = load_file(tmp_path / "ours"), load_file(tmp_path / "theirs")
    assert list(ours) == list(theirs)
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype
    assert len((tmp_path / "ours").read_bytes()) == len((tmp_path / "theirs").read_bytes())


MEASURE = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import torch
from pathlib import Path
from hf_speechllm.upstream.checkpoints import read_state_dict
from hf_speechllm.upstream.safetensors_file import write_safetensors
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
torch.zeros(1 << 20).sum()
before = peak()
state = read_state_dict(sys.argv[2])
write_safetensors(Path(sys.argv[3]), {f"{name}.{part}": tensor[part * 512 : (part + 1) * 512]
                                      for name, tensor in state.items() for part in range(3)})
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts mapped pages on Linux only")
def test_conversion_holds_the_weights_once(tmp_path):
    """200 MB in fused weights of 3 MB: mapped, written block by block, pages given back."""
    state = {f"layer.{index}": torch.ones(1536, 512) for index in range(64)}
    torch.save(state, tmp_path / "model.pt")
    size = (tmp_path / "model.pt").stat().st_size
    del state
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(ROOT / "src"), str(tmp_path / "model.pt"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 1.2 * size
    assert (tmp_path / "out").stat().st_size > 0.99 * size
