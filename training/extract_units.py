"""Speech units of every utterance of a data set, as parquet.

    python training/extract_units.py UNITS_MODEL DATA/digits/train UNITS.parquet
    python training/extract_units.py UNITS_MODEL DATA.jsonl UNITS.parquet --where split=train --batch_seconds 60

UNITS_MODEL is a folder or Hub id of a `speechgpt_units` model, of an `s3_tokenizer`, or of a whole `cosyvoice`, whose
tokenizer is used. Rows, in the order of the manifest: `key`, `text`, `speaker`, `units` (of `speechgpt_units` without
adjacent repeats), `durations` (frames of each), and every other column of the manifest.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> None:
    """Run the extraction; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of a units model or a CosyVoice")
    parser.add_argument("data", type=Path, help="audiofolder, .jsonl file or Kaldi folder")
    parser.add_argument("output", type=Path, help="parquet file")
    parser.add_argument("--where", nargs="*", default=[], metavar="COLUMN=VALUE[,VALUE]", help="keep these rows")
    parser.add_argument("--batch_seconds", type=float, default=60.0, help="audio of one batch, padding included")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bfloat16", action="store_true", help="on a CPU: faster, and some units change")
    parser.add_argument("--trust_remote_code", action="store_true")
    arguments = parser.parse_args(argv)

    from datasets import Dataset
    from transformers import AutoModel

    import hf_speechllm  # noqa: F401  registers the model families
    from hf_speechllm.cpu_inference import bfloat16_obstacle, use_bfloat16_products
    from hf_speechllm.data.manifests import parse_filters, read_manifest
    from hf_speechllm.data.unit_extraction import extract_units

    if arguments.bfloat16 and (obstacle := bfloat16_obstacle(arguments.device)) is not None:
        parser.error(f"--bfloat16: {obstacle}")
    utterances = read_manifest(arguments.data, where=parse_filters(arguments.where))
    model = AutoModel.from_pretrained(arguments.model, trust_remote_code=arguments.trust_remote_code)
    if model.config.model_type == "cosyvoice":
        model = model.speech_tokenizer
    model = model.eval().to(arguments.device)
    if arguments.bfloat16:
        use_bfloat16_products(model)
    rows = extract_units(model, utterances, arguments.batch_seconds)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows).to_parquet(str(arguments.output))
    print(f"{len(rows)} utterances, {sum(len(row['units']) for row in rows)} units: {arguments.output}")


if __name__ == "__main__":
    main(sys.argv[1:])
