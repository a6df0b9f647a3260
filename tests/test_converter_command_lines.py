"""Wrong input of the converters: one line that names file, key, expected and actual, and exit status 2."""

import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "conversion"))

import convert_funasr  # noqa: E402
import convert_speechgpt  # noqa: E402
import convert_speechtokenizer  # noqa: E402
import convert_wenet  # noqa: E402
import cosyvoice_flow  # noqa: E402


CONVERTERS = {
    "funasr": convert_funasr,
    "speechgpt_lm": convert_speechgpt,
    "speechtokenizer": convert_speechtokenizer,
    "wenet_u2pp": convert_wenet,
    "cosyvoice_flow": cosyvoice_flow,
}


def refusal(name: str, capsys, *arguments: object) -> str:
    assert CONVERTERS[name].main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("name", CONVERTERS)
def test_what_is_no_pack_is_named(name, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("no pack", encoding="utf-8")
    for pack in ("missing", "a.txt"):
        assert f"not a directory (file: {tmp_path / pack})" in refusal(name, capsys, tmp_path / pack, tmp_path / "out")
    assert str(tmp_path) in refusal(name, capsys, tmp_path, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt"]


@pytest.mark.parametrize("name", CONVERTERS)
def test_pack_of_another_family_is_named(name, tmp_path, capsys):
    family = "cosyvoice/s3_v1" if name == "wenet_u2pp" else "wenet/u2pp_conformer_tiny"
    pack = ROOT / "tests" / "golden" / family
    assert str(pack) in refusal(name, capsys, pack, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", CONVERTERS)
def test_model_of_another_family_is_named(name, tmp_path, capsys):
    """Before anything of it is loaded, so that transformers reports no missing weights."""
    config = tmp_path / "config.json"
    for content, message in (
        (None, "cannot read file"),
        ("[", "not valid JSON"),
        ('{"model_type": "bert"}', "another model"),
    ):
        if content is not None:
            config.write_text(content, encoding="utf-8")
        error = refusal(name, capsys, "--reverse", tmp_path, tmp_path / "out")
        assert message in error and f"file: {config}" in error
    assert "key: model_type; expected: " in error and name in error and error.endswith("actual: bert)\n")
