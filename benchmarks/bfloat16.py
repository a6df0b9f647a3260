"""What bfloat16 products change of a recogniser's texts, and what they save.

    python benchmarks/bfloat16.py MODEL DATA [--limit 200] [--where COLUMN=VALUE]

MODEL is any recogniser of this project, DATA an audiofolder, a .jsonl file or a Kaldi folder with transcripts. The
same utterances are recognised with packed weights in float32 and in bfloat16, one at a time and on one thread; a line
of JSON says how many texts differ, both error rates, and the ratio of the CPU times.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import evaluate
import torch
from transformers import pipeline

from hf_speechllm.audio import load_audio
from hf_speechllm.cpu_inference import has_bfloat16_products, pack_linear_weights, use_bfloat16_products
from hf_speechllm.data.manifests import parse_filters, read_manifest
from hf_speechllm.train.metrics import metric_path


def cpu_seconds(function: Callable[[], None]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of a recogniser")
    parser.add_argument("data", type=Path)
    parser.add_argument("--where", nargs="*", default=[], metavar="COLUMN=VALUE[,VALUE]", help="keep these rows")
    parser.add_argument("--limit", type=int, default=200, help="utterances")
    parser.add_argument("--runs", type=int, default=3, help="of both sides, after one to warm up")
    arguments = parser.parse_args()
    if not has_bfloat16_products():
        raise SystemExit("this processor has no fast bfloat16 products")
    torch.set_num_threads(1)
    import hf_speechllm  # noqa: F401  registers the model families

    utterances = read_manifest(arguments.data, where=parse_filters(arguments.where))[: arguments.limit]
    recognise = pipeline("automatic-speech-recognition", model=arguments.model, trust_remote_code=True)
    rate = recognise.feature_extractor.sampling_rate
    clips = [load_audio(item.audio, rate) for item in utterances]
    texts: dict[torch.dtype, list[str]] = {}

    def run(dtype: torch.dtype) -> None:
        texts[dtype] = [recognise({"raw": clip, "sampling_rate": rate})["text"] for clip in clips]

    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        # Not part of the time, and so the two sides cannot take turns.
        if dtype == torch.bfloat16:
            use_bfloat16_products(recognise.model)
        else:
            pack_linear_weights(recognise.model)
        run(dtype)
        seconds[dtype] = min(cpu_seconds(lambda kind=dtype: run(kind)) for _ in range(arguments.runs))
    wer = evaluate.load(metric_path("wer"))
    references = [item.text for item in utterances]
    error_rates = {
        str(dtype).removeprefix("torch."): round(100 * wer.compute(predictions=found, references=references)["wer"], 2)
        for dtype, found in texts.items()
    }
    changed = sum(one != other for one, other in zip(*texts.values(), strict=True))
    times = seconds[torch.float32] / seconds[torch.bfloat16]
    facts = {"utterances": len(clips), "texts_changed": changed, "wer": error_rates, "times_faster": round(times, 2)}
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
