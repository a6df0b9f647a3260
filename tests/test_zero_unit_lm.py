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
from test_zero import deepspeed, launch
from transformers import AutoModelForCausalLM


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
STEPS = [
    "--max_steps",
    "4",
    "--per_device_train_batch_size",
    "2",
    "--learning_rate",
    "0.003",
    "--adam_epsilon",
    "1e-6",
]
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
    data = [
        "--data_dir",
        str(folder / "cross_modal"),
        "--data.train",
        "[data/train.parquet]",
        "--data.max_length",
        "400",
    ]
    fixed = ["--pretrained", str(folder / "stage1"), *data, *STEPS, *QUIET]
    return launch(folder / name, "sft_unit_lm", *fixed, *options, processes=processes)


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Parameters by name, a tied head once."""
    model, info = AutoModelForCausalLM.from_pretrained(run, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return dict(model.named_parameters())


def difference(run: Path, other: Path) -> float:
    left, right = weights(run), weights(other)
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


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


def test_zero3_lora_merges(folder):
    plain, shared = (train(folder, name, *LORA, *more) for name, more in (("lora", ()), ("lora3", deepspeed(3))))
    assert difference(plain / "merged", shared / "merged") < TOLERANCE
    assert difference(plain / "merged", folder / "stage1") > 1e2 * TOLERANCE
    adapters = [load_file(run / "adapter_model.safetensors") for run in (plain, shared)]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.allclose(tensor, adapters[1][name], atol=TOLERANCE) for name, tensor in adapters[0].items())
