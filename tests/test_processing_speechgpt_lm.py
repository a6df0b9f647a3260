"""Prompts, training texts and answers of SpeechGPT and AnyGPT. (Upstream's values: the parity test.)"""

import numpy as np
import pytest
import soundfile
import torch
from tiny_speechgpt_lm import build_tokenizer, build_units
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

from hf_speechllm.models.answers_speechgpt_lm import SpeechGptAnswer, parse_answer, upstream_fields
from hf_speechllm.models.anygpt_dialogue import (
    TEMPLATES,
    dialogue_text,
    parse_reply,
    speech_string,
    voice_message,
    voice_reply,
)
from hf_speechllm.models.feature_extraction_kaldi_fbank import AudioError
from hf_speechllm.models.processing_speechgpt_lm import SpeechGptProcessor
from hf_speechllm.models.prompts_speechgpt_lm import (
    META_INSTRUCTION,
    SpeechGptTurn,
    chain_text,
    cross_modal_text,
    inference_prompt,
    question_with_units,
    replace_recordings,
)
from hf_speechllm.train.text_tokenizer import train_byte_bpe
from hf_speechllm.train.unit_vocabulary import add_unit_tokens


QUESTION, ANSWER = "What is it?", "A day; or two."
ASKED, SPOKEN = "<sosp><26><5><eosp>", "<sosp><35><8><97><eosp>"
TURNS = {
    (asked, answered): SpeechGptTurn(
        QUESTION, ANSWER, ASKED if asked == "speech" else None, SPOKEN if answered == "speech" else None
    )
    for asked in ("speech", "text")
    for answered in ("speech", "text")
}
every_format = pytest.mark.parametrize("modalities", TURNS, ids="-".join)
every_style = pytest.mark.parametrize("style", ("released", "paper"))


@pytest.fixture(scope="module")
def processor() -> SpeechGptProcessor:
    return SpeechGptProcessor(build_tokenizer())


@every_style
@every_format
def test_what_is_written_is_read_again(processor, modalities, style):
    """Both styles, four formats: the text, and the text that its ids decode to, give all parts back."""
    turn = TURNS[modalities]
    text = META_INSTRUCTION + chain_text(turn, style)
    decoded = processor.decode(processor.tokenizer(text).input_ids)
    assert "[SpeechGPT] :" in decoded and "[SpeechGPT]:" in text
    for source in (text, decoded):
        found = processor.parse(source)
        assert found.text == ANSWER
        assert found.transcript == (QUESTION if modalities[0] == "speech" else None)
        assert found.units == ([35, 8, 97] if modalities[1] == "speech" else [])
        assert found.question_units == ([26, 5] if modalities[0] == "speech" else [])
        assert QUESTION in found.question or found.question_units
        assert found.raw == source


@every_style
@every_format
def test_a_prompt_begins_the_training_text(modalities, style):
    """What is asked at inference is how the training text begins (in the released style but for a space)."""
    turn = TURNS[modalities]
    asked = turn.question_units or turn.question
    prompt = inference_prompt(asked, style=style, modalities=modalities)
    text = META_INSTRUCTION + chain_text(turn, style)
    assert text.startswith(prompt.replace(" <eoh>. ", "<eoh>. ") if style == "released" else prompt)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[SpeechGPT] :  no tags <eoa>", {"text": "no tags"}),
        ("[SpeechGPT]:only text, cut off", {"text": "only text, cut off"}),
        ("[SpeechGPT]: <sosp><1><2><eosp><eoa>.", {"units": [1, 2]}),
        ("[SpeechGPT] : q; [ta] a; [ua] <sosp> <1> <2>", {"transcript": "q", "text": "a", "units": [1, 2]}),
        ("[SpeechGPT]: [tq] q; [ta] a<eoa>.", {"transcript": "q", "text": "a"}),
        ("[SpeechGPT]: [ tq ] q [ta]a[ua]<sosp><7>", {"transcript": "q", "text": "a", "units": [7]}),
        ("[SpeechGPT]: [tq] only heard", {"transcript": "only heard"}),
        ("[SpeechGPT]: a; [ua] <sosp><3>", {"text": "a", "units": [3]}),
        ("[SpeechGPT]: [ta] a; [ua]", {"text": "a"}),
        ("[SpeechGPT]: a</s>", {"text": "a"}),
        ("[SpeechGPT]:", {}),
        ("", {}),
        ("a continuation; [ua] <4>", {"text": "a continuation", "units": [4]}),
        (
            "[Human]: q1<eoh>. [SpeechGPT]: a1<eoa>. [Human]: q2 <eoh>. [SpeechGPT]: a2",
            {"text": "a2", "question": "q2"},
        ),
    ],
)
def test_parser_takes_what_comes(text, expected):
    assert parse_answer(text) == SpeechGptAnswer(**expected, raw=text)


def test_with_a_prompt_the_answer_is_where_the_text_begins():
    """A model that goes on talking to itself does not replace its answer."""
    prompt = inference_prompt("q?")
    found = parse_answer(" a<eoa>. [Human]: x<eoh>. [SpeechGPT]: y<eoa>.", prompt)
    assert (found.question, found.text, found.units) == ("q?", "a", [])


def test_upstream_loses_the_answer_where_ours_does_not():
    text = chain_text(TURNS["speech", "text"])
    assert upstream_fields(text)["textAnswer"] == "" and parse_answer(text).text == ANSWER


def test_cross_modal_texts():
    released = cross_modal_text("Speak, please.", "a day", SPOKEN)
    assert released == f"[Human]: Speak, please. This is input: a day<eoh> [SpeechGPT]: {SPOKEN}<eoa> "
    paper = cross_modal_text("Write it", ASKED, "a day", "paper")
    assert paper == f"[Human]: Write it. This is input: {ASKED}<eoh>. [SpeechGPT]: a day<eos>."


def test_history_comes_before_the_question(processor):
    turns = [TURNS["speech", "speech"], TURNS["text", "text"]]
    prompt = inference_prompt("And now?", turns)
    assert prompt.startswith(
        META_INSTRUCTION + chain_text(turns[0]) + " " + chain_text(turns[1]) + " [Human]: And now?"
    )
    assert inference_prompt("And now?", " ".join(map(chain_text, turns)) + " ") == prompt
    ids = processor(text="And now?", history=turns)["input_ids"]
    assert ids.tolist() == [processor.tokenizer(prompt).input_ids]


def test_instruction_and_units():
    assert question_with_units(None, ASKED) == question_with_units("  ", ASKED) == ASKED
    assert question_with_units("Write, this is input: ", ASKED) == f"Write, this is input:{ASKED}"
    assert question_with_units("Write it down.", ASKED) == f"Write it down. This is input: {ASKED}"


def test_paths_in_a_text(tmp_path):
    """As upstream: a part between `is input:` that is an existing recording; all else stays."""
    recording = tmp_path / "a b.wav"
    recording.touch()
    for text, expected in (
        (f"{recording}", "U"),
        (f"Hear this is input: {recording} ", "Hear this is input:U"),
        (f"{recording} is input:{recording}", "U" + "is input:" + "U"),
        ("Hear this is input: no such.wav", None),
        (f"Hear {recording}", None),
        (str(tmp_path), None),
        ("", None),
    ):
        assert replace_recordings(text, lambda path: "U" if path == str(recording) else "?") == (expected or text)


@pytest.mark.parametrize("bad", ({"style": "loud"}, {"template": "GPT"}))
def test_unknown_choices_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SpeechGptProcessor(build_tokenizer(), **bad)


def test_incomplete_turns_are_refused():
    with pytest.raises(ValueError, match="answer"):
        chain_text(SpeechGptTurn(question="a"))
    with pytest.raises(ValueError, match="question"):
        chain_text(SpeechGptTurn(answer="a", question_units=ASKED))
    with pytest.raises(ValueError, match="modalities"):
        inference_prompt("a", modalities=("text", "smell"))


# -- processor --------------------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path, processor):
    """The settings come back; the tokenizer in the folder needs no code at all."""
    SpeechGptProcessor(build_tokenizer(), style="paper", prefix="Hi.\n").save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert (again.style, again.template, again.prefix, again.sampling_rate) == ("paper", "SpeechGPT", "Hi.\n", 16000)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(plain, PreTrainedTokenizerFast)
    text = "[Human]: hello <eoh>. [SpeechGPT]: <sosp><1><999><eosp>"
    assert plain(text).input_ids == processor.tokenizer(text).input_ids
    assert plain.decode(plain(text).input_ids, skip_special_tokens=True) == processor.decode(plain(text).input_ids)


def test_batch_is_padded_on_the_left(processor):
    batch = processor(text=["hello", "what is it today?"])
    alone = processor(text="hello")
    length = alone["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][0, -length:], alone["input_ids"][0])
    assert batch["attention_mask"][0].tolist() == [0] * (batch["input_ids"].shape[1] - length) + [1] * length
    assert not batch["input_ids"][0, :-length].any()


def test_units_instead_of_audio(processor):
    one = processor(units=[26, 5], text="Write it down.")
    assert torch.equal(one["input_ids"], processor(units=ASKED, text="Write it down.")["input_ids"])
    prompts = processor.prompts(units=[[26, 5], ASKED], text=[None, "Write, this is input:"], style="paper")
    assert f"This is a speech instruction: {ASKED}. And your response should be speech." in prompts[0]
    assert f"instruction: Write, this is input:{ASKED}. And" in prompts[1]
    assert "response should be text" in processor.prompts(units=[1], output="text", style="paper")[0]
    for one in (torch.tensor([26, 5]), np.array([26, 5]), [np.int64(26), np.int64(5)]):
        assert processor.prompts(units=one) == processor.prompts(units=[26, 5])
    both = processor.prompts(units=[[26, 5], [7]])
    for rows in (torch.tensor([[26, 5], [7, -1]]), np.array([[26, 5], [7, -1]]), [torch.tensor([26, 5]), [7]]):
        assert processor.prompts(units=rows) == both
    assert processor.prompts("hello", history=None) == processor.prompts("hello")


def test_a_prompt_ends_where_an_answer_begins(processor):
    """Tokens of a training text begin with those of its prompt; published tokenizers keep upstream's last space."""
    own = train_byte_bpe(["five six seven"], 300)
    add_unit_tokens(own, 8)
    ids = SpeechGptProcessor(own)(units=[1, 2])["input_ids"][0].tolist()
    text = SpeechGptProcessor(own).prompts(units=[1, 2])[0] + "five; [ta] six"
    whole = own(text).input_ids
    assert whole[: len(ids)] == ids and own.decode(whole[len(ids) :]).startswith(" five")
    published = processor(units=[1, 2])["input_ids"][0].tolist()
    assert published == processor.tokenizer(processor.prompts(units=[1, 2])[0]).input_ids


def test_numbers_that_are_no_units(processor):
    """A year in brackets, and digits of another script."""
    answer = processor.parse("[ta] in <2024>, <\u0661\u0662>; [ua] <sosp><1><2><eosp><eoa>")
    assert answer.units == [1, 2]
    assert parse_answer("[ua] <2024><1>").units == [2024, 1]  # the parser alone does not know the vocabulary


def test_audio_of_every_kind_gives_the_same_units(tmp_path, processor):
    model = build_units()
    samples = (0.2 * np.random.default_rng(0).standard_normal(4000)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    path = str(tmp_path / "a.wav")
    expected = processor.prompts(audio=samples, sampling_rate=16000, units_model=model)
    ids = model.encode(torch.from_numpy(samples)[None]).reduced_ids[0].tolist()
    assert processor.unit_string(ids) in expected[0]
    for audio in (
        path,
        (tmp_path / "a.wav").read_bytes(),
        {"array": samples, "sampling_rate": 16000},
        {"bytes": None, "path": path},
        torch.from_numpy(samples)[None],
    ):
        assert processor.prompts(audio=audio, sampling_rate=16000, units_model=model) == expected
    typed = processor.prompts(text=path, units_model=model, read_paths=True)
    assert typed == expected
    assert processor.prompts(text=path, units_model=model)[0].count(path) == 1
    # A batch of different lengths: each as alone.
    both = processor.prompts(audio=[samples, samples[:2500]], sampling_rate=16000, units_model=model)
    assert both == expected + processor.prompts(audio=samples[:2500], sampling_rate=16000, units_model=model)


def test_unusable_questions_are_refused(processor):
    for arguments, error, message in (
        ({}, ValueError, "text, audio or units"),
        ({"audio": np.zeros(100)}, ValueError, "units_model"),
        ({"audio": np.zeros(100), "units_model": build_units()}, AudioError, "sampling_rate"),
        ({"audio": {"path": None}, "units_model": build_units()}, AudioError, "expected `array`"),
        ({"audio": "no.wav", "units_model": build_units()}, AudioError, "no such file"),
        ({"audio": np.zeros(9), "units": [1]}, ValueError, "units"),
        ({"text": ["a", "b"], "units": [[1]]}, ValueError, "text"),
        ({"text": []}, ValueError, "at least one question"),
        ({"units": []}, ValueError, "at least one question"),
    ):
        with pytest.raises(error, match=message):
            processor(**arguments)


# -- AnyGPT -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
def test_anygpt_processor(name):
    template = TEMPLATES[name]
    processor = SpeechGptProcessor(build_tokenizer(), template=name)
    (prompt,) = processor.prompts(units=[1, 5, 5])
    assert prompt == dialogue_text([(voice_message([1, 5, 5]), None)], template)
    answer = voice_reply("hello", "I am fine.", [7, 7, 1023])
    found = processor.parse(f"{prompt} {answer}{template.end_of_answer}")
    assert (found.transcript, found.text, found.units) == ("hello", "I am fine.", [7, 7, 1023])
    so_far = dialogue_text([(voice_message([1, 5, 5]), answer)], template)
    (second,) = processor.prompts(text="And?", history=so_far)
    assert second == dialogue_text([(voice_message([1, 5, 5]), answer), ("And?", None)], template)
    turns = [SpeechGptTurn(answer=answer, question_units=voice_message([1, 5, 5]))]
    assert processor.prompts(text="And?", history=turns) == [second]


def test_anygpt_answers_as_they_come():
    assert parse_reply("just text").text == "just text"
    assert parse_reply("[MMGPT]: <-Ins-> cut off").text == "cut off"
    assert parse_reply(speech_string([4])).units == [4] and parse_reply(speech_string([4])).text is None
    with pytest.raises(ValueError, match=r"turns\[0\]"):
        dialogue_text([("a", None), ("b", None)])
