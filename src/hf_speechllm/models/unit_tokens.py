"""The tokens that a language model gets for speech units.

Upstream: SpeechGPT (https://arxiv.org/abs/2305.11000) adds `<0>` ... `<999>`, `<sosp>` and `<eosp>` before its first
stage and the dialogue tokens before its second. `<eoa>`, `[tq]`, `[ta]` and `[ua]` of its texts are no tokens:
ordinary pieces spell them.
"""

from collections.abc import Iterable

from .unit_string import END_OF_SPEECH, START_OF_SPEECH


DIALOGUE_TOKENS = ("[Human]", "[SpeechGPT]", "<eoh>", "<eos>")


def unit_token(unit: int, marker: str = "") -> str:
    """The token of one unit: `<12>`, or with a marker (AnyGPT writes an emoji there) `<🗣️12>`."""
    return f"<{marker}{unit}>"


def vocabulary_tokens(num_units: int, extra: Iterable[str] = DIALOGUE_TOKENS, marker: str = "") -> list[str]:
    """The tokens that a unit language model adds, in upstream's order: units, `<sosp>`, `<eosp>`, then `extra`.

    Raises:
        ValueError: fewer than one unit.
    """
    if num_units < 1:
        raise ValueError(f"num_units: expected at least 1, got {num_units}")
    return [*(unit_token(unit, marker) for unit in range(num_units)), START_OF_SPEECH, END_OF_SPEECH, *extra]
