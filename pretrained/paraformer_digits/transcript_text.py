"""Text of a Chinese and English token sequence: `@@` pieces joined to words, spaces, and abbreviations.

Two ways. [`words_of_tokens`] loses nothing and is the default. [`upstream_sentence`] gives what upstream's
`sentence_postprocess` gives, with its quirks, for comparisons:

* a piece `he@@` that no alphabetic token follows is dropped or glued to a later word, and a Chinese character between
  takes its time;
* the time of a dropped `<unk>` stays, and shifts those after it;
* a symbol between an English word and a Chinese character is dropped;
* a string comparison decides what is Chinese where all tokens seem to be, so that "1a" is.
"""

from collections.abc import Sequence
from dataclasses import dataclass


_DROPPED = ("<s>", "</s>", "<unk>", "<OOV>")
_DROPPED_BY_WENET = ("<sos>", "<eos>", "<blank>")
_CONTINUES = "@@"


@dataclass
class Word:
    """A word and the tokens it was made of.

    Args:
        text: without spaces.
        start, end: positions of its tokens, the end exclusive.
        space_before: whether a space separates it from the word before.
        pieces: text and position of each token.
    """

    text: str
    start: int
    end: int
    space_before: bool
    pieces: list[tuple[str, int]]


def is_chinese(text: str) -> bool:
    """Whether every character is of U+4E00..9FFF, a digit or "@": these are written without spaces around them."""
    return bool(text) and all("\u4e00" <= c <= "\u9fff" or "0" <= c <= "9" or c == "@" for c in text)


def is_alphabetic(text: str) -> bool:
    """Whether every character is a letter that is not Chinese, or an apostrophe."""
    return bool(text) and all(c == "'" or (c.isalpha() and not is_chinese(c)) for c in text)


def words_of_tokens(
    tokens: Sequence[str], dropped: Sequence[str] = _DROPPED, join_abbreviations: bool = True
) -> list[Word]:
    """Words of a token sequence.

    A token with `@@` continues in the next alphabetic one; where none follows it is a word of its own. A space goes
    between two alphabetic words, and between such a word and a symbol after it. Single ASCII letters in a row are an
    abbreviation: "b", "b" become "BB".

    Args:
        tokens: of the model's vocabulary.
        dropped: tokens that are no text.
        join_abbreviations: the rule of the last sentence.
    """
    words: list[Word] = []
    open_pieces: list[tuple[str, int]] = []

    def close(alphabetic: bool = True) -> None:
        text = "".join(piece for piece, _ in open_pieces)
        if text:
            after_word = bool(words) and is_alphabetic(words[-1].text)
            space = after_word and (alphabetic or not is_chinese(text))
            words.append(Word(text, open_pieces[0][1], open_pieces[-1][1] + 1, space, list(open_pieces)))
        open_pieces.clear()

    for position, token in enumerate(tokens):
        if token in dropped:
            continue
        text = token.replace(" ", "")
        if _CONTINUES in text and text != _CONTINUES:
            open_pieces.append((text.replace(_CONTINUES, ""), position))
        elif is_alphabetic(text):
            open_pieces.append((text, position))
            close()
        else:
            close()
            open_pieces.append((text, position))
            close(alphabetic=False)
    close()
    return _join_abbreviations(words) if join_abbreviations else words


def _join_abbreviations(words: list[Word]) -> list[Word]:
    joined: list[Word] = []
    run: list[Word] = []
    for word in [*words, None]:
        if word is not None and _is_letter(word.text) and (word.space_before or not run):
            run.append(word)
            continue
        if len(run) > 1:
            pieces = [(text.upper(), position) for letter in run for text, position in letter.pieces]
            text = "".join(piece for piece, _ in pieces)
            joined.append(Word(text, run[0].start, run[-1].end, run[0].space_before, pieces))
        else:
            joined += run
        run = []
        if word is not None:
            joined.append(word)
    return joined


def upstream_sentence(
    tokens: Sequence[str], times: list[list[int]] | None = None, toolkit: str = "funasr"
) -> tuple[str, list[list[int]] | None, list[str]]:
    """Text, times and words exactly as upstream's `sentence_postprocess` gives them.

    Args:
        tokens: of the model's vocabulary.
        times: `[start, end]` per token in milliseconds. With times, the text has a space between any two words.
        toolkit: `"wenet"`: its `paraformer_beautify_result`, which keeps `<unk>`, does not join abbreviations, and
            does not drop symbols.

    Raises:
        IndexError: where upstream raises it, when there are fewer times than tokens.
    """
    wenet = toolkit == "wenet"
    kept = [token for token in tokens if token not in (_DROPPED_BY_WENET if wenet else _DROPPED)]
    cleaned = [_without_marks(token) for token in kept]
    units: list[str] = []
    spans: list[list[int]] = []
    if kept and all(_seems_chinese(token) for token in cleaned):
        units = [token.replace(" ", "") for token in kept]
        spans = [] if times is None else times
    elif kept and all(t == "'" or (t.isalpha() and not _seems_chinese(t)) for t in cleaned):
        for position, token in enumerate(kept):
            units += [token, " "]
            if times is not None:
                spans.append(list(times[position]))
    else:
        units, spans = _mixed(kept, times, wenet)
    if wenet:
        words = units
    else:
        words, spans = _upstream_abbreviations(units, spans if times is not None else None)
    real = [word for word in words if word != " "]
    text = ("".join(words) if times is None else " ".join(real)).strip()
    return text, None if times is None else spans, real


def _mixed(tokens: list[str], times: list[list[int]] | None, wenet: bool) -> tuple[list[str], list[list[int]]]:
    units: list[str] = []
    spans: list[list[int]] = []
    piece, space_is_last = "", False
    begins_here, begin, end = True, -1, -1
    for position, token in enumerate(tokens):
        if times is not None and begins_here:
            begin, end = times[position]
        cleaned = [_without_marks(character) for character in token]
        if token and all(_seems_chinese(character) for character in cleaned):
            if space_is_last:
                units.pop()
            units.append(token)
            space_is_last = False
            if times is not None:
                begins_here = True
                spans.append([begin, end])
        elif _CONTINUES in token:
            piece += token.replace(_CONTINUES, "")
            space_is_last = False
            if times is not None:
                begins_here, end = False, times[position][1]
        elif token and all(c == "'" or (c.isalpha() and not _seems_chinese(c)) for c in cleaned):
            units += [piece + token, " "]
            piece, space_is_last = "", True
            if times is not None:
                begins_here, end = True, times[position][1]
                spans.append([begin, end])
        else:
            units.append(token)
            space_is_last = space_is_last and not wenet
    return units, spans


def _upstream_abbreviations(
    units: list[str], spans: list[list[int]] | None
) -> tuple[list[str], list[list[int]] | None]:
    words: list[str] = []
    joined: list[list[int]] = []
    position = count = 0  # `count`: units before `position` that are not spaces
    while position < len(units):
        last = position
        if _is_letter(units[position]):
            while last + 2 < len(units) and units[last + 1] == " " and _is_letter(units[last + 2]):
                last += 2
        letters = (last - position) // 2 + 1
        is_space = units[position] == " "
        if letters > 1:
            words.append("".join(units[position : last + 1 : 2]).upper())
        else:
            words.append(units[position])
        if spans is not None and letters > 1:
            begin = spans[count][0]
            if count + letters - 1 < len(spans):
                joined.append([begin, spans[count + letters - 1][1]])
        elif spans is not None and not is_space and count < len(spans):
            joined.append([spans[count][0], spans[count][1]])
        count += 0 if is_space else letters
        position = last + 1
    return words, None if spans is None else joined


def _without_marks(text: str) -> str:
    for mark in (" ", "</s>", "<s>", "<unk>", "<OOV>"):
        text = text.replace(mark, "")
    return text


def _seems_chinese(text: str) -> bool:
    return "\u4e00" <= text <= "\u9fff" or "0" <= text <= "9" or text == "@"


def _is_letter(text: str) -> bool:
    return len(text) == 1 and text.isascii() and text.isalpha()
