"""SenseVoice: vocabulary, label rows, texts with tags, emoji, words, the pipeline, remote code and the data path."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_funasr_sensevoice import BASE, ID, TAGS, label_row, tiny_model, tiny_processor, tiny_tokenizer, tones
from transformers import AutoProcessor, AutoTokenizer, pipeline

from hf_speechllm.data.collator import SpeechRecognitionCollator
from hf_speechllm.data.dataset import SpeechRecognitionDataset
from hf_speechllm.data.manifests import Utterance
from hf_speechllm.hub.self_check import self_check
from hf_speechllm.models.processing_funasr_sensevoice import emoji_text, tag_kind
from hf_speechllm.upstream.errors import ConversionError
from hf_speechllm.upstream.sentencepiece_model import read_sentencepiece_model
from hf_speechllm.upstream.sentencepiece_tokenizer import build_sentencepiece_tokenizer


CASE = Path(__file__).parent / "golden" / "funasr" / "sensevoice_tiny"


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny_sensevoice"
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


# -- vocabulary -------------------------------------------------------------------------------------------------------

TEXTS = [
    "the window",
    " the  ther ",
    "<|zh|><|NEUTRAL|><|Speech|><|woitn|>你好 world",
    "a <|BGM|> the<|Laughter|>",
    "<|zh|",
    "<|zh|><|zh|>",
    "<unk> <s>",
    "",
    "   ",
    "ＡＢ ﬁ é 語 unknownß",
    "\tthe\u3000ther\n",
]


def compare_with_sentencepiece(path: Path, unigram: bool = False) -> None:
    """Ids of texts and texts of ids, but for a lone tag behind a dummy prefix."""
    sentencepiece = pytest.importorskip("sentencepiece")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = build_sentencepiece_tokenizer(read_sentencepiece_model(path, user_defined=True, byte_fallback=True))
    assert len(tokenizer) == reference.get_piece_size()
    for text in TEXTS:
        if unigram and "<s>" in text:
            continue  # control pieces that are spelled out: a documented deviation
        ids = reference.encode(text)
        assert tokenizer(text)["input_ids"] == ids, text
        spoken = [index for index in ids if index > 2]
        assert tokenizer.decode(spoken, group_tokens=False) == reference.decode(spoken), text


def test_ids_and_texts_are_those_of_sentencepiece():
    compare_with_sentencepiece(CASE / "tiny_spectok.bpe.model")


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc", "nmt_nfkc_cf"])
@pytest.mark.parametrize("dummy_prefix", [True, False])
@pytest.mark.parametrize("byte_fallback", [True, False])
def test_other_models_than_the_golden_one(tmp_path, kind, rule, dummy_prefix, byte_fallback):
    """Trained models; case folding must not reach into the tags, and bytes stand for unknown characters."""
    sentencepiece = pytest.importorskip("sentencepiece")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the window ther 你好 world a b\nother windows the world é 語\n" * 20, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "spm"),
        vocab_size=60 + 256 * byte_fallback,
        model_type=kind,
        hard_vocab_limit=False,
        byte_fallback=byte_fallback,
        normalization_rule_name=rule,
        add_dummy_prefix=dummy_prefix,
        user_defined_symbols=[f"<|{tag}|>" for tag in TAGS],
        minloglevel=2,
    )
    compare_with_sentencepiece(tmp_path / "spm.model", unigram=kind == "unigram")


def test_models_that_cannot_be_expressed_are_refused():
    path = CASE / "tiny_spectok.bpe.model"
    with pytest.raises(ConversionError, match="user-defined pieces"):
        read_sentencepiece_model(path)
    with pytest.raises(ConversionError, match="blank_id"):
        build_sentencepiece_tokenizer(
            read_sentencepiece_model(path, user_defined=True, byte_fallback=True), blank_id=999
        )


def test_tokenizer_survives_saving(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "one")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "one")
    text = "<|en|><|HAPPY|>the <|BGM|>你 ther"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.tag_names() == list(TAGS) and loaded.tag_id("HAPPY") == ID["HAPPY"]
    loaded.save_pretrained(tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_frames_and_labels_are_decoded():
    tokenizer = tiny_tokenizer()
    frames = [ID["zh"], 0, ID["t"], ID["t"], 0, ID["t"], ID["▁the"], 1, 2, ID["BGM"], ID["你"]]
    assert tokenizer.decode(frames) == "<|zh|>tt the<|BGM|>你"
    assert tokenizer.decode(frames, skip_special_tokens=True) == "tt the你"
    assert tokenizer.decode(frames, skip_special_tokens=True, group_tokens=False) == "ttt the你"
    output = tokenizer.decode(frames, skip_special_tokens=True, output_char_offsets=True, output_word_offsets=True)
    assert [(item["char"], item["start_offset"], item["end_offset"]) for item in output["char_offsets"]] == [
        ("t", 2, 4),
        ("t", 5, 6),
        (" the", 6, 7),
        ("你", 10, 11),
    ]
    assert [item["word"] for item in output["word_offsets"]] == ["tt", "the", "你"]
    with pytest.raises(ValueError, match="id 999 is not in the vocabulary"):
        tokenizer.decode([999])


def test_words_of_several_scripts():
    tokenizer = tiny_tokenizer()
    units = ["▁the", "re", ",", "▁a", "你", "好", ".", "で", "す", "ー", "▁", "안", "녕"]
    output = tokenizer.decode([ID[unit] for unit in units], group_tokens=False, output_word_offsets=True)
    words = [item["word"] for item in output["word_offsets"]]
    assert words == ["there,", "a", "你", "好.", "で", "す", "ー", "안녕"]


# -- labels -----------------------------------------------------------------------------------------------------------


def test_label_rows_from_text_and_tags(processor):
    text = [ID["▁th"], ID["er"], ID["e"]]
    plain = processor.label_ids(" there")
    assert plain[:4] == label_row() and len(plain) > 4
    assert processor.label_ids("▁there") == label_row() + text
    full = processor.label_ids("▁there", language="en", emotion="HAPPY", event="<|BGM|>", use_itn=True)
    assert full == label_row(language="en", emotion="HAPPY", event="BGM", textnorm="withitn") + text
    tagged = "<|BGM|> <|en|><|withitn|>▁there"
    expected = label_row(language="en", emotion="SAD", event="BGM", textnorm="withitn") + text
    assert processor.label_ids(tagged, language="ja", emotion="SAD") == expected
    # A tag inside of the text is a unit of the text.
    assert processor.label_ids("t<|Laughter|>h")[4:] == [ID["t"], ID["Laughter"], ID["h"]]
    # What the vocabulary lacks is the blank's unit, which is no label.
    assert processor.label_ids("tßh")[4:] == [ID["t"], ID["h"]]
    assert processor.label_ids("") == label_row()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": "t", "language": "HAPPY"}, "language: expected the tag of a language such as 'zh', got 'HAPPY'"),
        ({"text": "t", "emotion": "zh"}, "emotion: expected one of .*'EMO_UNKNOWN'.*of kind language"),
        ({"text": "t", "language": "fr"}, r"tag <\|fr\|> is not in the vocabulary; it has zh, en"),
        ({"text": "t", "emotion": "FEARFUL"}, r"tag <\|FEARFUL\|> is not in the vocabulary"),
        ({"text": "<|zh|><|en|>t"}, "two tags of kind language, 'zh' and 'en'"),
        ({"text": "<|zh|><|SomethingElse|>t"}, "'SomethingElse' is neither a language"),
    ],
)
def test_wrong_tags_are_named(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor.label_ids(**arguments)


def test_call_makes_a_batch(processor):
    batch = processor(
        audio=[tones(0.3), tones(0.2)],
        sampling_rate=16000,
        text=["▁the", "<|ja|>で す"],
        emotion=["HAPPY", None],
        use_itn=[True, False],
    )
    assert batch["input_features"].shape[::2] == (2, 24) and batch["attention_mask"].sum() > 0
    rows = batch["labels"].tolist()
    assert rows[0] == [*label_row(emotion="HAPPY", textnorm="withitn"), ID["▁the"], -100, -100]
    assert rows[1] == [*label_row(language="ja"), ID["で"], ID["▁"], ID["す"]]
    tiny_model()(**batch).loss.backward()
    with pytest.raises(ValueError, match="expected audio, text or both"):
        processor()
    with pytest.raises(ValueError, match="'language'.*pass them to `generate`"):
        processor(audio=tones(0.1), sampling_rate=16000, language="zh")
    with pytest.raises(ValueError, match="emotion: expected one value or one for each of 2 texts, got 1"):
        processor(text=["t", "h"], emotion=["HAPPY"])


def test_rows_of_manifests(processor):
    upstream = {
        "text_language": "<|en|>",
        "emo_target": "<|SAD|>",
        "event_target": "<|BGM|>",
        "with_or_wo_itn": "<|withitn|>",
        "speaker": "x",
    }
    expected = [*label_row(language="en", emotion="SAD", event="BGM", textnorm="withitn"), ID["t"]]
    assert processor.label_ids_of_row("t", upstream) == expected
    ours = {"language": "en", "emotion": "SAD", "event": "BGM", "textnorm": "withitn"}
    assert processor.label_ids_of_row("t", ours) == expected
    assert processor.label_ids_of_row("t", {"language": "", "path": "a.wav"}) == [*label_row(), ID["t"]]
    with pytest.raises(ValueError, match="with_or_wo_itn: expected one of .*'withitn'.*got 'maybe'"):
        processor.label_ids_of_row("t", {"with_or_wo_itn": "maybe"})


def test_data_set_with_labels_trains(processor):
    """Features, label rows and their columns from utterances to a loss."""
    utterances = [
        Utterance(key, wav_bytes(tones(seconds, seed)), text, duration=seconds, columns=columns)
        for seed, (key, seconds, text, columns) in enumerate(
            [("a", 0.4, "▁the", {"emotion": "HAPPY"}), ("b", 0.3, "<|ja|>です", {"event_target": "<|BGM|>"})]
        )
    ]
    dataset = SpeechRecognitionDataset(
        utterances, processor.feature_extractor, processor.tokenizer, label_maker=processor.label_ids_of_row
    )
    items = [dataset[index] for index in range(2)]
    assert items[0]["labels"].tolist() == [*label_row(emotion="HAPPY"), ID["▁the"]]
    assert items[1]["labels"].tolist() == [*label_row(language="ja", event="BGM"), ID["で"], ID["す"]]
    assert [len(item["input_features"]) for item in items] == [dataset.plan(index, 0).num_frames for index in (0, 1)]
    loss = tiny_model().train()(**SpeechRecognitionCollator()(items)).loss
    loss.backward()
    assert torch.isfinite(loss)


def wav_bytes(waveform: np.ndarray) -> bytes:
    import io

    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, 16000, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


# -- texts ------------------------------------------------------------------------------------------------------------


def test_transcripts(processor):
    ids = [*label_row(language="en", emotion="HAPPY", event="BGM", textnorm="withitn"), ID["▁the"], ID["Laughter"]]
    ids += [ID["re"], ID["SAD"], ID["BGM"]]
    (result,) = processor.post_process_transcription([ids])
    assert result == {
        "text": "there",
        "language": "en",
        "emotion": "HAPPY",
        "events": ["BGM", "Laughter"],
        "tagged_text": "<|en|><|HAPPY|><|BGM|><|withitn|> the<|Laughter|>re<|SAD|><|BGM|>",
    }
    (shown,) = processor.post_process_transcription(torch.tensor([ids]), emoji=True)
    assert shown["text"] == "😀🎼there😊" and shown["tagged_text"] == result["tagged_text"]
    assert processor.batch_decode([ids, [0, 0]]) == ["there", ""]
    assert processor.decode(ids, skip_special_tokens=False) == result["tagged_text"]
    (empty,) = processor.post_process_transcription([[0]])
    assert empty == {"text": "", "language": None, "emotion": None, "events": [], "tagged_text": ""}


def test_kinds_of_tags():
    kinds = {tag: tag_kind(tag) for tag in ("zh", "nospeech", "EMO_UNKNOWN", "Speech_Noise", "woitn", "Piano")}
    assert list(kinds.values()) == ["language", "language", "emotion", "event", "textnorm", "other"]


def test_emoji_rules_of_upstream():
    cases = json.loads((CASE / "case.json").read_text(encoding="utf-8"))["rich_cases"]
    assert len(cases) == 6
    for case in cases:
        assert emoji_text(case["raw"]) == case["out"]


@pytest.mark.parametrize(
    ("tagged", "shown"),
    [
        ("", ""),
        ("no tags", "no tags"),
        # The most frequent emotion counts, the first in upstream's order among equals.
        ("<|zh|><|SAD|>a<|SAD|><|HAPPY|>", "a😔"),
        ("<|zh|><|SAD|><|HAPPY|>a", "a😊"),
        # An emotion must be more frequent than NEUTRAL.
        ("<|zh|><|NEUTRAL|><|HAPPY|>a", "a"),
        # Later events in upstream's order come first.
        ("<|en|><|Laughter|><|BGM|>a", "😀🎼a"),
        # The same event is not shown again, but then forgotten, and shown once more.
        ("<|en|><|BGM|>a<|en|><|BGM|>b<|en|><|BGM|>c", "🎼ab🎼c"),
        ("<|en|><|HAPPY|>a<|en|><|HAPPY|>b<|en|><|SAD|>c", "ab😊c😔"),
        ("<|en|><|Cough|>The. end", "🤧  end"),
        # A tag that upstream does not know stays.
        ("<|fr|>salut", "<|fr|>salut"),
    ],
)
def test_quirks_of_emoji(tagged, shown):
    assert emoji_text(tagged) == shown


def test_words_with_times(processor):
    units = ["▁", "▁the", "re", "BGM", "你", "t", "h"]
    ids, times = [ID[unit] for unit in units], [(float(index), index + 0.5) for index in range(len(units))]
    ours = [(word["word"], word["start"], word["end"]) for word in processor.word_timestamps(ids, times)]
    assert ours == [("there", 1.0, 2.5), ("你", 4.0, 4.5), ("th", 5.0, 6.5)]
    theirs = [(word["word"], word["start"], word["end"]) for word in processor.word_timestamps(ids, times, True)]
    assert theirs == [("there", 1.0, 2.5), ("<|BGM|>", 3.0, 3.5), ("你", 4.0, 4.5), ("th", 5.0, 6.5)]
    # Upstream keeps the boundary of a first word, to which nothing is then joined.
    first = processor.word_timestamps(ids[1:3], times[1:3], True)
    assert [word["word"] for word in first] == ["▁the", "re"]


def test_hot_words_at_the_start_and_after_a_space(processor):
    assert processor.hotword_ids(["the", "你好", " ", "ß"]) == [
        [ID["th"], ID["e"]],
        [ID["▁the"]],
        [ID["你"], ID["好"]],
        [ID["▁"], ID["你"], ID["好"]],
    ]


# -- pipeline and remote code -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recognise(model_dir):
    return pipeline("automatic-speech-recognition", model=str(model_dir), trust_remote_code=True, device="cpu")


def test_pipeline_says_more_than_the_text(recognise, processor):
    model, waveform = tiny_model(), tones(0.6)
    result = recognise(waveform, language="en", use_itn=True, return_timestamps="word", return_confidence=True)
    inputs = processor(audio=waveform, sampling_rate=16000)
    output = model.generate(**inputs, language="en", use_itn=True, return_timestamps=True)
    (expected,) = processor.post_process_transcription(output.sequences)
    for key in ("language", "emotion", "events", "tagged_text"):
        assert result[key] == expected[key], key
    prompts = int(output.prompt_lengths[0])
    assert result["text"] == processor.decode(output.sequences[0, prompts:]) != ""
    assert 0 < result["confidence"] <= 1
    words = processor.word_timestamps(output.sequences[0, prompts:], output.token_timestamps[0, prompts:].tolist())
    assert [chunk["text"] for chunk in result["chunks"]] == [word["word"] for word in words] != []
    assert [chunk["timestamp"][0] for chunk in result["chunks"]] == pytest.approx([word["start"] for word in words])
    assert set(recognise(waveform)) == {"text", "language", "emotion", "events", "tagged_text"}
    shown = recognise(waveform, emoji=True)
    assert shown["text"] == processor.batch_decode(model.generate(**inputs), emoji=True)[0]


def test_pipeline_options_reach_the_model(recognise, processor):
    model, waveform = tiny_model(), tones(0.5, seed=1)
    inputs = processor(audio=waveform, sampling_rate=16000)
    for language in ("auto", "zh", "en", "yue", "ja", "ko", "nospeech"):
        for use_itn in (True, False):
            ids = model.generate(**inputs, language=language, use_itn=use_itn)
            tagged = recognise(waveform, language=language, use_itn=use_itn)["tagged_text"]
            assert tagged == processor.decode(ids[0], skip_special_tokens=False)
    with pytest.raises(ValueError, match="language: expected one of"):
        recognise(waveform, language="xx")
    assert "世界" in recognise(waveform, hotwords=["世界"], hotwords_score=50.0, num_beams=48)["text"]


def test_pipeline_batches_and_windows(recognise):
    waveforms = [tones(0.6), tones(0.3, 1), tones(0.9, 2), np.zeros(10, np.float32)]
    alone = [recognise(waveform, return_timestamps=True) for waveform in waveforms]
    assert recognise(waveforms, batch_size=4, return_timestamps=True) == alone
    assert alone[3]["text"] == "" and alone[3]["chunks"] == []
    cut = recognise(tones(3.0, 3), chunk_length_s=1.0, return_timestamps="char")
    ends = [chunk["timestamp"][1] for chunk in cut["chunks"]]
    assert ends == sorted(ends) and ends[-1] <= 3.0
    # Four windows, each with its answers.
    assert cut["language"] in ("zh", "en", "yue", "ja", "ko", "nospeech", None)
    assert "".join(chunk["text"] for chunk in cut["chunks"]).strip() == cut["text"]


def test_pipeline_votes_over_windows(recognise):
    def window(row):
        length = torch.tensor([len(row)])
        return {
            "is_last": False,
            "window": (0.0, -float("inf"), float("inf")),
            "tokens": torch.tensor([row]),
            "lengths": length,
            "prompt_lengths": torch.tensor([4]),
        }

    rows = [
        [*label_row(language="en", emotion="SAD", event="BGM"), ID["t"]],
        [*label_row(language="ja", emotion="HAPPY"), ID["で"]],
        [*label_row(language="ja", emotion="HAPPY", event="Laughter"), ID["す"]],
        label_row(language="nospeech"),
    ]
    result = recognise.postprocess([window(row) for row in rows])
    assert (result["text"], result["language"], result["emotion"]) == ("tです", "ja", "HAPPY")
    assert result["events"] == ["BGM", "Speech", "Laughter"]
    assert result["tagged_text"].count("<|ja|>") == 2


def test_remote_code_in_a_clean_process(model_dir):
    report = self_check(model_dir)
    assert report["max_logit_difference"] == 0.0
    assert report["class"].startswith("transformers_modules.")
    assert report["pipeline"].startswith("transformers_modules.")


def test_saved_folder_is_complete_and_stable(model_dir, tmp_path):
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    assert config["auto_map"]["AutoModelForCTC"].endswith("FunasrSenseVoiceForSpeechRecognition")
    assert config["textnorm_token_ids"] == BASE["textnorm_token_ids"]
    names = {path.name for path in model_dir.iterdir()}
    assert {"pipeline_speech_recognition.py", "sanm.py", "tokenization_funasr_sensevoice.py"} <= names
    assert not [name for name in names if "wenet" in name or "paraformer" in name]
    AutoProcessor.from_pretrained(model_dir).save_pretrained(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (model_dir / path.name).read_bytes(), path.name
