"""conversion/check_parity.py on the golden cases: everything passes, and whatever is tampered with is noticed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file


ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).parent / "golden" / "wenet"
# How many expected values each case holds; a check that silently disappears changes the number.
CASES = {"conformer_bn_bpe_old_tiny": 342, "u2pp_conformer_tiny": 486, "u2pp_moe_tiny": 511, "paraformer_tiny": 253}
FUNASR = Path(__file__).parent / "golden" / "funasr"
FUNASR_CASES = {
    "bicif_timestamps_tiny": 129,
    "paraformer_sanm_tiny": 93,
    "paraformer_streaming_tiny": 59,
    "seaco_hotword": 88,
    "sensevoice_tiny": 167,
}
SPEECHGPT = Path(__file__).parent / "golden" / "speechgpt"
SPEECHGPT_CASES = {
    "prompts_anygpt_speech": 51,
    "prompts_three_stages": 127,
    "speechtokenizer_elu": 34,
    "speechtokenizer_snake_identity": 32,
    "units_hubert_base_like": 13,
    "vocoder_expresso_spk_style": 2,
    "vocoder_lj_dur": 9,
}
COSYVOICE = Path(__file__).parent / "golden" / "cosyvoice"
COSYVOICE_CASES = {
    "campplus": 2,
    "frontend": 14,
    "s3_v1": 10,
    "s3_v2": 10,
    "s3_v3": 10,
    "sampling": 7,
    "v1_flow": 34,
    "v1_hift": 17,
    "v1_lm": 17,
    "v2_flow": 19,
    "v2_hift": 17,
    "v2_lm": 33,
    "v3_flow": 19,
    "v3_hift": 9,
    "v3_lm": 22,
}


def check_parity(*cases: Path) -> tuple[int, list[dict], str]:
    """Exit status, the printed JSON lines, and what went to stderr."""
    command = [sys.executable, str(ROOT / "conversion" / "check_parity.py"), *map(str, cases)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=250)
    return (
        done.returncode,
        [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")],
        done.stderr,
    )


def failed_names(lines: list[dict]) -> list[str]:
    return [line["name"] for line in lines if line.get("pass") is False]


def test_every_case_is_listed():
    assert sorted(path.name for path in GOLDEN.iterdir()) == sorted(CASES)
    assert sorted(path.name for path in FUNASR.iterdir()) == sorted(FUNASR_CASES)
    assert sorted(path.name for path in SPEECHGPT.iterdir()) == sorted(SPEECHGPT_CASES)
    assert sorted(path.name for path in COSYVOICE.iterdir()) == sorted(COSYVOICE_CASES)


@pytest.mark.parametrize(
    "folder, cases",
    [(FUNASR, FUNASR_CASES), (SPEECHGPT, SPEECHGPT_CASES), (COSYVOICE, COSYVOICE_CASES)],
    ids=["funasr", "speechgpt", "cosyvoice"],
)
def test_every_case_of_the_other_families_passes(folder, cases):
    status, lines, errors = check_parity(*(folder / name for name in cases))
    assert failed_names(lines) == []
    assert status == 0, errors
    *values, total = lines
    assert total == {"total": sum(cases.values()), "passed": sum(cases.values()), "failed": 0}
    for name, count in cases.items():
        assert sum(line["case"] == name for line in values) == count


def test_tampered_funasr_case_is_noticed(tmp_path):
    """A changed tensor, a changed text, and an output that nobody checks; nothing else fails."""
    case = tmp_path / "case"
    shutil.copytree(FUNASR / "sensevoice_tiny", case)
    tensors = load_file(case / "io.safetensors")
    tensors["c2.logp"][0, 0, 0] += 0.01
    save_file(tensors | {"unheard_of": tensors["feats"].clone()}, case / "io.safetensors")

    def change(facts):
        facts["combos"][3]["rich"][0] += "x"
        facts["combos"][4]["psychic"] = 1
        facts["timestamps"][1]["result"]["timestamp"][0][1] += 1
        facts["oracle"] = {"text": "x"}

    edit_facts(case, change)
    status, lines, errors = check_parity(case)
    assert status == 1, errors
    expected = ["c2.logp", "combos[3].rich", "combos[4].psychic", "oracle.text", "timestamps[1].result", "unheard_of"]
    assert sorted(failed_names(lines)) == expected


def test_every_golden_case_passes():
    status, lines, errors = check_parity(*(GOLDEN / name for name in CASES))
    assert failed_names(lines) == []
    assert status == 0, errors
    *values, total = lines
    assert total == {"total": sum(CASES.values()), "passed": sum(CASES.values()), "failed": 0}
    for name, count in CASES.items():
        mine = [line for line in values if line["case"] == name]
        assert len(mine) == count and all(line["pass"] is True for line in mine)
        # Each name of the case's files was looked at.
        facts = json.loads((GOLDEN / name / "case.json").read_text(encoding="utf-8"))
        looked_at = {line["name"] for line in mine}
        assert set(facts["gradients"]["norms"] if "gradients" in facts else ()) <= {
            n.removeprefix("gradients/") for n in looked_at
        }
        assert set(facts["state_dict"]) <= {n.removeprefix("state_dict/") for n in looked_at}


def change_a_tensor(case: Path) -> str:
    tensors = load_file(case / "io.safetensors")
    name = next(n for n in tensors if n.startswith("encoder_out"))
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[0] += 0.01
    save_file(tensors, case / "io.safetensors")
    return name


def add_a_tensor(case: Path) -> str:
    tensors = load_file(case / "io.safetensors")
    tensors["unheard_of"] = next(iter(tensors.values())).clone()
    save_file(tensors, case / "io.safetensors")
    return "unheard_of"


def edit_facts(case: Path, change) -> None:
    path = case / "case.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    change(facts)
    path.write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")


def change_a_token(case: Path) -> str:
    def change(facts):
        entry = next(e for e in facts["decodes"]["ctc_prefix_beam_search"] if e["tokens"])
        entry["tokens"][0] += 1

    edit_facts(case, change)
    return "decodes/ctc_prefix_beam_search"


def add_a_decode(case: Path) -> str:
    edit_facts(case, lambda facts: facts["decodes"].update({"ctc_psychic_search": [1, 2, 3]}))
    return "decodes/ctc_psychic_search"


def change_a_gradient(case: Path) -> str:
    def change(facts):
        norms = facts["gradients"]["norms"]
        norms["ctc.ctc_lo.weight"] *= 1.01

    edit_facts(case, change)
    return "gradients/ctc.ctc_lo.weight"


def change_a_shape(case: Path) -> str:
    def change(facts):
        facts["state_dict"]["ctc.ctc_lo.bias"][0][0] += 1

    edit_facts(case, change)
    return "state_dict/ctc.ctc_lo.bias"


def test_tampered_cases_are_noticed(tmp_path):
    """One run over copies with one change each; exactly the changed value fails in each."""
    tampering = [change_a_tensor, add_a_tensor, change_a_token, add_a_decode, change_a_gradient, change_a_shape]
    expected = {}
    for tamper in tampering:
        case = tmp_path / tamper.__name__
        shutil.copytree(GOLDEN / "u2pp_conformer_tiny", case)
        expected[tamper.__name__] = [tamper(case)]
    status, lines, errors = check_parity(*(tmp_path / name for name in expected))
    assert status == 1, errors
    found = {name: failed_names([line for line in lines if line.get("case") == name]) for name in expected}
    assert found == expected
    assert lines[-1]["failed"] == len(tampering)


def test_cases_that_cannot_run_fail_and_the_others_still_run(tmp_path):
    cases = []
    for missing in ("final.pt", "io.safetensors", "case.json"):
        cases.append(tmp_path / missing)
        shutil.copytree(GOLDEN / "u2pp_conformer_tiny", cases[-1])
        (cases[-1] / missing).unlink()
    status, lines, _ = check_parity(*cases)
    assert status == 1
    assert [line["case"] for line in lines[:-1]] == ["final.pt", "io.safetensors", "case.json"]
    assert failed_names(lines) == ["run"] * 3 and lines[-1] == {"total": 3, "passed": 0, "failed": 3}


def test_a_case_of_an_unknown_family_is_counted_and_the_others_still_run(tmp_path):
    """The unknown one is a copy of a case with another family; it comes first, and what follows is checked."""
    unknown, known = tmp_path / "unknown", "vocoder_expresso_spk_style"
    shutil.copytree(SPEECHGPT / known, unknown)
    edit_facts(unknown, lambda facts: facts.update(family="telepathy"))
    status, lines, errors = check_parity(unknown, SPEECHGPT / known)
    assert status == 1, errors
    first, *values, total = lines
    assert first.keys() == {"case", "error"} and first["case"] == "unknown"
    assert first["error"].startswith("family: expected one of [") and first["error"].endswith("got 'telepathy'")
    count = SPEECHGPT_CASES[known]
    assert len(values) == count and all(line["case"] == known and line["pass"] is True for line in values)
    assert total == {"total": count, "passed": count, "failed": 0, "unsupported": 1}
