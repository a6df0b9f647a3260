"""What a case says of a call of upstream's `CosyVoice` classes: its mode and its arguments.

A case describes the waveform of a call as one would write the call down: `inference_zero_shot(text, prompt_text,
prompt.wav, stream=True)`, with texts in quotes, names of files, and names of entries of `case.json`; `...` stands for
whatever the case says for all of its calls. What is left open follows from the name of the call, and from which inputs
upstream passed to the models.
"""

import ast
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .case import Case


# Upstream's methods: parameters in their order.
_PARAMETERS = {
    "sft": ("tts_text", "spk_id", "stream", "speed", "text_frontend"),
    "zero_shot": ("tts_text", "prompt_text", "prompt_wav", "zero_shot_spk_id", "stream", "speed", "text_frontend"),
    "cross_lingual": ("tts_text", "prompt_wav", "zero_shot_spk_id", "stream", "speed", "text_frontend"),
    "instruct": ("tts_text", "spk_id", "instruct_text", "stream", "speed", "text_frontend"),
    "instruct2": ("tts_text", "instruct_text", "prompt_wav", "zero_shot_spk_id", "stream", "speed", "text_frontend"),
    "vc": ("source_wav", "prompt_wav", "stream", "speed"),
}
# In a call's name; the longer name first where one holds the other.
_NAMED = {
    **{name: name for name in ("zero_shot", "cross_lingual", "instruct2", "instruct", "sft")},
    **{"zeroshot": "zero_shot", "crosslingual": "cross_lingual", "voice_conversion": "vc", "vc": "vc"},
}
# Where `case.json` may have an argument of all calls.
_ENTRIES = {
    "tts_text": ("tts_text", "text"),
    "prompt_text": ("prompt_text",),
    "instruct_text": ("instruct_text", "instruct"),
    "spk_id": ("spk_id", "speaker", "spk"),
    "zero_shot_spk_id": ("zero_shot_spk_id",),
    "speed": ("speed",),
    "text_frontend": ("text_frontend",),
}
_FILES = {"prompt_wav": "prompt", "source_wav": "source"}
_SOUND = (".wav", ".flac", ".mp3", ".ogg")
# A file among the arguments; no expression where it has a hyphen.
_BARE_FILE = re.compile(r"""(?<=[(,=\s])([\w./-]+\.(?:wav|flac|mp3|ogg))(?=\s*[,)])""")


@dataclass
class Call:
    """One call.

    Args:
        mode: the method without `inference_`.
        text, prompt_text, instruct (`str`, *optional*): texts; `None` where the case does not say.
        speaker (`str`, *optional*): of `spk2info.pt`.
        saved_prompt (`bool`): whether the speaker stands for a prompt, upstream's `zero_shot_spk_id`.
        prompt_audio, source_audio (*optional*): recordings.
        stream, speed, normalize: as upstream's `stream`, `speed` and `text_frontend`.
    """

    mode: str
    text: str | None = None
    prompt_text: str | None = None
    instruct: str | None = None
    speaker: str | None = None
    saved_prompt: bool = False
    prompt_audio: Path | None = None
    source_audio: Path | None = None
    stream: bool = False
    speed: float = 1.0
    normalize: bool = True


def read_call(case: Case, name: str) -> Call:
    """The call `name` of a case."""
    inputs = given_inputs(case, name)
    method, given = written_call(case, name)
    mode = method or mode_of_name(name) or mode_of_inputs(inputs)
    values: dict[str, Any] = {}
    for parameter in _PARAMETERS[mode]:
        value = given.get(parameter, ...)
        if value is ...:
            value = find_entry(case, name, parameter)
        elif isinstance(value, Name):
            value = resolve(case, name, value.text)
        values[parameter] = value
    saved = values.get("zero_shot_spk_id") or None
    stream = values["stream"] if isinstance(values.get("stream"), bool) else "stream" in name
    return Call(
        mode=mode,
        text=as_text(values.get("tts_text")),
        prompt_text=as_text(values.get("prompt_text")),
        instruct=as_text(values.get("instruct_text")),
        speaker=as_text(saved or values.get("spk_id")),
        saved_prompt=saved is not None,
        prompt_audio=None if saved else as_file(case, values, "prompt_wav"),
        source_audio=as_file(case, values, "source_wav"),
        stream=stream,
        speed=float(values["speed"]) if isinstance(values.get("speed"), int | float) else 1.0,
        normalize=values.get("text_frontend") is not False,
    )


@dataclass
class Name:
    """An argument that is no constant: the name of an entry or of a file."""

    text: str


def written_call(case: Case, name: str) -> tuple[str | None, dict[str, Any]]:
    """Method and arguments out of the descriptions of the call, of which the first tensor's is the fullest."""
    described = [facts.get("what", "") for key, facts in case.facts["tensors"].items() if key.startswith(f"{name}.")]
    calls = case.facts.get("calls")
    if isinstance(calls, dict):
        described.append(str(calls.get(name, "")))
    found = [text for text in described if re.search(r"inference_\w+", text)]
    for text in found:
        start = text.index("inference_")
        # The shortest beginning that is an expression: what follows the call is prose.
        for end in (match.end() for match in re.finditer(r"\)", text[start:])):
            if (call := parse(text[start : start + end])) is not None:
                return call
    for text in found:
        method = re.search(r"inference_(\w+)", text)[1]
        if method in _PARAMETERS:
            return method, {}
    return None, {}


def parse(text: str) -> tuple[str, dict[str, Any]] | None:
    """Method and arguments of a call that is written as Python, `None` of anything else."""
    try:
        call = ast.parse(_BARE_FILE.sub(r"'\1'", text), mode="eval").body
    except SyntaxError:
        return None
    if not isinstance(call, ast.Call):
        return None
    method = ast.unparse(call.func).rpartition(".")[2].removeprefix("inference_")
    if method not in _PARAMETERS:
        return None
    given: dict[str, Any] = {}
    for parameter, argument in zip(_PARAMETERS[method], call.args, strict=False):
        value = argument_of(argument)
        if value is ...:
            # It stands for all that follow.
            break
        given[parameter] = value
    given |= {keyword.arg: argument_of(keyword.value) for keyword in call.keywords if keyword.arg is not None}
    return method, given


def argument_of(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return Name(ast.unparse(node).replace(" ", ""))


def mode_of_name(name: str) -> str | None:
    return next((mode for part, mode in _NAMED.items() if part in name), None)


def mode_of_inputs(inputs: set[str]) -> str:
    """By what upstream passed to the models; every mode has inputs of its own."""
    if "source_speech_token" in inputs:
        return "vc"
    if "llm_prompt_speech_token" in inputs:
        return "zero_shot"
    recorded = "flow_prompt_speech_token" in inputs
    if "prompt_text" in inputs:
        return "instruct2" if recorded else "instruct"
    return "cross_lingual" if recorded else "sft"


def given_inputs(case: Case, name: str) -> set[str]:
    """Names of the inputs of the models: those listed, and those stored."""
    stored = {key.rpartition(".")[2] for key in case.tensors if re.match(rf"{re.escape(name)}\.in\d*\.", key)}
    return stored | set(case.facts.get("inputs_passed", {}).get(name, ()))


def find_entry(case: Case, name: str, parameter: str) -> Any:
    """What `case.json` says of a parameter, for this call or for all; files by their names."""
    for key in (*_ENTRIES.get(parameter, (parameter,)), *((parameter,) if parameter in _FILES else ())):
        for entry in (f"{name}_{key}", key):
            value = case.facts.get(entry)
            if isinstance(value, dict):
                value = value.get(name)
            if value is not None:
                return value
    if parameter in _FILES:
        stem = _FILES[parameter]
        found = [path for path in case.directory.iterdir() if path.suffix in _SOUND and path.stem.startswith(stem)]
        return min(found, key=lambda path: (path.stem != stem, path.name)).name if found else None
    return None


def resolve(case: Case, name: str, text: str) -> Any:
    """The entry of `case.json`, or the file, that a name in a call means."""
    if (case.directory / text).is_file():
        return text
    value = case.facts.get(text)
    if isinstance(value, dict):
        value = value.get(name)
    if value is not None:
        return value
    return next((find_entry(case, name, key) for key, names in _ENTRIES.items() if text in (key, *names)), None)


def as_text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def as_file(case: Case, values: dict[str, Any], parameter: str) -> Path | None:
    """A recording, if the mode has one; that for all calls where what is written is none."""
    if parameter not in values:
        return None
    for candidate in (values[parameter], find_entry(case, "", parameter)):
        if isinstance(candidate, str) and (case.directory / candidate).is_file():
            return case.directory / candidate
    return None
