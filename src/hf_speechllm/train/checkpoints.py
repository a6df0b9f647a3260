"""Checkpoints that are complete or not there.

A checkpoint is written to a staging folder, listed in a manifest, flushed to disk and then renamed. A run that is
killed while saving leaves a staging folder (ignored, removed at the next save) but no half-written `checkpoint-N`.
Folders whose files do not match their manifest, e.g. after an incomplete copy, are skipped when a run resumes.
"""

import json
import os
import re
from pathlib import Path


MANIFEST_NAME = "checkpoint_manifest.json"
STAGING_PREFIX = ".staging-"
_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")


def fsync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder`, and `folder` itself, to disk."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_manifest(folder: Path) -> None:
    """Write the name and size of every file below `folder` to its manifest."""
    files = {
        str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()
    }
    (folder / MANIFEST_NAME).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")


def is_complete(folder: Path) -> bool:
    """Whether the manifest of `folder` exists and every file it lists is there with its size."""
    try:
        files = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def complete_checkpoints(run: Path) -> list[Path]:
    """The complete `checkpoint-N` folders of a run in ascending order of N."""
    found = []
    for folder in run.glob("checkpoint-*"):
        match = _CHECKPOINT.match(folder.name)
        if match and folder.is_dir() and is_complete(folder):
            found.append((int(match.group(1)), folder))
    return [folder for _, folder in sorted(found)]


def incomplete_checkpoints(run: Path) -> list[Path]:
    """The `checkpoint-N` folders of a run that do not match their manifest."""
    complete = set(complete_checkpoints(run))
    folders = [folder for folder in run.glob("checkpoint-*") if _CHECKPOINT.match(folder.name) and folder.is_dir()]
    return sorted(set(folders) - complete)


def publish(staged: Path, final: Path) -> None:
    """Manifest, flush, rename `staged` to `final`, flush the parent.

    Raises:
        FileExistsError: `final` exists and is complete.
    """
    write_manifest(staged)
    fsync_tree(staged)
    if final.exists():
        if is_complete(final):
            raise FileExistsError(f"{final}: expected no complete checkpoint of this step, found one")
        final.rename(final.with_name(f"{final.name}.incomplete"))
    staged.rename(final)
    descriptor = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
