"""Average the weights of several checkpoints."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from hf_speechllm.train.checkpoints import complete_checkpoints


def average_checkpoints(folders: Sequence[str | Path]) -> dict[str, torch.Tensor]:
    """Mean of the safetensors weights of checkpoints, accumulated in float64.

    Floating-point tensors, BatchNorm statistics included, are averaged and returned in their own dtype. Integer
    tensors (`num_batches_tracked`) are counters: the last folder's value is kept.

    Args:
        folders (`Sequence` of paths): checkpoints with the same tensors, oldest first. Sharded ones are read too.

    Raises:
        ValueError: no folder, a folder without safetensors, or tensors whose names or shapes differ.
    """
    if not folders:
        raise ValueError("average_checkpoints: expected at least one checkpoint, found none")
    sums: dict[str, torch.Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for folder in map(Path, folders):
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{folder}: expected *.safetensors, found none")
        seen = set()
        for file in files:
            with safe_open(file, framework="pt") as archive:
                for key in archive.keys():
                    tensor = archive.get_tensor(key)
                    seen.add(key)
                    if folder != Path(folders[0]) and (key not in sums or sums[key].shape != tensor.shape):
                        expected = tuple(sums[key].shape) if key in sums else "no such tensor"
                        raise ValueError(f"{file}: {key}: expected {expected}, found {tuple(tensor.shape)}")
                    dtypes[key] = tensor.dtype
                    if not tensor.is_floating_point():
                        sums[key] = tensor
                    elif key in sums:
                        sums[key] += tensor.double()
                    else:
                        sums[key] = tensor.double()
        if missing := sums.keys() - seen:
            raise ValueError(f"{folder}: expected the tensors {', '.join(sorted(missing))}, found none of them")
    return {
        key: (total / len(folders)).to(dtypes[key]) if total.is_floating_point() else total
        for key, total in sums.items()
    }


def select_checkpoints(
    run: str | Path, count: int, metric: str | None = None, greater_is_better: bool = False
) -> list[Path]:
    """The last, or best, complete checkpoints of a run, oldest first.

    Args:
        run (`str` or `Path`): output folder of a training run.
        count (`int`): how many; fewer are returned where fewer exist.
        metric (`str`, *optional*): e.g. `"eval_wer"`; the best by this metric of the evaluation at the checkpoint's
            step (later wins a tie). `None` takes the last.

    Raises:
        ValueError: no complete checkpoint, or none that was evaluated with `metric`.
    """
    folders = complete_checkpoints(Path(run))
    if not folders:
        raise ValueError(f"{run}: expected complete checkpoints, found none")
    if metric is None:
        return folders[-count:]
    history = json.loads((folders[-1] / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    score = {entry["step"]: entry[metric] for entry in history if metric in entry}
    steps = {folder: int(folder.name.rpartition("-")[2]) for folder in folders}
    scored = [folder for folder in folders if steps[folder] in score]
    if not scored:
        raise ValueError(f"{run}: expected {metric} in the log of the checkpoints, found none")
    sign = -1.0 if greater_is_better else 1.0
    best = sorted(scored, key=lambda folder: (sign * score[steps[folder]], -steps[folder]))[:count]
    return sorted(best, key=steps.__getitem__)
