"""Hostile, damaged and merely wrong files of a pack: nothing runs, nothing explodes, every refusal is typed."""

import io
import json
import math
import os
import pickle
import random
import sys
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from hf_speechllm.upstream.checkpoint_file import compact, write_state_dict
from hf_speechllm.upstream.checkpoints import read_state_dict
from hf_speechllm.upstream.cmvn import read_cmvn, write_json_cmvn
from hf_speechllm.upstream.errors import ConversionError, UnsafeArtifactError
from hf_speechllm.upstream.staging import staged_directory
from hf_speechllm.upstream.units import read_non_linguistic_symbols, read_units, write_units
from hf_speechllm.upstream.yaml_config import read_yaml_mapping


GOLDEN = Path(__file__).parent / "golden" / "wenet"


# ---------------------------------------------------------------------------------------------------------------------
# Proof that nothing ran

_EVENTS: list[str] = []
_WATCHING = [False]


def _audit(event: str, arguments: tuple) -> None:
    if _WATCHING[0] and event.split(".")[0] in ("os", "subprocess", "socket", "pty", "ctypes", "webbrowser", "shutil"):
        if event not in ("os.listdir", "os.scandir", "os.putenv"):
            _EVENTS.append(event)


sys.addaudithook(_audit)


@pytest.fixture
def nothing_runs(tmp_path):
    """Gives the path of a canary file that the attacks try to create; afterwards it must be absent."""
    canary = tmp_path / "canary"
    _EVENTS.clear()
    _WATCHING[0] = True
    yield canary
    _WATCHING[0] = False
    assert not canary.exists()
    assert _EVENTS == []


class Attack:
    """Pickles to a call of `function(*arguments)`."""

    def __init__(self, function: str, *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return _Named(self.function), self.arguments


class _Named:
    """A global that is pickled by name only, so that building the attack does not import it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *arguments: object) -> None:
        raise AssertionError("attacks are only pickled here")


class _Pickler(pickle._Pickler):
    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, _Named):
            module, _, name = obj.name.partition(":")
            self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())
            return None
        return super().save(obj, save_persistent_id)


def dumps(obj: object) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream, protocol=2).dump(obj)
    return stream.getvalue()


def attacks(canary: Path) -> dict[str, Attack]:
    code = f"open({str(canary)!r}, 'w').close()"
    shell = f"touch {canary}"
    return {
        "os.system": Attack("os:system", shell),
        "posix.system": Attack("posix:system", shell),
        "eval": Attack("builtins:eval", code),
        "exec": Attack("builtins:exec", code),
        "python 2 eval": Attack("__builtin__:eval", code),
        "open": Attack("builtins:open", str(canary), "w"),
        "subprocess": Attack("subprocess:Popen", shell, -1, None, None, None, None, None, True, True),
        "check_output": Attack("subprocess:check_output", ["touch", str(canary)]),
        "pkgutil": Attack("pkgutil:resolve_name", "os:system"),
        "methodcaller": Attack("operator:methodcaller", "system", shell),
        "attrgetter": Attack("operator:attrgetter", "__class__"),
        "getattr": Attack("builtins:getattr", "os", "system"),
        "torch hub": Attack("torch.hub:load", "a/b", "c"),
        "torch load": Attack("torch.serialization:load", str(canary)),
        "torch compile": Attack("torch._inductor.codecache:CppCodeCache.load", code),
        "runpy": Attack("runpy:_run_code", code, {}),
        "timeit": Attack("timeit:timeit", code),
        "cprofile": Attack("cProfile:run", code),
        "pdb": Attack("pdb:run", code),
        "code": Attack("code:InteractiveInterpreter.runsource", code),
        "importlib": Attack("importlib:import_module", "antigravity"),
        "webbrowser": Attack("webbrowser:open", "file:///"),
        "ctypes": Attack("ctypes:CDLL", "libc.so.6"),
        "shutil": Attack("shutil:rmtree", str(canary.parent)),
        "socket": Attack("socket:create_connection", ("127.0.0.1", 9)),
        "functools": Attack("functools:partial", "os:system", shell),
        "type": Attack("builtins:type", "X", (), {}),
        "bdb": Attack("bdb:Bdb.run", code),
        "numpy": Attack("numpy.testing._private.utils:runstring", code, {}),
        "numpy scalar": Attack("numpy.core.multiarray:scalar", 1),
        "marshal": Attack("marshal:loads", b"x"),
        "bytearray": Attack("builtins:bytearray", 1 << 40),
        "pty": Attack("pty:spawn", "sh"),
        "asyncio": Attack("asyncio.unix_events:_UnixSubprocessTransport._start", shell),
        "torch fx": Attack("torch.fx.graph_module:reduce_graph_module", {"_code": code}, ""),
        "rebuild from type": Attack("torch._tensor:_rebuild_from_type_v2", Attack("os:system", shell), 0, (), {}),
        "nested": OrderedDict(weight=[Attack("os:system", shell)]),
    }


ATTACKS = sorted(attacks(Path("canary")))


def torch_zip(
    path: Path, data: bytes, *, compression: int = zipfile.ZIP_STORED, extra: dict[str, bytes] | None = None
):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", b"3\n")
        for name, content in (extra or {}).items():
            archive.writestr(name, content)


@pytest.mark.parametrize("container", ["zip", "raw", "legacy", "appended", "prepended"])
@pytest.mark.parametrize("name", ATTACKS)
def test_pickles_that_call(tmp_path, nothing_runs, name, container):
    payload = dumps(attacks(nothing_runs)[name])
    path = tmp_path / "final.pt"
    if container == "zip":
        torch_zip(path, payload)
    elif container == "raw":
        path.write_bytes(payload)
    elif container == "legacy":
        magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
        path.write_bytes(magic + payload)
    else:
        torch_zip(path, payload)
        archive = path.read_bytes()
        path.write_bytes(archive + payload if container == "appended" else payload + archive)
    with pytest.raises(UnsafeArtifactError) as refusal:
        read_state_dict(path)
    assert "final.pt" in str(refusal.value)
    if container == "zip":
        assert "callable" in str(refusal.value) or "opcode" in str(refusal.value)


def test_legacy_checkpoint(tmp_path, nothing_runs):
    torch.save({"weight": torch.ones(2)}, tmp_path / "final.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UnsafeArtifactError, match="not a zip-format checkpoint"):
        read_state_dict(tmp_path / "final.pt")


def saved(tmp_path: Path, content: object) -> Path:
    torch.save(content, tmp_path / "final.pt")
    return tmp_path / "final.pt"


def rebuilt(path: Path, edit) -> Path:
    """Writes the members of a checkpoint again after `edit(name, data, info)` → (name, data, compression)."""
    with zipfile.ZipFile(path) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members:
            for new_name, new_data, compression in edit(name, data):
                archive.writestr(zipfile.ZipInfo(new_name), new_data, compress_type=compression)
    return path


STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED


def test_good_checkpoint(tmp_path):
    shared = torch.randn(3, 4)
    state = OrderedDict(a=shared, b=shared, c=torch.arange(3), d=torch.ones(2).half())
    path = rebuilt(saved(tmp_path, state), lambda name, data: [(name, data, STORED)])
    loaded = read_state_dict(path)
    assert list(loaded) == list(state) and all(torch.equal(loaded[name], state[name]) for name in state)
    assert set(read_state_dict(saved(tmp_path, {"w": shared, "epoch": 3}), allowed_scalars=frozenset(["epoch"]))) == {
        "w"
    }
    assert len(read_state_dict(GOLDEN / "u2pp_conformer_tiny" / "final.pt")) == 214


def test_zip_bombs(tmp_path):
    path = saved(tmp_path, {"w": torch.zeros(1000)})
    bomb = rebuilt(path, lambda name, data: [(name, b"\0" * (1 << 28) if "/data/" in name else data, DEFLATED)])
    assert bomb.stat().st_size < 1 << 20
    start = time.process_time()
    with pytest.raises(UnsafeArtifactError, match="compressed"):
        read_state_dict(bomb)
    assert time.process_time() - start < 20


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda name, data: [(name, data, DEFLATED)], "compressed"),
        (lambda name, data: [(name, data, STORED), ("../x/data/9", b"", STORED)], "name"),
        (lambda name, data: [(name, data, STORED), ("/etc/data/0", b"", STORED)], "name"),
        (lambda name, data: [(name, data, STORED), ("other/data/7", b"", STORED)], "another root"),
        (lambda name, data: [(name, data, STORED), ("final/evil.py", b"", STORED)], "name"),
        (lambda name, data: [(name.replace("final/", "../"), data, STORED)], "name"),
        (lambda name, data: [] if name.endswith("data.pkl") else [(name, data, STORED)], "data.pkl"),
        (lambda name, data: [] if "/data/" in name else [(name, data, STORED)], "differ in size"),
        (lambda name, data: [(name, data[:-4] if "/data/" in name else data, STORED)], "differ in size"),
        (lambda name, data: [(name, data.replace(b"M\xe8\x03", b"M\xe9\x03"), STORED)], "differ in size"),
        (lambda name, data: [(name, data[:40] if name.endswith("pkl") else data, STORED)], "pickle"),
    ],
)
def test_damaged_archives(tmp_path, edit, message):
    path = rebuilt(saved(tmp_path, {"w": torch.zeros(1000)}), edit)
    with pytest.raises(UnsafeArtifactError, match=message):
        read_state_dict(path)


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_duplicate_members(tmp_path):
    path = rebuilt(saved(tmp_path, {"w": torch.zeros(8)}), lambda name, data: [(name, data, STORED)] * 2)
    with pytest.raises(UnsafeArtifactError, match="occurs twice"):
        read_state_dict(path)


def test_too_many_members(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_speechllm.upstream.checkpoints.MAX_MEMBERS", 3)
    with pytest.raises(UnsafeArtifactError, match="too many members"):
        read_state_dict(saved(tmp_path, {"w": torch.zeros(8)}))


def test_header_that_disagrees_with_the_directory(tmp_path):
    path = rebuilt(saved(tmp_path, {"w": torch.zeros(8)}), lambda name, data: [(name, data, STORED)])
    data = path.read_bytes()
    path.write_bytes(data.replace(b"final/data.pkl", b"final/evil.pkl", 1))
    with pytest.raises(UnsafeArtifactError, match="disagrees"):
        read_state_dict(path)


def test_giant_tensor_without_storage(tmp_path):
    giant = torch.as_strided(torch.zeros(1), (1_000_000, 1_000_000), (0, 0))
    with pytest.raises(UnsafeArtifactError, match="larger than its storage"):
        read_state_dict(saved(tmp_path, {"w": giant}))


def test_many_overlapping_views(tmp_path):
    base = torch.zeros(100_000)
    with pytest.raises(UnsafeArtifactError, match="overlap"):
        read_state_dict(saved(tmp_path, {str(i): base[i:] for i in range(200)}))


@pytest.mark.parametrize(
    ("content", "error", "key"),
    [
        ({"w": torch.tensor([1.0, float("nan")])}, UnsafeArtifactError, "key: w; actual: NaN"),
        ({"w": torch.tensor([float("inf")]).half()}, UnsafeArtifactError, "key: w; actual: NaN"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, UnsafeArtifactError, "ComplexFloatStorage"),
        ({"w": torch.ones(2, 2).to_sparse()}, UnsafeArtifactError, "sparse"),
        ({"w": torch.ones(2), "epoch": 3}, ConversionError, "key: epoch"),
        ({"w": {"inner": torch.ones(2)}}, ConversionError, "key: w; actual: dict"),
        ({3: torch.ones(2)}, ConversionError, "key: 3"),
        ([torch.ones(2)], ConversionError, "list"),
        ({}, ConversionError, "no tensors"),
    ],
)
def test_unwanted_content(tmp_path, content, error, key):
    with pytest.raises(error, match=key):
        read_state_dict(saved(tmp_path, content))


def test_truncated_and_flipped_checkpoints(tmp_path):
    source = (GOLDEN / "u2pp_moe_tiny" / "final.pt").read_bytes()
    good = read_state_dict(GOLDEN / "u2pp_moe_tiny" / "final.pt")
    path = tmp_path / "final.pt"
    for cut in range(0, len(source), len(source) // 19):
        path.write_bytes(source[:cut])
        with pytest.raises(ConversionError):
            read_state_dict(path)
    chance = random.Random(0)
    for _ in range(40):  # in the pickle and the directory, where structure lives
        broken = bytearray(source)
        for _ in range(chance.randint(1, 16)):
            region = chance.choice([range(20_000), range(len(source) - 20_000, len(source))])
            broken[chance.choice(region)] ^= 1 << chance.randrange(8)
        path.write_bytes(broken)
        try:
            loaded = read_state_dict(path)
        except ConversionError:
            continue
        assert all(torch.isfinite(tensor).all() for tensor in loaded.values() if tensor.is_floating_point())
        assert len(loaded) <= len(good)


def test_not_a_file(tmp_path):
    with pytest.raises(ConversionError, match="cannot read file"):
        read_state_dict(tmp_path / "absent")
    with pytest.raises(UnsafeArtifactError, match="not a regular file"):
        read_state_dict(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnsafeArtifactError, match="not a regular file"):
        read_state_dict(tmp_path / "pipe")
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(ConversionError, match="empty"):
        read_state_dict(tmp_path / "empty")


def test_no_unsafe_load_in_the_sources():
    root = Path(__file__).parents[1]
    for path in [*(root / "src").rglob("*.py"), *(root / "conversion").rglob("*.py")]:
        assert "weights_only=" + "False" not in path.read_text(encoding="utf-8"), path


# ---------------------------------------------------------------------------------------------------------------------
# yaml


def yaml_file(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "train.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_plain_yaml(tmp_path):
    text = "a: 1\nb: [1.5, null, true, 'x']\nc: &c {<blank>: 0}\nd: *c\n"
    expected = {"a": 1, "b": [1.5, None, True, "x"], "c": {"<blank>": 0}, "d": {"<blank>": 0}}
    assert read_yaml_mapping(yaml_file(tmp_path, text)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: !!python/object/apply:os.system ['touch CANARY']", "tag"),
        ("a: !!python/object/new:os.system ['touch CANARY']", "tag"),
        ("a: !!python/name:os.system", "tag"),
        ("a: !!python/module:antigravity", "tag"),
        ("a: !!python/tuple [1]", "tag"),
        ("!!python/object:builtins.object {a: 1}", "tag"),
        ("a: !new:os.system [x]", "tag"),
        ("a: !include /etc/passwd", "tag"),
        ("a: !!binary aGk=", "tag"),
        ("a: !!set {x}", "tag"),
        ("a: 2024-01-01", "tag"),
        ("a: {<<: {b: 1}}", "tag|string"),
        ("a: 1\na: 2", "occurs twice"),
        ("x: {a: 1, a: 2}", "occurs twice"),
        ("1: a", "not a string"),
        ("yes: a", "not a string"),
        ("? [a]\n: b", "not a string"),
        ("- a", "mapping"),
        ("a", "mapping"),
        ("# nothing", "mapping"),
        ("a: 1\n---\nb: 2", "not valid yaml"),
        ("a: [", "not valid yaml"),
        ("a: *nowhere", "not valid yaml"),
        ("a: &a [*a]", "not valid yaml|itself"),
        ("a: " + "9" * 5000, "not valid yaml"),
        ("a: b\x01", "not valid yaml"),
        (b"\xef\xbb\xbfa: 1", "byte order mark"),
        (b"a: \xff", "UTF-8"),
        (b"a: \x00", "NUL"),
        (b"\xff\xfea\x00", "UTF-8"),
        ("a: " + "[" * 100 + "]" * 100, "nested too deeply"),
        ("a: " + "[" * 50_000, "nested too deeply"),
        ("a: " + "{b: " * 20_000, "nested too deeply"),
        ("".join(" " * i + f"a{i}:\n" for i in range(300)), "nested too deeply"),
        ("a: '" + "x" * (1 << 20) + "'", "too large"),
        (
            "a0: &a0 [x]\n" + "".join(f"a{i + 1}: &a{i + 1} [{','.join([f'*a{i}'] * 9)}]\n" for i in range(9)),
            "aliases",
        ),
    ],
)
def test_hostile_yaml(tmp_path, nothing_runs, text, message):
    if isinstance(text, str):
        text = text.replace("CANARY", str(nothing_runs))
    start = time.process_time()
    with pytest.raises(ConversionError, match=message):
        read_yaml_mapping(yaml_file(tmp_path, text))
    assert time.process_time() - start < 20


# ---------------------------------------------------------------------------------------------------------------------
# CMVN and units


def test_cmvn_json_and_kaldi(tmp_path):
    count, sums, squares = 7, [1.25, -3.0, 0.0], [11.0, 2.0, 0.0]
    (tmp_path / "json").write_text(json.dumps({"mean_stat": sums, "var_stat": squares, "frame_num": count}))
    (tmp_path / "kaldi").write_text(" [\n  1.25 -3 0 7\n  11 2e0 0 0 ]\n")
    mean, inverse_std = read_cmvn(tmp_path / "json", is_json=True, input_size=3)
    expected = [1 / math.sqrt(max(q / count - (s / count) ** 2, 1e-20)) for s, q in zip(sums, squares, strict=True)]
    assert torch.equal(mean, torch.tensor([s / count for s in sums], dtype=torch.float64).float())
    assert torch.equal(inverse_std, torch.tensor(expected, dtype=torch.float64).float())
    assert inverse_std[2] == 1e10
    for first, second in zip((mean, inverse_std), read_cmvn(tmp_path / "kaldi", is_json=False), strict=True):
        assert torch.equal(first, second)
    (tmp_path / "back").write_text(write_json_cmvn(mean[:2], inverse_std[:2]))
    for first, second in zip((mean, inverse_std), read_cmvn(tmp_path / "back", is_json=True), strict=True):
        torch.testing.assert_close(first[:2], second, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "text",
    [
        '{"mean_stat": [1, NaN], "var_stat": [1, 1], "frame_num": 1}',
        '{"mean_stat": [1], "var_stat": [Infinity], "frame_num": 1}',
        '{"mean_stat": [1e999], "var_stat": [1], "frame_num": 1}',
        '{"mean_stat": [1], "var_stat": [1, 2], "frame_num": 1}',
        '{"mean_stat": [1], "var_stat": [1], "frame_num": 0}',
        '{"mean_stat": [1], "var_stat": [1], "frame_num": -1}',
        '{"mean_stat": [1], "var_stat": [1], "frame_num": true}',
        '{"mean_stat": ["1"], "var_stat": [1], "frame_num": 1}',
        '{"mean_stat": [], "var_stat": [], "frame_num": 1}',
        '{"mean_stat": 1, "var_stat": [1], "frame_num": 1}',
        '{"mean_stat": [1], "var_stat": [1], "frame_num": 1, "x": 1}',
        '{"mean_stat": [1], "mean_stat": [1], "var_stat": [1], "frame_num": 1}',
        '{"mean_stat": [1]}',
        "[1]",
        "[" * 100_000,
        '{"mean_stat": [1e200], "var_stat": [1], "frame_num": 1}',
        '{"mean_stat": [' + "9" * 6000 + '], "var_stat": [1], "frame_num": 1}',
    ],
)
def test_bad_json_cmvn(tmp_path, text):
    (tmp_path / "global_cmvn").write_text(text)
    with pytest.raises(ConversionError, match="global_cmvn"):
        read_cmvn(tmp_path / "global_cmvn", is_json=True)


@pytest.mark.parametrize(
    "text",
    ["", "[ 1 1 1 0", "[ 1 nan 1 0 ]", "[ 1 1 1 1 ]", "[ 1 1 0 ]", "[ 0x1 1 1 0 ]", "[ 1 0 1 0 ]", "\0B [ 1 1 1 0 ]"],
)
def test_bad_kaldi_cmvn(tmp_path, text):
    (tmp_path / "global_cmvn").write_text(text)
    with pytest.raises(ConversionError, match="global_cmvn"):
        read_cmvn(tmp_path / "global_cmvn", is_json=False)


def test_cmvn_of_another_size(tmp_path):
    (tmp_path / "global_cmvn").write_text('{"mean_stat": [1], "var_stat": [2], "frame_num": 1}')
    with pytest.raises(ConversionError, match="expected: 80; actual: 1, 1"):
        read_cmvn(tmp_path / "global_cmvn", is_json=True, input_size=80)


def test_units(tmp_path):
    path = tmp_path / "units.txt"
    path.write_bytes("b 1\r\n你 0\n▁x 2\n".encode())
    assert list(read_units(path).items()) == [("你", 0), ("b", 1), ("▁x", 2)]
    assert write_units(read_units(path)) == "你 0\nb 1\n▁x 2\n"
    source = GOLDEN / "u2pp_conformer_tiny" / "units.txt"
    assert write_units(read_units(source)) == source.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a 0\na 1\n", "token occurs twice"),
        (b"a 0\nb 0\n", "id occurs twice"),
        (b"a 0\nb -1\n", "negative id"),
        (b"a 0\nb 2\n", "gap"),
        (b"a 1\n", "gap"),
        (b"a 0\nb\n", "line 2"),
        (b"a 0 1\n", "line 1"),
        (b"a 0\n\nb 1\n", "line 2"),
        (b"a x\n", "line 1"),
        (b"a 0x0\n", "line 1"),
        ("a ٠\n".encode(), "line 1"),
        (b"a 1e3\n", "line 1"),
        (b"a 99999999999999\n", "line 1"),
        (b"\n", "line 1"),
        (b"", "empty"),
        (b"\xff 0\n", "UTF-8"),
        (b"\xef\xbb\xbfa 0\n", "byte order mark"),
        (b"a\0 0\n", "NUL"),
    ],
)
def test_bad_units(tmp_path, data, message):
    (tmp_path / "units.txt").write_bytes(data)
    with pytest.raises(ConversionError, match=message):
        read_units(tmp_path / "units.txt")


def test_non_linguistic_symbols(tmp_path):
    path = tmp_path / "symbols"
    path.write_text("{NOISE}\n[X]\n<v>\n")
    assert read_non_linguistic_symbols(path) == ["{NOISE}", "[X]", "<v>"]
    path.write_text("{NOISE}\nNOISE\n")
    with pytest.raises(ConversionError, match="line 2"):
        read_non_linguistic_symbols(path)


# ---------------------------------------------------------------------------------------------------------------------
# Output directories


def test_staged_directory(tmp_path):
    with staged_directory(tmp_path / "out") as stage:
        (stage / "a").write_text("x")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "a").read_text() == "x"
    with pytest.raises(ConversionError, match="not empty"), staged_directory(tmp_path / "out"):
        pytest.fail("entered")
    with pytest.raises(KeyboardInterrupt), staged_directory(tmp_path / "other") as stage:
        (stage / "a").write_text("x")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(ConversionError, match="parent"), staged_directory(tmp_path / "no" / "where"):
        pytest.fail("entered")


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def test_written_checkpoint_is_what_torch_would_have_saved(tmp_path):
    """Parts of a table are written without the rest of it, tied names stay tied, and nothing is copied before."""
    table = torch.arange(300_000.0).reshape(1000, 300)
    state = {
        **{"tied.a": table[:7], "tied.b": table[:7], "rest": table[7:9], "turned": table[:4].T},
        **{"half": torch.ones(3, dtype=torch.bfloat16), "count": torch.tensor(5), "none": torch.zeros(0, 4)},
        "flags": torch.tensor([True, False]),
    }
    small = compact(state)
    assert small["rest"].data_ptr() == state["rest"].data_ptr()
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in small.values())
    write_state_dict(tmp_path / "llm.pt", small)
    assert (tmp_path / "llm.pt").stat().st_size < 40_000
    for found in (torch.load(tmp_path / "llm.pt", weights_only=True), read_state_dict(tmp_path / "llm.pt")):
        assert list(found) == list(state)
        for name, tensor in state.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
        assert found["tied.a"].data_ptr() == found["tied.b"].data_ptr() != found["rest"].data_ptr()
    assert torch.equal(table, torch.arange(300_000.0).reshape(1000, 300))
