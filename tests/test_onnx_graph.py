"""Reading ONNX graphs as data, well-formed and not."""

import shutil
import struct
from pathlib import Path

import pytest
import torch

from hf_speechllm.upstream.errors import ConversionError, UnsafeArtifactError
from hf_speechllm.upstream.onnx_graph import read_onnx_graph


GRAPH = Path(__file__).parent / "golden" / "cosyvoice" / "s3_v2" / "speech_tokenizer_v2.onnx"


def varint(value: int) -> bytes:
    data = bytearray()
    value &= (1 << 64) - 1
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*data, value])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def chunk(field: int, value: bytes | str) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return varint(field << 3 | 2) + varint(len(data)) + data


def tensor(name: str, shape: list[int], data: bytes, dtype: int = 1) -> bytes:
    return b"".join(number(1, size) for size in shape) + number(2, dtype) + chunk(8, name) + data


def graph(*parts: bytes) -> bytes:
    return number(1, 7) + chunk(7, b"".join(parts))


NODE = chunk(1, chunk(1, "x") + chunk(1, "w") + chunk(2, "y") + chunk(3, "/a/MatMul") + chunk(4, "MatMul"))


def read(tmp_path: Path, data: bytes):
    path = tmp_path / "graph.onnx"
    path.write_bytes(data)
    return read_onnx_graph(path)


def test_nodes_initialisers_and_constants(tmp_path):
    raw = struct.pack("<4f", 1, 2, 3, 4)
    constant = chunk(1, "value") + chunk(5, number(2, 7) + chunk(7, varint(5) + varint(-2)) + chunk(1, varint(2)))
    strides = chunk(1, "strides") + number(8, 2) + number(8, 3)
    rate = chunk(1, "alpha") + varint(2 << 3 | 5) + struct.pack("<f", 0.5)
    content = read(
        tmp_path,
        graph(
            NODE,
            chunk(1, chunk(2, "c") + chunk(4, "Constant") + chunk(5, constant)),
            chunk(1, chunk(3, "/b") + chunk(4, "Conv") + chunk(5, strides) + chunk(5, rate)),
            chunk(5, tensor("w", [2, 2], chunk(9, raw))),
            chunk(5, tensor("v", [3], b"".join(varint(4 << 3 | 5) + struct.pack("<f", v) for v in (1, 2, 3)))),
            chunk(5, tensor("h", [1], chunk(9, struct.pack("<e", 0.25)), dtype=10)),
        ),
    )
    assert [node.name for node in content.nodes] == ["/a/MatMul", "/b"]
    assert content.nodes[0].inputs == ("x", "w") and content.nodes[1].attributes == {"strides": [2, 3], "alpha": 0.5}
    assert content.tensors["w"].tolist() == [[1, 2], [3, 4]] and content.tensors["v"].tolist() == [1, 2, 3]
    assert content.tensors["c"].tolist() == [5, -2] and content.tensors["h"].dtype == torch.float16


def test_published_graph(tmp_path):
    content = read_onnx_graph(GRAPH)
    by_name = {node.name: node for node in content.nodes}
    assert by_name["/conv1/Conv"].attributes["strides"] == [2]
    assert content.tensors["onnx::MatMul_2536"].shape == (64, 8)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (graph(NODE, chunk(5, tensor("w", [2, 2], chunk(9, b"\0" * 12)))), "do not fit its shape"),
        (graph(NODE, chunk(5, tensor("w", [1 << 40, 1 << 20], chunk(9, b"\0" * 12)))), "do not fit its shape"),
        (graph(NODE, chunk(5, tensor("w", [2], varint(4 << 3 | 5) + struct.pack("<f", 1)))), "do not fit its shape"),
        (graph(NODE, chunk(5, tensor("w", [-1], chunk(9, b"")))), "bad shape"),
        (graph(NODE, chunk(5, tensor("w", [1], chunk(9, struct.pack("<f", float("nan")))))), "not finite"),
        (graph(NODE, chunk(5, chunk(8, "w") + chunk(9, b""))), "without a type"),
        (graph(NODE, *[chunk(5, tensor("w", [1], chunk(9, b"\0" * 4)))] * 2), "occurs twice"),
        (graph(NODE)[:-3], "truncated"),
        (graph(NODE + b"\x0b"), "truncated|wire type"),
        (graph(number(1, 3)), "wrong wire type"),
        (graph(chunk(1, chunk(3, b"\xff"))), "not UTF-8"),
        (b"\xff" * 64, "number longer|wire type|field number"),
    ],
)
def test_damaged_files_are_refused(tmp_path, data, message):
    with pytest.raises(UnsafeArtifactError, match=message):
        read(tmp_path, data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (number(1, 7), "no ONNX model"),
        (graph(chunk(5, tensor("w", [1], chunk(9, b"\0" * 4)))), "without nodes"),
        (graph(NODE, chunk(5, tensor("w", [1], number(14, 1)))), "another file"),
        (graph(NODE, chunk(5, tensor("w", [1], chunk(9, b"\0" * 4), dtype=8))), "type of a tensor"),
    ],
)
def test_what_cannot_be_converted_is_named(tmp_path, data, message):
    with pytest.raises(ConversionError, match=message):
        read(tmp_path, data)


def test_every_truncation_of_a_graph_is_an_error(tmp_path):
    data = GRAPH.read_bytes()
    for cut in range(1, len(data), len(data) // 40):
        with pytest.raises(ConversionError):
            read(tmp_path, data[:-cut])


def test_a_directory_is_no_graph(tmp_path):
    shutil.copytree(GRAPH.parent, tmp_path / "pack.onnx")
    with pytest.raises(UnsafeArtifactError):
        read_onnx_graph(tmp_path / "pack.onnx")
