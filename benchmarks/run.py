"""Speed against WeNet and kaldi-native-fbank: ratios measured side by side, one thread, the same weights.

    python benchmarks/run.py --wenet CHECKOUT [--only fbank attention ...] [--output benchmarks/RESULTS.md]

`CHECKOUT` is a clone of wenet-e2e/wenet. Without it only the comparisons that need no peer code run. Every
comparison checks first that both sides compute the same.
"""

import argparse
import platform
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "conversion")]

import torch
import transformers
from timing import HEADER
from u2pp_attention import attention
from u2pp_encoder import encoder, streaming, training_step
from u2pp_fbank import fbank
from u2pp_moe import moe
from u2pp_search import prefix_beam, rescoring


WITH_PEER = {
    "attention": attention,
    "encoder": encoder,
    "prefix_beam": prefix_beam,
    "rescoring": rescoring,
    "streaming": streaming,
    "training_step": training_step,
    "moe": moe,
}
WITHOUT_PEER = {"fbank": fbank}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wenet", type=Path, help="checkout of wenet-e2e/wenet")
    parser.add_argument("--only", nargs="+", choices=[*WITHOUT_PEER, *WITH_PEER], help="run only these")
    parser.add_argument("--output", type=Path, help="append the table to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    versions = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    )
    report(f"{versions}, {platform.machine()}, one thread\n\n{HEADER}", arguments.output)
    for name, function in {**WITHOUT_PEER, **WITH_PEER}.items():
        if arguments.only and name not in arguments.only:
            continue
        if name in WITH_PEER and arguments.wenet is None:
            print(f"skipped {name}: needs --wenet CHECKOUT", file=sys.stderr)
            continue
        for comparison in function(arguments.wenet) if name in WITH_PEER else function():
            report(comparison.row(), arguments.output)


def report(text: str, output: Path | None) -> None:
    """Print, and append to the file: what was measured stays if a later comparison fails."""
    print(text, flush=True)
    if output is not None:
        with output.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
