"""Evaluation of a synthesiser, as a user runs it: a tiny CosyVoice with random weights, and the shipped recogniser."""

import json
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from tiny_cosyvoice import recording, tiny_cosyvoice, tiny_processor
from tiny_s3_tokenizer import tiny_campplus
from transformers import AutoModelForSpeechSeq2Seq, AutoModelForTextToWaveform, AutoProcessor

import hf_speechllm  # noqa: F401  registers the model families


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "training"))

import evaluate_tts  # noqa: E402

from hf_speechllm.audio import load_audio  # noqa: E402
from hf_speechllm.data.manifests import ManifestError, read_manifest  # noqa: E402
from hf_speechllm.eval.listening import listen  # noqa: E402
from hf_speechllm.eval.speech_synthesis import speak_tokens, synthesize  # noqa: E402


RECOGNISER = ROOT / "pretrained" / "u2pp_moe_digits"
LIMITS = {"max_token_text_ratio": 4.0, "min_token_text_ratio": 2.0, "num_steps": 2}
OPTIONS = ("--options", *(f"{name}={value}" for name, value in LIMITS.items()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model that knows two voices, `tone` and `hum`."""
    path = tmp_path_factory.mktemp("cosyvoice")
    model, processor = tiny_cosyvoice(2), tiny_processor(2)
    for seed, name in enumerate(("tone", "hum")):
        prompt = model.encode_prompt(**processor.prompt_features([recording(0.6, seed)], 24000))
        processor.add_speaker(name, prompt, "yes no")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def references(tmp_path_factory) -> Path:
    """Two recordings of `tone`, two of somebody the model does not know."""
    folder = tmp_path_factory.mktemp("references")
    rows = []
    for number, (speaker, seconds, rate) in enumerate(
        [("tone", 0.5, 16000), ("tone", 0.7, 24000), ("other", 0.4, 16000), ("other", 0.6, 8000)]
    ):
        soundfile.write(folder / f"{number}.wav", recording(seconds, 5 * (speaker == "other"), rate).numpy(), rate)
        rows.append({"audio": f"{number}.wav", "text": "one two", "speaker": speaker})
    (folder / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder / "all.jsonl"


def evaluate(folder: Path, tmp_path: Path, *options: str) -> dict:
    output = tmp_path / "tts.json"
    evaluate_tts.main([str(folder), "--recogniser", str(RECOGNISER), *OPTIONS, "--output", str(output), *options])
    return json.loads(output.read_text(encoding="utf-8"))


def test_known_voices(folder, references, tmp_path):
    (tmp_path / "texts.txt").write_text("one\n\n  seven three \n", encoding="utf-8")
    options = ("--texts", str(tmp_path / "texts.txt"), "digits:2", "--references", str(references))
    report = evaluate(folder, tmp_path, *options, "--save_audio", str(tmp_path / "audio"))
    assert report["voices"] == ["hum", "tone"] and report["texts"] == 4 and report["instruct"] is None
    synthesis = report["synthesis"]
    assert synthesis["sentences"] == 8 and synthesis["by_voice"]["hum"]["sentences"] == 4
    for count in ("words", "substitutions", "deletions", "insertions"):
        assert sum(figures[count] for figures in synthesis["by_voice"].values()) == synthesis[count]
    errors = synthesis["substitutions"] + synthesis["deletions"] + synthesis["insertions"]
    assert synthesis["wer"] == pytest.approx(100 * errors / synthesis["words"], abs=1e-3)
    # Without references, `hum` is compared with the embedding that the model knows.
    assert synthesis["similarity"]["recordings"] == 8
    assert -1 <= synthesis["similarity"]["same_speaker"] <= 1
    assert report["recordings"]["sentences"] == 4 and report["recordings"]["words"] == 8
    assert report["recordings"]["audio_seconds"] == pytest.approx(2.2)
    # Each of the four has another of its speaker to be compared with.
    assert report["recordings"]["similarity"]["recordings"] == 4
    assert report["resynthesis"]["mel_distance"] > 0 and report["resynthesis"]["real_time_factor"] > 0
    assert report["resynthesis"]["similarity"]["recordings"] == 4
    saved = read_manifest(tmp_path / "audio" / "synthesis")
    assert [item.speaker for item in saved] == ["hum"] * 4 + ["tone"] * 4
    assert saved[1].text == "seven three" and "heard" in saved[0].columns
    seconds = sum(soundfile.info(item.audio).duration for item in saved)
    assert seconds == pytest.approx(synthesis["audio_seconds"], abs=0.01)
    assert len(read_manifest(tmp_path / "audio" / "resynthesis")) == 4


def test_an_instruction_is_followed_and_reported(folder, references, tmp_path):
    """The audio is what the model makes of the instruction, and so are the seconds that a word takes."""
    (tmp_path / "texts.txt").write_text("one\nseven three\n", encoding="utf-8")
    options = ("--texts", str(tmp_path / "texts.txt"), "--speakers", "tone", "--references", str(references))
    told = evaluate(folder, tmp_path, *options, "--instruct", "Softly.", "--save_audio", str(tmp_path / "audio"))
    assert told["instruct"] == "Softly."
    model = AutoModelForTextToWaveform.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    rows = [{"text": text, "speaker": "tone", "instruct": "Softly."} for text in ("one", "seven three")]
    expected = synthesize(model, processor, rows, **LIMITS).waveforms
    for item, waveform in zip(read_manifest(tmp_path / "audio" / "synthesis"), expected, strict=True):
        saved = torch.from_numpy(soundfile.read(item.audio, dtype="float32")[0])
        torch.testing.assert_close(saved, waveform, rtol=0, atol=1e-3)
    rates = torch.tensor([len(expected[0]), len(expected[1]) / 2]) / model.config.sampling_rate
    found = told["synthesis"]["seconds_per_word"]
    assert found["mean"] == pytest.approx(rates.mean().item(), abs=1e-4)
    assert found["standard_deviation"] == pytest.approx(rates.std().item(), abs=1e-4)
    # 0.5 + 0.7 + 0.4 + 0.6 seconds of two words each.
    assert told["recordings"]["seconds_per_word"]["mean"] == pytest.approx(0.275, abs=1e-4)


def test_figures_depend_on_the_seed_and_not_on_the_batch(folder, references, tmp_path):
    options = ("--texts", "digits:3", "--speakers", "tone", "--references", str(references), "--limit", "2")
    reports = [
        evaluate(folder, tmp_path, *options, "--seed", seed, "--batch_size", size)
        for seed, size in (("1", "8"), ("1", "2"), ("2", "8"))
    ]
    for report in reports:
        assert report["recordings"]["sentences"] == 2
        for group in ("synthesis", "resynthesis"):
            report[group].pop("real_time_factor")
        report.pop("batch_size")
    assert reports[0] == reports[1]
    assert reports[0]["synthesis"] != reports[2]["synthesis"]


def test_prompted_voices_and_another_speaker_encoder(folder, references, tmp_path):
    tiny_campplus().save_pretrained(tmp_path / "encoder")
    report = evaluate(
        *(folder, tmp_path, "--texts", "digits:1", "--prompts", str(references), "--mode", "cross_lingual"),
        *("--speaker_encoder", str(tmp_path / "encoder"), "--metric", "cer"),
    )
    assert report["voices"] == ["tone", "other"] and "recordings" not in report and "resynthesis" not in report
    assert report["synthesis"]["similarity"]["recordings"] == 2 and "cer" in report["synthesis"]
    assert report["synthesis"]["seconds_per_character"]["mean"] > 0
    with pytest.raises(ValueError, match="expected references of the voice 'hum'"):
        evaluate(folder, tmp_path, "--texts", "digits:1", "--speaker_encoder", str(tmp_path / "encoder"))


def test_requests_of_several_sentences_and_voices(folder):
    """A request of a batch is what it is alone; sentences come one after the other."""
    model, processor = tiny_cosyvoice(2), AutoProcessor.from_pretrained(folder)
    processor.normalizer = None
    words = " ".join(f"this is sentence {word} of a rather long text, as you see." for word in ("one", "two", "three"))
    audio = {"array": recording(0.5, 3), "sampling_rate": 24000}
    requests = [
        {"text": words, "speaker": "tone"},
        {"text": "", "speaker": "hum"},
        {"text": "hello", "prompt_audio": audio, "prompt_text": "you"},
    ]
    sentences = processor.split_text(words)
    assert len(sentences) > 1 and processor.split_text("") == []
    together = synthesize(model, processor, requests, seed=3, batch_size=2, **LIMITS)
    assert together.seconds > 0 and [len(waveform) > 0 for waveform in together.waveforms] == [True, False, True]
    pieces = []
    for row, sentence in enumerate(sentences):
        inputs = processor(sentence, speaker="tone", normalize=False)
        generator = torch.Generator().manual_seed(3 + row)
        pieces.append(model.generate(**inputs, generator=[generator], **LIMITS).waveform[0])
    torch.testing.assert_close(together.waveforms[0], torch.cat(pieces), rtol=0, atol=1e-4)
    last = synthesize(model, processor, requests[2:], seed=3 + len(sentences), **LIMITS)
    torch.testing.assert_close(together.waveforms[2], last.waveforms[0], rtol=0, atol=1e-4)

    # The tokens alone are those that were spoken.
    limits = {name: value for name, value in LIMITS.items() if name != "num_steps"}
    tokens = speak_tokens(model, processor, requests, seed=3, batch_size=2, **limits)
    assert [len(row) > 0 for row in tokens] == [True, False, True] and tokens[1].dtype == torch.long
    inputs = processor(**requests[2])
    generator = torch.Generator().manual_seed(3 + len(sentences))
    assert torch.equal(tokens[2], model.generate(**inputs, generator=[generator], **LIMITS).speech_ids[0])


def test_the_listener_understands_digits():
    """A real recording at another rate, in a batch with nothing and with silence."""
    model = AutoModelForSpeechSeq2Seq.from_pretrained(RECOGNISER).eval()
    processor = AutoProcessor.from_pretrained(RECOGNISER)
    digits = torch.from_numpy(load_audio(ROOT / "examples" / "audio" / "four_two_zero_five.wav", 24000))
    waveforms = [torch.zeros(0), digits, torch.zeros(2000), digits[:9600], torch.zeros(2500)]
    texts = listen(model, processor, waveforms, 24000, batch_size=2)
    assert texts[0] == texts[2] == "" and texts[1] == "four two zero five"
    assert texts == [listen(model, processor, [waveform], 24000)[0] for waveform in waveforms]


def test_texts(tmp_path):
    texts = evaluate_tts.read_texts(["digits:20"], 2, 4, seed=3)
    assert texts == evaluate_tts.read_texts(["digits:20"], 2, 4, seed=3)
    assert texts != evaluate_tts.read_texts(["digits:20"], 2, 4, seed=4)
    assert {len(text.split()) for text in texts} == {2, 3, 4}
    (tmp_path / "empty.txt").write_text("\n \n", encoding="utf-8")
    with pytest.raises(ValueError, match="at least one text"):
        evaluate_tts.read_texts([str(tmp_path / "empty.txt")], 1, 2, 0)
    with pytest.raises(ValueError, match="digits:N"):
        evaluate_tts.read_texts(["digits:many"], 1, 2, 0)


def test_wrong_arguments(folder, references, tmp_path):
    with pytest.raises(ValueError, match="NAME=JSON"):
        evaluate_tts.parse_options(["num_steps"])
    assert evaluate_tts.parse_options(["do_sample=false", "temperature=0.5"]) == {
        "do_sample": False,
        "temperature": 0.5,
    }
    nameless = references.parent / "nameless.jsonl"
    nameless.write_text(json.dumps({"audio": "0.wav", "text": "one"}) + "\n", encoding="utf-8")
    with pytest.raises(ManifestError, match="expected a speaker"):
        evaluate(folder, tmp_path, "--texts", "digits:1", "--references", str(nameless))
