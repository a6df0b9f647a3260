"""The processor of CosyVoice: modes and their arguments, texts, recordings of every kind, speakers."""

import io

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save_file
from tiny_cosyvoice import recording, tiny_processor
from transformers import AutoProcessor

from hf_speechllm.models.feature_extraction_kaldi_fbank import AudioError
from hf_speechllm.models.modeling_cosyvoice import CosyVoicePrompt
from hf_speechllm.models.processing_cosyvoice import END_OF_PROMPT, CosyVoiceProcessor
from hf_speechllm.models.speakers_cosyvoice import CosyVoiceSpeaker, load_speakers


TONE = {"prompt_audio": recording(0.5), "sampling_rate": 24000}


def with_speakers(version: int = 2) -> CosyVoiceProcessor:
    processor = tiny_processor(version)
    generator = torch.Generator().manual_seed(0)
    prompt = CosyVoicePrompt(
        speech_ids=torch.tensor([[1, 2, 3], [4, 0, 0]]),
        speech_mask=torch.tensor([[1, 1, 1], [1, 0, 0]]),
        mel=torch.randn(2, 6, 20, generator=generator),
        mel_mask=torch.tensor([[1] * 6, [1] * 2 + [0] * 4]),
        speaker_embedding=torch.randn(2, 192, generator=generator),
    )
    processor.add_speaker("tone", prompt, "yes no")
    processor.add_speaker("low", prompt, row=1)
    processor.speakers["plain"] = CosyVoiceSpeaker(prompt.speaker_embedding[0])
    return processor


def text_of(processor: CosyVoiceProcessor, inputs, name: str = "input_ids") -> str:
    mask = inputs["attention_mask" if name == "input_ids" else "prompt_attention_mask"][0].bool()
    vocabulary = {index: token for token, index in processor.tokenizer.get_vocab().items()}
    return "".join(vocabulary[token] for token in inputs[name][0][mask].tolist())


def test_mode_follows_from_the_arguments():
    processor = with_speakers()
    cases = [
        ({"text": "a", "speaker": "plain"}, (0, 1), 0, ""),
        ({"text": "a", "speaker": "tone"}, (1, 1), 3, "yes no"),
        ({"text": "a", "speaker": "low"}, (0, 1), 1, ""),
        ({"text": "a", "speaker": "tone", "instruct": "low"}, (0, 1), 3, f"low{END_OF_PROMPT}"),
        ({"text": "a", "speaker": "tone", "prompt_text": "other"}, (1, 1), 3, "other"),
        ({"text": "a", "speaker": "tone", "mode": "sft"}, (0, 1), 0, ""),
    ]
    for arguments, flags, tokens, before in cases:
        inputs = processor(**arguments)
        found = (int(inputs["lm_reads_prompt_speech"]), int(inputs["lm_reads_speaker"]))
        assert found == flags, arguments
        assert int(inputs["prompt_speech_mask"].sum()) == tokens, arguments
        assert int(inputs["prompt_mel_mask"].sum()) == 2 * tokens, arguments
        assert text_of(processor, inputs, "prompt_input_ids") == before
    recorded = processor("a", prompt_text="b", **TONE)
    assert int(recorded["lm_reads_prompt_speech"]) == 1 and "prompt_speech_ids" not in recorded
    assert int(processor("a", **TONE)["lm_reads_prompt_speech"]) == 0


def test_version_1_instructs_without_telling_the_speaker():
    inputs = with_speakers(1)("a", speaker="tone", instruct="low")
    assert int(inputs["lm_reads_speaker"]) == 0 and int(inputs["prompt_speech_mask"].sum()) == 0


def test_version_3_reads_its_system_prompt_first():
    processor = with_speakers(3)
    assert text_of(processor, processor("a", speaker="plain")) == f"ok{END_OF_PROMPT}a."
    inputs = processor("a", prompt_text="b", **TONE)
    assert text_of(processor, inputs) == "a."
    assert text_of(processor, inputs, "prompt_input_ids") == f"ok{END_OF_PROMPT}b"
    inputs = processor("a", speaker="tone", instruct="low")
    assert text_of(processor, inputs, "prompt_input_ids") == f"ok low{END_OF_PROMPT}"
    own = f"mine{END_OF_PROMPT}b"
    inputs = processor("a", prompt_text=own, **TONE)
    assert text_of(processor, inputs, "prompt_input_ids") == own
    # A speaker that is kept has its text with the system prompt.
    assert len(processor.speakers["tone"].text_ids) == len(f"ok-{'yes no'}")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"text": "a"}, ValueError, "speaker: expected a known one, or prompt_audio"),
        ({"text": "a", "speaker": "nobody"}, KeyError, "nobody"),
        ({"text": "a", "speaker": "plain", "mode": "zero_shot"}, ValueError, "with a recording for the mode"),
        ({"text": "a", "speaker": "low", "mode": "zero_shot"}, ValueError, "prompt_text: expected what"),
        ({"text": "a", "speaker": "tone", "mode": "instruct2"}, ValueError, "instruct: expected an instruction"),
        ({"text": "a", "speaker": "tone", "mode": "instruct"}, ValueError, "expected instruct2"),
        ({"text": "a", "speaker": "tone", "mode": "karaoke"}, ValueError, "mode: expected one of"),
        ({"text": "a", "mode": "sft", **TONE}, ValueError, "expected a known one for the mode 'sft'"),
        ({"text": "a", "speaker": "tone", **TONE}, ValueError, "expected none beside speaker"),
        ({"speaker": "tone"}, ValueError, "text: expected one"),
        ({"speaker": "tone", "mode": "voice_conversion"}, ValueError, "source_audio: expected speech"),
        ({"text": ["a", "b"], "speaker": ["tone"]}, ValueError, "lists of one length"),
        ({"text": [], "speaker": "tone"}, ValueError, "lists of one length"),
        (
            {
                "text": "a",
                "mode": ["sft", "voice_conversion"],
                "speaker": "tone",
                "source_audio": [None, recording(1)],
            },
            ValueError,
            "voice_conversion for all rows or for none",
        ),
    ],
)
def test_contradictions_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        with_speakers()(**{"sampling_rate": 24000, **arguments})


def test_long_texts_are_split_and_short_ones_finished():
    processor = with_speakers()
    assert processor.split_text("a b") == ["a b."]
    text = " ".join(f"this is sentence {word} of a rather long text, as you see." for word in ("one", "two", "three"))
    pieces = processor.split_text(text)
    # Tokens are characters here, so that every sentence is longer than the least.
    assert len(pieces) == 2 and "".join(pieces) == text.replace(" this", " this")
    assert processor.split_text(text, normalize=False) == [text]
    assert processor.split_text("<|en|>a. b") == ["<|en|>a. b"]
    assert processor.split_text("") == processor.split_text("?!") == []
    assert processor.split_text("call 12 now") == ["call twelve now."]


def test_recordings_of_every_kind(tmp_path):
    processor = with_speakers()
    wave = recording(0.5).numpy()
    expected = processor("a", **TONE)["prompt_mel"]
    file = io.BytesIO()
    soundfile.write(file, wave, 24000, format="WAV", subtype="FLOAT")
    (tmp_path / "a.wav").write_bytes(file.getvalue())
    sources = [
        tmp_path / "a.wav",
        str(tmp_path / "a.wav"),
        file.getvalue(),
        {"array": wave, "sampling_rate": 24000},
        {"path": tmp_path / "a.wav"},
        np.stack([wave, wave]),
        wave.astype(np.float64),
    ]
    for source in sources:
        inputs = processor("a", prompt_audio=source, sampling_rate=24000)
        torch.testing.assert_close(inputs["prompt_mel"], expected, atol=1e-4, rtol=1e-4)
    # Integers, and another rate.
    assert (
        processor("a", prompt_audio=(wave * 32767).astype(np.int16), sampling_rate=24000)["prompt_mel"]
        .isfinite()
        .all()
    )
    assert abs(processor("a", prompt_audio=wave, sampling_rate=48000)["prompt_mel"].shape[1] - 25) <= 1


@pytest.mark.parametrize(
    ("audio", "rate", "message"),
    [
        (np.array([0.0, np.nan] * 1000), 24000, "NaN"),
        (np.zeros(500, np.float32), 24000, "at least 25 ms, got 20.8 ms"),
        (np.zeros(8000, np.float32), 8000, "expected at least 16000, got 8000"),
        (np.zeros(8000, np.float32), None, "positive integer in Hz"),
        (np.zeros((2, 2, 2), np.float32), 24000, "dimensions"),
        ({"rate": 3}, None, "expected `array`"),
    ],
)
def test_recordings_that_are_none(audio, rate, message):
    with pytest.raises(AudioError, match=message):
        with_speakers()("a", prompt_audio=audio, sampling_rate=rate)


@pytest.mark.parametrize("seconds", [0.1, 40.0])
def test_silent_short_and_long_prompts_are_features(seconds):
    inputs = with_speakers()("a", prompt_audio=torch.zeros(int(seconds * 24000)), sampling_rate=24000)
    for name in ("prompt_features", "prompt_fbank", "prompt_mel"):
        assert torch.isfinite(inputs[name]).all(), name
    assert int(inputs["prompt_features_mask"].sum()) == round(seconds * 100)


def test_upstreams_rate_of_the_prompt_is_a_switch():
    """Version 1 has 22050 Hz; upstream reads a prompt at 24000 and takes its frames for those of 22050."""
    processor = tiny_processor(1)
    own, upstream = (
        processor("a", compatibility=choice, **TONE)["prompt_mel"].shape[1] for choice in (None, "upstream")
    )
    assert (own, upstream) == (11025 // 64, 12000 // 64)


def test_upstreams_texts_are_a_switch():
    """No words beside those given; a known prompt says what it says, whatever the instruction."""
    processor = with_speakers(3)

    def ids(text: str) -> list[int]:
        return processor.tokenizer(text)["input_ids"]

    def prompt(**options) -> list[int]:
        inputs = processor("b", compatibility="upstream", **options)
        assert inputs["input_ids"][0].tolist() == ids("b.")
        return inputs["prompt_input_ids"][0].tolist()

    assert prompt(mode="zero_shot", prompt_text="a", **TONE) == ids("a")
    assert prompt(mode="instruct2", instruct="a 2", **TONE) == ids("a 2")
    assert prompt(mode="cross_lingual", **TONE) == prompt(mode="sft", speaker="low") == []
    known = processor.speakers["tone"].text_ids.tolist()
    assert known
    assert prompt(mode="zero_shot", speaker="tone") == prompt(mode="instruct2", speaker="tone", instruct="a") == known


@pytest.mark.parametrize("choice", [None, "upstream"])
def test_instructions_of_version_1_have_their_numbers_written_out(choice):
    processor = with_speakers(1)
    inputs = processor("b", speaker="low", instruct="say 2", compatibility=choice)
    expected = "say two" + (END_OF_PROMPT if choice is None else "")
    assert inputs["prompt_input_ids"][0].tolist() == processor.tokenizer(expected)["input_ids"]
    tagged = f"say 2{END_OF_PROMPT}"
    inputs = processor("b", speaker="low", instruct=tagged, compatibility=choice)
    assert inputs["prompt_input_ids"][0].tolist() == processor.tokenizer(tagged)["input_ids"]


def test_speakers_are_mixed_and_kept(tmp_path):
    processor = with_speakers()
    processor.mix_speakers("half / half", {"tone": 2.0, "low": 2.0})
    unit = torch.nn.functional.normalize
    tone, low = (unit(processor.speakers[name].embedding, dim=0) for name in ("tone", "low"))
    torch.testing.assert_close(processor.speakers["half / half"].embedding, (tone + low) / 2)
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert list(again.speakers) == ["tone", "low", "plain", "half / half"]
    for name, speaker in processor.speakers.items():
        for part in ("embedding", "speech_ids", "mel", "text_ids"):
            assert torch.equal(getattr(speaker, part), getattr(again.speakers[name], part)), (name, part)
    with pytest.raises(KeyError, match="nobody"):
        processor.mix_speakers("x", {"nobody": 1.0})
    with pytest.raises(ValueError, match="positive sum"):
        processor.mix_speakers("x", {"tone": 0.0})
    with pytest.raises(ValueError, match="at least one character"):
        processor.add_speaker("", None)


def test_damaged_speakers_are_named(tmp_path):
    path = tmp_path / "speakers.safetensors"
    save_file({"0.embedding": torch.zeros(3)}, path, metadata={"speakers": '["a"]'})
    with pytest.raises(ValueError, match="expected tensors"):
        load_speakers(path)
    save_file({"0.embedding": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="list of names"):
        load_speakers(path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="damaged"):
        load_speakers(path)
