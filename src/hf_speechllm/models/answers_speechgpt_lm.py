"""Reading what SpeechGPT wrote: transcript, answer as text, answer as units.

Upstream (`speechgpt/src/infer/cli_infer.py`, `postprocess`) looks for `[SpeechGPT] :` with just that space, which a
later tokenizer does not write, and for `; [ua]` behind the text of an answer, so that a spoken question answered in
text, and a text answer without steps, lose their answer. [`parse_answer`] loses nothing; [`upstream_fields`] gives
upstream's fields.
"""

import re
from dataclasses import dataclass, field

from .unit_string import parse_unit_string


_ASSISTANT = re.compile(r"\[SpeechGPT\]\s*:?")
_HUMAN = re.compile(r"\[Human\]\s*:?")
_END_OF_QUESTION = re.compile(r"<\s*eoh\s*>")
_END_OF_ANSWER = re.compile(r"<\s*eoa\s*>|<eos>|</s>|\[Human\]")
_STEP = re.compile(r"\s*;?\s*\[\s*(tq|ta|ua)\s*\]")
_UNITS = re.compile(r"<sosp>|<eosp>|<\d+>", re.ASCII)


@dataclass(frozen=True)
class SpeechGptAnswer:
    """
    Args:
        question (`str`): what the human said, as it stands in the prompt; empty where there is no prompt.
        question_units (`list[int]`): units in it.
        transcript (`str`, *optional*): the question as text, where the model wrote it down.
        text (`str`, *optional*): the answer as text; None where there are only units.
        units (`list[int]`): every unit of the answer.
        raw (`str`): all that was read, without a prompt that was given apart.
    """

    question: str = ""
    question_units: list[int] = field(default_factory=list)
    transcript: str | None = None
    text: str | None = None
    units: list[int] = field(default_factory=list)
    raw: str = ""


def parse_answer(text: str, prompt: str | None = None) -> SpeechGptAnswer:
    """The last answer in a text: a prompt with its continuation, a training text, or a continuation alone.

    White space around colons and tags, a missing `<eoa>`, missing steps and a cut-off end are taken as they come.

    Args:
        text (`str`): what to read.
        prompt (`str`, *optional*): then `text` is the continuation alone, and its beginning is the answer, even if the
            model went on and asked and answered for itself.
    """
    question, answer = "", text
    asked = text if prompt is None else prompt
    if turns := list(_ASSISTANT.finditer(asked)):
        if prompt is None:
            answer = text[turns[-1].end() :]
        # Without its mark a question ends where the answer begins, as in one of the paper's formats.
        question = _HUMAN.split(asked[: turns[-1].start()])[-1]
        question = _END_OF_QUESTION.split(question)[0].strip()
    answer = split_answer(answer)
    steps = {"": ""}
    position, name = 0, ""
    for tag in _STEP.finditer(answer):
        steps[name] = answer[position : tag.start()]
        position, name = tag.end(), tag[1]
    steps[name] = answer[position:]
    transcript = spoken = None
    if "ta" in steps:
        # In the released style the transcript comes first, without a tag.
        transcript, spoken = _words(steps.get("tq", steps[""])), _words(steps["ta"])
    elif "tq" in steps:
        transcript = _words(steps["tq"])
    else:
        spoken = _words(steps[""])
    return SpeechGptAnswer(
        question=question,
        question_units=parse_unit_string(question),
        transcript=transcript,
        text=spoken,
        units=parse_unit_string(answer),
        raw=text,
    )


def split_answer(continuation: str) -> str:
    """What stands before the end of the answer in a continuation, as it was written."""
    return _END_OF_ANSWER.split(continuation)[0]


def upstream_fields(text: str) -> dict[str, str]:
    """The fields of upstream's `postprocess`: `question`, `answer`, `textQuestion`, `textAnswer`, `unitAnswer`.

    White space is kept, the first of several turns is taken, and what upstream misses is an empty string. The one
    difference: any white space, or none, may stand before the colon behind `[SpeechGPT]`.
    """

    def between(start: str, end: str, closed: bool = False) -> str:
        match = re.search(f"{start}(.*?){re.escape(end)}", text + (end if closed else ""), re.DOTALL)
        return match[1] if match else ""

    assistant = r"\[SpeechGPT\]\s*:"
    has_text, has_units = "[ta]" in text, "[ua]" in text
    return {
        "question": between(r"\[Human\]", "<eoh>"),
        "answer": between(assistant, "<eoa>", closed=True),
        "textQuestion": between(assistant, "; [ta]") if has_text else "",
        "textAnswer": between(r"\[ta\]", "; [ua]") if has_text else "",
        "unitAnswer": between(r"\[ua\]", "<eoa>", closed=True) if has_units else "",
    }


def _words(text: str) -> str | None:
    """A step without units and without the white space around it; None if nothing is left."""
    return _UNITS.sub("", text).strip() or None
