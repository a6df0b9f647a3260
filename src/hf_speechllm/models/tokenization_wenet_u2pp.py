"""Tokenizer of WeNet U2++ models: characters, words or sentencepiece units, with CTC decoding.

Text normalisation and segmentation are entirely in `tokenizer.json`; this class adds what a `tokenizer.json` cannot
say: collapsing of repeated frames, dropping of blanks, and offsets of characters and words.
"""

from __future__ import annotations

from itertools import groupby

from transformers import PreTrainedTokenizerFast
from transformers.utils import ModelOutput


WORD_BOUNDARY = "\u2581"


class WenetU2ppTokenizer(PreTrainedTokenizerFast):
    """Encodes label text as the toolkit does and decodes label ids or CTC frame ids.

    Settings that travel in `tokenizer_config.json`:

    unit_kind (`"char"`, `"word"` or `"bpe"`):
        What a unit is. Characters and sentencepiece units are joined without a separator, words with a space.
    word_delimiter (`str`, default a space):
        What the unit character `▁` becomes in decoded text. `"▁"` leaves it, as the toolkit does for characters.
    segmentation_only_pieces (`int`, default 0):
        How many pieces at the end of `tokenizer.json` are known to the sentencepiece model but are not units of the
        acoustic model. They take part in the segmentation and then become `<unk>`.

    The blank is `pad_token`. Special tokens that are spelled out in a text are text (`split_special_tokens`).
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]
    replace_word_delimiter_char = " "

    @property
    def unit_kind(self) -> str:
        """`"char"`, `"word"` or `"bpe"`."""
        return self.init_kwargs.get("unit_kind", "char")

    @property
    def word_delimiter(self) -> str:
        """What `▁` becomes in decoded text."""
        return self.init_kwargs.get("word_delimiter", " ")

    @property
    def segmentation_only_pieces(self) -> int:
        """Number of pieces that the segmentation uses and the acoustic model does not have."""
        return self.init_kwargs.get("segmentation_only_pieces", 0)

    @property
    def vocab_size(self) -> int:
        """Number of units: the size of the model's output layers."""
        return super().vocab_size - self.segmentation_only_pieces

    def __len__(self) -> int:
        return super().__len__() - self.segmentation_only_pieces

    def get_vocab(self) -> dict[str, int]:
        """The units with their ids."""
        hidden = self._segmentation_only_ids()
        return {token: index for token, index in super().get_vocab().items() if index not in hidden}

    def save_pretrained(self, save_directory, **kwargs) -> tuple[str, ...]:
        """Saves as the base class does, without how this object was loaded: load and save give equal files."""
        for key in ("is_local", "local_files_only"):
            self.init_kwargs.pop(key, None)
        return super().save_pretrained(save_directory, **kwargs)

    def _segmentation_only_ids(self) -> range:
        first = super().vocab_size - self.segmentation_only_pieces
        return range(first, first + self.segmentation_only_pieces)

    def _convert_token_to_id_with_added_voc(self, token: str) -> int:
        index = super()._convert_token_to_id_with_added_voc(token)
        return self.unk_token_id if index in self._segmentation_only_ids() else index

    def _convert_encoding(self, encoding, *args, **kwargs):
        encoded, encodings = super()._convert_encoding(encoding, *args, **kwargs)
        hidden = self._segmentation_only_ids()
        if hidden:
            encoded["input_ids"] = [
                [self.unk_token_id if index in hidden else index for index in ids] for ids in encoded["input_ids"]
            ]
        return encoded, encodings

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        group_tokens: bool = True,
        output_char_offsets: bool = False,
        output_word_offsets: bool = False,
        word_delimiter: str | None = None,
        **kwargs,
    ) -> str | ModelOutput:
        """Text of one sequence of ids.

        Args:
            token_ids: label ids, or one id per frame with blanks and repeats.
            skip_special_tokens: also drop `<unk>` and the sentence marks; blanks are always dropped.
            clean_up_tokenization_spaces: accepted for the common signature, without effect.
            group_tokens: collapse equal neighbours first. `False` for label ids, where "a a" is two units.
            output_char_offsets: return a `ModelOutput` with `text` and `char_offsets`, a list of `{"char",
                "start_offset", "end_offset"}` in positions of `token_ids`, the end exclusive. A unit that starts a
                word begins with a space there.
            output_word_offsets: the same with `word_offsets` (see `_get_word_offsets`).
            word_delimiter: what `▁` becomes, instead of the tokenizer's own setting.
        """
        if isinstance(token_ids, dict):
            token_ids = token_ids["input_ids"]
        ids = [token_ids] if isinstance(token_ids, int) else [int(index) for index in token_ids]
        delimiter = self.word_delimiter if word_delimiter is None else word_delimiter

        dropped = set(self.all_special_ids) if skip_special_tokens else set()
        dropped.add(self.pad_token_id)
        runs = [(index, len(list(run))) for index, run in groupby(ids)] if group_tokens else [(i, 1) for i in ids]
        offsets, position = [], 0
        for index, length in runs:
            if index not in dropped:
                token = self._tokenizer.id_to_token(index)
                if token is None:
                    raise ValueError(f"id {index} is not in the vocabulary of {len(self)} units")
                unit = token if token in self.all_special_tokens else token.replace(WORD_BOUNDARY, delimiter)
                if self.unit_kind == "word" and offsets:
                    unit = " " + unit
                offsets.append({"char": unit, "start_offset": position, "end_offset": position + length})
            position += length

        text = "".join(item["char"] for item in offsets)
        if delimiter == " ":
            text = text.strip(" ")
        if not (output_char_offsets or output_word_offsets):
            return text
        output = ModelOutput(text=text)
        if output_char_offsets:
            output["char_offsets"] = offsets
        if output_word_offsets:
            output["word_offsets"] = self._get_word_offsets(offsets, delimiter)
        return output

    @staticmethod
    def _get_word_offsets(offsets: list[dict], word_delimiter_char: str = " ") -> list[dict]:
        """Joins units to words: `{"word", "start_offset", "end_offset"}`.

        A word starts at a unit that begins with the delimiter and around every unit with a CJK character, which is a
        word of its own. Units that are only a delimiter belong to no word.
        """
        words: list[dict] = []
        joins = False
        for item in offsets:
            starts = item["char"].startswith(word_delimiter_char)
            unit = item["char"].strip(word_delimiter_char)
            cjk = any("\u4e00" <= character <= "\u9fff" for character in unit)
            if not unit:
                joins = False
                continue
            if joins and not starts and not cjk:
                words[-1]["word"] += unit
                words[-1]["end_offset"] = item["end_offset"]
            else:
                words.append({"word": unit, "start_offset": item["start_offset"], "end_offset": item["end_offset"]})
            joins = not cjk and not item["char"].endswith(word_delimiter_char)
        return words
