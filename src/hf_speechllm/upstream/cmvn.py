"""Global mean and variance statistics of a WeNet pack, JSON or Kaldi text."""

from __future__ import annotations

import json
import math
import re
from os import PathLike

import torch

from .errors import ConversionError, UnsafeArtifactError
from .files import read_utf8
from .json_config import parse_json


MAX_CMVN_BYTES = 4 << 20
VARIANCE_FLOOR = 1e-20
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def read_cmvn(
    path: str | PathLike[str], *, is_json: bool, input_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and inverse standard deviation, each float32 `(input_size,)`, computed in float64.

    mean = sum / n; variance = sum of squares / n - mean², at least 1e-20; inverse standard deviation = variance^-1/2.

    Args:
        is_json: `{"mean_stat": [...], "var_stat": [...], "frame_num": n}`; otherwise Kaldi text
            `[ s1 .. sD n  q1 .. qD 0 ]`.
        input_size: expected D.
    Raises:
        UnsafeArtifactError: the text is not of that form, or a number is not finite.
        ConversionError: lengths disagree, or the frame count is not positive.
    """
    text = read_utf8(path, MAX_CMVN_BYTES)
    sums, squares, count = _parse_json(text, path) if is_json else _parse_kaldi(text, path)
    if len(sums) != len(squares) or (input_size is not None and len(sums) != input_size):
        raise ConversionError(
            "statistics have the wrong length",
            file=path,
            key="mean_stat, var_stat",
            expected=input_size if input_size is not None else "equal lengths",
            actual=f"{len(sums)}, {len(squares)}",
        )
    if not sums:
        raise ConversionError("statistics are empty", file=path)
    if not count > 0:
        raise ConversionError("frame count is not positive", file=path, key="frame_num", actual=count)
    mean = [total / count for total in sums]
    inverse_std = []
    for total, average in zip(squares, mean, strict=True):
        variance = total / count - average * average
        if not math.isfinite(variance):
            raise UnsafeArtifactError("statistics overflow", file=path, actual=variance)
        inverse_std.append(1.0 / math.sqrt(max(variance, VARIANCE_FLOOR)))
    tensors = torch.tensor(mean, dtype=torch.float64).float(), torch.tensor(inverse_std, dtype=torch.float64).float()
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise UnsafeArtifactError("statistics overflow float32", file=path)
    return tensors


def write_json_cmvn(mean: torch.Tensor, inverse_std: torch.Tensor) -> str:
    """JSON statistics of one frame that give back `mean` and `inverse_std` (each `(D,)`) up to rounding."""
    average = mean.double()
    variance = inverse_std.double() ** -2
    return json.dumps(
        {"mean_stat": average.tolist(), "var_stat": (variance + average * average).tolist(), "frame_num": 1}
    )


def _parse_json(text: str, path: str | PathLike[str]) -> tuple[list[float], list[float], float]:
    content = parse_json(text, path)
    keys = {"mean_stat", "var_stat", "frame_num"}
    if not isinstance(content, dict) or set(content) != keys:
        actual = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise UnsafeArtifactError("not CMVN statistics", file=path, expected=sorted(keys), actual=actual)
    for key in ("mean_stat", "var_stat"):
        if not isinstance(content[key], list):
            raise UnsafeArtifactError("not a list of numbers", file=path, key=key, actual=type(content[key]).__name__)
    sums = [_number(value, path, "mean_stat") for value in content["mean_stat"]]
    squares = [_number(value, path, "var_stat") for value in content["var_stat"]]
    return sums, squares, _number(content["frame_num"], path, "frame_num")


def _parse_kaldi(text: str, path: str | PathLike[str]) -> tuple[list[float], list[float], float]:
    fields = text.split()
    if len(fields) < 6 or len(fields) % 2 or fields[0] != "[" or fields[-1] != "]" or fields[-2] != "0":
        raise UnsafeArtifactError("not Kaldi text statistics", file=path, expected="[ s1 .. sD n q1 .. qD 0 ]")
    for field in fields[1:-1]:
        if not _NUMBER.fullmatch(field):
            raise UnsafeArtifactError("not a finite number", file=path, actual=field)
    numbers = [_number(float(field), path, "statistics") for field in fields[1:-2]]
    size = (len(numbers) - 1) // 2
    return numbers[:size], numbers[size + 1 :], numbers[size]


def _number(value: object, path: str | PathLike[str], key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UnsafeArtifactError("not a number", file=path, key=key, actual=repr(value))
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise UnsafeArtifactError("not a finite number", file=path, key=key, actual=number)
    return number
