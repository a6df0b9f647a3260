"""Tokenizer of SenseVoice: sentencepiece units, tags such as `<|zh|>` among them, with CTC decoding.

Text normalisation and segmentation are entirely in `tokenizer.json`; this class adds what a `tokenizer.json` cannot
say: collapsing of repeated frames, dropping of blanks, and offsets of characters and words.
"""

from __future__ import annotations

import re
from itertools import groupby

from transformers import PreTrainedTokenizerFast
from transformers.utils import ModelOutput


WORD_BOUNDARY = "\u2581"
# A unit `<|NAME|>` is a tag: an answer to a prompt or a mark in the text, never a spoken word.
TAG_PATTERN = re.compile(r"<\|([^|<>]+)\|>")
# A unit `<0xE4>` is a byte of a character that has no unit of its own.
_BYTE = re.compile("<0x([0-9A-F]{2})>")
# Kana and Chinese characters are written without spaces: each unit of them is a word.
_UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")


class FunasrSenseVoiceTokenizer(PreTrainedTokenizerFast):
    """Encodes label text as sentencepiece does and decodes label ids or CTC frame ids.

    The blank is `pad_token`, and the unknown unit as well, as upstream has it: unknown characters leave no label. Tags
    that are spelled out in a text are tags; the control units are not (`split_special_tokens`).
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]
    replace_word_delimiter_char = " "

    def save_pretrained(self, save_directory, **kwargs) -> tuple[str, ...]:
        """Saves as the base class does, without how this object was loaded: load and save give equal files."""
        for key in ("is_local", "local_files_only"):
            self.init_kwargs.pop(key, None)
        return super().save_pretrained(save_directory, **kwargs)

    def tag_name(self, index: int) -> str | None:
        """Name of the tag with this id, without brackets; `None` for a unit that is no tag."""
        match = TAG_PATTERN.fullmatch(self._token(index))
        return None if match is None else match[1]

    def tag_id(self, name: str) -> int:
        """Id of the tag `<|name|>`.

        Raises:
            ValueError: the vocabulary has no such tag.
        """
        index = self._tokenizer.token_to_id(f"<|{name}|>")
        if index is None:
            raise ValueError(f"tag <|{name}|> is not in the vocabulary; it has {', '.join(self.tag_names())}")
        return index

    def tag_names(self) -> list[str]:
        """Names of all tags, without brackets, in the order of their ids."""
        units = sorted(self.get_vocab().items(), key=lambda item: item[1])
        return [match[1] for unit, _ in units if (match := TAG_PATTERN.fullmatch(unit))]

    def _token(self, index: int) -> str:
        token = self._tokenizer.id_to_token(index)
        if token is None:
            raise ValueError(f"id {index} is not in the vocabulary of {len(self)} units")
        return token

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        group_tokens: bool = True,
        output_char_offsets: bool = False,
        output_word_offsets: bool = False,
        **kwargs,
    ) -> str | ModelOutput:
        """Text of one sequence of ids.

        Args:
            token_ids: label ids, or one id per frame with blanks and repeats.
            skip_special_tokens: also drop the tags. Blanks and control units are always dropped.
            clean_up_tokenization_spaces: accepted for the common signature, without effect.
            group_tokens: collapse equal neighbours first. `False` for label ids, where "a a" is two units.
            output_char_offsets: return a `ModelOutput` with `text` and `char_offsets`, a list of `{"char",
                "start_offset", "end_offset"}` in positions of `token_ids`, the end exclusive. A unit that starts a
                word begins with a space there.
            output_word_offsets: the same with `word_offsets` (see `_get_word_offsets`).
        """
        if isinstance(token_ids, dict):
            token_ids = token_ids["input_ids"]
        ids = [token_ids] if isinstance(token_ids, int) else [int(index) for index in token_ids]
        dropped = set(self.all_special_ids)
        lengths = [(index, len(list(run))) for index, run in groupby(ids)] if group_tokens else [(i, 1) for i in ids]
        offsets, position = [], 0
        for index, length in lengths:
            if index not in dropped:
                token = self._token(index)
                if not (skip_special_tokens and TAG_PATTERN.fullmatch(token)):
                    unit = token.replace(WORD_BOUNDARY, " ")
                    offsets.append({"char": unit, "start_offset": position, "end_offset": position + length})
            position += length
        offsets = _join_bytes(offsets)

        text = "".join(item["char"] for item in offsets)
        text = text.strip(" ") if skip_special_tokens else text.lstrip(" ")
        if not (output_char_offsets or output_word_offsets):
            return text
        output = ModelOutput(text=text)
        if output_char_offsets:
            output["char_offsets"] = offsets
        if output_word_offsets:
            output["word_offsets"] = self._get_word_offsets(offsets, self.replace_word_delimiter_char)
        return output

    @staticmethod
    def _get_word_offsets(offsets: list[dict], word_delimiter_char: str = " ") -> list[dict]:
        """Joins units to words: `{"word", "start_offset", "end_offset"}`.

        A word starts at a unit that begins with the delimiter and around every unit with a Chinese character or kana,
        which is a word of its own. Punctuation belongs to the word before it. Units that are only a delimiter belong
        to no word.
        """
        words: list[dict] = []
        joins = False
        for item in offsets:
            starts = item["char"].startswith(word_delimiter_char)
            unit = item["char"].strip(word_delimiter_char)
            unspaced = _UNSPACED.search(unit) is not None
            if not unit:
                joins = False
                continue
            punctuation = not any(character.isalnum() for character in unit)
            if words and not starts and (punctuation or (joins and not unspaced)):
                words[-1]["word"] += unit
                words[-1]["end_offset"] = item["end_offset"]
            else:
                words.append({"word": unit, "start_offset": item["start_offset"], "end_offset": item["end_offset"]})
            joins = not unspaced and not item["char"].endswith(word_delimiter_char)
        return words


def _join_bytes(offsets: list[dict]) -> list[dict]:
    """Neighbouring byte units become the characters that they spell in UTF-8 (U+FFFD where they spell none)."""
    joined: list[dict] = []
    pending = b""
    for item in offsets:
        match = _BYTE.fullmatch(item["char"])
        if match is None:
            pending = b""
            joined.append(item)
            continue
        if pending:
            start = joined.pop()["start_offset"]
        else:
            start = item["start_offset"]
        pending += bytes.fromhex(match[1])
        text = pending.decode("utf-8", errors="replace")
        joined.append({"char": text, "start_offset": start, "end_offset": item["end_offset"]})
    return joined
