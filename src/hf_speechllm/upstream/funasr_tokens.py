"""Builders of `FunasrParaformerTokenizer`: a token list with a segmentation dictionary, or a sentencepiece model."""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from ..models.tokenization_funasr_paraformer import FunasrParaformerTokenizer
from .errors import ConversionError
from .sentencepiece_model import SentencePieceModel
from .sentencepiece_tokenizer import build_sentencepiece_tokenizer
from .tokens import escape_pattern


_WORD_BOUNDARY = "\u2581"


def build_paraformer_char_tokenizer(
    tokens: dict[str, int],
    *,
    seg_dict: dict[str, tuple[str, ...]] | None = None,
    blank_id: int = 0,
    bos_id: int = 1,
    eos_id: int = 2,
    unk_token: str = "<unk>",
    non_linguistic_symbols: list[str] | None = None,
    remove_non_linguistic_symbols: bool = False,
    segmentation: str = "funasr",
) -> FunasrParaformerTokenizer:
    """A tokenizer of characters, or of the words of `seg_dict`.

    Characters: spaces vanish, the listed symbols are tokens as a whole, anything unknown becomes `unk_token`. (Where
    one symbol starts another, upstream takes either; here the longer one wins.) With a dictionary, `tokenizer.json`
    takes the tokens that [`FunasrParaformerTokenizer.segment`] finds, separated by spaces.

    Args:
        tokens: token → id, ids 0 .. n-1.
        seg_dict: word → tokens; symbols are not looked at then, as upstream.
        blank_id, bos_id, eos_id: ids of the blank and the sentence marks.
        unk_token: must be one of the tokens.
        remove_non_linguistic_symbols: the listed symbols give no token.
        segmentation: whose rules split a text by the dictionary, `"funasr"` or `"wenet"`.
    Raises:
        ConversionError: an id or `unk_token` is not in `tokens`.
    """
    if unk_token not in tokens:
        raise ConversionError("unknown token is not in the token list", key="unk_symbol", actual=unk_token)
    tokenizer = Tokenizer(models.WordLevel(dict(tokens), unk_token=unk_token))
    if seg_dict is not None:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    else:
        listed = "|".join(
            escape_pattern(symbol) for symbol in sorted(non_linguistic_symbols or [], key=len, reverse=True)
        )
        splits: list[pre_tokenizers.PreTokenizer] = []
        if listed:
            behaviour = "removed" if remove_non_linguistic_symbols else "isolated"
            splits.append(pre_tokenizers.Split(Regex(listed), behaviour))
        one = f"{listed}|[\\s\\S]" if listed else "[\\s\\S]"
        splits.append(pre_tokenizers.Split(Regex(one), "isolated"))
        # Spaces go after the split at symbols, which may contain some.
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.Split(Regex("\\A \\z"), "removed")])
    tokenizer.decoder = decoders.Fuse()
    pieces = any(token.startswith(_WORD_BOUNDARY) and len(token) > 1 for token in tokens)
    settings: dict[str, object] = {"unit_kind": "bpe" if pieces else "char"}
    if non_linguistic_symbols:
        settings["non_linguistic_symbols"] = list(non_linguistic_symbols)
        settings["remove_non_linguistic_symbols"] = remove_non_linguistic_symbols
    if segmentation != "funasr":
        settings["segmentation"] = segmentation
    built = _wrap(tokenizer, tokens, (blank_id, bos_id, eos_id, unk_token), settings)
    built.seg_dict = seg_dict
    return built


def build_paraformer_sentencepiece_tokenizer(
    model: SentencePieceModel, *, blank_id: int = 0, bos_id: int = 1, eos_id: int = 2
) -> FunasrParaformerTokenizer:
    """A tokenizer that gives the ids that sentencepiece gives.

    Args:
        model: from `read_sentencepiece_model(..., user_defined=True)`.
        blank_id, bos_id, eos_id: ids of the blank and the sentence marks.
    Raises:
        ConversionError: see `build_sentencepiece_tokenizer`.
    """
    source = build_sentencepiece_tokenizer(model, blank_id=blank_id)
    units = {piece.text: index for index, piece in enumerate(model.pieces)}
    return _wrap(source.backend_tokenizer, units, (blank_id, bos_id, eos_id, source.unk_token), {"unit_kind": "bpe"})


def _wrap(
    tokenizer: Tokenizer, tokens: dict[str, int], special: tuple[int, int, int, str], settings: dict[str, object]
) -> FunasrParaformerTokenizer:
    names = {index: token for token, index in tokens.items()}
    *ids, unk_token = special
    roles = dict(zip(("pad_token", "bos_token", "eos_token"), ids, strict=True))
    for role, index in roles.items():
        if index not in names:
            raise ConversionError(
                "id is not in the token list", key=role, expected=f"0..{len(tokens) - 1}", actual=index
            )
    named = {role: names[index] for role, index in roles.items()} | {"unk_token": unk_token}
    added = dict.fromkeys(sorted(named.values(), key=tokens.__getitem__))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in added])
    return FunasrParaformerTokenizer(
        tokenizer_object=tokenizer,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        **settings,
        **named,
    )
