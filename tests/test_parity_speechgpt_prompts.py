"""conversion/check_parity.py on the cases that are texts: all of it passes, and what is tampered with is noticed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).parent / "golden" / "speechgpt"
CASES = ("prompts_three_stages", "prompts_anygpt_speech")


def check_parity(*cases: Path) -> tuple[int, list[dict], str]:
    command = [sys.executable, str(ROOT / "conversion" / "check_parity.py"), *map(str, cases)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=250)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return done.returncode, lines, done.stderr


def failed(lines: list[dict]) -> list[str]:
    return sorted(f"{line['case']}: {line['name']}" for line in lines[:-1] if not line["pass"])


def change(case: Path, *path: object, value: object) -> None:
    facts = json.loads((case / "case.json").read_text(encoding="utf-8"))
    place = facts
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (case / "case.json").write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")


def test_every_value_of_both_cases():
    status, lines, errors = check_parity(*(GOLDEN / name for name in CASES))
    assert failed(lines) == [] and status == 0, errors
    assert lines[-1] == {"total": 178, "passed": 178, "failed": 0}
    names = [line["name"] for line in lines[:-1]]
    assert sum(name.endswith("input_ids") for name in names) == 17
    assert sum("parsed/" in name for name in names) == 20


def test_tampered_cases_are_noticed(tmp_path):
    """Exactly what was changed fails, in one run over copies; an entry that nobody knows fails as well."""
    stages, dialogues = tmp_path / "stages", tmp_path / "dialogues"
    shutil.copytree(GOLDEN / "prompts_three_stages", stages)
    shutil.copytree(GOLDEN / "prompts_anygpt_speech", dialogues)
    chain = ("stages", "3_chain_of_modality", "examples")
    change(stages, "special_ids", "<999>", value=7)
    change(stages, *chain, 0, "input_ids", value=[1, 2])
    change(stages, *chain, 1, "parsed", "answer", value="no")
    change(stages, *chain, 2, "telepathy", value=1)
    change(stages, "stages", "1_modality_adaptation", "remainder_dropped_tokens", value=9)
    change(stages, "generation_config_used", "top_k", value=60)
    change(stages, "inference", 1, "prompt", value="?")
    change(dialogues, "dialogues", 0, "sep2", value="<eot>")
    change(dialogues, "base_model", 0, "tts_prompt", value="[Human]: x This is input: y<eoh> [MMGPT]: ")
    change(dialogues, "unheard_of", value=1)
    status, lines, errors = check_parity(stages, dialogues)
    assert status == 1, errors
    assert failed(lines) == [
        "dialogues: dialogues[0]/sep2",
        "dialogues: run",
        "stages: generation_config_used/top_k",
        "stages: inference[1]/prompt",
        "stages: special_ids/<999>",
        "stages: stages/1_modality_adaptation/remainder_dropped_tokens",
        "stages: stages/3_chain_of_modality/examples[0]/input_ids",
        "stages: stages/3_chain_of_modality/examples[1]/parsed/answer",
        "stages: stages/3_chain_of_modality/examples[2]/telepathy",
    ]
