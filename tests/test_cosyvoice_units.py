"""A CosyVoice as both ends of a unit language model: equal to its parts, in batches, in pieces, in the pipeline."""

import json

import numpy as np
import pytest
import soundfile
import torch
from datasets import Dataset
from tiny_cosyvoice import SPEECH_SIZE, generators, recording, tiny_cosyvoice, tiny_processor
from tiny_speechgpt_lm import FIRST_UNIT, NUM_UNITS, build_model, build_tokenizer

from hf_speechllm.cosyvoice_units import CosyVoiceUnits
from hf_speechllm.data.manifests import read_manifest
from hf_speechllm.data.unit_extraction import extract_units
from hf_speechllm.models.pipeline_speechgpt_lm import SpeechGptPipeline
from hf_speechllm.models.processing_speechgpt_lm import SpeechGptProcessor
from hf_speechllm.models.speakers_cosyvoice import CosyVoiceSpeaker


def build(version: int = 2) -> CosyVoiceUnits:
    """Two voices: `anna` with a recording, `ben` without."""
    processor = tiny_processor(version)
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(SPEECH_SIZE, (6,), generator=draw)
    mel = torch.randn(12, processor.feature_extractor.feature_size, generator=draw)
    empty = torch.zeros(0, mel.shape[1])
    processor.speakers["anna"] = CosyVoiceSpeaker(torch.randn(192, generator=draw), ids, mel)
    processor.speakers["ben"] = CosyVoiceSpeaker(torch.randn(192, generator=draw), mel=empty)
    return CosyVoiceUnits(tiny_cosyvoice(version), processor)


@pytest.fixture(scope="module")
def voice() -> CosyVoiceUnits:
    return build()


def draw_units(count: int, seed: int = 0) -> list[int]:
    return torch.randint(SPEECH_SIZE, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_units_are_the_tokenizers_and_a_batch_is_one_by_one(voice):
    clips = [recording(seconds, seed, 16000) for seed, seconds in enumerate((1.0, 0.5))]
    values = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(clip).long() for clip in clips], batch_first=True)
    together = voice.encode(values, mask).reduced_ids
    for row, clip in zip(together, clips, strict=True):
        alone = voice.encode(clip[None], torch.ones(1, len(clip)).long()).reduced_ids[0]
        assert torch.equal(row[: len(alone)], alone) and (row[len(alone) :] == -1).all()
    inputs = voice.processor(source_audio=clips[0].numpy(), sampling_rate=16000, speaker="anna")
    ids, _ = voice.model.encode_speech(inputs["source_features"], inputs["source_features_mask"])
    assert torch.equal(ids[0], together[0]) and len(ids[0]) == 25


@pytest.mark.parametrize("version", (1, 2, 3))
def test_sound_is_that_of_the_parts_in_any_batch(version):
    voice = build(version)
    rows = [draw_units(9), [], draw_units(14, seed=1)]
    batch = voice.synthesize_batch([rows[0], "", "<sosp>" + "".join(f"<{u}>" for u in rows[2]) + "<eosp>"], "anna")
    assert not len(batch[1]) and batch[2].abs().max() > 0
    torch.testing.assert_close(voice.synthesize(rows[0], "anna"), batch[0], atol=1e-5, rtol=1e-5)
    prompt = voice._voice("anna", 1)
    ids = torch.tensor([rows[0]])
    mel, mask = voice.model.token_to_mel(ids, torch.ones_like(ids), prompt, generator=generators(1))
    assert len(batch[0]) == mel.shape[1] * voice.config.vocoder_config.hop_length
    assert not torch.equal(voice.synthesize(rows[0], "ben")[:100], batch[0][:100])


@pytest.mark.parametrize("version", (2, 3))
def test_units_one_by_one_sound_like_one_pass_of_a_stream(version):
    voice = build(version)
    units, prompt = draw_units(23), voice._voice("anna", 1)
    ids = torch.tensor([units])
    mel, mask = voice.model.token_to_mel(ids, torch.ones_like(ids), prompt, streaming=True)
    expected, _ = voice.model.mel_to_waveform(mel, mask, generator=torch.Generator().manual_seed(0))
    for size in (1, 5, 23):
        stream = voice.start_stream("anna")
        pieces = [stream.push(units[start : start + size]) for start in range(0, len(units), size)]
        pieces.append(stream.push([], is_last=True))
        torch.testing.assert_close(torch.cat(pieces), expected[0], atol=1e-5, rtol=1e-5)


def test_misuse_is_refused(voice):
    with pytest.raises(KeyError, match=r"\['anna', 'ben'\], got 'carl'"):
        voice.synthesize([1], "carl")
    with pytest.raises(ValueError, match="speech token ids: expected below 27, got 27"):
        voice.synthesize([1, 27], "anna")
    with pytest.raises(ValueError, match="speech token ids: expected below 27, got 30"):
        voice.start_stream("anna").push([30])


def test_the_pipeline_hears_and_speaks_with_it(voice):
    processor = SpeechGptProcessor(build_tokenizer())
    pipe = SpeechGptPipeline(
        model=build_model(), processor=processor, units=voice, vocoder=voice, voice={"speaker": "ben"}
    )
    samples = recording(1.0, rate=16000).numpy()
    unknown = list(range(FIRST_UNIT + SPEECH_SIZE, FIRST_UNIT + NUM_UNITS))
    options = {"do_sample": False, "max_new_tokens": 30, "suppress_tokens": [1, 2, *unknown]}
    result = pipe(samples, sampling_rate=16000, **options)
    assert result["question"].count("<") == 25 + 2
    assert result["units"] and max(result["units"]) < SPEECH_SIZE
    assert result["sampling_rate"] == voice.config.sampling_rate
    assert np.array_equal(result["audio"], voice.synthesize(result["units"], "ben").numpy())
    question = {"audio": samples, "sampling_rate": 16000}
    pieces = list(pipe.stream(question, min_units=4, **options))
    assert [unit for piece in pieces for unit in piece.units] == result["units"]
    sound = torch.cat([piece.audio for piece in pieces if piece.audio is not None])
    assert len(sound) == len(result["audio"])


def test_extraction_keeps_repeats(voice, tmp_path):
    rows = []
    for number, seconds in enumerate((0.4, 1.0, 0.7)):
        soundfile.write(tmp_path / f"{number}.wav", recording(seconds, number, 16000).numpy(), 16000)
        rows.append({"audio": f"{number}.wav", "text": "a", "speaker": "x"})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    utterances = read_manifest(tmp_path / "data.jsonl")
    found = Dataset.from_list(extract_units(voice.model.speech_tokenizer, utterances, 1.5, progress=False))
    for row, item in zip(found, utterances, strict=True):
        clip = torch.from_numpy(soundfile.read(item.audio, dtype="float32")[0])
        alone = voice.encode(clip[None], torch.ones(1, len(clip)).long()).reduced_ids[0]
        assert row["units"] == alone.tolist() and row["durations"] == [1] * len(alone)
