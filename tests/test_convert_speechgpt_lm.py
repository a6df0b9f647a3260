"""Published SpeechGPT packs to transformers and back; the tokenizer; packs that are hostile or wrong."""

import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_speechgpt_lm import GOLDEN, SIZES, VOCABULARY, build_plain, build_tokenizer, upstream_state, write_pack
from transformers import AutoModelForCausalLM, AutoProcessor, LlamaForCausalLM

from hf_speechllm.models.modeling_speechgpt_lm import SpeechGptForCausalLM
from hf_speechllm.upstream.errors import ConversionError, UnsafeArtifactError
from hf_speechllm.upstream.speechgpt_tokenizer import build_speechgpt_tokenizer, read_published_tokenizer


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "conversion"))
import convert_speechgpt_lm  # noqa: E402


IDS = torch.tensor([[1, 5, 420, 1419, 1425]])


@pytest.fixture
def pack(tmp_path) -> Path:
    return write_pack(tmp_path / "pack", build_plain())


def edit(path: Path, **changes) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    for key, value in changes.items():
        if value is ...:
            content.pop(key, None)
        else:
            content[key] = value
    path.write_text(json.dumps(content), encoding="utf-8")


def shard(pack: Path, kind: str) -> None:
    """Weights of a pack as another kind of file."""
    state = torch.load(pack / "pytorch_model.bin", weights_only=True)
    (pack / "pytorch_model.bin").unlink()
    if kind == "safetensors":
        save_file(state, pack / "model.safetensors")
        return
    names = sorted(state)
    halves, places = (names[: len(names) // 2], names[len(names) // 2 :]), {}
    stem, suffix = ("pytorch_model", "bin") if kind == "bin shards" else ("model", "safetensors")
    for number, half in enumerate(halves, start=1):
        file = f"{stem}-{number:05d}-of-00002.{suffix}"
        places |= dict.fromkeys(half, file)
        part = {name: state[name] for name in half}
        torch.save(part, pack / file) if suffix == "bin" else save_file(part, pack / file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (pack / f"{stem}.{suffix}.index.json").write_text(json.dumps(index), encoding="utf-8")


@pytest.mark.parametrize("kind", ("bin", "safetensors", "bin shards", "safetensors shards"))
def test_pack_becomes_the_same_model(tmp_path, pack, kind):
    if kind != "bin":
        shard(pack, kind)
    report = convert_speechgpt_lm.convert(pack, tmp_path / "out")
    model, problems = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(model) is SpeechGptForCausalLM and not any(problems.values())
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, build_plain()(input_ids=IDS).logits)
    assert (model.config.num_units, model.config.first_unit_token_id) == (1000, 420)
    assert (model.generation_config.temperature, model.generation_config.min_new_tokens) == (0.7, 10)
    tokenizer = AutoProcessor.from_pretrained(tmp_path / "out").tokenizer
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab() and len(tokenizer) == VOCABULARY
    assert report["num_units"] == 1000 and len(report["ignored_weights"]) == 2
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert set(report["outputs"]) | {"conversion_report.json"} == files
    assert json.loads((tmp_path / "out" / "conversion_report.json").read_text())["inputs"] == report["inputs"]
    assert {"config.json", "tokenizer.model", "added_tokens.json"} < set(report["inputs"])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_there_and_back_again(tmp_path, dtype):
    """HF -> upstream -> HF gives every file bit for bit, and the pack the weights bit for bit."""
    plain = build_plain().to(dtype)
    pack = write_pack(tmp_path / "pack", plain, torch_dtype=str(dtype).removeprefix("torch."))
    first = convert_speechgpt_lm.convert(pack, tmp_path / "one")
    limit = 1 << 30 if dtype == torch.float32 else 60_000
    back = convert_speechgpt_lm.convert_back(tmp_path / "one", tmp_path / "back", limit)
    assert ("pytorch_model.bin" in back["outputs"]) == (dtype == torch.float32)
    second = convert_speechgpt_lm.convert(tmp_path / "back", tmp_path / "two")
    assert first["outputs"] == second["outputs"]
    state, _ = convert_speechgpt_lm.read_weights(convert_speechgpt_lm.find_weights(tmp_path / "back"))
    assert state.keys() == plain.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(state[name], tensor) and state[name].dtype == dtype
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == (GOLDEN / "tokenizer.model").read_bytes()
    added = [json.loads((folder / "added_tokens.json").read_text()) for folder in (GOLDEN, tmp_path / "back")]
    assert added[0] == added[1]
    # The pack's own class reads it as well.
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "back")
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in theirs.state_dict().items())


def test_tied_pack(tmp_path):
    plain = build_plain(tie_word_embeddings=True)
    pack = write_pack(tmp_path / "pack", plain)
    convert_speechgpt_lm.convert(pack, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)


def test_more_rows_than_tokens(tmp_path):
    """Padded rows are kept, and kept out of generation."""
    pack = write_pack(tmp_path / "pack", build_plain(vocab_size=1472))
    convert_speechgpt_lm.convert(pack, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == 1472
    assert model.generation_config.suppress_tokens == list(range(VOCABULARY, 1472))


def test_adapter_pack(tmp_path, pack):
    """`-com`: a LoRA adapter of an old peft, onto the converted model; and back."""
    plain = build_plain()
    lora = get_peft_model(plain, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], bias="none"))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
        expected = lora.eval()(input_ids=IDS).logits
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    state = {
        name.replace(".default", ""): tensor.clone() for name, tensor in lora.state_dict().items() if "lora_" in name
    }
    torch.save(state, adapter / "adapter_model.bin")
    config = {
        "base_model_name_or_path": "/home/someone/stage2",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 8,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    convert_speechgpt_lm.convert(pack, tmp_path / "out")
    report = convert_speechgpt_lm.convert(adapter, tmp_path / "peft")
    assert report["upstream_model"] == "LoRA adapter"
    assert "/home/someone" not in (tmp_path / "peft" / "adapter_config.json").read_text()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(base, tmp_path / "peft").eval()
        torch.testing.assert_close(adapted(input_ids=IDS).logits, expected)
    convert_speechgpt_lm.convert_back(tmp_path / "peft", tmp_path / "adapter_back")
    again = torch.load(tmp_path / "adapter_back" / "adapter_model.bin", weights_only=True)
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)

    edit(adapter / "adapter_config.json", r=4)
    with pytest.raises(ConversionError, match="rank 4"):
        convert_speechgpt_lm.convert(adapter, tmp_path / "no")
    edit(adapter / "adapter_config.json", r=8, target_modules=["q_proj"])
    with pytest.raises(ConversionError, match="v_proj"):
        convert_speechgpt_lm.convert(adapter, tmp_path / "no")
    edit(adapter / "adapter_config.json", bias="all")
    with pytest.raises(ConversionError, match="bias"):
        convert_speechgpt_lm.convert(adapter, tmp_path / "no")


def test_recognised_packs(tmp_path, pack):
    assert convert_speechgpt_lm.is_speechgpt_lm_pack(pack)
    assert not convert_speechgpt_lm.is_speechgpt_lm_pack(tmp_path)


# -- wrong and hostile packs ------------------------------------------------------------------------------------------


def refused(pack: Path, out: Path, match: str, error: type[ConversionError] = ConversionError) -> None:
    with pytest.raises(error, match=match):
        convert_speechgpt_lm.convert(pack, out)
    assert not out.exists() and not list(out.parent.glob(".*.partial"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotary_flavour": "mint"}, "rotary_flavour"),
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures"),
        ({"model_type": "mistral"}, "model_type"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"rope_theta": 500000.0}, "rotary"),
        ({"hidden_size": "16"}, "hidden_size"),
        ({"hidden_size": 32}, "shape"),
        ({"num_hidden_layers": 3}, "missing"),
        ({"num_hidden_layers": 1}, "unknown weight"),
        ({"num_attention_heads": 3}, "num_attention_heads"),
        ({"vocab_size": 1400}, "vocab_size"),
        ({"vocab_size": 1430}, "shape"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ],
)
def test_wrong_configurations(tmp_path, pack, changes, message):
    edit(pack / "config.json", **changes)
    refused(pack, tmp_path / "out", message)


def test_wrong_weights(tmp_path, pack):
    state = upstream_state(build_plain())
    name = "model.layers.1.mlp.up_proj.weight"
    for change, message, error in (
        ({name: ...}, name, ConversionError),
        ({"model.extra": torch.zeros(2)}, "model.extra", ConversionError),
        ({name: torch.zeros(3, 3)}, name, ConversionError),
        ({name: state[name].long()}, name, ConversionError),
        ({name: state[name].half()}, "types", ConversionError),
        ({name: torch.full_like(state[name], float("nan"))}, "finite", UnsafeArtifactError),
        ({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, "rotary", ConversionError),
    ):
        changed = {key: value for key, value in {**state, **change}.items() if value is not ...}
        torch.save(changed, pack / "pytorch_model.bin")
        refused(pack, tmp_path / "out", message, error)
    save_file({name: torch.full((2,), float("inf"))}, pack / "model.safetensors")
    refused(pack, tmp_path / "out", "finite", UnsafeArtifactError)


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/speechgpt_pickle_ran",)


def test_hostile_files(tmp_path, pack):
    weights = (pack / "pytorch_model.bin").read_bytes()
    (pack / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Evil()}))
    refused(pack, tmp_path / "out", "zip", UnsafeArtifactError)
    torch.save({"x": Evil()}, pack / "pytorch_model.bin")
    refused(pack, tmp_path / "out", "callable", UnsafeArtifactError)
    assert not Path("/tmp/speechgpt_pickle_ran").exists()
    for length in (0, 100, len(weights) // 2, len(weights) - 1):
        (pack / "pytorch_model.bin").write_bytes(weights[:length])
        refused(pack, tmp_path / "out", "pytorch_model.bin")
    (pack / "pytorch_model.bin").write_bytes(weights)
    for name in ("config.json", "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"):
        good = (pack / name).read_text(encoding="utf-8")
        for bad in ("{", "[]", "null", '{"a": 1, "a": 2}', "[" * 100_000, '{"a": NaN}', "\ufeff{}"):
            (pack / name).write_text(bad, encoding="utf-8")
            refused(pack, tmp_path / "out", name)
        (pack / name).write_text(good, encoding="utf-8")
    pieces = (pack / "tokenizer.model").read_bytes()
    for bad in (pieces[: len(pieces) // 2], b"\xff" * 50, pieces + b"\x0a\xff"):
        (pack / "tokenizer.model").write_bytes(bad)
        refused(pack, tmp_path / "out", "tokenizer.model", UnsafeArtifactError)
    (pack / "tokenizer.model").write_bytes(pieces)
    convert_speechgpt_lm.convert(pack, tmp_path / "out")


def test_hostile_indices(tmp_path, pack):
    shard(pack, "bin shards")
    index = pack / "pytorch_model.bin.index.json"
    good = json.loads(index.read_text(encoding="utf-8"))
    places = good["weight_map"]
    name = sorted(places)[0]
    for bad, error in (
        ({**places, name: "../../etc/passwd"}, UnsafeArtifactError),
        ({**places, name: "/etc/passwd"}, UnsafeArtifactError),
        ({**places, name: "pytorch_model-00002-of-00002.bin"}, ConversionError),
        ({**places, name: "pytorch_model-00003-of-00002.bin"}, ConversionError),
        ({**places, "model.ghost": places[name]}, ConversionError),
        ({**places, name: 3}, ConversionError),
        ([], ConversionError),
    ):
        index.write_text(json.dumps({**good, "weight_map": bad}), encoding="utf-8")
        refused(pack, tmp_path / "out", "pytorch_model", error)
    index.write_text(json.dumps(good), encoding="utf-8")
    (pack / places[name]).unlink()
    refused(pack, tmp_path / "out", places[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"<500>": 3000}, "gap"),
        ({"<500>": ...}, "gap"),
        ({"<7>": "427"}, "not an integer"),
        ({" <x>": 1426}, "usable"),
        ({"": 1426}, "usable"),
        ({"<s>": 5}, "<s>"),
        ({"<1000>": 1426}, "in a row"),
    ],
)
def test_wrong_added_tokens(tmp_path, pack, changes, message):
    edit(pack / "added_tokens.json", **changes)
    refused(pack, tmp_path / "out", message)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("tokenizer_config.json", {"legacy": False}, "legacy"),
        ("tokenizer_config.json", {"sp_model_kwargs": {"enable_sampling": True}}, "sp_model_kwargs"),
        ("tokenizer_config.json", {"add_bos_token": 1}, "add_bos_token"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.py", None]}}, "auto_map"),
        ("special_tokens_map.json", {"bos_token": "<b>"}, "bos_token"),
        ("special_tokens_map.json", {"mask_token": "<m>"}, "mask_token"),
        ("special_tokens_map.json", {"eos_token": 2}, "eos_token"),
    ],
)
def test_wrong_tokenizer_settings(tmp_path, pack, file, changes, message):
    edit(pack / file, **changes)
    refused(pack, tmp_path / "out", message)


def test_missing_files(tmp_path, pack):
    for name in ("config.json", "tokenizer.model", "pytorch_model.bin"):
        kept = (pack / name).read_bytes()
        (pack / name).unlink()
        refused(pack, tmp_path / "out", name)
        (pack / name).write_bytes(kept)
    (pack / "added_tokens.json").unlink()
    refused(pack, tmp_path / "out", "no units")


def test_way_back_refuses_what_upstream_cannot_say(tmp_path, pack):
    convert_speechgpt_lm.convert(pack, tmp_path / "out")
    for change, message in (
        (lambda folder: (folder / "upstream_tokenizer.model").unlink(), "upstream_tokenizer.model"),
        (lambda folder: (folder / "model.safetensors").unlink(), "weights are missing"),
    ):
        broken = tmp_path / "broken"
        shutil.copytree(tmp_path / "out", broken)
        change(broken)
        with pytest.raises(ConversionError, match=message):
            convert_speechgpt_lm.convert_back(broken, tmp_path / "back")
        assert not (tmp_path / "back").exists()
        shutil.rmtree(broken)
    from tiny_speechgpt_lm import save_folder

    save_folder(tmp_path / "qwen", base="qwen2")
    with pytest.raises(ConversionError, match="llama"):
        convert_speechgpt_lm.convert_back(tmp_path / "qwen", tmp_path / "back")


# -- tokenizer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("[Human]: hi <sosp>", ["<s>", "[Human]", "▁", ":", "▁", "hi", "<sosp>"]),
        ("  <sosp> \n <1>  <2>a", ["<s>", "<sosp>", "<1>", "<2>", "▁a"]),
        ("a</s> b", ["<s>", "▁a", "</s>", "▁", "▁b"]),
        ("<eoa>", ["<s>", "▁<", "eo", "a", ">"]),
        ("é", ["<s>", "▁", "<0xC3>", "<0xA9>"]),
        ("", ["<s>"]),
    ],
)
def test_pieces_are_those_of_transformers_4(text, pieces):
    """Written down from the slow tokenizer of transformers 4.33.1."""
    tokenizer = build_tokenizer()
    assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids) == pieces


def test_added_tokens_that_decoding_may_skip(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "pack")
    edit(tmp_path / "pack" / "special_tokens_map.json", additional_special_tokens=["<eos>"])
    edit(tmp_path / "pack" / "tokenizer_config.json", add_bos_token=False, add_eos_token=True)
    tokenizer = build_speechgpt_tokenizer(read_published_tokenizer(tmp_path / "pack"))
    ids = tokenizer("<1><eos><2>").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["<1>", "<eos>", "<2>", "</s>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<1> <2>"


def test_weights_of_a_converted_folder_are_the_packs(tmp_path, pack):
    convert_speechgpt_lm.convert(pack, tmp_path / "out")
    state = load_file(tmp_path / "out" / "model.safetensors")
    expected = build_plain().state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    assert SIZES["vocab_size"] == VOCABULARY
