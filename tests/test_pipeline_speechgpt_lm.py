"""The any-to-any pipeline: speech and text in and out, in batches, over turns, and piece by piece."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from tiny_speechgpt_lm import build_model, build_tokenizer, build_units, build_vocoder, save_folder
from transformers import pipeline

from hf_speechllm.hub import clean_process
from hf_speechllm.models.pipeline_speechgpt_lm import SpeechGptPipeline
from hf_speechllm.models.processing_speechgpt_lm import SpeechGptProcessor


GREEDY = {"do_sample": False, "max_new_tokens": 40}
# Hot, so that text and units come in turns; without the tokens that end an answer.
HOT = {"do_sample": True, "temperature": 3.0, "max_new_tokens": 90, "suppress_tokens": [1, 2, 1422, 1423, 1424, 1425]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("lm"))


@pytest.fixture(scope="module")
def pipe(folder):
    return SpeechGptPipeline(model=folder, units=build_units(), vocoder=build_vocoder())


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    path = tmp_path_factory.mktemp("audio") / "question.wav"
    soundfile.write(path, 0.2 * np.random.default_rng(0).standard_normal(4800), 16000)
    return path


def test_speech_in_speech_out(pipe, recording):
    result = pipe(f"Answer this, this is input: {recording}", **GREEDY)
    units = build_units().encode(torch.from_numpy(soundfile.read(recording, dtype="float32")[0])[None]).reduced_ids[0]
    assert result["question"].replace(" ", "").endswith("".join(f"<{unit}>" for unit in units.tolist()) + "<eosp>")
    assert result["units"] and result["sampling_rate"] == 16000
    expected = build_vocoder().synthesize(result["units"]).numpy()
    assert np.array_equal(result["audio"], expected) and np.abs(expected).max() > 0.01
    # The same question in its other forms.
    samples, _ = soundfile.read(recording, dtype="float32")
    for other in (
        {"text": "Answer this, this is input:", "audio": str(recording)},
        {"text": "Answer this, this is input:", "audio": samples, "sampling_rate": 16000},
        {"text": "Answer this, this is input:", "units": units.tolist()},
    ):
        assert pipe(other, **GREEDY)["raw"] == result["raw"]
    alone = pipe(str(recording), **GREEDY)["raw"]
    assert pipe(samples, sampling_rate=16000, **GREEDY)["raw"] == alone
    assert [one["raw"] for one in pipe([samples, samples], sampling_rate=16000, **GREEDY)] == [alone, alone]
    for row in ({"array": samples, "sampling_rate": 16000}, {"path": str(recording)}, {"units": units}):
        assert pipe({**row}, history=None, **GREEDY)["raw"] == alone
    assert pipe([], **GREEDY) == []


def test_batch_is_one_by_one(pipe, recording):
    questions = ["hello", str(recording), "what are the causes of climate change?"]
    together = pipe(questions, batch_size=3, **GREEDY)
    for question, result in zip(questions, together, strict=True):
        alone = pipe(question, **GREEDY)
        assert result["raw"] == alone["raw"] and result["dialogue"] == alone["dialogue"]


def test_paths_of_strangers_are_not_read(pipe, recording):
    assert "<sosp>" in pipe(str(recording), **GREEDY)["question"]
    assert "<sosp>" not in pipe(str(recording), read_paths=False, **GREEDY)["question"]


def test_dialogue_goes_on(pipe):
    # Bytes that are no character have no text, and cannot come back.
    options = {**GREEDY, "suppress_tokens": list(range(3, 259))}
    first = pipe("hello", **options)
    second = pipe("and now?", history=first["dialogue"], **options)
    words = [result["dialogue"].replace(" ", "") for result in (first, second)]
    assert words[1].startswith(words[0])
    assert second["dialogue"].count("[Human]") == 2 and second["question"] == "and now?"
    # The ids of the first turn are those that the model had.
    tokenizer = pipe.processor.tokenizer
    start = tokenizer(first["dialogue"]).input_ids
    assert tokenizer(second["dialogue"]).input_ids[: len(start)] == start


def test_text_output_stops_before_speech(folder):
    """A model that only writes `[ua]` stops after the first."""
    model, tokenizer = build_model(), build_tokenizer()
    tag = tokenizer(" [ua]", add_special_tokens=False).input_ids
    place = {index: number for number, index in enumerate(tag)}

    def logits_of(module, inputs, output):
        last = model.seen[-1]
        wanted = tag[(place[last] + 1) % len(tag)] if last in place else tag[0]
        return torch.nn.functional.one_hot(torch.tensor([[wanted]]), output.shape[-1]) * 100.0

    def remember(module, arguments, options):
        model.seen.append(int(options["input_ids"][0, -1]))

    model.seen = []
    model.model.register_forward_pre_hook(remember, with_kwargs=True)
    model.lm_head.register_forward_hook(logits_of)
    pipe = SpeechGptPipeline(model=model, processor=SpeechGptProcessor(tokenizer))
    assert pipe("x", **GREEDY)["raw"].count("[ua]") > 3
    model.seen.clear()
    assert pipe("x", output="text", **GREEDY)["raw"].count("[ua]") == 1


def test_without_a_vocoder_there_are_units_and_no_sound(folder):
    pipe = SpeechGptPipeline(model=folder)
    result = pipe("hello", **GREEDY)
    assert "audio" not in result and result["units"]
    with pytest.raises(ValueError, match="units_model"):
        pipe({"audio": np.zeros(4000, dtype=np.float32), "sampling_rate": 16000})


def test_upstreams_sampling_is_the_default(pipe):
    options = pipe._generate_options("speech", {})
    assert {key: options[key] for key in ("do_sample", "temperature", "top_p", "top_k", "max_new_tokens")} == {
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 50,
        "max_new_tokens": 2048,
    }


def test_misuse_is_refused(pipe, folder):
    with pytest.raises(ValueError, match="processor"):
        SpeechGptPipeline(model=build_model())
    with pytest.raises(ValueError, match="template"):
        SpeechGptPipeline(model=build_model(), processor=SpeechGptProcessor(build_tokenizer(), template="AnyGPT"))
    with pytest.raises(ValueError, match="num_return_sequences"):
        pipe("x", num_return_sequences=2)
    with pytest.raises(ValueError, match="inputs"):
        pipe({"image": 1})
    with pytest.raises(ValueError, match="min_units"):
        next(pipe.stream("x", min_units=0))


# -- streaming --------------------------------------------------------------------------------------------------------


def test_pieces_are_the_whole_answer(pipe):
    torch.manual_seed(0)
    pieces = list(pipe.stream("hello", min_units=5, **HOT))
    assert [piece.is_last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    units = [unit for piece in pieces for unit in piece.units]
    answer = pieces[-1].answer
    assert units == answer.units and len(units) > 10
    sounds = [piece.audio for piece in pieces if piece.audio is not None]
    assert len([sound for sound in sounds if len(sound)]) > 2
    torch.testing.assert_close(torch.cat(sounds), build_vocoder().synthesize(units), rtol=1e-5, atol=1e-6)
    torch.manual_seed(0)
    whole = pipe("hello", **HOT)
    assert whole["units"] == units
    text = "".join(piece.text for piece in pieces)
    assert text.replace(" ", "") == (whole["text"] or "").replace(" ", "") and text


def test_characters_of_several_bytes_come_whole(pipe):
    """Byte pieces of one character are held back until it is complete."""
    from hf_speechllm.models.streaming_speechgpt_lm import TextPieces

    tokenizer = build_tokenizer()
    ids = tokenizer("a 你好 b", add_special_tokens=False).input_ids
    pieces = TextPieces(tokenizer)
    found = [pieces.push(index) for index in ids] + [pieces.push(None)]
    assert "".join(found) == "a 你好 b" and not any("\ufffd" in piece for piece in found)
    assert len(found) > 6 and found.count("") >= 4


def test_an_error_while_generating_reaches_the_reader(pipe):
    with pytest.raises(ValueError, match="temperature"):
        list(pipe.stream("hello", do_sample=True, temperature=-1.0, max_new_tokens=5))


# -- remote code ------------------------------------------------------------------------------------------------------

CLEAN = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("clean_process", sys.argv[1])
clean_process = importlib.util.module_from_spec(spec)
spec.loader.exec_module(clean_process)
sys.meta_path.insert(0, clean_process.PackageBlocker())
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
torch.set_num_threads(1)
folder, units, vocoder, recording, again = sys.argv[2:7]
AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # needs no code
trusted = {"trust_remote_code": True}
units, vocoder = (AutoModel.from_pretrained(path, **trusted).eval() for path in (units, vocoder))
pipe = pipeline("any-to-any", model=folder, units=units, vocoder=vocoder, **trusted)
result = pipe(recording, do_sample=False, max_new_tokens=40)
model = AutoModelForCausalLM.from_pretrained(folder, **trusted)
loss = model(input_ids=torch.tensor([[5, 6, 430]]), labels=torch.tensor([[5, 6, 430]])).loss.item()
model.save_pretrained(again)
pipe.processor.save_pretrained(again)
print(json.dumps({
    "raw": result["raw"], "audio": float(abs(result["audio"]).sum()), "loss": loss,
    "modules": [type(thing).__module__ for thing in (pipe, pipe.model, pipe.processor, units)],
    "plain": type(model.to_plain()).__name__,
}))
"""


def test_clean_process_without_the_package(folder, recording, tmp_path):
    """`pipeline("any-to-any", ...)` by remote code gives what the package gives, and saves its code again."""
    build_units().save_pretrained(tmp_path / "units")
    build_vocoder().save_pretrained(tmp_path / "vocoder")
    script = tmp_path / "clean.py"
    script.write_text(CLEAN, encoding="utf-8")
    paths = (clean_process.__file__, folder, tmp_path / "units", tmp_path / "vocoder", recording, tmp_path / "again")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
    done = subprocess.run(
        [sys.executable, "-I", str(script), *map(str, paths)],
        env={**environment, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.strip().splitlines()[-1])
    assert all(name.startswith("transformers_modules.") for name in report["modules"])
    assert report["plain"] == "LlamaForCausalLM"
    here = pipeline(
        "any-to-any", model=str(folder), pipeline_class=SpeechGptPipeline, units=build_units(), vocoder=build_vocoder()
    )
    expected = here(str(recording), do_sample=False, max_new_tokens=40)
    assert report["raw"] == expected["raw"]
    assert report["audio"] == pytest.approx(float(np.abs(expected["audio"]).sum()), rel=1e-4)
    ids = torch.tensor([[5, 6, 430]])
    assert report["loss"] == pytest.approx(build_model()(input_ids=ids, labels=ids).loss.item(), rel=1e-6)
    assert {path.name for path in folder.glob("*.py")} == {path.name for path in (tmp_path / "again").glob("*.py")}
