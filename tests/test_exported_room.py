"""The rules of the folder whose files travel as remote code, checked on the source text."""

import ast
import re
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
ROOM = ROOT / "src" / "hf_speechllm" / "models"
FILES = sorted(path for path in ROOM.glob("*.py") if path.name != "__init__.py")
ALLOWED = {*sys.stdlib_module_names, "torch", "numpy", "transformers", "safetensors", "huggingface_hub"}
# What transformers' loader searches for in the text of a file, strings included.
RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\S+)\s+import|^\s*import\s+\.(\S+)\s*$", re.MULTILINE)

# Families that help a recogniser: they generate nothing, and have no pipeline.
NOT_RECOGNISERS = (
    *("campplus", "s3_tokenizer", "cosyvoice", "cosyvoice_lm", "cosyvoice_transformer_lm"),
    *("cosyvoice_flow", "cosyvoice2_flow", "cosyvoice3_flow"),
    *("cosyvoice_hift", "cosyvoice3_hift"),
    *("funasr_ct_transformer", "funasr_fsmn_vad"),
    *("speechgpt_lm", "speechgpt_unit_vocoder", "speechgpt_units", "speechtokenizer"),
)

# The parts of CosyVoice are one family: the complete model is made of all of them, and version 3's of version 2's.
COSYVOICE_PARTS = ("campplus", "s3_tokenizer")

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def relative_imports(path: Path) -> list[ast.ImportFrom]:
    return [node for node in ast.walk(parse(path)) if isinstance(node, ast.ImportFrom) and node.level > 0]


def siblings(path: Path) -> set[str]:
    """Files that the loader copies for one file, itself included."""
    found, waiting = set(), [path.name]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        text = (ROOM / name).read_text(encoding="utf-8")
        waiting += [f"{first or second}.py" for first, second in RELATIVE_IMPORT.findall(text)]
    return found


def is_cosyvoice(family: str) -> bool:
    return family.startswith("cosyvoice") or family in COSYVOICE_PARTS


def test_room_is_flat_and_not_empty():
    assert {"configuration_wenet_u2pp.py", "modeling_wenet_u2pp.py", "pipeline_speech_recognition.py"} <= {
        path.name for path in FILES
    }
    assert not [path for path in ROOM.iterdir() if path.is_dir() and path.name != "__pycache__"]


@every_file
def test_relative_imports_are_flat(path):
    for node in relative_imports(path):
        assert node.level == 1 and node.module and "." not in node.module, f"{path.name}:{node.lineno}"
        assert (ROOM / f"{node.module}.py").is_file(), f"{path.name}:{node.lineno}: no file {node.module}.py"


@every_file
def test_no_text_looks_like_a_relative_import(path):
    """Every match of the loader's search is a real import statement."""
    matches = len(RELATIVE_IMPORT.findall(path.read_text(encoding="utf-8")))
    assert matches == len(relative_imports(path))


@every_file
def test_imports_only_what_every_user_has(path):
    tree = parse(path)
    optional = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.Try) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            roots = {node.module.split(".")[0]}
        else:
            continue
        assert "hf_speechllm" not in roots, f"{path.name}:{node.lineno}"
        # The loader demands every import outside of a `try:`, wherever it stands.
        assert id(node) in optional or roots <= ALLOWED, f"{path.name}:{node.lineno}: {roots - ALLOWED}"


@every_file
def test_no_dangerous_calls(path):
    forbidden_names = {"eval", "exec", "compile", "__import__"}
    forbidden_modules = {"pickle", "subprocess", "shelve", "marshal", "socket", "ctypes", "urllib", "requests"}
    for node in ast.walk(parse(path)):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in forbidden_names, where
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in {("os", "system"), ("os", "popen"), ("torch", "load")}, where
        if isinstance(node, ast.Import):
            assert not forbidden_modules & {alias.name.split(".")[0] for alias in node.names}, where
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module.split(".")[0] not in forbidden_modules, where


@every_file
def test_no_non_persistent_tensors_by_attribute(path):
    """`register_buffer(..., persistent=False)` is uninitialised after loading unless `_init_weights` rebuilds it."""
    text = path.read_text(encoding="utf-8")
    if "persistent=False" in text:
        assert "_init_weights" in text, f"{path.name}: a non-persistent buffer needs _init_weights"
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef) and node.name == "_init_weights":
            assert not [n for n in ast.walk(node) if isinstance(n, ast.Attribute) and n.attr == "data"], path.name


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.name.startswith("configuration_")], ids=lambda path: path.name
)
def test_family_carries_no_other_family(path):
    family = path.stem.removeprefix("configuration_")
    families = {file.stem.removeprefix("configuration_") for file in ROOM.glob("configuration_*.py")}
    closure = set()
    for role in ("configuration", "modeling", "processing", "tokenization"):
        file = ROOM / f"{role}_{family}.py"
        if file.is_file():
            closure |= siblings(file)
    if family not in NOT_RECOGNISERS:
        assert f"generation_{family}.py" in closure
        assert "pipeline_speech_recognition.py" in closure, "save_pretrained would not copy the pipeline"
    if is_cosyvoice(family):
        families = {name for name in families if not is_cosyvoice(name)}
    for other in families - {family}:
        assert not [name for name in closure if name.endswith(f"_{other}.py")], f"{family} carries files of {other}"


def test_weights_only_is_never_off():
    pattern = re.compile(r"weights_only\s*=\s*" + "False")
    sources = [*(ROOT / "src").rglob("*.py"), *(ROOT / "conversion").rglob("*.py"), *(ROOT / "training").rglob("*.py")]
    assert len(sources) > 10
    assert not [str(path) for path in sources if pattern.search(path.read_text(encoding="utf-8"))]


def test_remote_code_is_never_trusted_by_itself():
    """`trust_remote_code=True` stands only where the isolated self-check loads a folder of our own."""
    allowed = {"clean_process.py"}
    for path in (ROOT / "src").rglob("*.py"):
        if path.name not in allowed:
            for node in ast.walk(parse(path)):
                if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                    assert not (isinstance(node.value, ast.Constant) and node.value.value is True), path.name
