"""What the command lines of all converters have in common: their arguments, the report, one line for a refusal."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from transformers.utils import logging

from hf_speechllm.upstream.errors import ConversionError


REFUSED = 2


def converter_parser(description: str, reverse: str) -> argparse.ArgumentParser:
    """A parser with `source`, `destination` and `--reverse`, which writes what `reverse` says."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="PACK, or with --reverse the model folder")
    parser.add_argument("destination", type=Path, help="folder to create")
    parser.add_argument("--reverse", action="store_true", help=reverse)
    return parser


def print_report(convert: Callable[[], dict[str, object]]) -> int:
    """Runs a conversion and prints its report as JSON.

    Returns:
        The exit status: 0, or 2 with one line on standard error where the pack or the folder is refused.
    """
    logging.disable_progress_bar()
    try:
        report = convert()
    except (ConversionError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return REFUSED
    print(json.dumps(report, indent=1, ensure_ascii=False))
    return 0
