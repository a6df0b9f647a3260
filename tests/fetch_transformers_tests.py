"""Fetch transformers' own model tests for `test_transformers_mixin.py`. Needs the network, once per version.

    python tests/fetch_transformers_tests.py

The wheel carries no tests; the source distribution carries most of them. pip downloads that of the installed version,
and its `tests/*.py` are unpacked as the package `transformers_tests` into `.transformers-tests/VERSION/` (ignored by
git). Three modules that they import are missing from the distribution; stand-ins replace them: the export and
generation mixins become empty classes, and the common configuration keywords a small dictionary.
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers


FOLDER = Path(__file__).resolve().parents[1] / ".transformers-tests" / transformers.__version__
PACKAGE = "transformers_tests"

_STAND_INS = {
    "__init__.py": "",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/__init__.py": "",
    "utils/test_configuration_utils.py": (
        "config_common_kwargs = {\n"
        '    "return_dict": False,\n'
        '    "output_hidden_states": True,\n'
        '    "dtype": "float16",\n'
        '    "chunk_size_feed_forward": 5,\n'
        '    "architectures": ["BertModel"],\n'
        '    "id2label": {0: "label"},\n'
        '    "label2id": {"label": "0"},\n'
        '    "problem_type": "regression",\n'
        "}\n"
    ),
}


def unpack(sdist: Path, folder: Path) -> None:
    """Write the test modules of a source distribution and the stand-ins into `folder / PACKAGE`."""
    package = folder / PACKAGE
    with tarfile.open(sdist) as archive:
        for member in archive:
            parts = Path(member.name).parts
            if member.isfile() and len(parts) == 3 and parts[1] == "tests" and parts[2].endswith(".py"):
                package.mkdir(parents=True, exist_ok=True)
                (package / parts[2]).write_bytes(archive.extractfile(member).read())
    if not (package / "test_modeling_common.py").is_file():
        raise SystemExit(f"{sdist.name}: expected tests/test_modeling_common.py in it")
    for name, text in _STAND_INS.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def main() -> None:
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-binary", ":all:", "--no-deps"]
        subprocess.run([*command, "--dest", work, f"transformers=={transformers.__version__}"], check=True)
        (sdist,) = Path(work).glob("transformers-*.tar.gz")
        staged = Path(work) / "staged"
        unpack(sdist, staged)
        shutil.rmtree(FOLDER, ignore_errors=True)
        FOLDER.parent.mkdir(exist_ok=True)
        shutil.move(staged, FOLDER)
    print(f"transformers {transformers.__version__}: tests unpacked into {FOLDER}")


if __name__ == "__main__":
    main()
