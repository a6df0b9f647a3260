"""CosyVoice 2's language model: one sentence and eight, with bfloat16 and with int8 weights too, against upstream.

    python benchmarks/cosyvoice_lm.py --cosyvoice CHECKOUT [--dependencies FOLDER] [--tokens 50] [--tiny]

CHECKOUT is a clone of FunAudioLLM/CosyVoice; FOLDER holds what its imports need beyond torch and transformers
(`pip install --no-deps --target`). Both sides have the published shape (0.5 B) and the same random weights; ids are
compared first, decoding greedily. The peer is upstream's `inference`: a sentence at a time, in Python token by token
with its sampling. Time is CPU time on one thread and includes the prompt.

Upstream passes a mask of the new tokens alone, which transformers 4.51 took for "everything is visible" and releases
since then refuse or misread; the peer here passes none, with the same meaning.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import torch
from cosyvoice_peer import PUBLISHED_LM, TINY_LM, import_peer, ours_lm, peer_lm
from timing import HEADER, Comparison, compare

from hf_speechllm.cpu_inference import has_bfloat16_products, pack_linear_weights, unpack_linear_weights
from hf_speechllm.cpu_int8 import quantize_linear_weights
from hf_speechllm.models.modeling_cosyvoice_lm import CosyVoiceLmForCausalLM
from hf_speechllm.models.ras_sampling import RasSettings


WORDS, PROMPT_SPEECH = 20, 50
GREEDY = RasSettings(top_k=1, threshold=1.1)
# Our weights: as loaded, or packed in this type.
WEIGHTS = {None: "", torch.float32: ", ours with packed weights", torch.bfloat16: ", ours in bfloat16"}


def sentences(count: int, text_size: int, speech_size: int) -> list[dict[str, torch.Tensor]]:
    """Inputs of the zero-shot mode, one sentence each."""
    generator = torch.Generator().manual_seed(1)

    def ids(size: int, number: int) -> torch.Tensor:
        return torch.randint(1, size, (1, number), generator=generator)

    return [
        {
            "text": ids(text_size, WORDS),
            "prompt_text": ids(text_size, WORDS),
            "prompt_speech": ids(speech_size, PROMPT_SPEECH),
        }
        for _ in range(count)
    ]


def peer_speaks(peer: torch.nn.Module, rows: list[dict[str, torch.Tensor]], tokens: int) -> list[list[int]]:
    """Upstream's loop, one sentence after the other."""
    answers = []
    for row in rows:
        lengths = [torch.tensor([row[name].shape[1]]) for name in ("text", "prompt_text", "prompt_speech")]
        spoken = peer.inference(
            *(row["text"], lengths[0], row["prompt_text"], lengths[1], row["prompt_speech"], lengths[2]),
            torch.zeros(0, 192),
            min_token_text_ratio=tokens / WORDS,
            max_token_text_ratio=tokens / WORDS,
        )
        answers.append(list(spoken))
    return answers


def ours_speak(
    model: CosyVoiceLmForCausalLM, rows: list[dict[str, torch.Tensor]], tokens: int, sampling: RasSettings | None
) -> list[list[int]]:
    """The same sentences in one batch."""
    text, before, speech = (torch.cat([row[name] for row in rows]) for name in rows[0])
    output = model.generate_speech_tokens(
        text,
        prompt_text_ids=before,
        prompt_speech_ids=speech,
        sampling=sampling,
        min_token_text_ratio=tokens / WORDS,
        max_token_text_ratio=tokens / WORDS,
        compatibility="upstream",
    )
    return [row[mask.bool()].tolist() for row, mask in zip(output.token_ids, output.token_mask, strict=True)]


def check_ids(peer: torch.nn.Module, model: CosyVoiceLmForCausalLM, rows: list[dict[str, torch.Tensor]]) -> None:
    """Both sides say the same when nothing is drawn."""
    sampling = peer.sampling
    peer.sampling = partial(sampling, top_k=1, tau_r=1.1)
    expected, found = peer_speaks(peer, rows, 10), ours_speak(model, rows, 10, GREEDY)
    peer.sampling = sampling
    same = [one == other for one, other in zip(expected, found, strict=True)]
    # A batch is rounded differently, and a near tie between two tokens may then fall the other way.
    assert sum(same) >= 0.75 * len(same), (expected, found)


def read_bandwidth(megabytes: int = 512) -> float:
    """Bytes a second that one thread reads, measured by a sum."""
    block = torch.ones(megabytes << 18)
    seconds = []
    for _ in range(5):
        start = time.process_time()
        block.sum()
        seconds.append(time.process_time() - start)
    return block.numel() * 4 / min(seconds)


def decoded_bytes(model: CosyVoiceLmForCausalLM) -> int:
    """Bytes of weights that one token reads: all but the table, of which it reads a row."""
    table = model.get_input_embeddings().weight
    held = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in held if tensor is not table)


def int8(
    model: CosyVoiceLmForCausalLM, rows: list[dict[str, torch.Tensor]], tokens: int, runs: int
) -> tuple[Comparison, dict[str, float]]:
    """Float32 against int8 weights, both against the floor that reading them sets. The model is int8 afterwards."""

    def seconds(count: int) -> float:
        start = time.process_time()
        ours_speak(model, rows[:1], count, None)
        return time.process_time() - start

    def per_token() -> float:
        # The difference of two lengths leaves the prompt out.
        return min((seconds(tokens + 10) - seconds(10)) / tokens for _ in range(runs))

    bandwidth = read_bandwidth()
    facts = {"read_gb_per_s": bandwidth / 1e9}
    measured = {}
    for kind in ("float32", "int8"):
        if kind == "int8":
            quantize_linear_weights(model)
        seconds(3)
        measured[kind] = [per_token()]
        facts[f"{kind}_ms_per_token"] = 1e3 * measured[kind][0]
        facts[f"{kind}_floor_ms"] = 1e3 * decoded_bytes(model) / bandwidth
        facts[f"{kind}_times_floor"] = facts[f"{kind}_ms_per_token"] / facts[f"{kind}_floor_ms"]
    name = "int8 weights against float32, one sentence, a token"
    return Comparison(name, "-", measured["float32"], measured["int8"]), facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cosyvoice", type=Path, required=True, help="checkout of FunAudioLLM/CosyVoice")
    parser.add_argument("--dependencies", type=Path, help="folder with the packages that its imports need")
    parser.add_argument("--tokens", type=int, default=50, help="speech tokens of an answer")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a model of 0.2 M parameters, to try the script")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    import_peer(arguments.cosyvoice, None, arguments.dependencies)
    sizes, speech_size = (TINY_LM, 200) if arguments.tiny else (PUBLISHED_LM, 6561)
    peer = peer_lm(2, sizes, speech_size)
    model = ours_lm(2, peer, sizes, speech_size)
    print(HEADER)
    for count, goal in ((1, ">= 1.3"), (8, ">= 3")):
        rows = sentences(count, sizes["vocab_size"], speech_size)
        check_ids(peer, model, rows)
        for packed in WEIGHTS:
            if packed == torch.bfloat16 and not has_bfloat16_products():
                continue
            if packed is not None and not pack_linear_weights(model, packed):
                continue
            comparison = compare(
                f"LM, {count} sentence(s) of {arguments.tokens} tokens{WEIGHTS[packed]}",
                goal,
                partial(peer_speaks, peer, rows, arguments.tokens),
                partial(ours_speak, model, rows, arguments.tokens, None),
                runs=arguments.runs,
            )
            print(comparison.row(), flush=True)
        unpack_linear_weights(model)
    del peer
    comparison, facts = int8(model, sentences(1, sizes["vocab_size"], speech_size), arguments.tokens, arguments.runs)
    print(comparison.row())
    print(json.dumps({name: round(value, 3) for name, value in facts.items()}))


if __name__ == "__main__":
    main()
