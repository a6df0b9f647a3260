"""Dialogues of AnyGPT (https://arxiv.org/abs/2402.12226), the speech part: prompts, training texts, answers.

Upstream: OpenMOSS/AnyGPT. Its units are the first codebook of SpeechTokenizer, without merging repeats, and are
written with an emoji in the token. The chat weights call the assistant `[MMGPT]`, later templates `[AnyGPT]`.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .unit_string import END_OF_SPEECH, START_OF_SPEECH
from .unit_tokens import unit_token


# Two code points, U+1F5E3 and U+FE0F.
SPEECH_MARKER = "\U0001f5e3\ufe0f"
# The tokens that are added beside those of the modalities, in upstream's order.
SPECIAL_TOKENS = ("[Human]", "[MMGPT]", "<eoh>", "<eos>", "<-Res->", "<-Ins->")
VOICE_REQUEST = "Please recognize the voice command and give reply and voice"


@dataclass(frozen=True)
class ModalityTokens:
    """Tokens of one modality: `start`, `<{marker}{k}>` for each of `vocab_size` codes, `end`."""

    marker: str
    start: str
    end: str
    vocab_size: int


MODALITIES = {
    "image": ModalityTokens("\U0001f440", "<soim>", "<eoim>", 8192),
    "speech": ModalityTokens(SPEECH_MARKER, START_OF_SPEECH, END_OF_SPEECH, 1024),
    "music": ModalityTokens("\U0001f3b6", "<somu>", "<eomu>", 8192),
}


@dataclass(frozen=True)
class AnyGptTemplate:
    """How a dialogue is written.

    Args:
        name (`str`): of the assistant. end_of_answer (`str`): the token behind an answer.
    """

    name: str
    end_of_answer: str
    end_of_question: str = "<eoh>"

    @property
    def role(self) -> str:
        return f"[{self.name}]"

    @property
    def system(self) -> str:
        return (
            f"You are an AI assistant named {self.name} who can understand and generate multimodal content, including "
            "text, speech, images and audio."
        )


TEMPLATES = {"AnyGPT": AnyGptTemplate("AnyGPT", "<eom>"), "MMGPT": AnyGptTemplate("MMGPT", "<eos>")}


@dataclass(frozen=True)
class AnyGptAnswer:
    """
    Args:
        transcript (`str`, *optional*): what the model understood. text (`str`, *optional*): its answer.
        units (`list[int]`): its answer, spoken. raw (`str`): all that was read.
    """

    transcript: str | None
    text: str | None
    units: list[int]
    raw: str


def speech_string(units: Iterable[int]) -> str:
    """Codes as text, with the emoji; negative ones are padding and left out."""
    tokens = (unit_token(int(unit), SPEECH_MARKER) for unit in units if unit >= 0)
    return f"{START_OF_SPEECH}{''.join(tokens)}{END_OF_SPEECH}"


def parse_speech_string(text: str) -> list[int]:
    """The codes of every speech token in a text, in order."""
    return [int(digits) for digits in re.findall(rf"<{SPEECH_MARKER}(\d+)>", text)]


def voice_message(units: Iterable[int] | str) -> str:
    """What the human says who speaks: the codes (or their string), and the request for a spoken answer."""
    return f"{units if isinstance(units, str) else speech_string(units)} {VOICE_REQUEST}"


def voice_reply(transcript: str, answer: str, units: Iterable[int] | str) -> str:
    """What the assistant answers to a spoken question: what it understood, its answer, and that spoken."""
    return f"<-Ins-> {transcript}\n <-Res-> {answer} {units if isinstance(units, str) else speech_string(units)}"


def dialogue_text(turns: Sequence[tuple[str, str | None]], template: AnyGptTemplate = TEMPLATES["MMGPT"]) -> str:
    """The whole dialogue; where the last answer is None it ends where the model goes on.

    Raises:
        ValueError: an answer that is missing before the last turn.
    """
    parts = [template.system]
    for number, (message, reply) in enumerate(turns):
        parts.append(f"[Human]: {message}{template.end_of_question}")
        if reply is None and number < len(turns) - 1:
            raise ValueError(f"turns[{number}]: expected an answer, got none")
        parts.append(f"{template.role}:" + ("" if reply is None else f" {reply}{template.end_of_answer}"))
    return "\n".join(parts)


def recognition_prompt(instruction: str, speech: str, template: AnyGptTemplate = TEMPLATES["MMGPT"]) -> str:
    """For the base model: an instruction in words, and the speech to be written down."""
    return f"[Human]: {instruction} {speech}{template.end_of_question} {template.role}:"


def synthesis_prompt(instruction: str, text: str, template: AnyGptTemplate = TEMPLATES["MMGPT"]) -> str:
    """For the base model: an instruction in words, and the text to be spoken."""
    return f"[Human]: {instruction} This is input: {text}{template.end_of_question} {template.role}:"


def parse_reply(text: str) -> AnyGptAnswer:
    """The last answer in a text: a dialogue, or a continuation alone."""
    reply = re.split(r"\[(?:AnyGPT|MMGPT)\]\s*:", text)[-1]
    reply = re.split(r"<eom>|<eos>|</s>|\[Human\]", reply)[0]
    instruction, mark, answer = reply.partition("<-Res->")
    if not mark:
        instruction, answer = "", reply
    transcript = instruction.replace("<-Ins->", "").strip() or None
    words = re.sub(rf"{START_OF_SPEECH}|{END_OF_SPEECH}|<{SPEECH_MARKER}\d+>", "", answer.replace("<-Ins->", ""))
    return AnyGptAnswer(transcript, words.strip() or None, parse_speech_string(answer), text)
