"""The unit language model: tokenising units, answering eight questions at once, memory of the loss.

    python benchmarks/speechgpt_lm.py [--pack FOLDER] [--transformers433 FOLDER] [--only tokenising generation memory]

`--transformers433` is a folder into which `pip install --target` put transformers 4.33.1, tokenizers 0.13.3 and
sentencepiece: the slow tokenizer that SpeechGPT pins is timed in a process of its own, since two releases cannot share
one. The reference of generation is SpeechGPT's loop (`speechgpt/src/infer/cli_infer.py`, `interact`): one question,
one `generate`. Both sides have the same weights, and the same ids come out.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from timing import HEADER, Comparison, compare
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_speechllm.cpu_inference import pack_linear_weights
from hf_speechllm.models.chunked_cross_entropy import chunked_cross_entropy
from hf_speechllm.models.modeling_speechgpt_lm import SpeechGptForCausalLM
from hf_speechllm.models.prompts_speechgpt_lm import inference_prompt
from hf_speechllm.models.unit_string import unit_string
from hf_speechllm.upstream.speechgpt_tokenizer import build_speechgpt_tokenizer, read_published_tokenizer


ROOT = Path(__file__).resolve().parents[1]
PACK = ROOT / "tests" / "golden" / "speechgpt" / "prompts_three_stages"
NUM_UNITS_SPOKEN = 3000
QUESTIONS = 8
# Of two Llamas: the tokens of an answer, and the width, the feed-forward's width, layers and heads.
LLAMAS = {"small": (192, 512, 1408, 8, 8), "large": (64, 1024, 2816, 16, 16)}
TOKENS, WIDTH = 2048, 1024
VOCABULARIES = (33_024, 152_064)

_SLOW = """
import json, sys, time
from transformers import LlamaTokenizer
text = sys.stdin.read()
tokenizer = LlamaTokenizer.from_pretrained(sys.argv[1])
seconds = []
for _ in range(int(sys.argv[2]) + 1):
    start = time.process_time()
    ids = tokenizer(text).input_ids
    seconds.append(time.process_time() - start)
print(json.dumps({"seconds": seconds[1:], "ids": ids}))
"""


def units_of(count: int) -> list[int]:
    return torch.randint(0, 1000, (count,), generator=torch.Generator().manual_seed(0)).tolist()


def tokenising(pack: Path, old_release: Path | None, runs: int = 9) -> list[Comparison]:
    """Text of 3000 units to ids."""
    tokenizer, text = (
        build_speechgpt_tokenizer(read_published_tokenizer(pack)),
        unit_string(units_of(NUM_UNITS_SPOKEN)),
    )
    ids = tokenizer(text).input_ids
    assert len(ids) == NUM_UNITS_SPOKEN + 3
    seconds = []
    for _ in range(runs):
        start = time.process_time()
        tokenizer(text)
        seconds.append(time.process_time() - start)
    if old_release is None:
        print(
            f"skipped the slow tokenizer: needs --transformers433; ours: {1e3 * min(seconds):.2f} ms", file=sys.stderr
        )
        return []
    done = subprocess.run(
        [sys.executable, "-c", _SLOW, str(pack), str(runs)],
        input=text,
        env={**os.environ, "PYTHONPATH": str(old_release)},
        capture_output=True,
        text=True,
        check=True,
    )
    slow = json.loads(done.stdout.strip().splitlines()[-1])
    assert slow["ids"] == ids
    return [Comparison(f"tokenising {NUM_UNITS_SPOKEN} units", "-", slow["seconds"], seconds)]


def generation(pack: Path, size: str) -> list[Comparison]:
    """Answers to eight questions with units, by a Llama of 27 or 208 million parameters, which is as far from the
    published 7 billion as a CPU allows; with plain and with packed weights. Ours keeps keys and values in place
    (`cache_implementation="static"`): the default copies those of all eight rows for every token."""
    tokenizer = build_speechgpt_tokenizer(read_published_tokenizer(pack))
    torch.manual_seed(0)
    new_tokens, *widths = LLAMAS[size]
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = LlamaConfig(
        vocab_size=1472,
        **dict(zip(names, widths, strict=True)),
        initializer_range=0.08,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    plain = LlamaForCausalLM(config).eval()
    model = SpeechGptForCausalLM.from_plain(copy.deepcopy(plain), 420, 1000)
    prompts = [inference_prompt(unit_string(units_of(20 + 5 * number))) for number in range(QUESTIONS)]
    options = {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens}

    def one_by_one() -> list[torch.Tensor]:
        answers = []
        for prompt in prompts:
            inputs = tokenizer(prompt, return_tensors="pt")
            # As in upstream's script, which keeps the scores.
            found = plain.generate(**inputs, **options, return_dict_in_generate=True, output_scores=True)
            answers.append(found.sequences[0, inputs.input_ids.shape[1] :])
        return answers

    def together() -> torch.Tensor:
        inputs = tokenizer(prompts, padding=True, return_tensors="pt")
        found = model.generate(**inputs, **options, cache_implementation="static")
        return found[:, inputs.input_ids.shape[1] :]

    expected = torch.stack(one_by_one())
    parameters = sum(parameter.numel() for parameter in plain.parameters()) / 1e6
    name = f"{QUESTIONS} answers of {new_tokens} tokens, {parameters:.0f} M parameters"
    rows = []
    for kind in ("", ", ours packed"):
        if kind:
            pack_linear_weights(model)
        alike = (expected == together()).all(dim=1).float().mean()
        # A batch is rounded differently, and a near tie between two tokens may then fall the other way.
        assert alike >= 0.75, alike
        rows.append(compare(name + kind, ">= 3", one_by_one, together, runs=2))
    return rows


def memory() -> None:
    """Peak memory beyond weights and inputs, of loss and backward pass, each in a process of its own."""
    print(
        f"| loss of {TOKENS} positions, {WIDTH} wide | all logits, MB | chunks of 256, MB | ratio |\n|---|---|---|---|"
    )
    for size in VOCABULARIES:
        for trained in ("trained", "frozen"):
            peaks = []
            for kind in ("plain", "chunked"):
                command = [sys.executable, __file__, "--measure", kind, str(size), trained]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                peaks.append(json.loads(done.stdout))
            plain, chunked = peaks
            assert abs(plain["loss"] - chunked["loss"]) <= 1e-6 * plain["loss"], peaks
            assert abs(plain["gradient"] - chunked["gradient"]) <= 1e-5 * plain["gradient"], peaks
            name = f"vocabulary {size}, head {trained}"
            ratio = plain["megabytes"] / chunked["megabytes"]
            print(f"| {name} | {plain['megabytes']:.0f} | {chunked['megabytes']:.0f} | **{ratio:.1f}** |", flush=True)


def measure(kind: str, size: int, trained: str) -> None:
    """One loss and its backward pass; prints the peak as JSON. The gradient of a trained head is part of it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    head, hidden = nn.Linear(WIDTH, size, bias=False), torch.randn(TOKENS, WIDTH, requires_grad=True)
    labels = torch.randint(0, size, (TOKENS,))
    head.requires_grad_(trained == "trained")
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    if kind == "plain":
        loss = nn.functional.cross_entropy(head(hidden).float(), labels)
    else:
        loss = chunked_cross_entropy(hidden, head, labels)
    loss.backward()
    peak = resident("VmHWM") - before
    print(json.dumps({"megabytes": peak, "loss": loss.item(), "gradient": hidden.grad.norm().item()}))


def resident(field: str) -> float:
    """Memory of this process in megabytes: `VmRSS` now, `VmHWM` at most since the mark was last cleared (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1000
    raise RuntimeError(f"/proc/self/status: expected {field}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pack", type=Path, default=PACK, help="folder with a published tokenizer")
    parser.add_argument("--transformers433", type=Path, help="folder with transformers 4.33.1")
    parser.add_argument("--only", nargs="+", choices=("tokenising", "generation", "memory"))
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure[0], int(arguments.measure[1]), arguments.measure[2])
        return
    wanted = arguments.only or ("tokenising", "generation", "memory")
    torch.set_num_threads(1)
    print(HEADER)
    if "tokenising" in wanted:
        for comparison in tokenising(arguments.pack, arguments.transformers433):
            print(comparison.row(), flush=True)
    if "generation" in wanted:
        for size in LLAMAS:
            for comparison in generation(arguments.pack, size):
                print(comparison.row(), flush=True)
    if "memory" in wanted:
        memory()


if __name__ == "__main__":
    main()
