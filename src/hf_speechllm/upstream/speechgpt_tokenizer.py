"""The tokenizer of a published SpeechGPT checkpoint as one `tokenizer.json`.

Upstream runs the slow `LlamaTokenizer` of transformers 4.33. There an added token swallows the white space on both
sides, each piece of text between added tokens gets a word boundary of its own, and decoding joins added tokens and
pieces of text with single spaces. Later releases do none of this, so the checkpoint's own files give other ids there.
What is built here gives the ids and the texts of 4.33 and is a plain `PreTrainedTokenizerFast`: no code travels.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from .errors import ConversionError, UnsafeArtifactError
from .json_config import read_json_mapping
from .sentencepiece_model import CONTROL, NORMAL, UNKNOWN, SentencePieceModel, read_sentencepiece_model
from .tokens import escape_pattern, merge_rules


MODEL_NAME, ADDED_NAME = "tokenizer.model", "added_tokens.json"
MAP_NAME, CONFIG_NAME = "special_tokens_map.json", "tokenizer_config.json"
MAX_JSON_BYTES = 16 << 20
MAX_ADDED_TOKENS = 1 << 17

_ROLES = ("bos_token", "eos_token", "unk_token")
# Keys of tokenizer_config.json that change nothing: truncation is the caller's, and upstream sets padding itself.
_IGNORED_KEYS = {
    *("model_max_length", "padding_side", "tokenizer_class", "tokenizer_file", "special_tokens_map_file"),
    *("clean_up_tokenization_spaces", "spaces_between_special_tokens", "use_default_system_prompt", "use_fast"),
    *("name_or_path", "pad_token", *_ROLES),
}
# In transformers 4.33 a missing or null `legacy` means true.
_REQUIRED_VALUES = {"legacy": (None, True), "sp_model_kwargs": (None, {})}

# Noncharacters around an added token while a text is put together; they never come out.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


@dataclass(frozen=True)
class PublishedTokenizer:
    """What the four files say.

    Args:
        model: the pieces.
        added: the added tokens, in the order of their ids, which continue those of the pieces.
        special: those of `added` that decoding may skip.
        add_bos, add_eos: whether `<s>` and `</s>` are put around a text.
        files: the files that were read.
    """

    model: SentencePieceModel
    added: tuple[str, ...]
    special: frozenset[str]
    add_bos: bool
    add_eos: bool
    files: tuple[Path, ...]


def read_published_tokenizer(folder: str | PathLike[str]) -> PublishedTokenizer:
    """Reads the tokenizer files of a checkpoint folder; only `tokenizer.model` must exist.

    Raises:
        UnsafeArtifactError: a file that is damaged or over the limits.
        ConversionError: a key or value that the result could not reproduce, named in the message.
    """
    folder = Path(folder)
    path = folder / MODEL_NAME
    model = read_sentencepiece_model(path, byte_fallback=True)
    if model.model_type != "bpe":
        raise ConversionError("model type", file=path, key="trainer_spec.model_type", expected="bpe", actual="unigram")
    if model.precompiled_charsmap or model.remove_extra_whitespaces or not model.add_dummy_prefix:
        raise ConversionError(
            "normalisation", file=path, key="normalizer_spec", expected="identity with a dummy prefix", actual="other"
        )
    kinds = {piece.text: piece.type for piece in model.pieces}
    for token, kind in (("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)):
        if kinds.get(token) != kind:
            raise ConversionError("piece is missing or of another type", file=path, key=token, actual=kinds.get(token))

    added: tuple[str, ...] = ()
    files = [path]
    if (folder / ADDED_NAME).exists():
        files.append(folder / ADDED_NAME)
        added = _read_added_tokens(folder / ADDED_NAME, kinds)
    special: frozenset[str] = frozenset()
    if (folder / MAP_NAME).exists():
        files.append(folder / MAP_NAME)
        special = _read_special_tokens(folder / MAP_NAME, added)
    add_bos, add_eos = True, False
    if (folder / CONFIG_NAME).exists():
        files.append(folder / CONFIG_NAME)
        add_bos, add_eos = _read_tokenizer_config(folder / CONFIG_NAME)
    return PublishedTokenizer(model, added, special, add_bos, add_eos, tuple(files))


def build_speechgpt_tokenizer(published: PublishedTokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer with upstream's ids and upstream's decoded texts.

    It pads on the left with `<unk>` (id 0), as upstream's scripts set it. One deviation: where upstream strips what
    Python calls white space beside an added token, this strips what Unicode calls so; they differ in the control
    characters 1C to 1F (hexadecimal).
    """
    pieces = published.model.pieces
    vocabulary = {piece.text: index for index, piece in enumerate(pieces)}
    ordinary = {piece.text: piece for piece in pieces if piece.type == NORMAL}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merge_rules(ordinary), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    # Applied to each piece of text between two added tokens.
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = upstream_decoder(published.added)
    bos = [("<s>", vocabulary["<s>"])] if published.add_bos else []
    eos = [("</s>", vocabulary["</s>"])] if published.add_eos else []
    if bos or eos:
        before, after = " ".join(token for token, _ in bos), " ".join(token for token, _ in eos)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{before} $A {after}".strip(), special_tokens=[*bos, *eos]
        )
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in ("<unk>", "<s>", "</s>")]
    )
    tokenizer.add_tokens([stripping_token(token, special=token in published.special) for token in published.added])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def stripping_token(token: str, special: bool = False) -> AddedToken:
    """An added token that swallows the white space beside it."""
    return AddedToken(token, lstrip=True, rstrip=True, normalized=False, special=special)


def upstream_decoder(added: tuple[str, ...]) -> decoders.Decoder:
    """Pieces to text, with one space between an added token and whatever stands beside it."""

    def replace(pattern: str, content: str) -> decoders.Decoder:
        return decoders.Replace(Regex(pattern), content)

    numbered = [token for token in added if re.fullmatch(r"<[0-9]+>", token)]
    others = [escape_pattern(token) for token in added if token not in set(numbered)]
    choices = "|".join((["<[0-9]+>"] if numbered else []) + others) or "(?!)"
    return decoders.Sequence(
        [
            replace(rf"\A(?=(?:{choices})\z)", _OPEN),
            replace(rf"\A{_OPEN}[\s\S]*\K\z", _CLOSE),
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            # A piece of text loses the word boundary that it was given, and sentencepiece takes one more away.
            replace(r"\A {1,2}", ""),
            replace(f"{_CLOSE}{_OPEN}|{_CLOSE} {{1,2}}|{_CLOSE}(?!\\z)", " "),
            replace(f"\\A{_OPEN}|{_CLOSE}\\z", ""),
            replace(_OPEN, " "),
        ]
    )


def _read_added_tokens(path: Path, kinds: dict[str, int]) -> tuple[str, ...]:
    content = read_json_mapping(path, MAX_JSON_BYTES)
    if len(content) > MAX_ADDED_TOKENS:
        raise UnsafeArtifactError("too many tokens", file=path, expected=f"at most {MAX_ADDED_TOKENS}")
    for token, index in content.items():
        if not token or token != token.strip() or _OPEN in token or _CLOSE in token:
            raise ConversionError("not a usable token", file=path, key=repr(token))
        if isinstance(index, bool) or not isinstance(index, int):
            raise ConversionError("id is not an integer", file=path, key=token, actual=repr(index))
    new = sorted(((index, token) for token, index in content.items() if token not in kinds))
    for expected, (index, token) in enumerate(new, start=len(kinds)):
        if index != expected:
            raise ConversionError("ids have a gap", file=path, key=token, expected=expected, actual=index)
    order = list(kinds)
    for token in content.keys() & kinds.keys():
        if content[token] != order.index(token):
            raise ConversionError(
                "id of a piece", file=path, key=token, expected=order.index(token), actual=content[token]
            )
    return tuple(token for _, token in new)


def _read_special_tokens(path: Path, added: tuple[str, ...]) -> frozenset[str]:
    expected = dict(zip(_ROLES, ("<s>", "</s>", "<unk>"), strict=True))
    special = set()
    for role, value in read_json_mapping(path, MAX_JSON_BYTES).items():
        if role in ("additional_special_tokens", "pad_token"):
            # Padding is upstream's own choice (id 0), whatever stands here.
            values = value if role == "additional_special_tokens" else [value]
            if not isinstance(values, list):
                raise ConversionError("not a list", file=path, key=role, actual=repr(values))
            special |= {_content(item, path, role) for item in values} & set(added)
        elif role not in expected:
            raise ConversionError("unknown key", file=path, key=role, actual=repr(value))
        elif _content(value, path, role) != expected[role]:
            raise ConversionError("special token", file=path, key=role, expected=expected[role], actual=repr(value))
    return frozenset(special)


def _content(value: object, path: Path, role: str) -> str:
    """The text of a token that is given as such or as an object with a `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise ConversionError("not a token", file=path, key=role, actual=repr(value))
    return text


def _read_tokenizer_config(path: Path) -> tuple[bool, bool]:
    content = read_json_mapping(path, MAX_JSON_BYTES)
    for key, value in content.items():
        if key in _REQUIRED_VALUES:
            if value not in _REQUIRED_VALUES[key]:
                raise ConversionError(
                    "not supported", file=path, key=key, expected=_REQUIRED_VALUES[key], actual=repr(value)
                )
        elif key not in _IGNORED_KEYS and key not in ("add_bos_token", "add_eos_token"):
            raise ConversionError("unknown key", file=path, key=key, actual=repr(value))
    flags = []
    for key, default in (("add_bos_token", True), ("add_eos_token", False)):
        value = content.get(key, default)
        if not isinstance(value, bool):
            raise ConversionError("bad value", file=path, key=key, expected="true or false", actual=repr(value))
        flags.append(value)
    return flags[0], flags[1]
