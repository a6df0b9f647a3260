"""The text tokenizer of a CosyVoice pack: what its yaml names, and where the file of version 1's tokens is.

Versions 2 and 3 have theirs in the pack. The yaml of version 1 names a function, `get_tokenizer` of the package
`whisper` or, for the 25 Hz model, of upstream itself, which takes the tokens from a file of that package.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from cosyvoice_pack import QWEN_FOLDER
from transformers import PreTrainedTokenizerFast

from hf_speechllm.models.configuration_cosyvoice import CosyVoiceConfig
from hf_speechllm.models.processing_cosyvoice import END_OF_PROMPT
from hf_speechllm.upstream.cosyvoice_tokenizers import (
    build_qwen_tokenizer,
    build_whisper_tokenizer,
    qwen_special_id,
)
from hf_speechllm.upstream.errors import ConversionError
from hf_speechllm.upstream.hyperpyyaml import Call


_UPSTREAM_FUNCTION = "cosyvoice.tokenizer.tokenizer.get_tokenizer"
_FUNCTIONS = ("whisper.tokenizer.get_tokenizer", _UPSTREAM_FUNCTION)
_WHISPER_FILE, _UPSTREAM_FILE = "multilingual.tiktoken", "multilingual_zh_ja_yue_char_del.tiktoken"
# Installed packages that bring the files, and where in them.
_PACKAGES = {
    _WHISPER_FILE: (
        ("whisper", "assets"),
        ("cosyvoice", "tokenizer/assets"),
        ("funasr", "models/sense_voice/whisper_lib/assets"),
    ),
    _UPSTREAM_FILE: (("cosyvoice", "tokenizer/assets"),),
}


@dataclass
class WhisperTokens:
    """Which tokens version 1 reads.

    Args:
        extended: those of the 25 Hz model in place of Whisper's.
        num_languages (*optional*): how many of its languages have a token; all where the yaml does not say.
    """

    extended: bool
    num_languages: int | None = None

    @property
    def file_name(self) -> str:
        return _UPSTREAM_FILE if self.extended else _WHISPER_FILE


def read_whisper_tokens(settings: dict[str, object], path: Path, token_rate: int) -> WhisperTokens:
    """What the yaml of version 1 says of its tokenizer.

    Args:
        token_rate: speech tokens a second, which tell the models apart where the yaml names no tokenizer.
    Raises:
        ConversionError: another function, or a number of languages that is none.
    """
    call = settings.get("get_tokenizer")
    if call is None:
        return WhisperTokens(extended=token_rate == 25)
    if not isinstance(call, Call) or call.target not in _FUNCTIONS or not isinstance(call.arguments, dict):
        actual = call.target if isinstance(call, Call) else repr(call)
        raise ConversionError("unknown class", file=path, key="get_tokenizer", expected=_FUNCTIONS, actual=actual)
    if call.arguments.get("multilingual") is not True:
        raise ConversionError("not supported", file=path, key="get_tokenizer.multilingual", expected=True)
    # The default of both functions.
    count = call.arguments.get("num_languages", 99)
    if type(count) is not int or count < 1:
        raise ConversionError("bad value", file=path, key="get_tokenizer.num_languages", actual=repr(count))
    return WhisperTokens(extended=call.target == _UPSTREAM_FUNCTION, num_languages=count)


def find_text_tokens(pack: Path, name: str) -> Path | None:
    """The file of text tokens of version 1: `name` in the pack or a folder of it, the only such file of the pack, or
    that of an installed package, of which nothing is run."""
    found = sorted([*pack.glob("*.tiktoken"), *pack.glob("*/*.tiktoken")])
    named = [path for path in found if path.name == name]
    if named or len(found) == 1:
        return (named or found)[0]
    for package, folder in _PACKAGES.get(name, ()):
        spec = find_spec(package)
        for root in () if spec is None else spec.submodule_search_locations or ():
            if (path := Path(root) / folder / name).is_file():
                return path
    return None


def build_tokenizer(
    pack: Path, settings: dict[str, object], yaml_path: Path, config: CosyVoiceConfig, tokenizer: str | Path | None
) -> PreTrainedTokenizerFast:
    """The text tokenizer.

    Args:
        tokenizer: tiktoken file of version 1; searched where it is not given, see [`find_text_tokens`].
    Raises:
        ConversionError: no such file, or one with more tokens than the language model has.
    """
    if config.version != 1:
        return build_qwen_tokenizer(pack / QWEN_FOLDER, config.version)
    tokens = read_whisper_tokens(settings, yaml_path, config.speech_tokenizer_config.token_rate)
    path = find_text_tokens(pack, tokens.file_name) if tokenizer is None else Path(tokenizer)
    if path is None:
        raise ConversionError(
            "version 1 needs a file of text tokens",
            file=pack,
            key="--tokenizer",
            expected=f"{tokens.file_name} ({'upstream' if tokens.extended else 'Whisper'}'s), beside the yaml or "
            f"given; or one of the packages {', '.join(name for name, _ in _PACKAGES[tokens.file_name])} installed",
        )
    built = build_whisper_tokenizer(path, tokens.extended, tokens.num_languages)
    if len(built) > config.lm_config.text_vocab_size:
        raise ConversionError(
            "tokens of the text",
            file=path,
            expected=f"at most {config.lm_config.text_vocab_size}, the rows of llm.pt",
            actual=len(built),
        )
    return built


def end_of_prompt_id(folder: Path) -> int | None:
    """Id of `<|endofprompt|>` of version 3, which follows from the size of the vocabulary; `None` without one.

    Args:
        folder: `CosyVoice-BlankEN` of a pack.
    """
    return qwen_special_id(folder, 3, END_OF_PROMPT) if (folder / "vocab.json").exists() else None
