"""Text of CosyVoice before the tokenizer: normalisation and division into sentences.

Upstream: `text_normalize` of `cosyvoice/cli/frontend.py`, `cosyvoice/utils/frontend_utils.py`. What reads dates, units
and sums out loud is pluggable: any [`TextNormalizer`]; `WetextNormalizer` where the package `wetext` is installed.
Without one, Chinese keeps its digits and English has its numbers spelled.
"""

import re
import unicodedata
from collections.abc import Callable
from importlib.util import find_spec
from typing import Protocol

from .english_numbers import spell_numbers


_CHINESE = re.compile("[\u4e00-\u9fff]")
_MARKS = {"zh": "。？！；：、.?!;", "en": ".?!;:"}
_FULL_STOP = {"zh": "。", "en": "."}


class TextNormalizer(Protocol):
    """Reads a text out loud in writing.

    Args:
        text: without leading and trailing white space. language: `"zh"` if it has a Chinese character, else `"en"`.

    Returns:
        the text, or its sentences if the normaliser divides it, which are then taken as they are.
    """

    def __call__(self, text: str, language: str) -> str | list[str]: ...


class WetextNormalizer:
    """The normaliser of the package `wetext` (extra `wetext`): numbers, dates, units. Chinese keeps its erhua.

    Raises:
        ImportError: the package is not installed.
    """

    def __init__(self) -> None:
        try:
            from wetext import Normalizer
        except ImportError as error:
            raise ImportError("text normalisation needs wetext: pip install 'hf-speechllm[wetext]'") from error
        self._chinese = Normalizer(remove_erhua=False)
        self._english = Normalizer()

    def __call__(self, text: str, language: str) -> str:
        return (self._chinese if language == "zh" else self._english).normalize(text)


def default_normalizer() -> TextNormalizer | None:
    """`WetextNormalizer` where its package is installed, otherwise none, as upstream chooses."""
    return WetextNormalizer() if find_spec("wetext") is not None else None


def prepare_text(
    text: str,
    count_tokens: Callable[[str], int],
    split: bool = True,
    normalize: bool = True,
    normalizer: TextNormalizer | None = None,
) -> list[str]:
    """A text as what the tokenizer gets.

    Args:
        count_tokens: tokens of a piece of text, which limits English sentences.
        split (`bool`): divide into sentences; prompts and instructions are not divided.
        normalize (`bool`): false leaves the text as it is, undivided. So does a text with `<|` and `|>` in it.
        normalizer (*optional*): see [`TextNormalizer`].

    Returns:
        the sentences, or the one text. Nothing is left of a text without words; upstream fails on one of white space.
    """
    if not text:
        return []
    if not normalize or ("<|" in text and "|>" in text):
        return [text]
    text = text.strip()
    if not text:
        return []
    language = "zh" if _CHINESE.search(text) else "en"
    read = text if normalizer is None else normalizer(text, language)
    if isinstance(read, list):
        sentences, text = read, "".join(read)
    else:
        text = tidy_chinese(read) if language == "zh" else spell_numbers(read)
        sentences = split_paragraph(text, count_tokens, language) if split else []
    if not split:
        return [text]
    return [sentence for sentence in sentences if not is_punctuation(sentence)]


def tidy_chinese(text: str) -> str:
    """Line breaks, blanks between Chinese characters, brackets and western full stops out of a Chinese text."""
    text = text.replace("\n", "")
    text = "".join(
        character
        for index, character in enumerate(text)
        if character != " " or (_is_word(text, index - 1) and _is_word(text, index + 1))
    )
    text = text.replace("²", "平方").replace("³", "立方")
    text = text.replace(".", "。").replace(" - ", "，")
    text = re.sub("[（）【】`]", "", text).replace("——", " ")
    return re.sub("[，,、]+$", "。", text)


def _is_word(text: str, index: int) -> bool:
    """Whether a neighbour keeps a blank: an ASCII character that is none."""
    return 0 <= index < len(text) and text[index].isascii() and text[index] != " "


def is_punctuation(text: str) -> bool:
    """Whether a text has punctuation and symbols only, or nothing at all."""
    return all(unicodedata.category(character)[0] in "PS" for character in text)


def split_paragraph(
    text: str,
    count_tokens: Callable[[str], int],
    language: str = "zh",
    longest: int = 80,
    shortest: int = 60,
    merge: int = 20,
    at_commas: bool = False,
) -> list[str]:
    """Sentences of a paragraph, the short ones together.

    Args:
        language: `"zh"`: lengths are characters; `"en"`: tokens.
        longest, shortest (`int`): a sentence begins a new piece if with it the piece would be longer than `longest`
            and without it is longer than `shortest` already.
        merge (`int`): a last piece shorter than this joins the one before.
        at_commas (`bool`): divide there too.
    """
    if not text:
        return []
    marks = _MARKS[language] + ("，," if at_commas else "")
    if text[-1] not in marks:
        text += _FULL_STOP[language]
    sentences: list[str] = []
    start = 0
    for index, character in enumerate(text):
        if character not in marks:
            continue
        if index > start:
            sentences.append(text[start : index + 1])
        start = index + 1
        if text[start : start + 1] in ('"', "”"):
            # A closing quotation mark stays with its sentence.
            if sentences:
                sentences[-1] += text[start]
            start += 1

    def length(piece: str) -> int:
        return len(piece) if language == "zh" else count_tokens(piece)

    pieces: list[str] = []
    piece = ""
    for sentence in sentences:
        if length(piece + sentence) > longest and length(piece) > shortest:
            pieces.append(piece)
            piece = ""
        piece += sentence
    if piece:
        if pieces and length(piece) < merge:
            pieces[-1] += piece
        else:
            pieces.append(piece)
    return pieces
