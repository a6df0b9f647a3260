"""The sources that a run file names, as utterances."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_speechllm.data.manifests import Utterance, read_hub_dataset, read_manifest


def read_sources(sources: Sequence[Any], data_dir: str | None) -> list[Utterance]:
    """Utterances of every source of `data.train` or `data.validation`, in order.

    A source is a path or a mapping with `path` or `hub`, `repeat`, what its reader takes, and `columns`: values of
    columns that its manifest lacks or leaves empty, e.g. `{language: en}`. With `text: ""` its transcripts are left
    out, for a language that only its tag is learned of. Relative paths start from `data_dir`.
    """
    utterances = []
    for source in sources:
        options = {"path": source} if isinstance(source, str) else dict(source)
        repeat = int(options.pop("repeat", 1))
        columns, text = options.pop("columns", {}), options.pop("text", None)
        if "hub" in options:
            found = read_hub_dataset(options.pop("hub"), **options)
        else:
            path = Path(data_dir or ".") / options.pop("path")
            found = read_manifest(path, **options)
        if columns:
            found = [
                replace(item, columns={**columns, **{name: value for name, value in item.columns.items() if value}})
                for item in found
            ]
        if text is not None:
            found = [replace(item, text=text) for item in found]
        utterances.extend(found * repeat)
    return utterances
