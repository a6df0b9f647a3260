"""A strict reader of SentencePiece `.model` files (a protobuf message) without the protobuf or sentencepiece package.

Field numbers: `sentencepiece_model.proto` of the SentencePiece project.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from os import PathLike

import numpy as np

from .errors import ConversionError, UnsafeArtifactError
from .files import read_bytes
from .protobuf_message import message_fields


MAX_MODEL_BYTES = 64 << 20
MAX_PIECES = 1_000_000
MAX_RULES = 1_000_000

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


@dataclass(frozen=True)
class SentencePiece:
    """One piece: its text, its log probability (unigram) or merge priority (bpe), and its type (`NORMAL`, …)."""

    text: str
    score: float
    type: int


@dataclass(frozen=True)
class SentencePieceModel:
    """What segmentation needs from a `.model` file. `precompiled_charsmap` is empty for the identity normaliser."""

    pieces: tuple[SentencePiece, ...]
    model_type: str
    precompiled_charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


def read_sentencepiece_model(
    path: str | PathLike[str], *, user_defined: bool = False, byte_fallback: bool = False
) -> SentencePieceModel:
    """Reads the pieces and the normaliser of a unigram or bpe model.

    Args:
        user_defined: whether a bpe model may have user-defined pieces (symbols that are never split or merged).
        byte_fallback: whether byte pieces, which spell unknown characters, may occur.
    Raises:
        UnsafeArtifactError: not a well-formed message of this kind, or over the limits.
        ConversionError: a feature that a `tokenizer.json` cannot reproduce (named in the message).
    """
    data = read_bytes(path, MAX_MODEL_BYTES)
    return parse_sentencepiece_model(data, path, user_defined=user_defined, byte_fallback=byte_fallback)


def parse_sentencepiece_model(
    data: bytes,
    path: str | PathLike[str] = "<bytes>",
    *,
    user_defined: bool = False,
    byte_fallback: bool = False,
) -> SentencePieceModel:
    """`read_sentencepiece_model` for bytes in memory; `path` only serves the messages."""
    pieces: list[SentencePiece] = []
    trainer: dict[int, object] = {}
    normalizer: dict[int, object] = {}
    for field, value in message_fields(data, path, "model"):
        if field == 1:
            if len(pieces) >= MAX_PIECES:
                raise UnsafeArtifactError("too many pieces", file=path, expected=f"at most {MAX_PIECES}")
            pieces.append(_piece(_message(value, path, "pieces"), path, len(pieces)))
        elif field == 2:
            trainer.update(message_fields(_message(value, path, "trainer_spec"), path, "trainer_spec"))
        elif field == 3:
            normalizer.update(message_fields(_message(value, path, "normalizer_spec"), path, "normalizer_spec"))
    if not pieces:
        raise UnsafeArtifactError("no pieces", file=path, key="pieces")
    seen: set[str] = set()
    for piece in pieces:
        if piece.text in seen:
            raise UnsafeArtifactError("piece occurs twice", file=path, key=piece.text)
        seen.add(piece.text)

    number = _varint_field(trainer, 3, 1, path, "trainer_spec.model_type")
    model_type = _MODEL_TYPES.get(number, str(number))
    if model_type not in ("unigram", "bpe"):
        raise ConversionError(
            "model type", file=path, key="trainer_spec.model_type", expected="unigram or bpe", actual=model_type
        )
    if _varint_field(trainer, 24, 0, path, "trainer_spec.treat_whitespace_as_suffix"):
        raise ConversionError("not supported", file=path, key="trainer_spec.treat_whitespace_as_suffix", actual=True)
    if not _varint_field(normalizer, 5, 1, path, "normalizer_spec.escape_whitespaces"):
        raise ConversionError("not supported", file=path, key="normalizer_spec.escape_whitespaces", actual=False)
    for piece in pieces:
        refused = {UNUSED: True, BYTE: not byte_fallback, USER_DEFINED: model_type == "bpe" and not user_defined}
        if refused.get(piece.type, False):
            kind = {UNUSED: "unused", BYTE: "byte", USER_DEFINED: "user-defined"}[piece.type]
            raise ConversionError(
                f"{kind} pieces are not supported in a {model_type} model", file=path, key=piece.text
            )
    return SentencePieceModel(
        pieces=tuple(pieces),
        model_type=model_type,
        precompiled_charsmap=_message(normalizer.get(2, b""), path, "normalizer_spec.precompiled_charsmap"),
        add_dummy_prefix=bool(_varint_field(normalizer, 3, 1, path, "normalizer_spec.add_dummy_prefix")),
        remove_extra_whitespaces=bool(
            _varint_field(normalizer, 4, 1, path, "normalizer_spec.remove_extra_whitespaces")
        ),
    )


def charsmap_rules(charsmap: bytes, path: str | PathLike[str] = "<bytes>") -> dict[str, str]:
    """The replacement rules of a precompiled character map: text → replacement.

    The map is a little-endian uint32 size, a double-array trie of that many bytes whose leaves are offsets, and the
    replacements as NUL-terminated strings. Units of the trie: bits 0-7 and 31 the label, bit 8 "has a leaf", bits
    10-30 the offset (shifted by 8 more when bit 9 is set); a leaf holds its value in bits 0-30.

    Raises:
        UnsafeArtifactError: an offset leaves its array, text is not UTF-8, or the trie has too many or too deep paths.
    """
    if not charsmap:
        return {}

    def refuse(what: str) -> UnsafeArtifactError:
        return UnsafeArtifactError(f"character map: {what}", file=path, key="normalizer_spec.precompiled_charsmap")

    size = int.from_bytes(charsmap[:4], "little")
    if len(charsmap) < 8 or size == 0 or size % 4 or size > len(charsmap) - 4:
        raise refuse("bad size of the trie")
    units = np.frombuffer(charsmap, dtype="<u4", count=size // 4, offset=4).astype(np.int64)
    replacements = charsmap[4 + size :]
    labels = units & 0x800000FF
    offsets = (units >> 10) << ((units & 0x200) >> 6)
    letters = np.arange(1, 256)

    rules: dict[str, str] = {}
    pending = [(b"", int(offsets[0]))]
    visited = 0
    while pending:
        prefix, base = pending.pop()
        visited += 1
        if visited > 4 * MAX_RULES or len(prefix) > 256:
            raise refuse("too many or too deep paths")
        positions = base ^ letters
        inside = positions < len(units)
        matches = positions[inside][labels[positions[inside]] == letters[inside]]
        for position in matches.tolist():
            key = prefix + bytes([base ^ position])
            child = position ^ int(offsets[position])
            if units[position] & 0x100:
                if child >= len(units):
                    raise refuse("offset outside of the trie")
                start = int(units[child]) & 0x7FFFFFFF
                end = replacements.find(b"\0", start)
                if start >= len(replacements) or end < 0:
                    raise refuse("replacement outside of the strings")
                try:
                    rules[key.decode("utf-8")] = replacements[start:end].decode("utf-8")
                except UnicodeDecodeError:
                    raise refuse("text is not UTF-8") from None
                if len(rules) > MAX_RULES:
                    raise refuse("too many rules")
            pending.append((key, child))
    return rules


def _piece(data: bytes, path: str | PathLike[str], index: int) -> SentencePiece:
    text, score, kind = None, 0.0, NORMAL
    for field, value in message_fields(data, path, f"pieces[{index}]"):
        if field == 1:
            try:
                text = _message(value, path, f"pieces[{index}].piece").decode("utf-8")
            except UnicodeDecodeError:
                raise UnsafeArtifactError("piece is not UTF-8", file=path, key=f"pieces[{index}]") from None
        elif field == 2:
            if not isinstance(value, float) or not math.isfinite(value):
                raise UnsafeArtifactError(
                    "score is not a finite float", file=path, key=f"pieces[{index}].score", actual=value
                )
            score = value
        elif field == 3:
            kind = value
    if not text:
        raise UnsafeArtifactError("piece without text", file=path, key=f"pieces[{index}]")
    if kind not in (NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE):
        raise UnsafeArtifactError("unknown piece type", file=path, key=text, actual=kind)
    return SentencePiece(text, score, kind)


def _message(value: object, path: str | PathLike[str], where: str) -> bytes:
    if not isinstance(value, bytes):
        raise UnsafeArtifactError("wrong wire type", file=path, key=where, expected="length-delimited")
    return value


def _varint_field(fields: dict[int, object], number: int, default: int, path: str | PathLike[str], where: str) -> int:
    value = fields.get(number, default)
    if not isinstance(value, int):
        raise UnsafeArtifactError("wrong wire type", file=path, key=where, expected="varint")
    return value
