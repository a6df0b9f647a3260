"""Speed against WeNet, FunASR and kaldi-native-fbank: ratios measured side by side, one thread, the same weights.

    python benchmarks/run.py --wenet CHECKOUT --funasr CHECKOUT --speechtokenizer CHECKOUT [--only fbank attention ...]
        [--output benchmarks/RESULTS.md]

The checkouts are clones of wenet-e2e/wenet, modelscope/FunASR and ZhangXInFD/SpeechTokenizer. What needs one that is
not given is skipped. Every comparison checks first that both sides compute the same.
"""

import argparse
import platform
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "conversion")]

import torch
import transformers
from funasr_cif import cif
from funasr_end_to_end import paraformer, sensevoice
from funasr_nar import nar
from speechgpt_units import units
from speechgpt_vocoder import vocoder
from speechtokenizer import speechtokenizer
from timing import HEADER, report
from u2pp_attention import attention
from u2pp_encoder import encoder, streaming, training_step
from u2pp_fbank import fbank
from u2pp_moe import moe
from u2pp_search import prefix_beam, rescoring


WITH_WENET = {
    "attention": attention,
    "encoder": encoder,
    "prefix_beam": prefix_beam,
    "rescoring": rescoring,
    "streaming": streaming,
    "training_step": training_step,
    "moe": moe,
}
WITH_FUNASR = {"cif": cif, "paraformer": paraformer, "sensevoice": sensevoice}
WITH_SPEECHTOKENIZER = {"speechtokenizer": speechtokenizer}
WITHOUT_PEER = {"fbank": fbank, "nar": nar, "units": units, "vocoder": vocoder}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wenet", type=Path, help="checkout of wenet-e2e/wenet")
    parser.add_argument("--funasr", type=Path, help="checkout of modelscope/FunASR")
    parser.add_argument("--speechtokenizer", type=Path, help="checkout of ZhangXInFD/SpeechTokenizer")
    names = [*WITHOUT_PEER, *WITH_WENET, *WITH_FUNASR, *WITH_SPEECHTOKENIZER]
    parser.add_argument("--only", nargs="+", choices=names, help="run only these")
    parser.add_argument("--output", type=Path, help="append the table to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    versions = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    )
    report(f"{versions}, {platform.machine()}, one thread\n\n{HEADER}", arguments.output)
    for functions, checkout, option in (
        (WITHOUT_PEER, None, None),
        (WITH_WENET, arguments.wenet, "--wenet"),
        (WITH_FUNASR, arguments.funasr, "--funasr"),
        (WITH_SPEECHTOKENIZER, arguments.speechtokenizer, "--speechtokenizer"),
    ):
        for name, function in functions.items():
            if arguments.only and name not in arguments.only:
                continue
            if option is not None and checkout is None:
                print(f"skipped {name}: needs {option} CHECKOUT", file=sys.stderr)
                continue
            for comparison in function() if option is None else function(checkout):
                report(comparison.row(), arguments.output)


if __name__ == "__main__":
    main()
