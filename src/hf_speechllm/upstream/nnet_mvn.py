"""Mean and variance normalisation of a FunASR pack: `am.mvn`, a Kaldi nnet1 network in text form.

    <Nnet>
    <Splice> D D
    [ 0 ]
    <AddShift> D D
    <LearnRateCoef> 0 [ shift_1 … shift_D ]
    <Rescale> D D
    <LearnRateCoef> 0 [ scale_1 … scale_D ]
    </Nnet>

Features are normalised as `(x + shift) * scale`. The splice is the identity; its brackets hold no statistics.
"""

from __future__ import annotations

import re
from os import PathLike

import torch
from torch import Tensor

from .errors import ConversionError, UnsafeArtifactError
from .files import read_utf8


MAX_MVN_BYTES = 4 << 20
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def read_nnet_mvn(path: str | PathLike[str], *, input_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Shift and scale, each float32 `(input_size,)`.

    Args:
        input_size: expected D, e.g. 560.
    Raises:
        UnsafeArtifactError: the text is not of the form above, or a number is not finite in float32.
        ConversionError: a component or D disagrees with the others or with `input_size`.
    """
    fields = read_utf8(path, MAX_MVN_BYTES).split()
    if len(fields) < 2 or fields[0] != "<Nnet>" or fields[-1] != "</Nnet>":
        raise UnsafeArtifactError("not a Kaldi network", file=path, expected="<Nnet> … </Nnet>", actual=fields[:1])
    vectors: dict[str, list[str]] = {}
    position = 1
    while position < len(fields) - 1:
        name = fields[position]
        position += 1
        if name not in ("<Splice>", "<AddShift>", "<Rescale>"):
            raise UnsafeArtifactError(
                "unknown component", file=path, expected="<Splice>, <AddShift>, <Rescale>", actual=name
            )
        if name in vectors:
            raise UnsafeArtifactError("component occurs twice", file=path, key=name)
        end = next((i for i in range(position, len(fields) - 1) if fields[i] == "]"), None)
        start = next((i for i in range(position, len(fields) - 1) if fields[i] == "["), None)
        if start is None or end is None or end < start:
            raise UnsafeArtifactError("component has no [ … ]", file=path, key=name)
        head, vectors[name] = fields[position:start], fields[start + 1 : end]
        coefficient = [] if name == "<Splice>" else ["<LearnRateCoef>", "0"]
        if len(head) != 2 + len(coefficient) or head[0] != head[1] or head[2:3] != coefficient[:1]:
            raise UnsafeArtifactError(
                "malformed component",
                file=path,
                key=name,
                expected=f"{name} D D {' '.join(coefficient)} [",
                actual=head,
            )
        if not (head[0].isascii() and head[0].isdigit()):
            raise UnsafeArtifactError("dimension is not a number", file=path, key=name, actual=head[0])
        if name != "<Splice>" and int(head[0][:9]) != len(vectors[name]):
            raise ConversionError(
                "wrong number of values", file=path, key=name, expected=head[0], actual=len(vectors[name])
            )
        position = end + 1
    if vectors.pop("<Splice>", ["0"]) != ["0"]:
        raise ConversionError("splicing of frames is not supported", file=path, key="<Splice>", expected="[ 0 ]")
    for name in ("<AddShift>", "<Rescale>"):
        if name not in vectors:
            raise ConversionError("component is missing", file=path, key=name)
        expected = len(vectors["<AddShift>"]) if input_size is None else input_size
        if len(vectors[name]) != expected or not expected:
            raise ConversionError(
                "statistics have the wrong length", file=path, key=name, expected=expected, actual=len(vectors[name])
            )
    return _vector(vectors["<AddShift>"], path, "<AddShift>"), _vector(vectors["<Rescale>"], path, "<Rescale>")


def write_nnet_mvn(shift: Tensor, scale: Tensor) -> str:
    """The text of an `am.mvn` that gives back `shift` and `scale` (each `(D,)` float32) exactly."""
    size = len(shift)

    def component(name: str, values: Tensor) -> str:
        numbers = " ".join(repr(value) for value in values.double().tolist())
        return f"<{name}> {size} {size}\n<LearnRateCoef> 0 [ {numbers} ]\n"

    splice = f"<Splice> {size} {size}\n[ 0 ]\n"
    return f"<Nnet>\n{splice}{component('AddShift', shift)}{component('Rescale', scale)}</Nnet>\n"


def _vector(fields: list[str], path: str | PathLike[str], name: str) -> Tensor:
    for field in fields:
        if not _NUMBER.fullmatch(field):
            raise UnsafeArtifactError("not a finite number", file=path, key=name, actual=field[:40])
    vector = torch.tensor([float(field) for field in fields], dtype=torch.float64).float()
    if not bool(torch.isfinite(vector).all()):
        raise UnsafeArtifactError("not finite in float32", file=path, key=name)
    return vector
