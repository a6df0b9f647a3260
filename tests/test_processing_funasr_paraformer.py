"""Text, times and hotwords of Paraformer: upstream's rules and ours, tokenizer, processor, pipeline."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, AutoTokenizer, pipeline

from hf_speechllm.hub.self_check import self_check
from hf_speechllm.models.cif_timestamps import (
    firing_segments,
    integrate_and_fire,
    milliseconds,
    segments_text,
    token_times,
)
from hf_speechllm.models.tokenization_funasr_paraformer import FunasrParaformerTokenizer
from hf_speechllm.models.transcript_text import upstream_sentence, words_of_tokens
from hf_speechllm.upstream.funasr_tokens import build_paraformer_char_tokenizer


sys.path.insert(0, str(Path(__file__).parents[1] / "conversion"))

from convert_funasr import convert_funasr_pack  # noqa: E402


GOLDEN = Path(__file__).parent / "golden" / "funasr"
# Tokens; upstream's text; its text and times where token i spans 10 i .. 10 i + 8 ms; our text.
SENTENCES = [
    ("的 我 12", "的我12", "的 我 12", [[0, 8], [10, 18], [20, 28]], "的我12"),
    ("the llo", "the llo", "the llo", [[0, 8], [10, 18]], "the llo"),
    ("he@@ llo a b c", "hello ABC", "hello ABC", [[0, 18], [20, 48]], "hello ABC"),
    ("he@@ 有 能 x", "有能hex", "有 能 hex", [[0, 8], [20, 28], [30, 38]], "he有能x"),
    ("x 到 3 我", "x到3我", "x 到 3 我", [[0, 8], [10, 18], [20, 28], [30, 38]], "x到3我"),
    ("a b the c d", "AB the CD", "AB the CD", [[0, 18], [20, 28], [30, 48]], "AB the CD"),
    ("the & 我", "the 我", "the 我", [[0, 8], [20, 28]], "the &我"),
    ("1a 9a", "1a9a", "1a 9a", [], "1a9a"),
    ("s@@", "", "", [], "s"),
    ("<unk> 我 b b", "我BB", "我 BB", [[0, 8], [10, 28]], "我BB"),
    ("i'm a b 我 a", "i'm AB我a", "i'm AB 我 a", [[0, 8], [10, 28], [30, 38], [40, 48]], "i'm AB我a"),
    ("@@ 我 3@@ ing", "@@我3@@ing", "@@ 我 3@@ ing", [[0, 8], [10, 18], [20, 28], [30, 38]], "@@我3ing"),
    ("b", "b", "b", [[0, 8]], "b"),
]


# -- text -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("line", "text", "timed_text", "times", "ours"), SENTENCES)
def test_sentences(line, text, timed_text, times, ours):
    tokens = line.split()
    spans = [[10 * index, 10 * index + 8] for index in range(len(tokens))]
    assert upstream_sentence(tokens)[0] == text
    assert upstream_sentence(tokens, spans)[:2] == (timed_text, times)
    words = words_of_tokens(tokens)
    assert "".join(" " * word.space_before + word.text for word in words) == ours
    # Each token that is text belongs to one word, in order.
    positions = [position for word in words for _, position in word.pieces]
    assert positions == [index for index, token in enumerate(tokens) if token != "<unk>"]
    assert all(word.start == word.pieces[0][1] and word.end == word.pieces[-1][1] + 1 for word in words)


def test_too_few_times_are_an_error_as_upstream():
    with pytest.raises(IndexError):
        upstream_sentence(["the", "我"], [[0, 1]])


def test_sentences_of_the_other_toolkit():
    tokens = ["a", "b", "<unk>", "the", "&", "我", "<eos>"]
    assert upstream_sentence(tokens, toolkit="wenet")[0] == "a b <unk>the &我"
    assert [word.text for word in words_of_tokens(tokens[:2], (), join_abbreviations=False)] == ["a", "b"]


# -- times ------------------------------------------------------------------------------------------------------------
def tracks(*peaks: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    alphas = torch.zeros(length)
    alphas[list(peaks)] = 1.0
    return alphas, integrate_and_fire(alphas)


def test_a_token_lies_between_two_peaks():
    alphas, peaks = tracks(10, 14, 40, length=42)
    segments = firing_segments(alphas, peaks, 2)
    # 1.5 frames early, 20 ms each; the second token is cut after 12 frames; the rest is short and goes to the last.
    assert [index for index, _, _ in segments] == [None, 0, 1, None]
    assert milliseconds(segments) == [[170, 250], [250, 490]]
    assert (
        segments_text(segments, ["你", "好"]) == "<sil> 0.000 0.170;你 0.170 0.250;好 0.250 0.490;<sil> 0.490 0.840;"
    )
    assert segments_text(segments, ["你", "好"], with_silence=False) == "你 0.170 0.250;好 0.250 0.490;"
    assert milliseconds(firing_segments(alphas, peaks, 2, upsample_rate=1, offset_ms=1000))[0] == [1510, 1750]


def test_early_peaks_give_negative_starts_upstream_and_zero_here():
    segments = firing_segments(*tracks(1, 6, length=20), 1)
    assert milliseconds(segments) == [[-10, 245]] and segments[1][0] is None
    assert token_times(segments, 1) == [(0.0, pytest.approx(0.245))]


def test_peaks_of_dropped_tokens_are_renormalised():
    alphas = torch.full((60,), 0.1)
    alphas = alphas / alphas.sum() * 5
    peaks = integrate_and_fire(alphas)
    # Five peaks belong to four tokens; the decoder kept two: the weights are spread over three peaks.
    segments = firing_segments(alphas, peaks, 2)
    assert len(milliseconds(segments)) == 2
    assert torch.equal(alphas, torch.full((60,), 0.1) / torch.full((60,), 0.1).sum() * 5), "the input was changed"


@pytest.mark.parametrize("count", [0, 1, 4])
@pytest.mark.parametrize("alphas", [torch.zeros(0), torch.zeros(7), torch.full((9,), 1e-3), torch.ones(5)])
def test_times_exist_for_every_token_whatever_the_weights(alphas, count):
    times = token_times(firing_segments(alphas, integrate_and_fire(alphas), count), count)
    assert len(times) == count
    assert all(0 <= start <= end for start, end in times)


# -- tokenizer --------------------------------------------------------------------------------------------------------
TOKENS = ["<blank>", "<s>", "</s>", "的", "你", "好", "he@@", "llo", "g", "p", "t", "4", "a b", "H", "<unk>"]
TABLE = {token: index for index, token in enumerate(TOKENS)}
WORDS = {"hello": ("he@@", "llo"), "你": ("你",), "好": ("好",), "g": ("g",), "p": ("p",), "t": ("t",), "4": ("4",)}


def names(tokenizer: FunasrParaformerTokenizer, ids: list[int]) -> list[str]:
    return [TOKENS[index] for index in ids]


def test_characters_without_a_dictionary():
    tokenizer = build_paraformer_char_tokenizer(TABLE)
    assert names(tokenizer, tokenizer("你 好Hg<s>")["input_ids"]) == ["你", "好", "H", "g", *["<unk>"] * 3]
    symbols = build_paraformer_char_tokenizer(TABLE, non_linguistic_symbols=["he@@", "a b"])
    assert names(symbols, symbols("a bhe@@ 的")["input_ids"]) == ["a b", "he@@", "的"]
    removed = build_paraformer_char_tokenizer(
        TABLE, non_linguistic_symbols=["he@@"], remove_non_linguistic_symbols=True
    )
    assert names(removed, removed("he@@的")["input_ids"]) == ["的"]


def test_words_of_a_dictionary():
    tokenizer = build_paraformer_char_tokenizer(TABLE, seg_dict=WORDS)
    assert tokenizer.segment("Hello 你好") == ["he@@", "llo", "你", "好"]
    # Characters where the word starts with one, one unknown token otherwise; nothing between two spaces.
    assert tokenizer.segment("gpt-4  !4  ") == ["g", "p", "t", "<unk>", "4", "<unk>"]
    batch = tokenizer(["Hello", "你"], padding=True)
    assert batch["input_ids"] == [[6, 7], [4, 0]] and batch["attention_mask"] == [[1, 1], [1, 0]]
    wenet = build_paraformer_char_tokenizer(TABLE, seg_dict=WORDS, segmentation="wenet")
    assert wenet.segment("的hello Hello你") == ["的", "he@@", "llo", "Hello", "你"]
    with pytest.raises(ValueError, match="no segmentation dictionary"):
        build_paraformer_char_tokenizer(TABLE).segment("你")


def test_hotwords():
    tokenizer = build_paraformer_char_tokenizer(TABLE, seg_dict=WORDS)
    for upstream in (False, True):
        assert names(tokenizer, tokenizer.hotword_ids("你好 HELLO", upstream)) == ["你", "好", "he@@", "llo"]
    # Upstream gives up on a word of two scripts, and on a Latin word that the dictionary lacks.
    assert names(tokenizer, tokenizer.hotword_ids("GPT4", True)) == ["<unk>"]
    assert names(tokenizer, tokenizer.hotword_ids("GPT4")) == ["g", "p", "t", "4"]
    assert names(tokenizer, tokenizer.hotword_ids("hello你")) == ["he@@", "llo", "你"]
    plain = build_paraformer_char_tokenizer(TABLE)
    assert names(plain, plain.hotword_ids("你好")) == ["你", "好"]
    assert names(plain, plain.hotword_ids("你好 好", True)) == ["<unk>", "好"]


def test_decoding():
    tokenizer = build_paraformer_char_tokenizer(TABLE)
    ids = [0, 1, TABLE["的"], TABLE["he@@"], TABLE["llo"], TABLE["g"], TABLE["p"], TABLE["<unk>"], 2]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "的hello GP"
    assert tokenizer.decode([ids, [6]], skip_special_tokens=True) == ["的hello GP", "he"]
    output = tokenizer.decode(ids, skip_special_tokens=True, output_char_offsets=True, output_word_offsets=True)
    assert output["word_offsets"] == [
        {"word": "的", "start_offset": 2, "end_offset": 3},
        {"word": "hello", "start_offset": 3, "end_offset": 5},
        {"word": "GP", "start_offset": 5, "end_offset": 7},
    ]
    assert "".join(item["char"] for item in output["char_offsets"]) == output["text"]
    assert [item["char"] for item in output["char_offsets"]] == ["的", "he", "llo", " G", "P"]
    frames = [0, 3, 3, 0, 3, 4, 4]
    assert tokenizer.decode(frames, skip_special_tokens=True, group_tokens=True) == "的的你"
    with pytest.raises(ValueError, match="id 99 is not in the vocabulary of 15 tokens"):
        tokenizer.decode([99])


def test_word_marks_of_sentencepiece_units():
    table = {token: index for index, token in enumerate(["<blank>", "<s>", "</s>", "▁the", "▁", "re", "你", "<unk>"])}
    tokenizer = build_paraformer_char_tokenizer(table)
    assert tokenizer.unit_kind == "bpe"
    assert tokenizer.decode([3, 5, 4, 5, 3, 6, 6, 5]) == "there re the你你re"
    offsets = tokenizer.decode([3, 5, 4, 5, 6], output_word_offsets=True)["word_offsets"]
    assert [(item["word"], item["start_offset"], item["end_offset"]) for item in offsets] == [
        ("there", 0, 2),
        ("re", 3, 4),
        ("你", 4, 5),
    ]


def test_saved_tokenizer_is_the_same(tmp_path):
    tokenizer = build_paraformer_char_tokenizer(TABLE, seg_dict=WORDS)
    tokenizer.save_pretrained(tmp_path / "a")
    loaded = FunasrParaformerTokenizer.from_pretrained(tmp_path / "a")
    assert loaded.seg_dict == WORDS and "seg_dict_file" not in (tmp_path / "a" / "tokenizer_config.json").read_text()
    assert loaded(["你好 hello", "g"], padding=True)["input_ids"] == [[4, 5, 6, 7], [8, 0, 0, 0]]
    loaded.save_pretrained(tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


# -- processor, pipeline, remote code ---------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def seaco_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("seaco") / "model"
    convert_funasr_pack(GOLDEN / "seaco_hotword", folder)
    return folder


@pytest.fixture(scope="module")
def waves() -> list[np.ndarray]:
    tensors = load_file(GOLDEN / "seaco_hotword" / "io.safetensors")
    return [tensors[f"wav.{index}"].numpy() for index in range(3)]


def test_processor_texts_and_times(seaco_dir, waves):
    processor = AutoProcessor.from_pretrained(seaco_dir)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(seaco_dir).eval()
    facts = json.loads((GOLDEN / "seaco_hotword" / "case.json").read_text("utf-8"))
    inputs = processor(audio=waves, sampling_rate=16000, text=["你好", "hello 的", ""])
    assert inputs["labels"].tolist() == [[34, 59, -100], [40, 41, 3], [-100] * 3]
    features = {name: inputs[name] for name in ("input_features", "attention_mask")}
    hotwords = processor.hotword_ids("你好 世界", upstream=True)
    assert [*hotwords, [1]] == facts["hotword_runs"]["hw1"]["hotword_ids"]
    output = model.generate(**features, hotwords=hotwords, return_dict_in_generate=True)
    results = processor.post_process(output.sequences, output.token_timestamps)
    # Upstream's words (its text has spaces everywhere) and times in milliseconds, but for the piece that it loses.
    expected = facts["hotword_runs"]["hw1"]["generate_single"]
    assert results[0]["words"] == expected[0]["text"].split() and results[2] == {
        "text": "",
        "words": [],
        "timestamp": [],
    }
    assert expected[1]["text"] == "我 中 4" and results[1]["words"] == ["我", "中", "he", "4"]
    for ours, theirs in zip(results[0]["timestamp"], expected[0]["timestamp"], strict=True):
        assert ours == pytest.approx([max(time, 0) for time in theirs], abs=1.01)
    assert [result["text"] for result in results] == processor.batch_decode(output.sequences)
    assert processor.post_process(output.sequences)[0] == {"text": "也也也DD对"}


def test_pipeline(seaco_dir, waves):
    recognise = pipeline("automatic-speech-recognition", model=str(seaco_dir), trust_remote_code=True, device="cpu")
    alone = [recognise(wave.copy()) for wave in waves]
    assert recognise([wave.copy() for wave in waves], batch_size=3) == alone
    words = recognise(waves[0].copy(), return_timestamps=True, hotwords=["你好", "世界"])
    assert [chunk["text"] for chunk in words["chunks"]] == ["也", "也", "也", "DD", "对"]
    assert words["chunks"][3]["timestamp"] == (pytest.approx(0.67), pytest.approx(1.15))
    characters = recognise(waves[0].copy(), return_timestamps="char", hotwords=["你好", "世界"])
    assert [chunk["text"] for chunk in characters["chunks"]] == ["也", "也", "也", "D", "D", "对"]
    assert recognise(waves[0].copy(), return_timestamps="word", hotwords=["你好", "世界"]) == words
    long = np.concatenate(waves * 3)
    cut = recognise(long, chunk_length_s=2.0, return_timestamps="char", batch_size=2)
    times = [time for chunk in cut["chunks"] for time in chunk["timestamp"]]
    assert len(cut["chunks"]) > 5 and times[-1] <= len(long) / 16000 + 0.06
    assert recognise(np.zeros(100, dtype=np.float32)) == {"text": ""}


def test_clean_process_gives_the_same(seaco_dir):
    report = self_check(seaco_dir)
    assert report["max_logit_difference"] == 0.0 and report["text"]
    assert report["class"].startswith("transformers_modules.")
    assert report["pipeline"].startswith("transformers_modules.")
    assert type(AutoTokenizer.from_pretrained(seaco_dir)).__module__.startswith("hf_speechllm.")
    assert not [path.name for path in seaco_dir.iterdir() if "wenet" in path.name or "sensevoice" in path.name]
