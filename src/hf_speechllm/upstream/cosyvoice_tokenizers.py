"""The text tokenizers of CosyVoice as transformers tokenizers without code of their own (`tokenizer.json`).

Versions 2 and 3: `vocab.json`, `merges.txt` and `tokenizer_config.json` of a Qwen2, and special tokens in a fixed
order (`cosyvoice/tokenizer/tokenizer.py`). Version 1: a tiktoken file, OpenAI Whisper's `multilingual.tiktoken`, or in
the 25 Hz model `multilingual_zh_ja_yue_char_del.tiktoken`; neither is in a published pack.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .errors import ConversionError, UnsafeArtifactError
from .files import read_bytes, read_utf8
from .json_config import read_json_mapping


MAX_VOCABULARY_BYTES = 64 << 20
MAX_TOKENS = 1 << 20

_QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WHISPER_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_SPEECH_TAGS = (
    *("<|im_start|>", "<|im_end|>", "<|endofprompt|>"),
    *("[breath]", "<strong>", "</strong>", "[noise]", "[laughter]", "[cough]", "[clucking]", "[accent]"),
    *("[quick_breath]", "<laughter>", "</laughter>", "[hissing]", "[sigh]", "[vocalized-noise]", "[lipsmack]", "[mn]"),
)
_VOWELS = "AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW".split()
_PHONES = "AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH"
# ARPAbet: a vowel without stress and with each of the three.
_ARPABET = tuple(
    f"[{phone}{stress}]"
    for phone in _PHONES.split()
    for stress in (("", "0", "1", "2") if phone in _VOWELS else ("",))
)
_PINYIN = tuple(
    f"[{piece}]"
    for piece in (
        "a ai an ang ao b c ch d e ei en eng f g h i ian in ing iu ià iàn iàng iào iá ián iáng iáo iè ié iòng ióng iù "
        "iú iā iān iāng iāo iē iě iōng iū iǎ iǎn iǎng iǎo iǒng iǔ j k l m n o ong ou p q r s sh t u uang ue un uo uà "
        "uài uàn uàng uá uái uán uáng uè ué uì uí uò uó uā uāi uān uāng uē uě uī uō uǎ uǎi uǎn uǎng uǐ uǒ vè w x y z "
        "zh à ài àn àng ào á ái án áng áo è èi èn èng èr é éi én éng ér ì ìn ìng í ín íng ò òng òu ó óng óu ù ùn ú ún "
        "ā āi ān āng āo ē ēi ēn ēng ě ěi ěn ěng ěr ī īn īng ō ōng ōu ū ūn ǎ ǎi ǎn ǎng ǎo ǐ ǐn ǐng ǒ ǒng ǒu ǔ ǔn ǘ ǚ ǜ"
    ).split()
)
QWEN_SPECIALS = {2: _SPEECH_TAGS, 3: (*_SPEECH_TAGS, "<|endofsystem|>", *_ARPABET, *_PINYIN)}

_END_OF_TEXT = "<|endoftext|>"
# OpenAI Whisper's order.
_WHISPER_LANGUAGES = (
    "en zh de es ru ko fr ja pt tr pl ca nl ar sv it id hi fi vi he uk el ms cs ro da hu ta no th ur hr bg lt la mi "
    "ml cy sk te fa lv bn sr az sl kn et mk br eu is hy ne mn bs kk sq sw gl mr pa si km sn yo so af oc ka be tg sd "
    "gu am yi lo uz fo ht ps tk nn mt sa lb my bo tl mg as tt haw ln ha ba jw su yue"
).split()
_MORE_LANGUAGES = ("minnan", "wuyu", "dialect", "zh/en", "en/zh")
_EVENTS = (
    "ASR",
    "AED",
    "SER",
    *(f"{end}{event}" for event in ("Speech", "BGM", "Laughter", "Applause") for end in ("", "/")),
)
_EMOTIONS = ("HAPPY", "SAD", "ANGRY", "NEUTRAL")
_TASKS = ("translate", "transcribe", "startoflm", "startofprev", "nospeech", "notimestamps")
_VOCAL = ("TTS/B", "TTS/O", "TTS/Q", "TTS/A", "TTS/CO", "TTS/CL", "TTS/H", *(f"TTS/SP{i:02d}" for i in range(1, 14)))
_TIMES = tuple(f"{step * 0.02:.2f}" for step in range(1501))


def build_qwen_tokenizer(folder: Path, version: int) -> PreTrainedTokenizerFast:
    """The tokenizer of version 2 or 3.

    Args:
        folder: `CosyVoice-BlankEN` of a pack: `vocab.json`, `merges.txt`, `tokenizer_config.json`.
    Raises:
        ConversionError: a token or a merge that does not fit the vocabulary. UnsafeArtifactError: a damaged file.
    """
    vocabulary = _read_vocabulary(folder / "vocab.json")
    merges = _read_merges(folder / "merges.txt", vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=False, fuse_unk=False))
    tokenizer.normalizer = normalizers.NFC()
    _work_on_bytes(tokenizer, _QWEN_PATTERN)
    for token in _read_added(folder / "tokenizer_config.json", len(vocabulary)):
        tokenizer.add_special_tokens([_special(token)])
    tokenizer.add_special_tokens([_special(token) for token in (_END_OF_TEXT, *QWEN_SPECIALS[version])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=_END_OF_TEXT,
        pad_token=_END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def qwen_special_id(folder: Path, version: int, token: str) -> int:
    """Id of a special token of [`build_qwen_tokenizer`], without building it.

    Raises:
        ValueError: none of them. ConversionError, UnsafeArtifactError: as there.
    """
    vocabulary = _read_vocabulary(folder / "vocab.json")
    added = _read_added(folder / "tokenizer_config.json", len(vocabulary))
    specials = dict.fromkeys((*added, _END_OF_TEXT, *QWEN_SPECIALS[version]))
    new = [special for special in specials if special not in vocabulary]
    return vocabulary[token] if token in vocabulary else len(vocabulary) + new.index(token)


def build_whisper_tokenizer(
    path: Path, extended: bool = False, num_languages: int | None = None
) -> PreTrainedTokenizerFast:
    """The tokenizer of version 1.

    Args:
        path: tiktoken file: lines of a token in base 64 and its rank.
        extended: the special tokens of the 25 Hz model; otherwise those of Whisper.
        num_languages (*optional*): how many languages have a token; by default all.
    Raises:
        UnsafeArtifactError: a line that is none, or ranks with gaps.
    """
    ranks = _read_tiktoken(path)
    alphabet = _byte_characters()
    names = {token: "".join(alphabet[byte] for byte in token) for token in ranks}
    merges = []
    # By the rank of what they make; among those of the same token by the ranks of the parts.
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [pair for pair in splits if pair[0] in ranks and pair[1] in ranks]
        known.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(names[left], names[right]) for left, right in known]
    vocabulary = {names[token]: rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=False, fuse_unk=False))
    _work_on_bytes(tokenizer, _WHISPER_PATTERN)
    tokenizer.add_special_tokens([_special(token) for token in whisper_specials(extended, num_languages)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=_END_OF_TEXT,
        pad_token=_END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def whisper_specials(extended: bool, num_languages: int | None = None) -> list[str]:
    """Special tokens behind the ranks, in order."""
    languages = (*_WHISPER_LANGUAGES, *_MORE_LANGUAGES) if extended else _WHISPER_LANGUAGES
    names = ["endoftext", "startoftranscript", *languages[:num_languages]]
    names += [*_EVENTS, *_EMOTIONS] if extended else []
    names += _TASKS
    names += [*(f"SPECIAL_TOKEN_{number}" for number in range(1, 31)), *_VOCAL] if extended else []
    return [f"<|{name}|>" for name in (*names, *_TIMES)]


def _work_on_bytes(tokenizer: Tokenizer, pattern: str) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()


def _special(token: str) -> AddedToken:
    return AddedToken(token, normalized=False, special=True)


def _read_vocabulary(path: Path) -> dict[str, int]:
    vocabulary = read_json_mapping(path, MAX_VOCABULARY_BYTES)
    if not all(type(index) is int for index in vocabulary.values()):
        raise UnsafeArtifactError("vocabulary maps tokens to something else than ids", file=path)
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise ConversionError("ids are not in a row", file=path, expected=f"0..{len(vocabulary) - 1}")
    return vocabulary


def _read_merges(path: Path, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(read_utf8(path, MAX_VOCABULARY_BYTES).split("\n"), 1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        parts = line.split(" ")
        if len(parts) != 2 or "".join(parts) not in vocabulary or not all(part in vocabulary for part in parts):
            raise ConversionError("not a merge of two tokens to a third", file=path, key=f"line {number}", actual=line)
        merges.append((parts[0], parts[1]))
    return merges


def _read_added(path: Path, first: int) -> list[str]:
    """Special tokens of the Qwen2, in the order of their ids, which follow the vocabulary."""
    entries = read_json_mapping(path, MAX_VOCABULARY_BYTES).get("added_tokens_decoder")
    if not isinstance(entries, dict) or not all(key.isascii() and key.isdigit() for key in entries):
        raise ConversionError("no mapping of ids to tokens", file=path, key="added_tokens_decoder")
    tokens = []
    for number, key in enumerate(sorted(entries, key=int), first):
        entry = entries[key]
        if int(key) != number or not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise ConversionError(
                "added tokens do not follow the vocabulary", file=path, key="added_tokens_decoder", expected=number
            )
        tokens.append(entry["content"])
    return tokens


def _read_tiktoken(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_bytes(path, MAX_VOCABULARY_BYTES).split(b"\n"), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            # Both published files have a lone "=": a token of no bytes, which no text contains.
            ranks[b"" if token == b"=" else base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise UnsafeArtifactError("not a token and its rank", file=path, key=f"line {number}") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or len(ranks) > MAX_TOKENS:
        raise UnsafeArtifactError("ranks have gaps", file=path, expected=f"0..{len(ranks) - 1}")
    for byte in range(256):
        if bytes([byte]) not in ranks:
            raise ConversionError("token of a single byte is missing", file=path, key=str(byte))
    return ranks


def _byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level BPE: itself if it can be seen, else one from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(0x100, 0x200))
    return [chr(byte) if byte in visible else chr(next(hidden)) for byte in range(256)]
