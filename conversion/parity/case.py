"""A golden case: what the upstream said, and the book-keeping of what has been compared with it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from hf_speechllm.upstream.yaml_config import read_yaml_mapping


# Entries of a FunASR case's `case.json` that describe the case and are no outputs.
_DESCRIPTIONS = {
    *("argmax_margin", "cif_margin", "index", "margins", "name", "note", "seed", "special_ids", "tensors"),
    *("tolerance", "upstream", "vocab_size"),
}
# Families whose cases are texts and ids, without tensors, and the entries that describe such a case.
_TEXT_FAMILIES = {"prompts", "prompts_anygpt_speech"}
_TEXT_DESCRIPTIONS = {"case", "commit", "family", "seed", "transformers", "upstream"}
# The tolerance of a FunASR case, which `case.json` says in words.
_FUNASR_ATOL, _FUNASR_RTOL = 2e-5, 1e-4


@dataclass
class Case:
    """One case directory.

    Args:
        directory: where the pack lies. facts: `case.json`. tensors: `io.safetensors`.
        atol, rtol: default tolerance of tensors. score_atol: tolerance of search scores.
    """

    directory: Path
    facts: dict[str, Any]
    tensors: dict[str, Tensor]
    atol: float
    rtol: float
    score_atol: float = 1e-3
    passed: int = 0
    failed: int = 0
    checked: set[str] = field(default_factory=set)

    @classmethod
    def load(cls, directory: Path) -> "Case":
        facts = json.loads((directory / "case.json").read_text(encoding="utf-8"))
        if facts.get("family") in _TEXT_FAMILIES:
            return cls(directory, facts, {}, 0.0, 0.0)
        tensors = load_file(directory / "io.safetensors")
        tolerance = facts.get("tolerance", {})
        if "family" not in facts and (directory / "config.yaml").exists():
            return cls(directory, facts, tensors, _FUNASR_ATOL, _FUNASR_RTOL)
        return cls(directory, facts, tensors, float(tolerance.get("atol", 1e-4)), float(tolerance.get("rtol", 1e-4)))

    @property
    def family(self) -> str:
        """What `case.json` says, what files a CosyVoice case has, or the model that a FunASR pack's yaml names."""
        if "family" in self.facts:
            return self.facts["family"]
        if (self.directory / "config.yaml").exists():
            return str(read_yaml_mapping(self.directory / "config.yaml").get("model"))
        return cosyvoice_family(self.directory, set(self.tensors))

    @property
    def decodes(self) -> dict[str, Any]:
        return self.facts.get("decodes", {})

    def expected_names(self) -> set[str]:
        """Everything that must be looked at: tensors (also those only described), decodes, gradients."""
        if "family" not in self.facts:
            described = self.fact_names() if (self.directory / "config.yaml").exists() else self.facts["tensors"]
            return set(self.tensors) | set(described)
        if self.family in _TEXT_FAMILIES:
            described = {key: value for key, value in self.facts.items() if key not in _TEXT_DESCRIPTIONS}
            return set(leaf_names(described))
        names = set(self.tensors) | set(self.facts.get("tensors", {}))
        names |= {f"decodes/{name}" for name in self.decodes}
        names |= {f"gradients/{name}" for name in self.facts.get("gradients", {}).get("norms", {})}
        if "total_norm" in self.facts.get("gradients", {}):
            names.add("gradients/total_norm")
        names |= {f"state_dict/{name}" for name in self.facts.get("state_dict", {})}
        # Texts of units.
        names |= {name for name in self.facts if name.endswith("_string")}
        return names

    def fact_names(self) -> set[str]:
        """The outputs in a FunASR case's `case.json`: `key`, `key.entry`, `key[i]` or `key[i].entry`."""
        names = set()
        for key, value in self.facts.items():
            if key in _DESCRIPTIONS:
                continue
            items = (
                [(f"{key}[{i}]", item) for i, item in enumerate(value)] if isinstance(value, list) else [(key, value)]
            )
            for name, item in items:
                if isinstance(item, dict):
                    names |= {f"{name}.{entry}" for entry in item if entry not in _DESCRIPTIONS}
                else:
                    names.add(name)
        return names

    def use(self, *names: str) -> None:
        """Mark inputs, which are consumed rather than compared."""
        self.checked.update(names)

    def record(self, name: str, difference: float | None, tolerance: float | str, passed: bool, **extra: Any) -> bool:
        """Print and count one comparison."""
        self.checked.add(name)
        self.passed += passed
        self.failed += not passed
        line = {
            "case": self.directory.name,
            "name": name,
            "max_abs_diff": difference,
            "tolerance": tolerance,
            "pass": passed,
        }
        print(json.dumps(line | extra, ensure_ascii=False), flush=True)
        return passed

    def compare(
        self,
        name: str,
        actual: Tensor,
        expected: Tensor | None = None,
        where: Tensor | None = None,
        atol: float | None = None,
    ) -> bool:
        """Compare a tensor; `where` (bool, broadcastable) restricts it to the entries that mean something.

        Integer tensors must be equal; floats may differ by `atol + rtol * |expected|`.
        """
        expected = self.tensors[name] if expected is None else expected
        actual = actual.detach().cpu()
        if actual.shape != expected.shape:
            return self.record(name, None, "shape", False, expected=list(expected.shape), actual=list(actual.shape))
        exact = not expected.is_floating_point()
        atol = 0.0 if exact else (self.atol if atol is None else atol)
        difference = (actual.double() - expected.double()).abs()
        allowed = atol + (0.0 if exact else self.rtol) * expected.double().abs()
        good = difference <= allowed
        if where is not None:
            where = where.expand(difference.shape)
            good, difference = good | ~where, difference[where]
        largest = float(difference.max()) if difference.numel() else 0.0
        # NaN compares false, so it fails.
        return self.record(name, largest, atol, bool(good.all()))

    def compare_value(self, name: str, actual: Any, expected: Any, atol: float | None = None) -> bool:
        """Compare nested lists, dictionaries, strings and numbers; ints and strings exactly, floats within `atol`."""
        atol = self.score_atol if atol is None else atol
        difference, problem = largest_difference(actual, expected, name)
        passed = problem is None and difference <= atol
        extra = {} if problem is None else {"problem": problem}
        return self.record(name, difference, atol, passed, **extra)

    def fail_unchecked(self) -> None:
        """Every expected value that no stage looked at is a failure."""
        for name in sorted(self.expected_names() - self.checked):
            self.record(name, None, "unchecked", False)


def cosyvoice_family(directory: Path, tensors: set[str]) -> str:
    """The check that a CosyVoice case needs: a part of a pack, a complete one, or functions without weights."""
    parts = [part for part in ("llm", "flow", "hift") if (directory / f"{part}.pt").exists()]
    if len(parts) == 3:
        return "cosyvoice_pack"
    if len(parts) == 1:
        return {"llm": "cosyvoice_lm", "flow": "cosyvoice_flow", "hift": "cosyvoice_hift"}[parts[0]]
    if any(directory.glob("speech_tokenizer*")):
        return "s3_tokenizer"
    if any(directory.glob("campplus*")):
        return "campplus"
    if "nucleus.ids" in tensors:
        return "cosyvoice_sampling"
    if "whisper.mel" in tensors:
        return "cosyvoice_frontend"
    raise ValueError(f"{directory}: what the case is about: expected files or tensors of a known family")


def leaf_names(value: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Names of all values in nested dictionaries and lists of dictionaries: `key/entry`, `key[i]/entry`."""
    for key, item in value.items():
        name = f"{prefix}{key}"
        if isinstance(item, dict):
            yield from leaf_names(item, f"{name}/")
        elif isinstance(item, list) and item and isinstance(item[0], dict):
            for number, entry in enumerate(item):
                yield from leaf_names(entry, f"{name}[{number}]/")
        else:
            yield name


def largest_difference(actual: Any, expected: Any, path: str) -> tuple[float, str | None]:
    """Largest difference of floats in two nested values, and a description of the first mismatch of anything else."""
    if isinstance(expected, dict):
        pairs = [
            (actual.get(key) if isinstance(actual, dict) else None, value, f"{path}.{key}")
            for key, value in expected.items()
        ]
    elif isinstance(expected, list):
        if not isinstance(actual, list | tuple) or len(actual) != len(expected):
            return 0.0, f"{path}: expected {expected}, got {actual}"
        pairs = [(a, e, f"{path}[{i}]") for i, (a, e) in enumerate(zip(actual, expected, strict=True))]
    elif isinstance(expected, float) and isinstance(actual, int | float):
        if expected == actual:
            return 0.0, None
        difference = abs(actual - expected)
        return (difference, None) if difference == difference else (0.0, f"{path}: expected {expected}, got {actual}")
    else:
        return 0.0, None if actual == expected else f"{path}: expected {expected!r}, got {actual!r}"
    largest = 0.0
    for a, e, where in pairs:
        difference, problem = largest_difference(a, e, where)
        if problem is not None:
            return largest, problem
        largest = max(largest, difference)
    return largest, None


def as_float(tensor: Tensor) -> Tensor:
    """Scalar or tensor as float32, for comparisons with stored losses."""
    return torch.as_tensor(tensor, dtype=torch.float32)
