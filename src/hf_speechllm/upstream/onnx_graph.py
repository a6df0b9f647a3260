"""A strict reader of ONNX files: nodes, initialisers and constants as data, without onnx or onnxruntime.

Nothing of the graph is run. Field numbers: `onnx.proto` of the ONNX project (IR version 3 and later).
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from os import PathLike

import torch
from torch import Tensor

from .errors import ConversionError, UnsafeArtifactError
from .files import require_regular_file
from .protobuf_message import message_fields, packed_varints, signed


MAX_FILE_BYTES = 4 << 30
MAX_NODES = 200_000
MAX_DIMENSIONS = 8
_DTYPES = {
    **{1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64},
    **{9: torch.bool, 10: torch.float16, 11: torch.float64, 16: torch.bfloat16},
}
# Fields of TensorProto that hold values as numbers instead of bytes -> how they are packed.
_FLOAT_DATA, _INT32_DATA, _INT64_DATA, _RAW_DATA, _DOUBLE_DATA = 4, 5, 7, 9, 10


@dataclass(frozen=True)
class OnnxNode:
    """One operation: names of its inputs and outputs, and its attributes that are numbers or lists of integers."""

    name: str
    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, int | float | list[int]]


@dataclass(frozen=True)
class OnnxGraph:
    """A graph as data.

    Args:
        nodes: in the file's order, constants left out.
        tensors: initialisers and constants by the name that nodes use; the large ones view the mapped file, which
            must stay in place while they are used.
    """

    nodes: tuple[OnnxNode, ...]
    tensors: dict[str, Tensor]


def read_onnx_graph(path: str | PathLike[str]) -> OnnxGraph:
    """Reads the graph of an ONNX file.

    Raises:
        UnsafeArtifactError: not a well-formed message, over the limits, a tensor whose bytes do not fit its shape, or
            a weight that is not finite.
        ConversionError: no graph in it, or weights in another file.
    """
    path = require_regular_file(path, MAX_FILE_BYTES)
    with path.open("rb") as file:
        # A private mapping: torch wants memory that could be written, and nothing ever writes it.
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    graphs = [value for field, value in message_fields(data, path, "model") if field == 7]
    if len(graphs) != 1 or not isinstance(graphs[0], memoryview):
        raise ConversionError("file is no ONNX model", file=path, expected="one graph", actual=f"{len(graphs)} graphs")
    nodes: list[OnnxNode] = []
    tensors: dict[str, Tensor] = {}
    for field, value in message_fields(graphs[0], path, "graph"):
        if field == 1:
            if len(nodes) >= MAX_NODES:
                raise UnsafeArtifactError("too many nodes", file=path, expected=f"at most {MAX_NODES}")
            node, constant = _node(_view(value, path, "graph.node"), path)
            if constant is None:
                nodes.append(node)
            else:
                tensors[node.outputs[0]] = constant
        elif field == 5:
            name, tensor = _tensor(_view(value, path, "graph.initializer"), path, "initializer")
            if name in tensors:
                raise UnsafeArtifactError("initializer occurs twice", file=path, key=name)
            tensors[name] = tensor
    if not nodes:
        raise ConversionError("graph without nodes", file=path)
    return OnnxGraph(tuple(nodes), tensors)


def _node(data: memoryview, path: PathLike[str]) -> tuple[OnnxNode, Tensor | None]:
    """A node and, if it is a constant, its tensor."""
    inputs: list[str] = []
    outputs: list[str] = []
    name = op_type = ""
    attributes: dict[str, int | float | list[int]] = {}
    constant = None
    for field, value in message_fields(data, path, "node"):
        if field == 1:
            inputs.append(_text(value, path, "node.input"))
        elif field == 2:
            outputs.append(_text(value, path, "node.output"))
        elif field == 3:
            name = _text(value, path, "node.name")
        elif field == 4:
            op_type = _text(value, path, "node.op_type")
        elif field == 5:
            attribute, content = _attribute(_view(value, path, "node.attribute"), path)
            if isinstance(content, Tensor):
                constant = content
            elif content is not None:
                attributes[attribute] = content
    if op_type != "Constant" or not outputs:
        constant = None
    return OnnxNode(name, op_type, tuple(inputs), tuple(outputs), attributes), constant


def _attribute(data: memoryview, path: PathLike[str]) -> tuple[str, int | float | list[int] | Tensor | None]:
    name, content = "", None
    integers: list[int] = []
    for field, value in message_fields(data, path, "attribute"):
        if field == 1:
            name = _text(value, path, "attribute.name")
        elif field == 2:
            content = value
        elif field == 3:
            content = signed(value)
        elif field == 5:
            content = _tensor(_view(value, path, "attribute.t"), path, "attribute")[1]
        elif field == 8:
            integers += (
                packed_varints(value, path, "attribute.ints") if isinstance(value, memoryview) else [signed(value)]
            )
    return name, integers or content


def _tensor(data: memoryview, path: PathLike[str], where: str) -> tuple[str, Tensor]:
    shape: list[int] = []
    name, dtype, payload, numbers = "", None, None, []
    for field, value in message_fields(data, path, where):
        if field == 1:
            shape += packed_varints(value, path, where) if isinstance(value, memoryview) else [signed(value)]
        elif field == 2:
            dtype = _DTYPES.get(value)
            if dtype is None:
                raise ConversionError("type of a tensor", file=path, key=where, expected=sorted(_DTYPES), actual=value)
        elif field == 8:
            name = _text(value, path, f"{where}.name")
        elif field == _RAW_DATA:
            payload = _view(value, path, where)
        elif field in (_FLOAT_DATA, _DOUBLE_DATA):
            numbers += (
                list(value.cast("f" if field == _FLOAT_DATA else "d")) if isinstance(value, memoryview) else [value]
            )
        elif field in (_INT32_DATA, _INT64_DATA):
            numbers += packed_varints(value, path, where) if isinstance(value, memoryview) else [signed(value)]
        elif field == 13 or (field == 14 and value == 1):
            raise ConversionError("weights in another file are not supported", file=path, key=name or where)
    if dtype is None:
        raise UnsafeArtifactError("tensor without a type", file=path, key=name or where)
    if len(shape) > MAX_DIMENSIONS or any(size < 0 for size in shape):
        raise UnsafeArtifactError("bad shape", file=path, key=name or where, actual=shape)
    count = math.prod(shape)
    size = count * dtype.itemsize
    if payload is not None and len(payload) != size:
        raise UnsafeArtifactError(
            "bytes of a tensor do not fit its shape", file=path, key=name, expected=size, actual=len(payload)
        )
    if payload is None and len(numbers) != count:
        raise UnsafeArtifactError(
            "values of a tensor do not fit its shape", file=path, key=name, expected=count, actual=len(numbers)
        )
    if count == 0:
        tensor = torch.empty(shape, dtype=dtype)
    elif payload is not None:
        tensor = torch.frombuffer(payload, dtype=torch.uint8)
        # Protobuf aligns nothing; a view of another type wants its address to be a multiple of its size.
        tensor = (tensor.clone() if tensor.data_ptr() % dtype.itemsize else tensor).view(dtype).reshape(shape)
    else:
        tensor = torch.tensor(numbers, dtype=dtype).reshape(shape)
    if name and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise UnsafeArtifactError("weight is not finite", file=path, key=name, actual="NaN or infinity")
    return name, tensor


def _view(value: object, path: PathLike[str], where: str) -> memoryview:
    if not isinstance(value, memoryview):
        raise UnsafeArtifactError("wrong wire type", file=path, key=where, expected="length-delimited")
    return value


def _text(value: object, path: PathLike[str], where: str) -> str:
    try:
        return str(_view(value, path, where), "utf-8")
    except UnicodeDecodeError:
        raise UnsafeArtifactError("text is not UTF-8", file=path, key=where) from None
