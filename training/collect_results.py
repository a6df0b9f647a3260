"""Gather evaluations of several seeds into the results file of a model card.

    python training/collect_results.py pretrained/MODEL/results.json \
        --add u2pp_moe_digits "Free Spoken Digit Dataset" test_unseen seed1.json seed2.json seed3.json \
        --add ...

Each `--add` takes a model, a data set, a split, and the JSON files that `evaluate_asr.py --output` wrote, one per
seed. A row holds the mean over the seeds and each seed's own figure, in per cent, and the mean numbers of
substitutions, deletions and insertions.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import mean


ERRORS = ("substitutions", "deletions", "insertions")


def rows_of(model: str, dataset: str, split: str, files: list[str]) -> list[dict]:
    """One row per decoding and chunk size; every file must have the same ones.

    Raises:
        ValueError: a file has other decodings, chunk sizes or metrics than the first one.
    """
    reports = [json.loads(Path(file).read_text(encoding="utf-8"))["results"] for file in files]
    rows = []
    for index, first in enumerate(reports[0]):
        metric = "wer" if "wer" in first else "cer"
        wanted = (first["decoding"], first["chunk_size"])
        for file, report in zip(files, reports, strict=True):
            found = (report[index]["decoding"], report[index]["chunk_size"]) if index < len(report) else None
            if found != wanted or metric not in report[index]:
                raise ValueError(f"{file}: results[{index}]: expected {wanted} with {metric}, found {found}")
        values = [report[index][metric] for report in reports]
        rows.append(
            {
                "model": model,
                "dataset": dataset,
                "split": split,
                "decoding": wanted[0],
                "chunk_size": wanted[1],
                "metric": metric,
                "value": round(mean(values), 3),
                "per_seed": values,
            }
            | {kind: round(mean(report[index][kind] for report in reports), 1) for kind in ERRORS}
        )
    return rows


def main(argv: list[str]) -> None:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--add", nargs="+", action="append", required=True, metavar="MODEL DATASET SPLIT FILE...")
    arguments = parser.parse_args(argv)
    rows = []
    for model, dataset, split, *files in arguments.add:
        rows += rows_of(model, dataset, split, files)
    arguments.output.write_text(json.dumps({"rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
