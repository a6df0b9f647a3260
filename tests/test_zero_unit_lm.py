"""Stage 2 of a unit language model under DeepSpeed ZeRO-1, 2 and 3 on two CPU processes, in full and with LoRA.

Each run ends with the weights of plain data parallel, and that with those of one process that accumulates. Four steps
move weights by 7.5e-3; the largest difference measured is 1.2e-7, of ZeRO-3.
"""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_unit_lm_scripts import MODEL, NUM_UNITS, write_units
from test_zero import CONFIGS, deepspeed, launch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_speechllm.train.text_tokenizer import train_byte_bpe


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "training"))
try:
    import build_speech_instruct
    import pretrain_unit_lm
finally:
    sys.path.remove(str(ROOT / "training"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the extra [deepspeed]"),
]

TOLERANCE = 1e-6
STEPS = "--max_steps 4 --per_device_train_batch_size 2 --learning_rate 0.003 --adam_epsilon 1e-6".split()
QUIET = ["--use_cpu", "true", "--disable_tqdm", "true", "--logging_steps", "1", "--save_strategy", "no", "--seed", "1"]
LORA = ["--lora.rank", "2", "--lora.alpha", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The model of stage 1, and the instructions of stage 2."""
    root = tmp_path_factory.mktemp("zero_unit_lm")
    write_units(root / "speech.parquet", 64, seed=0)
    options = ["--model.config", json.dumps(MODEL), "--num_units", str(NUM_UNITS), "--text_vocab_size", "300"]
    options += ["--text", "[speech.parquet]", "--data_dir", str(root), "--data.train", "[speech.parquet]"]
    options += ["--block_size", "32", "--max_steps", "4", "--use_cpu", "true", "--disable_tqdm", "true"]
    pretrain_unit_lm.main([*options, "--output_dir", str(root / "stage1")])
    units = ["--units", str(root / "speech.parquet"), "--tokenizer", str(root / "stage1"), "--max_tokens", "400"]
    build_speech_instruct.main(["cross-modal", *units, str(root / "cross_modal")])
    return root


def train(folder: Path, name: str, *options: str, processes: int = 2) -> Path:
    data = ["--data_dir", str(folder / "cross_modal"), "--data.train", "[data/train.parquet]"]
    fixed = ["--pretrained", str(folder / "stage1"), *data, "--data.max_length", "400", *STEPS, *QUIET]
    return launch(folder / name, "sft_unit_lm", *fixed, *options, processes=processes)


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Parameters by name, a tied head once."""
    model, info = AutoModelForCausalLM.from_pretrained(run, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return dict(model.named_parameters())


def difference(run: Path, other: Path) -> float:
    left, right = weights(run), weights(other)
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).detach().abs().max()) for name in left)


@pytest.fixture(scope="module")
def data_parallel(folder) -> Path:
    return train(folder, "data_parallel")


def test_data_parallel_equals_one_process_that_accumulates(folder, data_parallel):
    one = train(folder, "one", "--gradient_accumulation_steps", "2", processes=1)
    assert difference(one, data_parallel) < TOLERANCE
    assert difference(data_parallel, folder / "stage1") > 1e3 * TOLERANCE


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_equals_data_parallel(folder, data_parallel, stage):
    run = train(folder, f"zero{stage}", *deepspeed(stage))
    assert difference(run, data_parallel) < TOLERANCE
    counted = [json.loads((path / "training_summary.json").read_text())["parameters"] for path in (run, data_parallel)]
    assert counted[0] == counted[1] == sum(parameter.numel() for parameter in weights(run).values())


@pytest.fixture(scope="module")
def all_shared(folder) -> tuple[str, str]:
    """ZeRO-3 that leaves no parameter whole, however small."""
    settings = json.loads((CONFIGS / "zero3.json").read_text())
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (folder / "all_shared.json").write_text(json.dumps(settings))
    return "--training.deepspeed", str(folder / "all_shared.json")


def test_zero3_extends_a_plain_model(folder, all_shared):
    """Stage 1: the vocabulary grows as in one process."""
    tokenizer = train_byte_bpe(["one two three four", "five six seven"], 300)
    fields = {name: value for name, value in MODEL.items() if name != "model_type"}
    LlamaForCausalLM(LlamaConfig(**fields, vocab_size=len(tokenizer))).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    options = ["--pretrained", str(folder / "base"), "--num_units", str(NUM_UNITS), "--data_dir", str(folder)]
    options += ["--data.train", "[speech.parquet]", "--block_size", "32", *STEPS, *QUIET]
    plain = launch(folder / "extended", "pretrain_unit_lm", *options)
    shared = launch(folder / "extended3", "pretrain_unit_lm", *options, *all_shared)
    assert difference(plain, shared) < TOLERANCE
    assert AutoModelForCausalLM.from_pretrained(shared).config.num_units == NUM_UNITS


def test_zero3_lora_merges(folder, all_shared):
    plain, shared = train(folder, "lora", *LORA), train(folder, "lora3", *LORA, *all_shared)
    assert difference(plain / "merged", shared / "merged") < TOLERANCE
    assert difference(plain / "merged", folder / "stage1") > 1e2 * TOLERANCE
    adapters = [load_file(run / "adapter_model.safetensors") for run in (plain, shared)]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.allclose(tensor, adapters[1][name], atol=TOLERANCE) for name, tensor in adapters[0].items())
