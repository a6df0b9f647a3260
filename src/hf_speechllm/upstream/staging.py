"""Output directories that are complete or absent."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from .errors import ConversionError


REPORT_NAME = "conversion_report.json"


@contextmanager
def staged_directory(destination: str | PathLike[str]) -> Iterator[Path]:
    """A temporary sibling of `destination` that takes its place when the block ends without an error.

    Every file is flushed to the disk before the rename. After an error nothing is left behind.

    Raises:
        ConversionError: `destination` exists and is not an empty directory, or its parent does not exist.
    """
    destination = Path(destination).absolute()
    if not destination.parent.is_dir():
        raise ConversionError("parent directory does not exist", file=destination)
    if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
        raise ConversionError("output exists and is not a directory", file=destination)
    if destination.is_dir() and any(destination.iterdir()):
        raise ConversionError("output directory is not empty", file=destination)
    stage = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".partial", dir=destination.parent))
    try:
        yield stage
        for folder, _, names in os.walk(stage):
            for name in names:
                _flush(Path(folder) / name)
            _flush(Path(folder))
        stage.chmod(0o777 & ~_umask())
        os.rename(stage, destination)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise
    _flush(destination.parent)


def write_report(stage: Path, report: dict[str, object]) -> None:
    """Add the SHA-256 of every file in `stage` to a conversion's report, and write it there."""
    report["outputs"] = sha256_of_files(stage)
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    (stage / REPORT_NAME).write_text(text, encoding="utf-8")


def sha256_of_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`, by its path relative to it, in alphabetical order."""
    sums = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        sums[path.relative_to(folder).as_posix()] = sha256_of_file(path)
    return sums


def sha256_of_file(path: Path) -> str:
    """SHA-256 of one file as hexadecimal text."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
