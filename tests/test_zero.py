"""DeepSpeed ZeRO-1, 2 and 3 on two CPU processes train as plain data parallel and as one process that accumulates.

Every run is `training/train_asr.py` with a file of `training/deepspeed/`, on a mixture of experts of which one never
gets a frame: a process that waited for that expert's gradient would hang. Only the order of float32 sums differs
between the runs: losses agree to 1e-5 of their value and weights to 1e-5 after six steps that move them 500 times as
far (measured: 1.3e-6).
"""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from conftest import build_tiny_model, build_tiny_processor, free_port, speech_like
from safetensors.torch import load_file

from hf_speechllm.models.configuration_wenet_u2pp import WenetU2ppConfig
from hf_speechllm.models.modeling_wenet_u2pp import WenetU2ppForSpeechRecognition


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the extra [deepspeed]"),
    pytest.mark.skipif(find_spec("accelerate") is None, reason="needs the extra [train]"),
]

TESTS = Path(__file__).resolve().parent
CONFIGS = TESTS.parent / "training" / "deepspeed"
STEPS = 6
LOSS_TOLERANCE = 1e-5
WEIGHT_TOLERANCE = 1e-5
NO_DROPOUT = dict.fromkeys(
    ("hidden_dropout", "positional_dropout", "decoder_dropout", "decoder_positional_dropout"), 0.0
)
# Five experts, of which the last gets no frame: see `base_model`.
MODEL = {**NO_DROPOUT, "num_experts": 5, "num_experts_per_tok": 2, "use_dynamic_chunk": False, "static_chunk_size": 4}
DECODER_MOE = {"decoder_mlp_type": "moe", "decoder_num_experts": 3, "decoder_num_experts_per_tok": 1}
NEW_MODEL = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_causal": True,
    "conv_norm_type": "layer_norm",
    "mlp_type": "moe",
    "num_experts": 4,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_intermediate_size": 16,
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """A run file: 24 clips of 0.5 to 0.9 s with two words each, six batches of four an epoch."""
    folder = tmp_path_factory.mktemp("zero")
    rng = np.random.default_rng(0)
    lines = []
    for number in range(24):
        waveform = speech_like(rng.uniform(0.5, 0.9), seed=number)
        soundfile.write(folder / f"{number}.wav", waveform, 16000)
        words = " ".join(rng.choice(["one", "two", "three"], size=2))
        lines.append({"audio": f"{number}.wav", "text": words, "duration": len(waveform) / 16000})
    (folder / "clips.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    base_model(folder / "base")
    content = {
        "model": {"pretrained": str(folder / "base")},
        "data": {"train": [str(folder / "clips.jsonl")], "validation": [str(folder / "clips.jsonl")]},
        "training": {
            "max_steps": STEPS,
            "max_frames_per_batch": 10000,
            "max_items_per_batch": 4,
            "learning_rate": 0.003,
            "warmup_steps": 3,
            "weight_decay": 0.1,
            "max_grad_norm": 2.0,
            "adam_epsilon": 1e-6,
            "logging_steps": 1,
            "save_steps": 3,
            "average_checkpoints": 2,
            "log_expert_load": True,
            "use_cpu": True,
            "disable_tqdm": True,
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return folder / "run.yaml"


def base_model(folder: Path) -> None:
    """Router rows w, -w, v, -v and 0: two of the first four logits are at least 0, so the last never wins."""
    model = build_tiny_model(**MODEL, **DECODER_MOE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("model.encoder.") and name.endswith("router.weight"):
                parameter[1], parameter[3], parameter[4] = -parameter[0], -parameter[2], 0.0
    model.save_pretrained(folder)
    build_tiny_processor().save_pretrained(folder)


def train(recipe: Path, output: Path, *options: str, processes: int = 2) -> Path:
    return launch(output, "train_asr", str(recipe), *options, processes=processes)


def launch(output: Path, script: str, *options: str, processes: int = 2) -> Path:
    """Run a script of `training/` in its own processes; a run that hangs is killed with its children."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_addr=127.0.0.1"]
        launcher += [f"--master_port={free_port()}"]
    command = [*launcher, str(TESTS / "zero_worker.py"), script, *options, "--output_dir", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "DS_SKIP_CUDA_CHECK": "1"}
    with open(f"{output}.log", "w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            code = process.wait(timeout=200)
        except subprocess.TimeoutExpired:
            code = "a time-out"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)
                process.wait()
        log.seek(0)
        assert code == 0, f"{' '.join(command)}: expected exit code 0, found {code}\n{log.read()[-6000:]}"
    return output


def deepspeed(stage: int) -> tuple[str, str]:
    return "--training.deepspeed", str(CONFIGS / f"zero{stage}.json")


@pytest.fixture(scope="module")
def data_parallel(recipe) -> Path:
    """Two processes without DeepSpeed."""
    return train(recipe, recipe.parent / "ddp")


def history(run: Path, key: str) -> list[float]:
    log = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [entry[key] for entry in log if key in entry]


def largest_difference(left: Path, right: Path) -> float:
    """Over the weights of two folders, which must have the same names and shapes and no empty tensor."""
    left, right = load_file(left / "model.safetensors"), load_file(right / "model.safetensors")
    assert {k: v.shape for k, v in left.items()} == {k: v.shape for k, v in right.items()}
    assert all(tensor.numel() for tensor in left.values())
    return max((left[name] - right[name]).abs().max().item() for name in left)


def check_same_training(run: Path, reference: Path) -> None:
    assert len(history(run, "loss")) == STEPS
    for key in ("loss", "loss_ctc", "loss_att", "grad_norm", "learning_rate", "eval_loss", "eval_wer"):
        assert history(run, key) == pytest.approx(history(reference, key), rel=LOSS_TOLERANCE), key
    for key in ("expert_share_min", "expert_share_max", "decoder_expert_share_max"):
        assert history(run, key) == pytest.approx(history(reference, key), abs=0.01), key
    for step in (3, 6):
        difference = largest_difference(run / f"checkpoint-{step}", reference / f"checkpoint-{step}")
        assert difference < WEIGHT_TOLERANCE, f"step {step}"
    # The mean of both checkpoints.
    assert largest_difference(run, reference) < WEIGHT_TOLERANCE


def test_the_run_is_worth_comparing(recipe, data_parallel):
    losses = history(data_parallel, "loss")
    assert losses[-1] < 0.9 * losses[0]
    assert largest_difference(data_parallel, recipe.parent / "base") > 500 * WEIGHT_TOLERANCE
    assert history(data_parallel, "expert_share_min") == [0.0] * STEPS
    parts = (history(data_parallel, name) for name in ("loss_ctc", "loss_att"))
    joint = [0.5 * ctc + 0.5 * att for ctc, att in zip(*parts, strict=True)]
    assert losses == pytest.approx(joint, rel=1e-4)


def test_data_parallel_equals_one_process_that_accumulates(recipe, data_parallel):
    one = train(recipe, recipe.parent / "one", "--gradient_accumulation_steps", "2", processes=1)
    check_same_training(one, data_parallel)


@pytest.fixture(scope="module", params=[1, 2, 3], ids=lambda stage: f"zero{stage}")
def zero(request, recipe) -> tuple[int, Path]:
    """Stage and folder of a run with DeepSpeed."""
    return request.param, train(recipe, recipe.parent / f"zero{request.param}", *deepspeed(request.param))


def test_zero_equals_data_parallel(zero, data_parallel):
    _, run = zero
    check_same_training(run, data_parallel)
    reloaded, info = WenetU2ppForSpeechRecognition.from_pretrained(run, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(parameter.numel() for parameter in reloaded.parameters())


def test_resumed_equals_uninterrupted(recipe, zero):
    stage, run = zero
    again = recipe.parent / f"resumed{stage}"
    shutil.copytree(run / "checkpoint-3", again / "checkpoint-3")
    train(recipe, again, *deepspeed(stage), "--resume", "true")
    assert largest_difference(again / "checkpoint-6", run / "checkpoint-6") == 0.0
    assert history(again, "loss") == history(run, "loss")


def test_checkpoint_converts_to_its_own_weights(zero):
    """`zero_to_fp32.py`, which DeepSpeed puts beside its shards."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    _, run = zero
    state = get_fp32_state_dict_from_zero_checkpoint(str(run / "checkpoint-6"))
    saved = load_file(run / "checkpoint-6" / "model.safetensors")
    assert state.keys() == saved.keys() and all(torch.equal(state[name].float(), saved[name]) for name in saved)


def test_the_leaf_module_of_zero3_is_the_mixture_of_experts():
    from deepspeed.utils import set_z3_leaf_modules

    classes = json.loads((CONFIGS / "zero3.json").read_text())["zero_optimization"]["leaf_module"]["classes"]
    model = build_tiny_model(**MODEL, **DECODER_MOE)
    leaves = set_z3_leaf_modules(model, classes)
    # Two encoder layers with two feed-forward modules each, one layer in each of two decoders.
    assert [type(module).__name__ for module in leaves] == ["MixtureOfExperts"] * 6


def test_zero3_lora_merges(recipe):
    options = ["--rank", "2", "--target_modules", "[q_proj, v_proj]", "--modules_to_save", "[ctc_head]"]
    run = train(recipe, recipe.parent / "lora", *deepspeed(3), *options)
    merged, base = (load_file(folder / "model.safetensors") for folder in (run / "merged", recipe.parent / "base"))
    assert {name: tensor.shape for name, tensor in merged.items()} == {k: v.shape for k, v in base.items()}
    changed = {name for name in merged if not torch.equal(merged[name], base[name])}
    assert changed == {n for n in merged if n.endswith(("q_proj.weight", "v_proj.weight")) or n.startswith("ctc_head")}
    adapted = load_file(run / "adapter_model.safetensors")
    name = "model.encoder.layers.0.self_attn.q_proj"
    lora_a, lora_b = (adapted[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    # alpha 16, rank 2
    expected = base[f"{name}.weight"] + 8.0 * lora_b @ lora_a
    assert torch.allclose(merged[f"{name}.weight"], expected, atol=1e-6)


def test_zero3_makes_a_new_model(recipe):
    """The parameters are shared out while the model is made: other draws, from the same distributions."""
    options = ["--model.pretrained", "null", "--model.config", json.dumps(NEW_MODEL)]
    options += ["--data.tokenizer", str(recipe.parent / "base"), "--model.compute_cmvn", "false"]
    options += ["--max_steps", "1", "--learning_rate", "0", "--weight_decay", "0", "--average_checkpoints", "0"]
    new = load_file(train(recipe, recipe.parent / "new", *deepspeed(3), *options) / "model.safetensors")
    config = WenetU2ppConfig(vocab_size=13, pad_token_id=0, bos_token_id=12, eos_token_id=12, **NEW_MODEL)
    expected = WenetU2ppForSpeechRecognition(config).state_dict()
    assert {name: tensor.shape for name, tensor in new.items()} == {k: v.shape for k, v in expected.items()}
    for name, tensor in new.items():
        if tensor.dim() < 2:
            assert bool(tensor.isfinite().all()), name
        else:
            assert tensor.std().item() == pytest.approx(expected[name].std().item(), rel=0.5), name


def test_zero3_refuses_to_evaluate_with_a_decoder(recipe):
    with pytest.raises(AssertionError, match="eval_decoding: expected one of"):
        train(recipe, recipe.parent / "refused", *deepspeed(3), "--eval_decoding", "attention")
