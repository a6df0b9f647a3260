"""Hostile, damaged and merely wrong fairseq checkpoints and k-means files: nothing runs, every refusal is typed."""

import argparse
import io
import pickle
import random
import struct
import sys
import time
import types
import zipfile
import zlib
from collections import OrderedDict
from enum import Enum
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_upstream_readers import ATTACKS, Attack, attacks, dumps, nothing_runs, rebuilt, torch_zip  # noqa: F401

from hf_speechllm.upstream.errors import ConversionError, UnsafeArtifactError
from hf_speechllm.upstream.fairseq_checkpoint import read_fairseq_checkpoint
from hf_speechllm.upstream.inert_pickle import InertGlobal, InertObject, PlainValues, read_inert_pickle
from hf_speechllm.upstream.joblib_kmeans import read_kmeans_centres


CASE = Path(__file__).parent / "golden" / "speechgpt" / "units_hubert_base_like"
CHECKPOINT, KMEANS = CASE / "mhubert_base_vp_en_es_fr_it3.pt", CASE / "mhubert_base_vp_en_es_fr_it3_L11_km1000.bin"
STORED = zipfile.ZIP_STORED


def inert(data: bytes) -> object:
    return read_inert_pickle(io.BytesIO(data), Path("file"))


# ---------------------------------------------------------------------------------------------------------------------
# The pickle that is not run


PLAIN = {
    "numbers": [1, -5, 2**40, -(2**70), 1.5, True, False, None],
    "text": ["", "é", "x" * 300, b"bytes", b"y" * 300],
    "nested": {"a": [1, (2, (), (3,))], 4: {"b": [[]]}},
    "shared": [[1]] * 3,
}


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_are_as_pickled(protocol):
    if protocol < 3:
        content = {**PLAIN, "text": PLAIN["text"][:3]}  # bytes are calls there
    else:
        content = PLAIN
    assert inert(pickle.dumps(content, protocol)) == content


@pytest.mark.parametrize("protocol", range(2, 6))
def test_objects_are_only_written_down(protocol):
    content = {"namespace": argparse.Namespace(a=1, b="x"), "ordered": OrderedDict(c=2), "set": {3}}
    found = inert(pickle.dumps(content, protocol))
    assert found["ordered"] == {"c": 2} and "argparse" in found["namespace"].kind
    assert found["namespace"].state == {"a": 1, "b": "x"}
    if protocol > 3:
        assert found["set"] == [3]


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_are_only_written_down(nothing_runs, name):  # noqa: F811
    found = inert(dumps({"model": attacks(nothing_runs)[name], "after": 1}))
    assert found["after"] == 1 and "<" in repr(found["model"])


def test_nothing_explodes(tmp_path):
    """Small files whose values are huge once they are compared, hashed, printed or walked through."""
    doubling = b")q\x000" + b"".join(b"h%ch%c\x86q%c0" % (i, i, i + 1) for i in range(200)) + b"h\xc8"
    start = time.process_time()
    huge = inert(b"\x80\x02" + doubling + b".")
    assert inert(b"\x80\x02}" + doubling + b"K\x01s.") == {}, "no such key"
    with pytest.raises(UnsafeArtifactError, match="too deep or too large"):
        PlainValues(Path("file")).of(huge)
    assert repr(inert(b"\x80\x02cevil\nThing\n" + doubling + b"\x85R.")) == "<evil.Thing>"
    with pytest.raises(UnsafeArtifactError, match="malformed storage reference"):
        torch_zip(tmp_path / "h.pt", b"\x80\x02" + doubling + b"Q.")
        read_fairseq_checkpoint(tmp_path / "h.pt")
    assert time.process_time() - start < 5


def test_deep_and_endless_values():
    deep = b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b"."
    assert isinstance(inert(deep), tuple)
    endless: list = []
    endless.append(endless)
    with pytest.raises(UnsafeArtifactError, match="too deep"):
        PlainValues(Path("file")).of(inert(pickle.dumps(endless, 4)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"\x80\x02",
        b"\x80\x02K\x01",
        b"\x80\x02h\x05.",
        b"\x80\x02t.",
        b"\x80\x02K\x01R.",
        b"\x80\x02]K\x01K\x02s.",
        b"\x80\x02}(K\x01u.",
        b"\x80\x02K\x01}b.",
        b"\x80\x05\x97.",
        b"\x80\x02\x82\x01.",
        b"\x80\x02Pname\n.",
        b"\x80\x02K\x01Q.",
        b"\x8a\xff\xff\xff\xff.",
        b"\x8d" + struct.pack("<Q", 1 << 60) + b".",
        b"I" + b"9" * 5000 + b"\n.",
        b"\xff.",
    ],
)
def test_malformed_pickles(data):
    with pytest.raises(UnsafeArtifactError):
        inert(data)


# ---------------------------------------------------------------------------------------------------------------------
# fairseq checkpoints


class Node:
    """Pickles as an omegaconf node with this state."""

    def __init__(self, **state) -> None:
        self.__dict__.update(state)


class Mode(Enum):
    LAYER = "layer_norm"


def omegaconf_node(monkeypatch, name: str, **state) -> object:
    """An object of a class that is called `omegaconf.…`, which nothing here has installed."""
    module = types.ModuleType("omegaconf.nodes")
    kind = type(name, (Node,), {"__module__": "omegaconf.nodes"})
    setattr(module, name, kind)
    for entry in ("omegaconf", "omegaconf.nodes"):
        monkeypatch.setitem(sys.modules, entry, sys.modules.get(entry, module))
    monkeypatch.setitem(sys.modules, "omegaconf.nodes", module)
    return kind(**state)


def fairseq_file(path: Path, **changes) -> Path:
    content = {
        "args": None,
        "cfg": {"model": {"_name": "hubert", "conv_bias": True}, "task": {"normalize": True}},
        "model": OrderedDict(w=torch.arange(6.0).view(2, 3), tied=torch.ones(2)),
        **changes,
    }
    torch.save(content, path)
    return path


def test_good_checkpoint():
    checkpoint = read_fairseq_checkpoint(CHECKPOINT)
    assert checkpoint.model_config["encoder_layers"] == 4 and checkpoint.task_config["normalize"] is False
    assert len(checkpoint.weights) == 86 and not checkpoint.from_arguments
    with zipfile.ZipFile(CHECKPOINT) as archive:
        raw = archive.read("mhubert_base_vp_en_es_fr_it3/data/2")
    first = checkpoint.weights["feature_extractor.conv_layers.0.0.weight"]
    assert torch.equal(first.flatten(), torch.frombuffer(bytearray(raw), dtype=torch.float32))


def test_tensors_are_those_that_were_saved(tmp_path):
    base = torch.randn(4, 6)
    tensors = OrderedDict(
        plain=base,
        turned=base.T,
        part=base[1:3, ::2],
        half=base.half(),
        brain=base.bfloat16(),
        whole=torch.arange(5),
        scalar=torch.tensor(3.5),
        empty=torch.empty(0, 4),
        parameter=torch.nn.Parameter(base[0]),
        flags=torch.tensor([True, False]),
    )
    found = read_fairseq_checkpoint(fairseq_file(tmp_path / "h.pt", model=tensors)).weights
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor.detach()), name


def test_configurations_of_all_ages(tmp_path, monkeypatch):
    model, task = {"_name": "hubert", "encoder_layers": 3}, {"normalize": True}
    arguments = argparse.Namespace(**model, **task, arch="hubert", lr=[0.1], mode=Mode.LAYER)
    old = read_fairseq_checkpoint(fairseq_file(tmp_path / "a.pt", args=arguments, cfg=None))
    assert old.from_arguments and old.model_config["encoder_layers"] == 3 and old.task_config["normalize"] is True
    assert old.model_config["mode"] == "layer_norm"
    mixed = {"model": argparse.Namespace(**model), "task": task}
    assert read_fairseq_checkpoint(fairseq_file(tmp_path / "b.pt", cfg=mixed)).model_config == model
    value = omegaconf_node(monkeypatch, "AnyNode", _val=3, _metadata=None)
    config = {"model": {"encoder_layers": value}, "task": task}
    assert read_fairseq_checkpoint(fairseq_file(tmp_path / "c.pt", cfg=config)).model_config == {"encoder_layers": 3}
    inner = omegaconf_node(monkeypatch, "DictConfig", _content={"encoder_layers": 3, "_name": "hubert"})
    config = omegaconf_node(monkeypatch, "DictConfig", _content={"model": inner, "task": task})
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["omegaconf.nodes"], "DictConfig", type(inner))
        config.__class__ = type(inner)
        path = fairseq_file(tmp_path / "d.pt", cfg=config)
    assert read_fairseq_checkpoint(path).model_config == model


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("place", ["file", "weight", "config"])
def test_hostile_checkpoints(tmp_path, nothing_runs, name, place):  # noqa: F811
    attack = attacks(nothing_runs)[name]
    content = {
        "file": attack,
        "weight": {"model": {"w": attack}, "cfg": {}},
        "config": {"model": {"w": 1}, "cfg": {"model": attack, "task": {}}},
    }[place]
    torch_zip(tmp_path / "h.pt", dumps(content))
    with pytest.raises(ConversionError) as refusal:
        read_fairseq_checkpoint(tmp_path / "h.pt")
    assert "h.pt" in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": {"w": torch.tensor([float("nan")])}}, UnsafeArtifactError, "key: w; actual: NaN"),
        ({"model": {"w": torch.as_strided(torch.zeros(1), (10**6, 10**6), (0, 0))}}, UnsafeArtifactError, "larger"),
        ({"model": {str(i): torch.zeros(1)[0:] for i in range(3)}, "cfg": None}, ConversionError, "cfg.model"),
        ({"model": {"w": 3}}, ConversionError, "key: w; actual: int"),
        ({"model": {}}, ConversionError, "no tensors"),
        ({"model": torch.zeros(1)}, ConversionError, "key: model"),
        ({"cfg": {"model": {}, "task": 3}}, ConversionError, "cfg.task"),
        ({"args": 3}, ConversionError, "key: args"),
    ],
)
def test_unwanted_content(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        read_fairseq_checkpoint(fairseq_file(tmp_path / "h.pt", **changes))


def test_overlapping_views(tmp_path):
    base = torch.zeros(100_000)
    path = fairseq_file(tmp_path / "h.pt", model={str(i): base[i:] for i in range(200)})
    with pytest.raises(UnsafeArtifactError, match="overlap"):
        read_fairseq_checkpoint(path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda name, data: [(name, data, zipfile.ZIP_DEFLATED)], "compressed"),
        (lambda name, data: [(name, data[:-4] if "/data/" in name else data, STORED)], "differ in size"),
        (lambda name, data: [] if "/data/" in name else [(name, data, STORED)], "differ in size"),
        (lambda name, data: [(name, data[:40] if name.endswith("pkl") else data, STORED)], "pickle"),
        (lambda name, data: [(name, b"big" if name.endswith("byteorder") else data, STORED)], "byte order"),
        (lambda name, data: [] if name.endswith("data.pkl") else [(name, data, STORED)], "data.pkl"),
        (lambda name, data: [(name, data, STORED), ("h/evil.py", b"", STORED)], "name"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_damaged_archives(tmp_path, edit, message):
    path = rebuilt(fairseq_file(tmp_path / "h.pt"), edit)
    with pytest.raises(ConversionError, match=message):
        read_fairseq_checkpoint(path)


@pytest.mark.parametrize(("source", "read"), [(CHECKPOINT, read_fairseq_checkpoint), (KMEANS, read_kmeans_centres)])
def test_truncated_and_flipped_files(tmp_path, source, read):
    data, path = source.read_bytes(), tmp_path / "file"
    for cut in range(0, len(data), len(data) // 19):
        path.write_bytes(data[:cut])
        with pytest.raises(ConversionError):
            read(path)
    chance = random.Random(0)
    for _ in range(150):
        broken = bytearray(data)
        for _ in range(chance.randint(1, 16)):
            broken[chance.randrange(min(len(data), 20_000))] ^= 1 << chance.randrange(8)
        path.write_bytes(broken)
        try:
            read(path)
        except ConversionError:
            continue


def test_legacy_checkpoint(tmp_path):
    torch.save({"model": {"w": torch.ones(2)}}, tmp_path / "h.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UnsafeArtifactError, match="not a zip-format checkpoint"):
        read_fairseq_checkpoint(tmp_path / "h.pt")


# ---------------------------------------------------------------------------------------------------------------------
# k-means


def test_good_centres(tmp_path):
    expected = load_file(CASE / "io.safetensors")["km_centers"]
    assert torch.equal(read_kmeans_centres(KMEANS), expected)
    (tmp_path / "z.bin").write_bytes(zlib.compress(KMEANS.read_bytes()))
    assert torch.equal(read_kmeans_centres(tmp_path / "z.bin"), expected)


def test_zlib_bombs_and_rests(tmp_path, monkeypatch):
    path = tmp_path / "z.bin"
    path.write_bytes(zlib.compress(KMEANS.read_bytes())[:-20])
    with pytest.raises(UnsafeArtifactError):
        read_kmeans_centres(path)
    path.write_bytes(b"\x78\x9cnonsense")
    with pytest.raises(UnsafeArtifactError, match="damaged zlib data"):
        read_kmeans_centres(path)
    monkeypatch.setattr("hf_speechllm.upstream.joblib_kmeans.MAX_CONTENT_BYTES", 1 << 20)
    path.write_bytes(zlib.compress(b"\0" * (1 << 24)))
    with pytest.raises(UnsafeArtifactError, match="content is too large"):
        read_kmeans_centres(path)


@pytest.mark.parametrize("name", ATTACKS)
def test_hostile_kmeans(tmp_path, nothing_runs, name):  # noqa: F811
    path = tmp_path / "km.bin"
    path.write_bytes(dumps(attacks(nothing_runs)[name]))
    with pytest.raises(ConversionError, match="km.bin"):
        read_kmeans_centres(path)


def wrapped_array(
    shape: bytes, order: bytes = b"X\x01\x00\x00\x00C", dtype: bytes = b"f4", tail: bytes = b""
) -> bytes:
    """A k-means model whose centres are described as asked, in opcodes."""

    def text(value: bytes) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value

    described = (
        b"cjoblib.numpy_pickle\nNumpyArrayWrapper\n)\x81}("
        + (text(b"shape") + shape)
        + (text(b"order") + order)
        + (
            text(b"dtype")
            + b"cnumpy\ndtype\n"
            + text(dtype)
            + b"\x89\x88\x87R(K\x03"
            + text(b"<")
            + b"NNNJ\xff\xff\xff\xff"
        )
        + b"J\xff\xff\xff\xffK\x00tb"
        + b"ub"
    )
    return b"\x80\x02csklearn.cluster._kmeans\nKMeans\n)\x81}" + text(b"cluster_centers_") + described + tail + b"sb."


def test_an_array_that_is_well_described(tmp_path):
    path = tmp_path / "km.bin"
    path.write_bytes(wrapped_array(b"K\x02K\x03\x86", tail=struct.pack("<6f", *range(6))))
    assert read_kmeans_centres(path).tolist() == [[0, 1, 2], [3, 4, 5]]
    path.write_bytes(wrapped_array(b"K\x02K\x03\x86", b"X\x01\x00\x00\x00F", tail=struct.pack("<6f", *range(6))))
    assert read_kmeans_centres(path).tolist() == [[0, 2, 4], [1, 3, 5]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (wrapped_array(b"K\x02K\x03\x86", tail=b"\0" * 23), "damaged pickle|ends early"),
        (wrapped_array(b"K\x02K\x03\x86", dtype=b"O8"), "not of plain numbers"),
        (wrapped_array(b"K\x02K\x03\x86", dtype=b"V8"), "not of plain numbers"),
        (wrapped_array(b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86"), "malformed array|ends early"),
        (wrapped_array(b"K\x02J\xff\xff\xff\xff\x86"), "malformed array"),
        (wrapped_array(b"K\x02K\x03\x86", b"K\x01"), "malformed array"),
        (wrapped_array(b"K\x06\x85", tail=b"\0" * 24), "no centres"),
        (wrapped_array(b"K\x02K\x03\x86", dtype=b"i4", tail=b"\0" * 24), "no centres"),
        (wrapped_array(b"K\x00K\x03\x86"), "no centres"),
        (wrapped_array(b"K\x01K\x01\x86", tail=struct.pack("<f", float("nan"))), "not finite"),
        (pickle.dumps([1, 2], 4), "not a k-means model"),
        (b"\x80\x02csklearn.cluster._kmeans\nKMeans\n)\x81}b.", "no centres"),
        (b"\x80\x02csklearn.svm\nSVC\n)\x81}b.", "not a k-means model"),
        (b"\x93NUMPY\x01\x00", "opcode|damaged"),
    ],
)
def test_wrong_kmeans(tmp_path, data, message):
    (tmp_path / "km.bin").write_bytes(data)
    with pytest.raises(ConversionError, match=message):
        read_kmeans_centres(tmp_path / "km.bin")


def test_names_are_written_as_they_stand():
    found = inert(b"\x80\x02cos.path\njoin\n.")
    assert found == InertGlobal("os.path", "join") and str(found) == "os.path.join"
    assert InertObject(3).kind == "?"
