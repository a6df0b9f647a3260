"""Builders of `WenetU2ppTokenizer`: a table of units (and a sentencepiece model) becomes one `tokenizer.json`."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ..models.tokenization_wenet_u2pp import WORD_BOUNDARY, WenetU2ppTokenizer
from .errors import ConversionError
from .sentencepiece_model import CONTROL, UNKNOWN, USER_DEFINED, SentencePieceModel, charsmap_rules
from .units import NON_LINGUISTIC_PATTERN


_CJK = "[\u4e00-\u9fff]"
# What Python's str.strip removes; the Rust definition of white space lacks the four separators 1C to 1F.
_SPACE = "[" + "".join(chr(code) for code in range(0x3001) if chr(code).isspace()) + "]"
# Two noncharacters mark the start and the end of a part that is a unit as it stands. They never reach the model.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
# A third one stands for text that no token contains. (Character maps turn U+FFFD into a space.)
_FOREIGN = "\ufdd2"


def build_char_tokenizer(
    units: dict[str, int],
    *,
    blank_id: int = 0,
    bos_id: int | None = None,
    eos_id: int | None = None,
    unk_token: str = "<unk>",
    split_with_space: bool = False,
    non_linguistic_symbols: list[str] | None = None,
    word_delimiter: str = " ",
) -> WenetU2ppTokenizer:
    """A tokenizer whose units are single characters, or whole words (`split_with_space`).

    Text is stripped. Characters: a space becomes `▁`, anything unknown becomes `unk_token`. Words: the text is split
    at single spaces. (The toolkit makes an unknown unit of the empty word between two spaces; here there is none.)

    Args:
        units: token → id, ids 0 .. n-1.
        blank_id, bos_id, eos_id: ids of the blank and the sentence marks; the marks default to the last unit.
        unk_token: must be one of the units.
        non_linguistic_symbols: when given (an empty list counts), text is upper-cased, white space around bracketed
            parts is removed, and the listed symbols are units as a whole.
    Raises:
        ConversionError: an id or `unk_token` is not in `units`.
    """
    steps: list[normalizers.Normalizer] = [_strip_line()]
    symbols: list[str] = []
    if non_linguistic_symbols is not None:
        symbols = sorted(non_linguistic_symbols, key=len, reverse=True)
        steps += _upper_case(units)
        steps.append(normalizers.Replace(Regex(f"{_SPACE}+(?={NON_LINGUISTIC_PATTERN})"), ""))
        steps.append(normalizers.Replace(Regex(f"(?:{NON_LINGUISTIC_PATTERN})\\K{_SPACE}+"), ""))
    listed = "|".join(escape_pattern(symbol) for symbol in symbols)
    if split_with_space:
        splits = [pre_tokenizers.Split(Regex(listed), "isolated")] if listed else []
        splitter: pre_tokenizers.PreTokenizer = pre_tokenizers.Sequence(
            [*splits, pre_tokenizers.Split(" ", "removed")]
        )
        decoder = None
    else:
        steps.append(normalizers.Replace(" ", WORD_BOUNDARY))
        listed = listed.replace(" ", WORD_BOUNDARY)
        splitter = pre_tokenizers.Split(Regex(f"{listed}|[\\s\\S]" if listed else "[\\s\\S]"), "isolated")
        decoder = join_units()
    tokenizer = Tokenizer(models.WordLevel(dict(units), unk_token=unk_token))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = splitter
    if decoder is not None:
        tokenizer.decoder = decoder
    return _wrap(
        tokenizer,
        units,
        (blank_id, bos_id, eos_id, unk_token),
        unit_kind="word" if split_with_space else "char",
        word_delimiter=word_delimiter,
        non_linguistic_symbols=non_linguistic_symbols,
    )


def build_word_tokenizer(units: dict[str, int], **arguments) -> WenetU2ppTokenizer:
    """`build_char_tokenizer` with words as units: "three one" gives two ids and is decoded with spaces."""
    return build_char_tokenizer(units, split_with_space=True, **arguments)


def build_bpe_tokenizer(
    units: dict[str, int],
    model: SentencePieceModel,
    *,
    blank_id: int = 0,
    bos_id: int | None = None,
    eos_id: int | None = None,
    unk_token: str = "<unk>",
    non_linguistic_symbols: list[str] | None = None,
) -> WenetU2ppTokenizer:
    """A tokenizer whose units are sentencepiece pieces, looked up by their text in `units`.

    Text is stripped and upper-cased, each CJK character (U+4E00 to U+9FFF) is a unit of its own, and every part
    between them is segmented by itself. Pieces that are not units become `unk_token`. One deviation: a unit that the
    sentencepiece model does not know keeps its id beside unknown characters, where the toolkit merges the whole run
    of unknown characters and finds no such unit.

    Args:
        units, blank_id, bos_id, eos_id, unk_token: as in `build_char_tokenizer`.
        model: the pieces and normaliser (`read_sentencepiece_model`), unigram or bpe.
        non_linguistic_symbols: when given, bracketed parts are segmented by themselves and the listed ones are units
            as a whole. Only with a unigram model.
    Raises:
        ConversionError: an id or `unk_token` is not in `units`, or a combination that cannot be expressed.
    """
    pieces = {piece.text: piece for piece in model.pieces if piece.type not in (CONTROL, UNKNOWN)}
    table = dict(units)
    for text in pieces:
        if text not in table:
            table[text] = len(table)
    symbols = sorted(non_linguistic_symbols or [], key=len, reverse=True)
    for symbol in symbols:
        if model.model_type == "bpe" or re.search(_CJK, symbol):
            raise ConversionError(
                "a non-linguistic symbol needs a unigram model and no CJK character",
                key=symbol,
                actual=model.model_type,
            )

    if model.model_type == "unigram":
        scores = _unigram_scores(table, pieces, symbols)
        tokenizer = Tokenizer(models.Unigram(scores, unk_id=units.get(unk_token), byte_fallback=False))
    else:
        tokenizer = Tokenizer(models.BPE(table, merge_rules(pieces), unk_token=unk_token, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(_bpe_normalizers(table, model, non_linguistic_symbols))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"[{_OPEN}{_CLOSE}]"), "removed")
    tokenizer.decoder = join_units()
    return _wrap(
        tokenizer,
        units,
        (blank_id, bos_id, eos_id, unk_token),
        unit_kind="bpe",
        word_delimiter=" ",
        non_linguistic_symbols=non_linguistic_symbols,
        segmentation_only_pieces=len(table) - len(units),
    )


def _unigram_scores(table: dict[str, int], pieces: dict, symbols: list[str]) -> list[tuple[str, float]]:
    """(token, log probability) in the order of the ids.

    Units that the sentencepiece model does not have can only come from unknown characters of the training text, so
    they may win against unknown characters but never against known pieces.
    """
    normal = [piece.score for piece in pieces.values() if piece.type != USER_DEFINED]
    if not normal:
        raise ConversionError("sentencepiece model has no ordinary pieces", key="pieces")
    lowest, highest = min(normal), max(normal)
    alphabet = set("".join(pieces))
    scores = []
    for token in table:
        if token in pieces:
            score = pieces[token].score
            if pieces[token].type == USER_DEFINED:
                score = len(token.encode("utf-8")) * highest - 0.1
        elif token in symbols:
            score = 100.0
        elif alphabet.isdisjoint(token):
            score = lowest
        else:
            score = (lowest - 10.0) * (len(token) + 1)
        scores.append((token, score))
    return scores


def merge_rules(pieces: dict) -> list[tuple[str, str]]:
    """Every split of a piece into two pieces, best priority first; equal priorities in the order of the pieces."""
    ranked = []
    for order, piece in enumerate(pieces.values()):
        for cut in range(1, len(piece.text)):
            left, right = piece.text[:cut], piece.text[cut:]
            if left in pieces and right in pieces:
                ranked.append((-piece.score, order, cut, (left, right)))
    return [pair for _, _, _, pair in sorted(ranked)]


def _bpe_normalizers(
    table: Iterable[str], model: SentencePieceModel, non_linguistic_symbols: list[str] | None
) -> list[normalizers.Normalizer]:
    def replace(pattern: str, content: str) -> normalizers.Replace:
        return normalizers.Replace(Regex(pattern), content)

    start, end = f"(?:\\A|(?<={_CLOSE}))", f"(?={_OPEN}|\\z)"
    steps = [_strip_line(), replace(f"[{_OPEN}{_CLOSE}]", _FOREIGN), *_upper_case(table)]
    if non_linguistic_symbols is not None:
        listed = "|".join(escape_pattern(symbol) for symbol in non_linguistic_symbols) or "(?!)"
        other = f"(?!{listed})(?:{NON_LINGUISTIC_PATTERN})"
        steps += [
            replace(f"(?={other})", _OPEN + _CLOSE),
            replace(f"{other}\\K", _OPEN + _CLOSE),
            replace(f"(?={listed})", _OPEN),
            replace(f"(?:{listed})\\K", _CLOSE),
        ]
    steps += [
        replace(f"(?={_CJK})", _OPEN),
        replace(f"(?<={_CJK})", _CLOSE),
        replace(f"{start}{_SPACE}+{end}", ""),
    ]
    steps += character_map_steps(table, charsmap_rules(model.precompiled_charsmap))
    if model.remove_extra_whitespaces:
        steps += [replace(" {2,}", " "), replace(f"{start} ", "")]
    if model.add_dummy_prefix:
        steps.append(replace(f"{start}(?![{_OPEN}{_CLOSE}]|\\z)", WORD_BOUNDARY))
    steps.append(normalizers.Replace(" ", WORD_BOUNDARY))
    if model.remove_extra_whitespaces:
        steps.append(replace(f"{WORD_BOUNDARY}+{end}", ""))
    return steps


def _strip_line() -> normalizers.Normalizer:
    return normalizers.Replace(Regex(f"\\A{_SPACE}+|{_SPACE}+\\z"), "")


def _upper_case(tokens: Iterable[str]) -> list[normalizers.Normalizer]:
    """Upper-casing of the characters that make a difference to `tokens` (there is no such normaliser).

    A character whose lower and upper forms are both foreign to every token is unknown in either form.
    """
    alphabet = set("".join(tokens))
    rules = {}
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        upper = character.upper()
        if upper != character:
            forms = character + upper + unicodedata.normalize("NFKC", character + upper)
            if not alphabet.isdisjoint(forms):
                rules[character] = upper
    return _replacements(rules)


def character_map_steps(tokens: Iterable[str], rules: dict[str, str]) -> list[normalizers.Normalizer]:
    """The rules of a character map that make a difference to `tokens`, longest texts first.

    They are spelled out because the normaliser for complete maps (`Precompiled`, tokenizers 0.23) fails with an index
    error for some texts and disagrees with sentencepiece for others.
    """
    alphabet = set("".join(tokens)) | {" "}
    rules = {text: replacement for text, replacement in rules.items() if text != replacement}
    relevant = alphabet | {
        text
        for text, replacement in rules.items()
        if len(text) == 1 and (not replacement or not alphabet.isdisjoint(text + replacement))
    }
    rules = {text: new for text, new in rules.items() if not relevant.isdisjoint(text + new)}
    foreign = {text for text, new in rules.items() if new and alphabet.isdisjoint(new)}
    return _replacements({text: _FOREIGN if text in foreign else new for text, new in rules.items()})


def _replacements(rules: dict[str, str]) -> list[normalizers.Normalizer]:
    """Steps that replace texts, longer ones first; texts that differ in their first character share a pattern."""
    groups: dict[tuple[int, str], dict[str, list[str]]] = {}
    for text, replacement in sorted(rules.items()):
        groups.setdefault((-len(text), replacement), {}).setdefault(text[1:], []).append(text[0])
    steps = []
    for (_, replacement), endings in sorted(groups.items()):
        choices = ["[" + "".join(map(_code, first)) + "]" + "".join(map(_code, end)) for end, first in endings.items()]
        steps.append(normalizers.Replace(Regex("|".join(choices)), replacement))
    return steps


def _code(character: str) -> str:
    return f"\\x{{{ord(character):x}}}"


def join_units() -> decoders.Decoder:
    return decoders.Sequence([decoders.Replace(WORD_BOUNDARY, " "), decoders.Fuse(), decoders.Strip(" ", 1, 1)])


def escape_pattern(text: str) -> str:
    return "".join(f"\\{character}" if character in r"\^$.|?*+()[]{}-" else character for character in text)


def _wrap(
    tokenizer: Tokenizer,
    units: dict[str, int],
    special: tuple[int, int | None, int | None, str],
    **settings,
) -> WenetU2ppTokenizer:
    names = {index: token for token, index in units.items()}
    blank_id, bos_id, eos_id, unk_token = special
    last = len(units) - 1
    roles = {
        "pad_token": blank_id,
        "bos_token": last if bos_id is None else bos_id,
        "eos_token": last if eos_id is None else eos_id,
    }
    for role, index in roles.items():
        if index not in names:
            raise ConversionError("id is not in the table of units", key=role, expected=f"0..{last}", actual=index)
    if unk_token not in units:
        raise ConversionError("unknown token is not in the table of units", key=unk_token)
    tokens = {role: names[index] for role, index in roles.items()} | {"unk_token": unk_token}
    added = dict.fromkeys(sorted(tokens.values(), key=units.__getitem__))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in added])
    settings = {name: value for name, value in settings.items() if value is not None}
    return WenetU2ppTokenizer(
        tokenizer_object=tokenizer,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        **tokens,
        **settings,
    )
