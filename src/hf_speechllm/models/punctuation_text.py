"""The text side of punctuation: words of mixed Chinese and English, where to cut, and words and marks back to text.

Upstream: modelscope/FunASR, `funasr/models/ct_transformer/utils.py` (`split_words`) and `model.py` (`inference`).
"""

from collections.abc import Sequence


NO_MARKS = ("_", "<unk>")
_SENTENCE_ENDS = ("。", "？")
_COMMA = "，"
_HALF_WIDTH = {"，": ",", "。": ".", "？": "?"}


def split_words(text: str) -> list[str]:
    """Words between spaces; every character beyond ASCII is a word of its own, which also ends the one before it."""
    words = []
    for part in text.split():
        word = ""
        for character in part:
            if character.isascii():
                word += character
                continue
            words += [word, character] if word else [character]
            word = ""
        if word:
            words.append(word)
    return words


def end_of_finished(marks: Sequence[str], longest: int) -> tuple[int, bool]:
    """How many words at the start are finished, while more words are to come.

    Up to the last end of a sentence, which must leave a word behind it and two before it; without one, up to the last
    comma where there are more than `longest` words.

    Args:
        marks: after each word.

    Returns:
        the number, 0 for none, and whether a comma was taken for the end of a sentence.
    """
    candidates = range(len(marks) - 2, 1, -1)
    end = next((index for index in candidates if marks[index] in _SENTENCE_ENDS), None)
    if end is not None:
        return end + 1, False
    comma = next((index for index in candidates if marks[index] == _COMMA), None)
    if comma is not None and len(marks) > longest:
        return comma + 1, True
    return 0, False


def join_words(words: Sequence[str], marks: Sequence[str]) -> str:
    """Text of finished words, which begin a sentence.

    A space goes before an ASCII word that comes first or after another; the first ASCII word of a sentence is
    capitalised (the rest of it becomes lower case, as upstream), and marks after ASCII words are half-width.
    """
    text, starts = "", True
    for index, (word, mark) in enumerate(zip(words, marks, strict=True)):
        latin = word[0].isascii()
        if latin and (index == 0 or words[index - 1][0].isascii()):
            text += " "
        text += word.capitalize() if latin and starts else word
        if mark not in NO_MARKS:
            text += _HALF_WIDTH.get(mark, mark) if latin else mark
        starts = mark in _SENTENCE_ENDS
    return text


def end_text(text: str) -> str:
    """Text that ends in a full stop or a question mark; a comma at the end becomes a full stop."""
    if not text or text[-1] in "。？.?":
        return text
    if text[-1] in "，、":
        return text[:-1] + "。"
    if text[-1] == ",":
        return text[:-1] + "."
    return text + ("." if text[-1].isascii() else "。")
