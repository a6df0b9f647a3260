"""Tokenizer of Paraformer: characters with `@@` pieces, or sentencepiece units.

`tokenizer.json` holds the vocabulary and splits text into characters or sentencepiece units. A pack with a
segmentation dictionary (`seg_dict`, word → tokens) splits words by it instead; the dictionary travels as a file of its
own, because a `tokenizer.json` cannot express a table of arbitrary splits.
"""

import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from transformers import PreTrainedTokenizerFast
from transformers.utils import ModelOutput

from .transcript_text import Word, words_of_tokens


SEG_DICT_NAME = "seg_dict"
_WORD_BOUNDARY = "\u2581"
# A word that the dictionary lacks is split into characters if it starts like this; otherwise all of it is unknown.
_SPLITTABLE = re.compile("[\u4e00-\u9fa5A-Za-z0-9]")
_CHINESE = re.compile("([\u4e00-\u9fff])")
# Hot words: upstream splits only what consists of these.
_CHINESE_OR_DIGITS = re.compile("[\u4e00-\u9fa50-9]+")
_HOTWORD_PARTS = re.compile("[\u4e00-\u9fa50-9]|[^\u4e00-\u9fa50-9]+")


class FunasrParaformerTokenizer(PreTrainedTokenizerFast):
    """Encodes label text as the toolkit does and decodes token ids to text.

    Settings that travel in `tokenizer_config.json`:

    unit_kind (`"char"` or `"bpe"`):
        Characters with `@@` pieces, or sentencepiece units with `▁`.
    segmentation (`"funasr"` or `"wenet"`):
        Whose rules split a text by the dictionary. WeNet's takes Chinese characters as they are, looks up the words
        between them in their own case, and does not join abbreviations.

    The blank is `pad_token`. Special tokens that are spelled out in a text are text (`split_special_tokens`).
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json", "seg_dict_file": SEG_DICT_NAME}
    model_input_names = ["input_ids", "attention_mask"]
    replace_word_delimiter_char = " "

    @property
    def unit_kind(self) -> str:
        """`"char"` or `"bpe"`."""
        return self.init_kwargs.get("unit_kind", "char")

    @property
    def segmentation(self) -> str:
        """`"funasr"` or `"wenet"`."""
        return self.init_kwargs.get("segmentation", "funasr")

    @property
    def seg_dict(self) -> dict[str, tuple[str, ...]] | None:
        """Word → tokens, or `None`. Read from its file at first use (a published one has 300,000 lines)."""
        if not hasattr(self, "_seg_dict"):
            path = self.init_kwargs.get("seg_dict_file")
            self._seg_dict = None if path is None else _read_seg_dict(path)
        return self._seg_dict

    @seg_dict.setter
    def seg_dict(self, words: dict[str, tuple[str, ...]] | None) -> None:
        self._seg_dict = words

    # -- text to ids -------------------------------------------------------------------------------------------------
    def segment(self, text: str) -> list[str]:
        """Tokens of a text by the dictionary: lower-cased words, then characters, then `<unk>`.

        The empty word between two spaces is nothing here; the toolkit makes an unknown token of it.

        Raises:
            ValueError: the tokenizer has no dictionary.
        """
        if self.seg_dict is None:
            raise ValueError("segment: this tokenizer has no segmentation dictionary")
        tokens: list[str] = []
        if self.segmentation == "wenet":
            for part in _CHINESE.split(text):
                for word in part.split():
                    tokens += self.seg_dict.get(word, (word,))
            return tokens
        for word in text.strip().split(" "):
            if word:
                tokens += self._segment_word(word, _SPLITTABLE.match(word.lower()) is not None)
        return tokens

    def _segment_word(self, word: str, splittable: bool) -> list[str]:
        words, unknown = self.seg_dict, (self.unk_token,)
        word = word.lower()
        if word in words:
            return list(words[word])
        if splittable:
            return [token for character in word for token in words.get(character, unknown)]
        return list(unknown)

    def hotword_ids(self, phrase: str, upstream: bool = False) -> list[int]:
        """Token ids of a phrase to prefer.

        By default a word is looked up in the dictionary, and where it is not there its Chinese characters and digits
        are looked up one by one and the rest piece by piece; without a dictionary the phrase is encoded like a label.

        Args:
            upstream: as the toolkit does: a word that mixes scripts is unknown, and without a dictionary every word
                is looked up as a single token, so that most become `<unk>`.
        """
        words = phrase.split()
        if self.unit_kind == "bpe" or self.segmentation == "wenet":
            return list(self(phrase)["input_ids"])
        if self.seg_dict is None:
            return [self._token_id(word) for word in words] if upstream else list(self(phrase)["input_ids"])
        tokens: list[str] = []
        for word in words:
            lowered = word.lower()
            if upstream or lowered in self.seg_dict:
                tokens += self._segment_word(word, _CHINESE_OR_DIGITS.fullmatch(lowered) is not None)
            else:
                for part in _HOTWORD_PARTS.findall(lowered):
                    tokens += self._segment_word(part, part.isalnum() and part.isascii())
        return [self._token_id(token) for token in tokens]

    def _token_id(self, token: str) -> int:
        index = self._tokenizer.token_to_id(token)
        return self.unk_token_id if index is None else index

    def _encode_plus(self, text, text_pair=None, is_split_into_words: bool = False, **kwargs):
        """As the base class. With a dictionary, offsets are positions in the space-separated tokens."""
        if self.seg_dict is not None and not is_split_into_words:
            text = self._segmented(text)
            text_pair = None if text_pair is None else self._segmented(text_pair)
        return super()._encode_plus(text, text_pair, is_split_into_words=is_split_into_words, **kwargs)

    def _segmented(self, text: str | Sequence[str]) -> str | list[str]:
        if isinstance(text, str):
            return " ".join(self.segment(text))
        return [" ".join(self.segment(item)) if isinstance(item, str) else item for item in text]

    # -- ids to text -------------------------------------------------------------------------------------------------
    def _decode(
        self,
        token_ids: int | Sequence[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        group_tokens: bool = False,
        output_char_offsets: bool = False,
        output_word_offsets: bool = False,
        **kwargs,
    ) -> str | ModelOutput:
        """Text of one sequence of ids: `@@` pieces joined, spaces between English words, abbreviations merged.

        Args:
            token_ids: token ids, or one id per frame of the CTC head.
            skip_special_tokens: also drop `<unk>` and the sentence marks; blanks are always dropped.
            clean_up_tokenization_spaces: accepted for the common signature, without effect.
            group_tokens: collapse equal neighbours first, for CTC frames.
            output_char_offsets: return a `ModelOutput` with `text` and `char_offsets`, a list of `{"char",
                "start_offset", "end_offset"}` per token in positions of `token_ids`, the end exclusive. A token that
                follows a space begins with it.
            output_word_offsets: the same with `word_offsets` (key `"word"`); a Chinese character is a word.

        Raises:
            ValueError: an id that the vocabulary does not have.
        """
        words, borders = self._words(token_ids, skip_special_tokens, group_tokens)
        text = "".join(" " * word.space_before + word.text for word in words)
        if not (output_char_offsets or output_word_offsets):
            return text
        output = ModelOutput(text=text)
        if output_char_offsets:
            output["char_offsets"] = [
                {
                    "char": " " * (word.space_before and index == 0) + piece,
                    "start_offset": borders[position][0],
                    "end_offset": borders[position][1],
                }
                for word in words
                for index, (piece, position) in enumerate(word.pieces)
            ]
        if output_word_offsets:
            output["word_offsets"] = [
                {"word": word.text, "start_offset": borders[word.start][0], "end_offset": borders[word.end - 1][1]}
                for word in words
            ]
        return output

    def tokens_of_ids(self, token_ids: Sequence[int]) -> list[str]:
        """The vocabulary's tokens.

        Raises:
            ValueError: an id that the vocabulary does not have.
        """
        tokens = [self._tokenizer.id_to_token(int(index)) for index in token_ids]
        if None in tokens:
            unknown = int(token_ids[tokens.index(None)])
            raise ValueError(f"id {unknown} is not in the vocabulary of {len(self)} tokens")
        return tokens

    def _words(
        self, token_ids: int | Sequence[int], skip_special_tokens: bool, group_tokens: bool
    ) -> tuple[list[Word], list[tuple[int, int]]]:
        """Words, and for each kept token its `(start, end)` in `token_ids`."""
        ids = [token_ids] if isinstance(token_ids, int) else [int(index) for index in token_ids]
        runs = [(index, len(list(run))) for index, run in groupby(ids)] if group_tokens else [(i, 1) for i in ids]
        dropped = set(self.all_special_ids) if skip_special_tokens else set()
        dropped.add(self.pad_token_id)
        kept: list[int] = []
        borders: list[tuple[int, int]] = []
        position = 0
        for index, length in runs:
            if index not in dropped:
                kept.append(index)
                borders.append((position, position + length))
            position += length
        tokens = self.tokens_of_ids(kept)
        if self.unit_kind == "bpe":
            return _sentencepiece_words(tokens), borders
        return words_of_tokens(tokens, (), self.segmentation == "funasr"), borders

    # -- files -------------------------------------------------------------------------------------------------------
    def save_pretrained(self, save_directory, **kwargs) -> tuple[str, ...]:
        """Saves as the base class does, without how it was loaded and used: load and save give equal files."""
        for key in ("is_local", "local_files_only"):
            self.init_kwargs.pop(key, None)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        return super().save_pretrained(save_directory, **kwargs)

    def _save_pretrained(self, save_directory, file_names, legacy_format=None, filename_prefix=None):
        files = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        if self.seg_dict is None:
            return files
        path = Path(save_directory) / ((f"{filename_prefix}-" if filename_prefix else "") + SEG_DICT_NAME)
        lines = (" ".join((word, *tokens)) + "\n" for word, tokens in self.seg_dict.items())
        path.write_text("".join(lines), encoding="utf-8")
        return (*files, str(path))


def _read_seg_dict(path: str) -> dict[str, tuple[str, ...]]:
    words: dict[str, tuple[str, ...]] = {}
    with open(path, encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            fields = line.split()
            if not fields:
                raise ValueError(f"{path}: line {number}: expected a word and its tokens, got an empty line")
            words[fields[0]] = tuple(fields[1:])
    return words


def _sentencepiece_words(tokens: Sequence[str]) -> list[Word]:
    """Words of sentencepiece units: one starts at `▁` and around every Chinese character."""
    words: list[Word] = []
    joins = space = False
    for position, token in enumerate(tokens):
        piece = token.strip(_WORD_BOUNDARY)
        space = space or token.startswith(_WORD_BOUNDARY)
        joins = joins and not space
        if piece:
            text = piece.replace(_WORD_BOUNDARY, " ")
            chinese = any("\u4e00" <= character <= "\u9fff" for character in text)
            if joins and not chinese:
                words[-1].text += text
                words[-1].end = position + 1
                words[-1].pieces.append((text, position))
            else:
                words.append(Word(text, position, position + 1, space and bool(words), [(text, position)]))
            joins, space = not chinese, token.endswith(_WORD_BOUNDARY) and len(token) > 1
    return words


FunasrParaformerTokenizer.register_for_auto_class()
