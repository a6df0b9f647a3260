"""Processor of SenseVoice: features, label rows with tags, transcripts with language, emotion and events.

Upstream: label layout `SenseVoiceCTCDataset` in `funasr/datasets/sense_voice_datasets`, emoji rules
`rich_transcription_postprocess` in `funasr/utils/postprocess_utils.py`, words `SenseVoiceSmall.post`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin
from transformers.utils import logging


logger = logging.get_logger(__name__)

EMOTIONS = ("HAPPY", "SAD", "ANGRY", "NEUTRAL", "FEARFUL", "DISGUSTED", "SURPRISED", "EMO_UNKNOWN")
EVENTS = (
    *("BGM", "Speech", "Applause", "Laughter", "Cry", "Sneeze", "Breath", "Cough", "Sing", "Speech_Noise", "GBG"),
    "Event_UNK",
)
TEXT_NORMS = ("withitn", "woitn")
# What upstream's data set takes where a manifest names no tag.
DEFAULT_TAGS = {"language": "zh", "emotion": "NEUTRAL", "event": "Speech", "textnorm": "woitn"}

# Columns of a manifest, ours and upstream's.
_COLUMNS = {
    "language": ("language", "text_language"),
    "emotion": ("emotion", "emo_target"),
    "event": ("event", "event_target"),
    "textnorm": ("textnorm", "with_or_wo_itn"),
}
_TAG = re.compile(r"<\|([^|<>]+)\|>")
_LEADING_TAGS = re.compile(rf"\s*((?:{_TAG.pattern}\s*)*)")
# Emoji of a segment, in the order in which upstream counts (emotions) and prepends (events) them.
_EMOTION_EMOJI = {
    "HAPPY": "😊",
    "SAD": "😔",
    "ANGRY": "😡",
    "NEUTRAL": "",
    "FEARFUL": "😰",
    "DISGUSTED": "🤢",
    "SURPRISED": "😮",
}
_EVENT_EMOJI = {
    "BGM": "🎼",
    "Speech": "",
    "Applause": "👏",
    "Laughter": "😀",
    "Cry": "😭",
    "Sneeze": "🤧",
    "Breath": "",
    "Cough": "🤧",
}
_SHOWN_EMOTIONS = frozenset("😊😔😡😰🤢😮")
_SHOWN_EVENTS = frozenset("🎼👏😀😭🤧😷")
# The languages that begin a segment, and every tag that is removed from the text; others stay as they are.
_SEGMENT_LANGUAGES = ("zh", "en", "yue", "ja", "ko", "nospeech")
_REMOVED_TAGS = (*_SEGMENT_LANGUAGES, *EMOTIONS, *EVENTS, *TEXT_NORMS)


class FunasrSenseVoiceProcessor(ProcessorMixin):
    r"""Feature extractor and tokenizer of SenseVoice.

    Args:
        feature_extractor ([`KaldiFbankFeatureExtractor`]).
        tokenizer ([`FunasrSenseVoiceTokenizer`]).
    """

    def __init__(self, feature_extractor=None, tokenizer=None, **kwargs):
        super().__init__(feature_extractor, tokenizer, **kwargs)

    def __call__(
        self,
        audio: np.ndarray | Tensor | Sequence | None = None,
        text: str | list[str] | None = None,
        sampling_rate: int | None = None,
        language: str | Sequence[str | None] | None = None,
        emotion: str | Sequence[str | None] | None = None,
        event: str | Sequence[str | None] | None = None,
        use_itn: bool | Sequence[bool | None] | None = None,
        return_tensors: str | None = "pt",
        **kwargs,
    ) -> BatchFeature:
        """Model inputs.

        Args:
            audio: waveform or list of waveforms, see [`KaldiFbankFeatureExtractor.__call__`], which also takes
                `kwargs`.
            text: transcript or list of transcripts; see [`label_ids`] for what it may begin with.
            language, emotion, event, use_itn: of the transcripts, one for all or one for each; see [`label_ids`].

        Returns:
            `input_features`, `attention_mask` (1 = real frame) for audio; `labels` `(batch, 4 + tokens)` (-100 =
            padding) for text.

        Raises:
            ValueError: neither audio nor text, tags without text, or a tag that the vocabulary lacks. AudioError:
                unusable audio.
        """
        tags = {"language": language, "emotion": emotion, "event": event, "use_itn": use_itn}
        if audio is None and text is None:
            raise ValueError("processor: expected audio, text or both")
        if text is None and any(value is not None for value in tags.values()):
            named = [name for name, value in tags.items() if value is not None]
            raise ValueError(f"processor: {named} belong to a label; for recognition pass them to `generate`")
        data = {}
        if audio is not None:
            data |= self.feature_extractor(audio, sampling_rate=sampling_rate, return_tensors=return_tensors, **kwargs)
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            columns = {name: _per_item(name, value, len(texts)) for name, value in tags.items()}
            rows = [
                self.label_ids(item, **{name: values[index] for name, values in columns.items()})
                for index, item in enumerate(texts)
            ]
            if return_tensors == "pt":
                rows = torch.nn.utils.rnn.pad_sequence(
                    [torch.tensor(row) for row in rows], batch_first=True, padding_value=-100
                )
            data["labels"] = rows
        return BatchFeature(data)

    def label_ids(
        self,
        text: str,
        language: str | None = None,
        emotion: str | None = None,
        event: str | None = None,
        use_itn: bool | None = None,
    ) -> list[int]:
        """The label row of one transcript: language, emotion, event, text normalisation, then the text.

        Args:
            text: may begin with tags in any order (`"<|en|><|HAPPY|><|Speech|><|withitn|>Hello."`), which win over the
                arguments. Characters that the vocabulary lacks leave no label, because their unit is the blank.
            language, emotion, event: names of tags, with or without `<|` and `|>`.
            use_itn: whether the text has numbers and punctuation as written (`withitn`) or as spoken (`woitn`).
                What nobody names is `DEFAULT_TAGS`, as in upstream's data set.

        Raises:
            ValueError: a tag that the vocabulary lacks, two tags of one kind, or a tag of the wrong kind.
        """
        given = {"language": language, "emotion": emotion, "event": event}
        chosen = {kind: value.removeprefix("<|").removesuffix("|>") for kind, value in given.items() if value}
        for kind, name in chosen.items():
            if tag_kind(name) not in (kind, "other"):
                raise ValueError(
                    f"{kind}: expected {_expected(kind)}, got {name!r}, which is of kind {tag_kind(name)}"
                )
        if use_itn is not None:
            chosen["textnorm"] = "withitn" if use_itn else "woitn"
        match = _LEADING_TAGS.match(text)
        found: dict[str, str] = {}
        for name in _TAG.findall(match[1]):
            kind = tag_kind(name)
            if kind not in DEFAULT_TAGS:
                raise ValueError(f"text: {name!r} is neither a language, an emotion nor an event that is known here")
            if kind in found:
                raise ValueError(f"text: two tags of kind {kind}, {found[kind]!r} and {name!r}: {text[:80]!r}")
            found[kind] = name
        tags = {**DEFAULT_TAGS, **chosen, **found}
        answers = [self.tokenizer.tag_id(tags[kind]) for kind in DEFAULT_TAGS]
        special = set(self.tokenizer.all_special_ids)
        body = self.tokenizer(text[match.end() :], add_special_tokens=False)["input_ids"]
        spelled = [index for index in body if index not in special]
        if len(spelled) < len(body):
            logger.warning_once(
                f"{len(body) - len(spelled)} runs of characters of {text[:60]!r} are not in the vocabulary and leave "
                "no label"
            )
        return answers + spelled

    def label_ids_of_row(self, text: str, columns: Mapping[str, str]) -> list[int]:
        """The label row of a transcript with the columns of its manifest row.

        Args:
            columns: `language`, `emotion`, `event` and `textnorm` (`withitn` or `woitn`), or upstream's
                `text_language`, `emo_target`, `event_target` and `with_or_wo_itn`, with or without `<|` and `|>`; any
                of them may be missing or empty (`DEFAULT_TAGS`), and other columns are left alone.

        Raises:
            ValueError: as of [`label_ids`], or a text normalisation that is neither of the two.
        """
        tags = {}
        for kind, names in _COLUMNS.items():
            values = [columns[name] for name in names if columns.get(name)]
            tags[kind] = values[0] if values else None
        style = tags.pop("textnorm")
        name = None if style is None else style.removeprefix("<|").removesuffix("|>")
        if name not in (None, *TEXT_NORMS):
            raise ValueError(f"{' or '.join(_COLUMNS['textnorm'])}: expected one of {TEXT_NORMS}, got {style!r}")
        return self.label_ids(text, **tags, use_itn=None if name is None else name == "withitn")

    def batch_decode(
        self,
        sequences: Tensor | Sequence[Sequence[int]],
        skip_special_tokens: bool = True,
        emoji: bool = False,
        **kwargs,
    ) -> list[str]:
        """Texts of token ids from `generate`; repeated tokens are kept (they are not CTC frames).

        Args:
            skip_special_tokens: leave out the tags; `False` gives upstream's raw text.
            emoji: turn the tags of emotions and events into emoji instead, see [`emoji_text`].
        """
        return [self.decode(row, skip_special_tokens=skip_special_tokens, emoji=emoji, **kwargs) for row in sequences]

    def decode(
        self, token_ids: Tensor | Sequence[int], skip_special_tokens: bool = True, emoji: bool = False, **kwargs
    ) -> str:
        """Text of one hypothesis, see [`batch_decode`]."""
        kwargs.setdefault("group_tokens", False)
        if emoji:
            return emoji_text(self.tokenizer.decode(token_ids, skip_special_tokens=False, **kwargs))
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, **kwargs)

    def post_process_transcription(
        self, sequences: Tensor | Sequence[Sequence[int]], emoji: bool = False
    ) -> list[dict[str, Any]]:
        """What the token ids of each utterance say.

        Args:
            sequences (`(b, n)` or lists): from `generate`, tags included.

        Returns:
            per utterance `text`, `language` and `emotion` (names of tags; `None` if there is none), `events` (names,
            in order of appearance, each once) and `tagged_text`, upstream's raw text.
        """
        results = []
        for row in sequences:
            ids = [int(index) for index in row]
            names = [name for index in ids if (name := self.tokenizer.tag_name(index)) is not None]
            by_kind = {kind: [name for name in names if tag_kind(name) == kind] for kind in DEFAULT_TAGS}
            results.append(
                {
                    "text": self.decode(ids, emoji=emoji),
                    "language": next(iter(by_kind["language"]), None),
                    "emotion": next(iter(by_kind["emotion"]), None),
                    "events": list(dict.fromkeys(by_kind["event"])),
                    "tagged_text": self.decode(ids, skip_special_tokens=False),
                }
            )
        return results

    def word_timestamps(
        self, token_ids: Sequence[int], times: Sequence[Sequence[float]], upstream: bool = False
    ) -> list[dict[str, Any]]:
        """Words of a text with their times.

        Args:
            token_ids, times: of `generate` without the answers, (start, end) in seconds.
            upstream: join pieces as upstream does: a piece goes to the word before it only if both are ASCII letters,
                tags are words, and the first word keeps its `▁`. Otherwise words are those of the tokenizer.

        Returns:
            `{"word": str, "start": float, "end": float}` per word.
        """
        ids = [int(index) for index in token_ids]
        if not upstream:
            offsets = self.tokenizer.decode(
                ids, skip_special_tokens=True, group_tokens=False, output_word_offsets=True
            )["word_offsets"]
            return [
                {
                    "word": item["word"],
                    "start": times[item["start_offset"]][0],
                    "end": times[item["end_offset"] - 1][1],
                }
                for item in offsets
            ]
        words: list[dict[str, Any]] = []
        for position, (piece, (start, end)) in enumerate(
            zip(self.tokenizer.convert_ids_to_tokens(ids), times, strict=True)
        ):
            if piece == "▁":
                continue
            glued = words and all(part.isascii() and part.isalpha() for part in (words[-1]["word"], piece))
            if position == 0:
                words.append({"word": piece, "start": start, "end": end})
            elif piece.startswith("▁"):
                words.append({"word": piece[1:], "start": start, "end": end})
            elif glued:
                words[-1] |= {"word": words[-1]["word"] + piece, "end": end}
            else:
                words.append({"word": piece, "start": start, "end": end})
        return words

    def hotword_ids(self, phrases: Sequence[str]) -> list[list[int]]:
        """Token ids of phrases, for `generate(hotwords=...)`; blank lines are dropped.

        A phrase in Latin letters counts at the start of a word and after a space, which are different units.
        """
        found = []
        for phrase in phrases:
            forms = [phrase.strip(), f"▁{phrase.strip()}"] if phrase.strip() else []
            for form in forms:
                ids = self.tokenizer(form, add_special_tokens=False)["input_ids"]
                if ids and self.tokenizer.unk_token_id not in ids and ids not in found:
                    found.append(ids)
        return found


def tag_kind(name: str) -> str:
    """`"language"`, `"emotion"`, `"event"`, `"textnorm"` or `"other"` for the name of a tag without its brackets.

    Languages are the tags in lower case. A tag of kind `"other"` has the kind of the argument that names it.
    """
    for kind, names in (("textnorm", TEXT_NORMS), ("emotion", EMOTIONS), ("event", EVENTS)):
        if name in names:
            return kind
    return "language" if name.islower() else "other"


def emoji_text(tagged_text: str) -> str:
    """A raw tagged text with emoji for events (before) and the emotion (behind), by upstream's rules.

    A language tag begins a segment. In a segment the most frequent emotion counts. A segment that begins with the
    event of the one before it does not show it again, and neighbours with the same emotion show it once, at the end.
    Kept quirks: the event of a segment that did not show its own is forgotten, so the next one shows it again; spaces
    around emoji and segments vanish, between words too; and every "The." becomes a space.
    """
    text = tagged_text.replace("<|nospeech|><|Event_UNK|>", "❓")
    for language in _SEGMENT_LANGUAGES:
        text = text.replace(f"<|{language}|>", "\0")
    first, *segments = (_emoji_segment(segment) for segment in text.split("\0"))
    # Upstream looks for the first segment's event behind a space, and so never finds one.
    joined, event = " " + first, None
    for segment in segments:
        if segment and segment[0] in _SHOWN_EVENTS and segment[0] == event:
            segment = segment[1:]
        if not segment:
            continue
        event = segment[0] if segment[0] in _SHOWN_EVENTS else None
        if segment[-1] in _SHOWN_EMOTIONS and segment[-1] == joined[-1]:
            joined = joined[:-1]
        joined += segment.strip()
    return joined.replace("The.", " ").strip()


def _emoji_segment(segment: str) -> str:
    counts = {name: segment.count(f"<|{name}|>") for name in _REMOVED_TAGS}
    for name in _REMOVED_TAGS:
        segment = segment.replace(f"<|{name}|>", "")
    emotion = "NEUTRAL"
    for name in _EMOTION_EMOJI:
        if counts[name] > counts[emotion]:
            emotion = name
    for name, emoji in _EVENT_EMOJI.items():
        if counts[name]:
            segment = emoji + segment
    segment += _EMOTION_EMOJI[emotion]
    for emoji in sorted(_SHOWN_EMOTIONS | _SHOWN_EVENTS):
        segment = segment.replace(f" {emoji}", emoji).replace(f"{emoji} ", emoji)
    return segment.strip()


def _expected(kind: str) -> str:
    names = {"emotion": EMOTIONS, "event": EVENTS}
    return f"one of {names[kind]}" if kind in names else "the tag of a language such as 'zh'"


def _per_item(name: str, value: Any, count: int) -> list[Any]:
    values = [value] * count if value is None or isinstance(value, str | bool) else list(value)
    if len(values) != count:
        raise ValueError(f"{name}: expected one value or one for each of {count} texts, got {len(values)}")
    return values


FunasrSenseVoiceProcessor.register_for_auto_class()
