"""Speech units as text: `<sosp><12><7><eosp>`, the form in which a language model reads and writes them.

Upstream: 0nutation/SpeechGPT, `speechgpt/utils/speech2unit/speech2unit.py` and `speechgpt/src/infer/cli_infer.py`.
"""

import re
from collections.abc import Iterable

from torch import Tensor


START_OF_SPEECH = "<sosp>"
END_OF_SPEECH = "<eosp>"

_UNIT = re.compile(r"<(\d{1,9})>", re.ASCII)


def unit_string(unit_ids: Iterable[int] | Tensor, start: str = START_OF_SPEECH, end: str = END_OF_SPEECH) -> str:
    """`start`, then `<id>` for every id, then `end`.

    Args:
        unit_ids: one utterance: `(units,)` int64, or a sequence of integers. Negative ids are padding and left out.
        start, end: what stands around the units; empty strings give the units alone.
    """
    ids = unit_ids.tolist() if isinstance(unit_ids, Tensor) else unit_ids
    return start + "".join(f"<{unit}>" for unit in ids if unit >= 0) + end


def parse_unit_string(text: str) -> list[int]:
    """The ids of every `<digits>` in a text, in order; anything else in it is passed over."""
    return [int(digits) for digits in _UNIT.findall(text)]
