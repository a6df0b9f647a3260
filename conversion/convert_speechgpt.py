"""Converts the parts of SpeechGPT to transformers folders: units, unit vocoder, language model; the last also back.

    python conversion/convert_speechgpt.py PACK OUT
    python conversion/convert_speechgpt.py speech2unit/ UNITS --layer 11
    python conversion/convert_speechgpt.py --reverse OUT PACK

What PACK is, its files decide: a fairseq HuBERT (`.pt`) with its k-means centres (`.bin`), a unit vocoder of fairseq
or textlesslib (`config.json` with `upsample_rates`, and a checkpoint), or a language model or adapter as published.
The pack is untrusted: see `hf_speechllm.upstream`. OUT appears complete or not at all.
"""

from __future__ import annotations

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent))

from command_line import converter_parser, print_report
from convert_speechgpt_lm import convert as convert_lm_pack
from convert_speechgpt_lm import convert_back as export_lm_pack
from convert_speechgpt_lm import is_speechgpt_lm_pack
from convert_speechgpt_units import CHECKPOINT_SUFFIXES, KMEANS_SUFFIXES, convert_units_pack
from convert_speechgpt_vocoder import CONFIG_NAME, convert_vocoder_pack

from hf_speechllm.upstream.errors import ConversionError
from hf_speechllm.upstream.json_config import read_json_mapping


def kind_of_pack(pack: Path) -> str:
    """`"units"`, `"vocoder"` or `"lm"`, by what is in the folder.

    Raises:
        ConversionError: not a folder, or none of the three.
        UnsafeArtifactError: a `config.json` that is not valid JSON.
    """
    if not pack.is_dir():
        raise ConversionError("pack is not a directory", file=pack)
    config = pack / CONFIG_NAME
    if config.is_file() and "upsample_rates" in read_json_mapping(config):
        return "vocoder"
    if is_speechgpt_lm_pack(pack):
        return "lm"
    names = {path.suffix for path in pack.iterdir()}
    if names & set(CHECKPOINT_SUFFIXES) and names & set(KMEANS_SUFFIXES):
        return "units"
    raise ConversionError(
        "not a pack of SpeechGPT",
        file=pack,
        expected="a fairseq checkpoint with k-means centres, a unit vocoder, or a language model",
        actual=sorted(path.name for path in pack.iterdir()),
    )


def convert_speechgpt_pack(pack: str | Path, out_dir: str | Path, layer: int | None = None) -> dict[str, object]:
    """Converts a pack of any of the three kinds; see `convert_units_pack`, `convert_vocoder_pack`, `convert_lm_pack`.

    Args:
        pack: the folder. out_dir: must not exist or be empty; its parent must exist.
        layer: for units, the layer that the centres divide; default: what the name of their file says.
    Returns:
        The report, which is also written as `conversion_report.json`.
    Raises:
        ConversionError: something that the model does not have, named in the message.
        UnsafeArtifactError: a file that is hostile or damaged.
    """
    pack = Path(pack)
    kind = kind_of_pack(pack)
    if kind == "units":
        return convert_units_pack(pack, out_dir, layer)
    if layer is not None:
        raise ConversionError("--layer is for units", file=pack, expected="units", actual=kind)
    return convert_vocoder_pack(pack, out_dir) if kind == "vocoder" else convert_lm_pack(pack, out_dir)


def main(arguments: list[str] | None = None) -> int:
    """Command line, see `print_report`."""
    parser = converter_parser(__doc__, "write the published layout of a language model")
    parser.add_argument("--layer", type=int, help="units: the layer that the k-means centres divide, from 1")
    options = parser.parse_args(arguments)
    if options.reverse:
        return print_report(lambda: export_lm_pack(options.source, options.destination))
    return print_report(lambda: convert_speechgpt_pack(options.source, options.destination, options.layer))


if __name__ == "__main__":
    sys.exit(main())
