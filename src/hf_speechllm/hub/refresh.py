"""Brings the code inside exported model folders up to date with the package.

python -m hf_speechllm.hub.refresh FOLDER [FOLDER ...]
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

from .. import models


SOURCES = Path(models.__file__).parent


def named_classes(content: Any) -> list[str]:
    """The `module.Class` references of a configuration: every `auto_map` and pipeline in it, at any depth."""
    if isinstance(content, list):
        return [reference for value in content for reference in named_classes(value)]
    if not isinstance(content, dict):
        return []
    references = []
    for key, value in content.items():
        if key == "auto_map":
            for item in value.values():
                # A tokenizer has a pair, one of which may be null.
                references += [name for name in (item if isinstance(item, list) else [item]) if name is not None]
        elif key == "impl":
            references.append(value)
        else:
            references += named_classes(value)
    return references


def code_files(folder: Path) -> set[str]:
    """Names of the files that `folder` has to carry: those that its JSON files name, and all that they import."""
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*config.json")]
    names = {reference.split(".")[0] + ".py" for reference in named_classes(contents)}
    return names | {Path(path).name for name in names for path in get_relative_import_files(SOURCES / name)}


def refresh_code(folder: Path) -> None:
    """Copy the files that `folder` needs from the package, and remove code files that it needs no longer."""
    needed = code_files(folder)
    for path in folder.glob("*.py"):
        if path.name not in needed:
            path.unlink()
    for name in sorted(needed):
        shutil.copyfile(SOURCES / name, folder / name)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        refresh_code(Path(argument))
