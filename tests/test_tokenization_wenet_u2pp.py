"""Characters, words and sentencepiece units: encoding as the toolkit defines it, decoding, offsets, save and load."""

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_speechllm.models.tokenization_wenet_u2pp import WenetU2ppTokenizer
from hf_speechllm.upstream.errors import ConversionError, UnsafeArtifactError
from hf_speechllm.upstream.sentencepiece_model import (
    charsmap_rules,
    parse_sentencepiece_model,
    read_sentencepiece_model,
)
from hf_speechllm.upstream.tokens import build_bpe_tokenizer, build_char_tokenizer, build_word_tokenizer


CHARS = ["<blank>", "<unk>", "<sos/eos>", "你", "好", "▁", "a", "A", "S", "{NOISE}", "[X]"]
DIGITS = ["<blank>", "<unk>", "one", "two", "three", "<sos/eos>"]
CORPUS = """THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG AND RUNS AWAY FROM THE OTHER FOXES
A SMALL SET OF SENTENCES THAT TRAINS A TINY MODEL OF WORD PIECES FOR THE TESTS
IT'S THE SHAPE OF THE TEXT AND NOT THE MEANING THAT MATTERS IN THESE SENTENCES
ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE TEN ELEVEN TWELVE THIRTEEN FOURTEEN
SHE SELLS SEA SHELLS ON THE SEA SHORE AND THE SHELLS THAT SHE SELLS ARE SEA SHELLS""".split("\n")


def table(tokens):
    return {token: index for index, token in enumerate(tokens)}


@pytest.fixture
def char_tokenizer():
    return build_char_tokenizer(table(CHARS), bos_id=2, eos_id=2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("你好", [3, 4]),
        ("  你 好\t\n", [3, 5, 4]),
        ("你  好", [3, 5, 5, 4]),
        ("\x1c你\u3000", [3]),
        ("你\u3000好", [3, 1, 4]),
        ("aA", [6, 7]),
        ("e\u0301\n你", [1, 1, 1, 3]),
        ("<blank>", [1, 1, 1, 6, 1, 1, 1]),
        ("", []),
    ],
)
def test_characters(char_tokenizer, text, expected):
    assert char_tokenizer(text).input_ids == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a {noise}  a", [7, 9, 7]),
        ("ß[x]你", [8, 8, 10, 3]),
        ("a <other> a", [7, 1, 1, 1, 1, 1, 1, 1, 7]),
        ("a a", [7, 5, 7]),
    ],
)
def test_non_linguistic_symbols(text, expected):
    tokenizer = build_char_tokenizer(table(CHARS), bos_id=2, eos_id=2, non_linguistic_symbols=["{NOISE}", "[X]"])
    assert tokenizer(text).input_ids == expected


def test_words():
    tokenizer = build_word_tokenizer(table(DIGITS))
    assert tokenizer(" three  one four").input_ids == [4, 2, 1]
    assert tokenizer.decode([4, 2], group_tokens=False) == "three one"
    assert tokenizer.decode([0, 4, 4, 0, 2, 5], skip_special_tokens=True) == "three one"
    output = tokenizer.decode([0, 4, 4, 0, 2], output_char_offsets=True, output_word_offsets=True)
    assert output["word_offsets"] == [
        {"word": "three", "start_offset": 1, "end_offset": 3},
        {"word": "one", "start_offset": 4, "end_offset": 5},
    ]
    assert "".join(item["char"] for item in output["char_offsets"]) == output["text"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (5, 5, 0)


def test_decode_groups_frames_but_not_labels(char_tokenizer):
    frames = [0, 3, 3, 0, 3, 5, 4, 4, 2, 0]
    assert char_tokenizer.decode(frames) == "你你 好<sos/eos>"
    assert char_tokenizer.decode(frames, skip_special_tokens=True) == "你你 好"
    assert char_tokenizer.decode([3, 3, 4], group_tokens=False) == "你你好"
    assert char_tokenizer.decode([5, 3, 5, 4], word_delimiter="▁") == "▁你▁好"
    assert char_tokenizer.decode([]) == ""
    assert char_tokenizer.batch_decode([[3, 0], [4, 4]], group_tokens=False) == ["你", "好好"]


def test_decode_refuses_foreign_id(char_tokenizer):
    with pytest.raises(ValueError, match="id 11 is not in the vocabulary of 11 units"):
        char_tokenizer.decode([11])


def test_offsets(char_tokenizer):
    output = char_tokenizer.decode([0, 6, 6, 5, 7, 7, 3, 4, 6], output_char_offsets=True)
    assert output["text"] == "a A你好a"
    assert output["char_offsets"][0] == {"char": "a", "start_offset": 1, "end_offset": 3}
    assert char_tokenizer._get_word_offsets(output["char_offsets"], char_tokenizer.replace_word_delimiter_char) == [
        {"word": "a", "start_offset": 1, "end_offset": 3},
        {"word": "A", "start_offset": 4, "end_offset": 6},
        {"word": "你", "start_offset": 6, "end_offset": 7},
        {"word": "好", "start_offset": 7, "end_offset": 8},
        {"word": "a", "start_offset": 8, "end_offset": 9},
    ]


def test_builder_refuses_bad_ids():
    with pytest.raises(ConversionError, match="pad_token.*99"):
        build_char_tokenizer(table(CHARS), blank_id=99)
    with pytest.raises(ConversionError, match="<UNK>"):
        build_char_tokenizer(table(CHARS), unk_token="<UNK>")


def test_save_load_with_and_without_remote_code(tmp_path, char_tokenizer):
    WenetU2ppTokenizer.register_for_auto_class()
    char_tokenizer.save_pretrained(tmp_path / "a")
    loaded = WenetU2ppTokenizer.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenization_wenet_u2pp.py"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    plain = PreTrainedTokenizerFast.from_pretrained(tmp_path / "a")
    for text in ("你 好<blank>a", "x\ny"):
        assert loaded(text).input_ids == plain(text).input_ids == char_tokenizer(text).input_ids
    assert plain.decode([0, 3, 5, 4, 2], skip_special_tokens=True) == "你 好"
    program = (
        "import sys; sys.modules['hf_speechllm'] = None\n"
        "from transformers import AutoTokenizer\n"
        "t = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(t('你 好<blank>').input_ids, t.decode([0, 3, 3, 0, 3, 5, 4]), len(t), type(t).__module__[:20])\n"
        "print('google.protobuf' in sys.modules)\n"
    )
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "a")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[0] == "[3, 5, 4, 1, 1, 1, 6, 1, 1, 1] 你你 好 11 transformers_modules"
    assert result.stdout.split("\n")[1] == "False"
    installed = AutoTokenizer.from_pretrained(tmp_path / "a", trust_remote_code=True)
    assert installed("你 好").input_ids == [3, 5, 4]


# ---------------------------------------------------------------------------------------------------------------------
# sentencepiece


def train_sentencepiece(path: Path, **arguments):
    sentencepiece = pytest.importorskip("sentencepiece", reason="the oracle is the sentencepiece package")
    arguments = {"vocab_size": 90, "hard_vocab_limit": False, "minloglevel": 2, **arguments}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_prefix=str(path / "m"), **arguments)
    return sentencepiece.SentencePieceProcessor(model_file=str(path / "m.model")), path / "m.model"


def reference_ids(text, processor, units):
    """The definition: upper-case, CJK characters on their own, pieces of the rest looked up by their text."""
    pieces = []
    for part in re.split("([\u4e00-\u9fff])", text.strip().upper()):
        if re.fullmatch("[\u4e00-\u9fff]", part):
            pieces.append(part)
        elif part.strip():
            pieces += processor.encode_as_pieces(part)
    return [units.get(piece, units["<unk>"]) for piece in pieces]


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
@pytest.mark.parametrize(
    "settings",
    [
        {"normalization_rule_name": "nmt_nfkc"},
        {"normalization_rule_name": "identity"},
        {"normalization_rule_name": "identity", "add_dummy_prefix": False},
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": False},
    ],
    ids=["nfkc", "identity", "no prefix", "all spaces"],
)
def test_pieces_equal_sentencepiece(tmp_path, model_type, settings):
    processor, path = train_sentencepiece(tmp_path, model_type=model_type, **settings)
    model = read_sentencepiece_model(path)
    assert model.model_type == model_type
    assert [piece.text for piece in model.pieces] == [processor.id_to_piece(i) for i in range(len(processor))]
    assert [piece.score for piece in model.pieces] == [processor.get_score(i) for i in range(len(processor))]
    ordinary = [piece.text for piece in model.pieces if piece.type == 1]
    chance = random.Random(0)
    kept = sorted(text for text in ordinary if chance.random() < 0.9)
    units = table(["<blank>", "<unk>", "<sos/eos>", *kept, "你", "好"])
    tokenizer = build_bpe_tokenizer(units, model, bos_id=2, eos_id=2)
    assert len(tokenizer) == tokenizer.vocab_size == len(units) and tokenizer.get_vocab() == units
    assert tokenizer.segmentation_only_pieces == len(ordinary) - len(kept) > 0
    fragments = [
        "the",
        "Sells",
        " ",
        "  ",
        "你",
        "好",
        "ß",
        "\t",
        "\u3000",
        "ａ",
        "ﬁ",
        "é",
        "e\u0301",
        "½",
        "…",
        "豈",
        "▁",
    ]
    texts = ["".join(chance.choice(fragments) for _ in range(chance.randrange(9))) for _ in range(300)]
    texts += [line.lower() for line in CORPUS] + ["", "   ", "<blank> <unk>", "\ufdd0the\ufdd1", "it's 你好 the fox"]
    for text in texts:
        expected = reference_ids(text, processor, units)
        assert tokenizer(text).input_ids == expected, text
        joined = "".join(list(units)[index] for index in expected).replace("▁", " ").strip()
        assert tokenizer.decode(expected, group_tokens=False) == joined
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = WenetU2ppTokenizer.from_pretrained(tmp_path / "saved")
    assert all(loaded(text).input_ids == tokenizer(text).input_ids for text in texts)
    assert loaded(texts[:5], padding=True).input_ids == tokenizer(texts[:5], padding=True).input_ids
    assert loaded.convert_tokens_to_ids(next(text for text in ordinary if text not in kept)) == 1


def test_symbols_between_pieces(tmp_path):
    processor, path = train_sentencepiece(tmp_path, model_type="unigram")
    model = read_sentencepiece_model(path)
    units = table(["<blank>", "<unk>", "{NOISE}", *sorted(p.text for p in model.pieces if p.type == 1), "<sos/eos>"])
    tokenizer = build_bpe_tokenizer(units, model, non_linguistic_symbols=["{NOISE}"])

    def the(text):
        return reference_ids(text, processor, units)

    assert tokenizer("the {noise} fox").input_ids == [*the("THE"), 2, *the("FOX")]
    assert tokenizer("the [dog] fox").input_ids == [*the("THE"), *the("[DOG]"), *the("FOX")]
    with pytest.raises(ConversionError, match="NOISE"):
        bpe = train_sentencepiece(tmp_path, model_type="bpe")[1]
        build_bpe_tokenizer(units, read_sentencepiece_model(bpe), non_linguistic_symbols=["{NOISE}"])


def test_unsupported_and_damaged_models(tmp_path):
    _, path = train_sentencepiece(tmp_path, model_type="unigram")
    data = path.read_bytes()
    for size in range(0, len(data), max(1, len(data) // 20)):
        try:
            parse_sentencepiece_model(data[:size])
        except ConversionError:
            continue
        assert data[size : size + 1] in (b"\x0a", b"\x12", b"\x1a", b"\x22", b"\x2a"), "cut inside of a field"
    chance = random.Random(1)
    for _ in range(15):
        broken = bytearray(data)
        for _ in range(chance.randint(1, 8)):
            broken[chance.randrange(len(broken))] ^= 1 << chance.randrange(8)
        try:
            charsmap_rules(parse_sentencepiece_model(bytes(broken)).precompiled_charsmap)
        except ConversionError:
            pass
    _, char_model = train_sentencepiece(tmp_path, model_type="char")
    with pytest.raises(ConversionError, match="unigram or bpe.*char"):
        read_sentencepiece_model(char_model)
    _, bytes_model = train_sentencepiece(tmp_path, model_type="bpe", byte_fallback=True, vocab_size=350)
    with pytest.raises(ConversionError, match="byte pieces"):
        read_sentencepiece_model(bytes_model)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x0a",
        b"\x0a\xff",
        b"\x80" * 12,
        b"\x07",
        b"\x0a\x03\x0a\x01\xff",
        b"\x0a\x00",
        b"\x0a\x05\x15\x00\x00\xc0\x7f",
    ],
)
def test_malformed_models(data):
    with pytest.raises(UnsafeArtifactError):
        parse_sentencepiece_model(data)


@pytest.mark.parametrize(
    "data", [b"\x00" * 8, b"\xff" * 16, b"\x04\x00\x00\x00\x00", b"\x08\x00\x00\x00" + b"\x00\xff" * 6]
)
def test_malformed_character_maps(data):
    try:
        rules = charsmap_rules(data)
    except UnsafeArtifactError:
        return
    assert rules == {}
