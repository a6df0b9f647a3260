"""Check a converted model against the outputs of its upstream, stage by stage.

    python conversion/check_parity.py CASE_DIR [CASE_DIR ...]

A case directory holds an upstream pack, `io.safetensors` with inputs and expected tensors, and `case.json` with
expected texts, scores, losses and gradients. For every case the pack is converted into a temporary folder, loaded from
there, and run. One JSON line per expected value says its name, the largest absolute difference, the tolerance and
whether it passed; a last line counts. An expected value that no stage looked at counts as failed. A case of a family
that no check knows is one line with its `error`, and the last line counts such cases as `unsupported`. The exit status
is 1 if anything failed or was not checked.

To add a family, write a `check_<family>` function in `conversion/parity/` that takes a [`Case`] and checks every name
in it, and name it in `CHECKS` below.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent))

from parity.campplus import check_campplus
from parity.case import Case
from parity.cosyvoice_flow import check_flow
from parity.cosyvoice_frontend import check_frontend
from parity.cosyvoice_hift import check_hift
from parity.cosyvoice_lm import check_lm
from parity.cosyvoice_pack import check_pack
from parity.cosyvoice_sampling import check_sampling
from parity.funasr_paraformer import check_paraformer
from parity.funasr_sensevoice import check_sensevoice
from parity.funasr_streaming import check_streaming
from parity.s3_tokenizer import check_s3_tokenizer
from parity.speechgpt_prompts import check_anygpt_prompts, check_prompts
from parity.speechgpt_units import check_units
from parity.speechgpt_vocoder import check_vocoder
from parity.speechtokenizer import check_speechtokenizer
from parity.wenet import check_wenet


CHECKS = {
    "hubert_kmeans_units": check_units,
    "unit_vocoder": check_vocoder,
    "prompts": check_prompts,
    "prompts_anygpt_speech": check_anygpt_prompts,
    "speechtokenizer": check_speechtokenizer,
    "s3_tokenizer": check_s3_tokenizer,
    "campplus": check_campplus,
    "cosyvoice_pack": check_pack,
    "wenet": check_wenet,
    "cosyvoice_flow": check_flow,
    "cosyvoice_frontend": check_frontend,
    "cosyvoice_hift": check_hift,
    "cosyvoice_lm": check_lm,
    "cosyvoice_sampling": check_sampling,
    "SenseVoiceSmall": check_sensevoice,
    "ParaformerStreaming": check_streaming,
    **dict.fromkeys(("Paraformer", "BiCifParaformer", "ContextualParaformer", "SeacoParaformer"), check_paraformer),
}


class UnsupportedFamilyError(ValueError):
    """A case of a family for which there is no check."""


def check_case(directory: Path) -> tuple[int, int]:
    """Run one case; prints a line per value and returns how many passed and failed.

    Raises:
        UnsupportedFamilyError: a family that `CHECKS` does not name.
    """
    case = Case.load(directory)
    if case.family not in CHECKS:
        raise UnsupportedFamilyError(f"family: expected one of {sorted(CHECKS)}, got {case.family!r}")
    with tempfile.TemporaryDirectory(prefix="parity-") as work:
        CHECKS[case.family](case, Path(work))
    case.fail_unchecked()
    return case.passed, case.failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="+", type=Path, metavar="CASE_DIR")
    arguments = parser.parse_args()
    total_passed = total_failed = unsupported = 0
    for directory in arguments.cases:
        try:
            passed, failed = check_case(directory)
        except UnsupportedFamilyError as error:  # neither passed nor failed: no value of it was looked at
            print(json.dumps({"case": directory.name, "error": str(error)}))
            passed, failed = 0, 0
            unsupported += 1
        except Exception as error:  # a case that cannot run is a failed case, and the others still run
            print(
                json.dumps(
                    {"case": directory.name, "name": "run", "pass": False, "error": f"{type(error).__name__}: {error}"}
                )
            )
            passed, failed = 0, 1
        total_passed += passed
        total_failed += failed
    summary = {"total": total_passed + total_failed, "passed": total_passed, "failed": total_failed}
    print(json.dumps(summary | ({"unsupported": unsupported} if unsupported else {})))
    return 1 if total_failed or unsupported else 0


if __name__ == "__main__":
    sys.exit(main())
