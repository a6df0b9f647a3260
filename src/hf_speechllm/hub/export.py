"""Exports a recogniser as a folder that is ready for the Hub: weights, processor, code files, card."""

import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, PreTrainedModel, ProcessorMixin

from .. import auto  # noqa: F401
from .card import read_facts, render_card
from .self_check import self_check


def export_model(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    folder: str | os.PathLike,
    facts: str | os.PathLike | None = None,
    results: str | os.PathLike | None = None,
    overwrite: bool = False,
    half_precision_file: bool = False,
) -> dict[str, object]:
    """Writes model, processor, code and card beside `folder`, checks the result in a clean process, then renames it.

    Args:
        model, processor: what to publish.
        folder: where to. Nothing is there before everything is complete.
        facts: YAML facts for the card (see `model_cards/`); no card without them.
        results: JSON results for the card's table.
        overwrite: replace an existing folder.
        half_precision_file: store the weights as float16, half the size. The configuration keeps its type, to which
            loading brings them back: what is computed is computed in float32.

    Returns:
        The report of [`self_check`].

    Raises:
        FileExistsError: `folder` exists and `overwrite` is off.
        SelfCheckError: the exported folder does not work on its own; nothing is left behind.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not overwrite:
        raise FileExistsError(f"{folder}: exists; expected a new folder, or overwrite")
    staging = folder.with_name(folder.name + ".partial")
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    try:
        model.save_pretrained(staging)
        if half_precision_file:
            halve(staging / "model.safetensors")
        processor.save_pretrained(staging)
        if facts is not None:
            card = render_card(read_facts(facts, results))
            (staging / "README.md").write_text(card, encoding="utf-8")
        if results is not None:
            shutil.copyfile(results, staging / "results.json")
        report = self_check(staging)
        _replace(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return report


def halve(path: Path) -> None:
    """Rewrites a file of weights with its float32 tensors as float16.

    Raises:
        ValueError: a weight that float16 cannot hold.
    """
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float32:
            tensors[name] = tensor.half()
            if not bool(torch.isfinite(tensors[name]).all()):
                raise ValueError(f"{path}: {name}: expected magnitudes up to 65504, got {float(tensor.abs().max()):g}")
    save_file(tensors, path, metadata={"format": "pt"})


def _replace(staging: Path, folder: Path) -> None:
    """Renames `staging` to `folder`; an existing folder is moved away first and put back if that fails."""
    old = folder.with_name(folder.name + ".old")
    if old.exists():
        shutil.rmtree(old)
    if folder.exists():
        folder.rename(old)
    try:
        staging.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def export_folder(source: str | os.PathLike, folder: str | os.PathLike, **options) -> dict[str, object]:
    """[`export_model`] of a checkpoint folder, for example one that a training run wrote."""
    model = AutoModelForSpeechSeq2Seq.from_pretrained(source)
    processor = AutoProcessor.from_pretrained(source)
    return export_model(model, processor, folder, **options)
