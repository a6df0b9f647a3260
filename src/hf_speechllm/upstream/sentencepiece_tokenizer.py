"""Builder of `FunasrSenseVoiceTokenizer`: a sentencepiece model whose piece ids are the model's ids."""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers

from ..models.tokenization_funasr_sensevoice import WORD_BOUNDARY, FunasrSenseVoiceTokenizer
from .errors import ConversionError
from .sentencepiece_model import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, SentencePieceModel, charsmap_rules
from .tokens import character_map_steps, escape_pattern, join_units, merge_rules


# Noncharacters: text that no piece contains, and the first of those that stand for symbols while text is normalised.
_FOREIGN = "\ufdd2"
_FIRST_SYMBOL = 0x100000


def build_sentencepiece_tokenizer(model: SentencePieceModel, *, blank_id: int = 0) -> FunasrSenseVoiceTokenizer:
    """A tokenizer that gives the ids that sentencepiece gives.

    User-defined pieces (the tags) are found in the text as it stands, before normalisation, and are never split. Two
    deviations: with `add_dummy_prefix`, a text that is one such piece and nothing else gets no word boundary before
    it; and a unigram model takes a control piece that is spelled out in a text for that piece.

    Args:
        model: the pieces and the normaliser, unigram or bpe, of any kind of piece that
            `read_sentencepiece_model(..., user_defined=True, byte_fallback=True)` gives.
        blank_id: the unit of the CTC blank, which becomes the padding.
    Raises:
        ConversionError: `blank_id` is no piece, or the model has no unknown piece or no ordinary ones.
    """
    units = {piece.text: index for index, piece in enumerate(model.pieces)}
    ordinary = {piece.text: piece for piece in model.pieces if piece.type == NORMAL}
    symbols = [piece.text for piece in model.pieces if piece.type == USER_DEFINED]
    unknown = [piece.text for piece in model.pieces if piece.type == UNKNOWN]
    has_bytes = any(piece.type == BYTE for piece in model.pieces)
    if len(unknown) != 1:
        raise ConversionError("number of unknown pieces", key="pieces", expected=1, actual=len(unknown))
    if not ordinary:
        raise ConversionError("sentencepiece model has no ordinary pieces", key="pieces")
    if not 0 <= blank_id < len(units):
        raise ConversionError("blank is no piece", key="blank_id", expected=f"0..{len(units) - 1}", actual=blank_id)

    if model.model_type == "unigram":
        # The score of an unknown character follows from the lowest one, so the others may not go below it.
        lowest = min(piece.score for piece in ordinary.values())
        scores = [(piece.text, piece.score if piece.type == NORMAL else lowest) for piece in model.pieces]
        tokenizer = Tokenizer(models.Unigram(scores, unk_id=units[unknown[0]], byte_fallback=has_bytes))
    else:
        rules = merge_rules(ordinary)
        tokenizer = Tokenizer(
            models.BPE(dict(units), rules, unk_token=unknown[0], fuse_unk=True, byte_fallback=has_bytes)
        )
    tokenizer.normalizer = normalizers.Sequence(_normalizers(model, ordinary, symbols))
    tokenizer.decoder = join_units()
    # Found in the normalised text, which the rules above leave as they are.
    tokenizer.add_tokens([AddedToken(symbol, normalized=True, special=False) for symbol in symbols])
    control = [piece.text for piece in model.pieces if piece.type == CONTROL]
    pad = model.pieces[blank_id].text
    special = dict.fromkeys(sorted({unknown[0], pad, *control}, key=units.__getitem__))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    roles = dict(zip(("bos_token", "eos_token"), control, strict=False))
    return FunasrSenseVoiceTokenizer(
        tokenizer_object=tokenizer,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        unk_token=unknown[0],
        pad_token=pad,
        **roles,
    )


def _normalizers(
    model: SentencePieceModel, ordinary: dict[str, object], symbols: list[str]
) -> list[normalizers.Normalizer]:
    def replace(pattern: str, content: str) -> normalizers.Replace:
        return normalizers.Replace(Regex(pattern), content)

    rules = charsmap_rules(model.precompiled_charsmap)
    # A symbol that the character map would change hides behind a character of its own while the map is applied.
    hidden = {
        symbol: chr(_FIRST_SYMBOL + number)
        for number, symbol in enumerate(sorted(symbols, key=len, reverse=True))
        if any(text in symbol and text != new for text, new in rules.items())
    }
    steps: list[normalizers.Normalizer] = []
    if hidden:
        steps.append(replace(f"[{min(hidden.values())}-{max(hidden.values())}]", _FOREIGN))
    steps += [normalizers.Replace(symbol, stand_in) for symbol, stand_in in hidden.items()]
    # With byte pieces every character matters, also those that no piece has.
    has_bytes = any(piece.type == BYTE for piece in model.pieces)
    steps += character_map_steps([*ordinary, *rules.values()] if has_bytes else ordinary, rules)
    if model.remove_extra_whitespaces:
        steps += [replace(" {2,}", " "), replace("\\A +| +\\z", "")]
    steps += [normalizers.Replace(stand_in, symbol) for symbol, stand_in in hidden.items()]
    if model.add_dummy_prefix:
        alone = "|".join(escape_pattern(symbol) for symbol in symbols) or "(?!)"
        steps.append(replace(f"\\A(?!(?:{alone})?\\z)", WORD_BOUNDARY))
    steps.append(normalizers.Replace(" ", WORD_BOUNDARY))
    return steps
