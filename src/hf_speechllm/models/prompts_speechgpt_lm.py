"""What SpeechGPT is trained on and asked with: the texts of stages 2 and 3, and the prompts of inference.

Two styles. `"released"` is what the published data and the published scripts have, and what the published weights
understand; `"paper"` is appendix C of https://arxiv.org/abs/2305.11000, which spells the steps out and tags them. A
chain of modality goes through text: the question as text `[tq]`, the answer as text `[ta]`, the answer as units
`[ua]`. Units are strings such as `<sosp><12><7><eosp>`.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal


# Put before every dialogue, verbatim as the published weights were trained with it.
META_INSTRUCTION = (
    "You are an AI assistant whose name is SpeechGPT.\n"
    "- SpeechGPT is a intrinsic cross-modal conversational language model that is developed by Fudan University.  "
    "SpeechGPT can understand and communicate fluently with human through speech or text chosen by the user.\n"
    "- It can perceive cross-modal inputs and generate cross-modal outputs.\n"
)
INFERENCE_TEMPLATE = "[Human]: {question} <eoh>. [SpeechGPT]: "
# Where upstream cuts what the user typed, to look for the path of a recording.
INPUT_MARK = "is input:"
RECORDING_SUFFIXES = (".wav", ".flac", ".mp3", ".mp4", ".ogg")

STYLES = ("released", "paper")
Style = Literal["released", "paper"]
Modality = Literal["speech", "text"]

# Appendix C: (input, output) -> what the human says before the answer begins. The last has no <eoh> there.
_STEPS = "You can do it step by step. You can first transcribe the instruction and get the text {name}. Then you can "
_PAPER_REQUESTS = {
    ("speech", "speech"): (
        "This is a speech instruction: {question}. And your response should be speech. "
        + _STEPS.format(name="Instruction")
        + "think about the instruction and get the text response. Last, you should speak the response aloud <eoh>."
    ),
    ("speech", "text"): (
        "This is a speech instruction: {question}. And your response should be text. "
        + _STEPS.format(name="instruction")
        + "think about the instruction and get the text response. <eoh>."
    ),
    ("text", "speech"): (
        "This is a text instruction: {question}. And your response should be speech. You can do it step by step. You "
        "can think about the instruction and get the text response. Then you should speak the response aloud <eoh>."
    ),
    ("text", "text"): (
        "This is a text instruction: {question}. And your response should be text. You can think about the "
        "instruction and get the text response."
    ),
}


@dataclass(frozen=True)
class SpeechGptTurn:
    """A question and its answer, in the modalities that there are.

    Args:
        question, answer (`str`, *optional*): as text.
        question_units, answer_units (`str`, *optional*): as a string of units. A question with units is a spoken one,
            and its text becomes the transcript; an answer with units is spoken.
    """

    question: str | None = None
    answer: str | None = None
    question_units: str | None = None
    answer_units: str | None = None

    @property
    def modalities(self) -> tuple[Modality, Modality]:
        """Of the question and of the answer."""
        return ("speech" if self.question_units else "text", "speech" if self.answer_units else "text")


def chain_text(turn: SpeechGptTurn, style: Style = "released") -> str:
    """Stage 3: one turn as a text, in the format of its modalities.

    Raises:
        ValueError: an unknown style, or a turn without the text of its question or answer.
    """
    _check_style(style)
    if turn.question is None or turn.answer is None:
        missing = "question" if turn.question is None else "answer"
        raise ValueError(f"{missing}: expected the text, which a chain of modality goes through, got none")
    spoken_question, spoken_answer = turn.question_units, turn.answer_units
    asked = spoken_question or turn.question
    if style == "paper":
        request = _PAPER_REQUESTS[turn.modalities].format(question=asked)
        steps = [f"[tq] {turn.question}"] if spoken_question else []
        steps.append(f"[ta] {turn.answer}")
    else:
        request = f"{asked}<eoh>."
        steps = [turn.question, f"[ta] {turn.answer}"] if spoken_question else [turn.answer]
    if spoken_answer:
        steps.append(f"[ua] {spoken_answer}")
    return f"[Human]: {request} [SpeechGPT]: {'; '.join(steps)}<eoa>."


def cross_modal_text(description: str, source: str, target: str, style: Style = "released") -> str:
    """Stage 2: a task in words, what it is to be done with, and the result; one of the two is a string of units.

    The released data has no period after `<eoh>` and a space at the end, so that such texts can follow one another.
    """
    _check_style(style)
    if style == "paper":
        return f"[Human]: {description}. This is input: {source}<eoh>. [SpeechGPT]: {target}<eos>."
    return f"[Human]: {description} This is input: {source}<eoh> [SpeechGPT]: {target}<eoa> "


def question_with_units(instruction: str | None, units: str) -> str:
    """What the human says who gives a recording: its units, after the instruction if there is one.

    An instruction that ends in `is input:` gets the units right behind it, as upstream puts them.
    """
    if not instruction or not instruction.strip():
        return units
    if instruction.rstrip().endswith(INPUT_MARK):
        return instruction.rstrip() + units
    return f"{instruction.rstrip()} This {INPUT_MARK} {units}"


def inference_prompt(
    question: str,
    history: str | Sequence[SpeechGptTurn] = (),
    style: Style = "released",
    modalities: tuple[Modality, Modality] = ("text", "text"),
    prefix: str = META_INSTRUCTION,
) -> str:
    """Everything up to where the model goes on.

    Args:
        question (`str`): text, a string of units, or both.
        history (`str` or `Sequence[SpeechGptTurn]`): the dialogue so far, as it was written or as complete turns,
            oldest first.
        style (`"released"` or `"paper"`).
        modalities: of the question and of the answer wanted; only the paper's style says them to the model.
        prefix (`str`): the meta instruction.

    Raises:
        ValueError: an unknown style or modality.
    """
    _check_style(style)
    if modalities not in _PAPER_REQUESTS:
        raise ValueError(f"modalities: expected 'speech' or 'text' for question and answer, got {modalities}")
    if style == "paper":
        last = f"[Human]: {_PAPER_REQUESTS[modalities].format(question=question)} [SpeechGPT]: "
    else:
        last = INFERENCE_TEMPLATE.format(question=question)
    if not isinstance(history, str):
        history = " ".join(chain_text(turn, style) for turn in history)
    return prefix + (f"{history.strip()} " if history.strip() else "") + last


def _check_style(style: str) -> None:
    if style not in STYLES:
        raise ValueError(f"style: expected one of {STYLES}, got {style!r}")


def replace_recordings(text: str, encode: Callable[[str], str]) -> str:
    """What the user typed, with the path of every recording replaced by its units.

    As upstream does it: the text is cut at each `is input:`, and a part that is the path of an existing audio file,
    white space aside, is replaced.

    Args:
        text (`str`): e.g. `"Recognize this speech, this is input: question.wav"`, or the path alone.
        encode: path to string of units.
    """
    parts = []
    for part in text.split(INPUT_MARK):
        path = part.strip()
        is_recording = os.path.splitext(path)[1].lower() in RECORDING_SUFFIXES and os.path.isfile(path)
        parts.append(encode(path) if is_recording else part)
    return INPUT_MARK.join(parts)
