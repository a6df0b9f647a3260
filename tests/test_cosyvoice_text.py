"""Text of CosyVoice: numbers, normalisation, sentences, and the tokenizers of all versions."""

import base64
import json
import shutil
import sys
import types
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from hf_speechllm.models import text_normalization_cosyvoice
from hf_speechllm.models.english_numbers import number_in_words, spell_numbers
from hf_speechllm.models.text_normalization_cosyvoice import (
    WetextNormalizer,
    default_normalizer,
    is_punctuation,
    prepare_text,
    split_paragraph,
    tidy_chinese,
)
from hf_speechllm.upstream.cosyvoice_tokenizers import (
    QWEN_SPECIALS,
    build_qwen_tokenizer,
    build_whisper_tokenizer,
    whisper_specials,
)
from hf_speechllm.upstream.errors import ConversionError, UnsafeArtifactError


QWEN = Path(__file__).parent / "golden" / "cosyvoice_tokenizer"
TEXTS = (
    "hello small world of the fox",
    "你好，世界。比较 lazy 的模型",
    "He'LL do it  twice\n\n 123 ²½ é e\u0301 😀\t\r\n!",
    "[laughter]呵呵<strong>yes</strong><|endofprompt|>the [breath]brown[j][ǐ]dog <|im_end|><|endoftext|>",
    "",
)


def words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize(
    ("digits", "expected"),
    [
        ("0", "zero"),
        ("007", "seven"),
        ("12", "twelve"),
        ("40", "forty"),
        ("101", "one hundred and one"),
        ("1001", "one thousand and one"),
        ("1100", "one thousand, one hundred"),
        ("1000100", "one million, one hundred"),
        ("1234567", "one million, two hundred and thirty-four thousand, five hundred and sixty-seven"),
        ("1" + "0" * 33, "one decillion"),
        ("12" + "0" * 35, " ".join(["one", "two", *["zero"] * 35])),
        ("٣", "three"),
        ("²", "zero"),
    ],
)
def test_numbers_in_words(digits, expected):
    """Values of the `inflect` package, except where it fails (beyond decillions)."""
    assert number_in_words(digits) == expected


def test_numbers_in_a_text():
    assert (
        spell_numbers("in 1999, 3x and 21") == "in one thousand, nine hundred and ninety-nine, threex and twenty-one"
    )


def test_chinese_is_tidied():
    assert tidy_chinese("你好 世界 ab cd（注）5 m² - 好.——`x`\n，、") == "你好世界ab cd注5 m平方-好。 x。"
    # A dash keeps its blanks between western words only.
    assert tidy_chinese("好ab - cd") == "好ab，cd"


def test_sentences_by_hand():
    assert split_paragraph("你好。他说：“再见！”走了", len) == ["你好。他说：“再见！”走了。"]
    long = "一" * 50 + "。"
    assert split_paragraph(long * 3, len) == [long * 2, long]
    # The last piece is short and joins the one before.
    assert split_paragraph(long * 2 + "短。", len) == [long * 2 + "短。"]
    english = "word " * 49 + "word."
    assert split_paragraph(english * 3 + " a b", words, "en") == [english * 2, english + " a b."]
    comma = "字" * 40 + "，"
    assert split_paragraph(comma * 4, len, at_commas=True) == [comma * 2, comma * 2]
    assert split_paragraph(comma * 4, len) == [comma * 4 + "。"]
    assert split_paragraph("", len) == [] and split_paragraph('."', len) == []


def test_text_as_a_whole():
    assert prepare_text(" I have 2 dogs", words) == ["I have two dogs."]
    assert prepare_text(" I have 2 dogs", words, split=False) == ["I have two dogs"]
    assert prepare_text("<|en|> 2 dogs", words) == ["<|en|> 2 dogs"]
    assert prepare_text("2 dogs", words, normalize=False) == ["2 dogs"]
    assert prepare_text("", words) == prepare_text(" \n", words) == prepare_text("…！", words) == []
    # Of several marks in a row the first stays.
    assert prepare_text("好！？！", words) == ["好！"]
    assert is_punctuation("…$") and not is_punctuation("a.")


def test_normaliser_is_pluggable():
    seen = []

    def reads(text: str, language: str) -> str:
        seen.append((text, language))
        return text.replace("%", "per cent")

    assert prepare_text("5 %", words, normalizer=reads) == ["five per cent."]
    assert prepare_text("好 5%", words, split=False, normalizer=reads) == ["好5per cent"]
    assert seen == [("5 %", "en"), ("好 5%", "zh")]
    # One that divides the text itself.
    assert prepare_text("好. 1", words, normalizer=lambda text, language: ["好.", "。", " 1"]) == ["好.", " 1"]
    assert prepare_text("好. 1", words, False, normalizer=lambda text, language: ["好.", " 1"]) == ["好. 1"]


def test_wetext_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "wetext", None)
    monkeypatch.setattr(text_normalization_cosyvoice, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"hf-speechllm\[wetext\]"):
        WetextNormalizer()
    assert default_normalizer() is None

    class Normalizer:
        def __init__(self, **options):
            self.options = options

        def normalize(self, text: str) -> str:
            return f"{text} {self.options}"

    monkeypatch.setitem(sys.modules, "wetext", types.SimpleNamespace(Normalizer=Normalizer))
    monkeypatch.setattr(text_normalization_cosyvoice, "find_spec", lambda name: name)
    reads = default_normalizer()
    assert reads("好", "zh") == "好 {'remove_erhua': False}" and reads("x", "en") == "x {}"


@pytest.mark.parametrize("version", (2, 3))
def test_qwen_tokenizer_is_that_of_transformers(version, tmp_path):
    """Ids, decoded text, and the special tokens where upstream adds them; saved and loaded without remote code."""
    theirs = AutoTokenizer.from_pretrained(QWEN)
    theirs.add_tokens(list(QWEN_SPECIALS[version]), special_tokens=True)
    build_qwen_tokenizer(QWEN, version).save_pretrained(tmp_path)
    ours = AutoTokenizer.from_pretrained(tmp_path)
    assert len(ours) == len(theirs) == {2: 350, 3: 611}[version]
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours(text)["input_ids"] == ids
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.eos_token_id == ours.pad_token_id == 330
    assert [ours.convert_tokens_to_ids(token) for token in QWEN_SPECIALS[2][:4]] == [331, 332, 333, 334]


def test_fixed_special_tokens():
    """Counts and places of the published vocabulary (base specials 151643..151645)."""
    place = {token: 151644 + index for index, token in enumerate(QWEN_SPECIALS[3])}
    assert (place["<|endofprompt|>"], place["[mn]"], place["<|endofsystem|>"], place["[ǜ]"]) == (
        151646,
        151662,
        151663,
        151923,
    )
    assert len(QWEN_SPECIALS[2]) == 19 and len(QWEN_SPECIALS[3]) == 280 == len(set(QWEN_SPECIALS[3]))
    assert len(whisper_specials(False)) == 51866 - 50257 and len(whisper_specials(True)) == 60515 - 58836
    assert whisper_specials(False)[101] == "<|yue|>" and whisper_specials(True)[106] == "<|en/zh|>"
    assert len(set(whisper_specials(True))) == len(whisper_specials(True))


def write_tiktoken(path: Path) -> dict[bytes, int]:
    """Every byte, some longer tokens, and the empty one that the published files have."""
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [b"ll", b"he", b" t", b"llo", b"hello", b" the", b"th", b"aa", b"aaa", b"\xe4\xbd", b"\xe4\xbd\xa0", b""]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    lines = [b"%s %d" % (base64.b64encode(token) or b"=", rank) for token, rank in ranks.items()]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return ranks


def by_definition(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Byte pairs joined in the order of the rank of what they make, the leftmost first."""
    parts = [bytes([byte]) for byte in piece]
    while True:
        pairs = [
            (ranks[parts[i] + parts[i + 1]], i) for i in range(len(parts) - 1) if parts[i] + parts[i + 1] in ranks
        ]
        if not pairs:
            return [ranks[part] for part in parts]
        _, place = min(pairs)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


@pytest.mark.parametrize("extended", (False, True))
def test_whisper_tokenizer(extended, tmp_path):
    ranks = write_tiktoken(tmp_path / "x.tiktoken")
    build_whisper_tokenizer(tmp_path / "x.tiktoken", extended).save_pretrained(tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert len(tokenizer) == len(ranks) + len(whisper_specials(extended))
    for pieces in (["hello", " the", " llo"], ["aaaaaaa"], [" 你好你", "！"], ["it", "'s", " hell"], ["  ", " the"]):
        expected = [token for piece in pieces for token in by_definition(piece.encode(), ranks)]
        assert tokenizer("".join(pieces))["input_ids"] == expected
        assert tokenizer.decode(expected) == "".join(pieces)
    special = tokenizer("<|zh|>hello<|endofprompt|>")["input_ids"]
    assert special[0] == len(ranks) + 3 and special[1] == ranks[b"hello"]
    # No special token of this vocabulary, so ordinary text.
    assert len(special) > 10


def damaged_folder(tmp_path: Path, name: str, change) -> Path:
    folder = tmp_path / "qwen"
    shutil.copytree(QWEN, folder)
    path = folder / name
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("vocab.json", lambda text: json.dumps(json.loads(text) | {"new": 999}), "not in a row"),
        ("vocab.json", lambda text: json.dumps(json.loads(text) | {"new": "1"}), "something else than ids"),
        ("vocab.json", lambda text: text[:50], "json"),
        ("merges.txt", lambda text: text + "h zzz\n", "not a merge"),
        ("merges.txt", lambda text: text + "a b c\n", "not a merge"),
        ("tokenizer_config.json", lambda text: "{}", "added_tokens_decoder"),
        ("tokenizer_config.json", lambda text: text.replace('"331"', '"400"'), "added_tokens_decoder"),
    ],
)
def test_damaged_qwen_files_are_named(name, change, message, tmp_path):
    with pytest.raises(ConversionError, match=message):
        build_qwen_tokenizer(damaged_folder(tmp_path, name, change), 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data + b"!!! 9\n", "not a token"),
        (lambda data: data + b"YQ==\n", "not a token"),
        (lambda data: data + b"YWJj 999\n", "gaps"),
        (lambda data: data.replace(b"AA== 0\n", b"QUJD 0\n"), "single byte"),
    ],
)
def test_damaged_tiktoken_files_are_named(change, message, tmp_path):
    path = tmp_path / "x.tiktoken"
    write_tiktoken(path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises((ConversionError, UnsafeArtifactError), match=message):
        build_whisper_tokenizer(path)
