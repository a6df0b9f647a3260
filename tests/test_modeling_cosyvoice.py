"""A complete CosyVoice: modes, batches, speeds, saving, and where the package is not installed."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_cosyvoice import generators, recording, tiny_cosyvoice, tiny_processor
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForTextToWaveform, AutoProcessor

from hf_speechllm.hub import clean_process
from hf_speechllm.models.configuration_cosyvoice import CosyVoiceConfig
from hf_speechllm.models.modeling_cosyvoice import CosyVoiceForTextToWaveform, change_speed
from hf_speechllm.models.processing_cosyvoice import CosyVoiceProcessor


VERSIONS = (1, 2, 3)
every_version = pytest.mark.parametrize("version", VERSIONS)
LIMITS = {"max_token_text_ratio": 4.0, "min_token_text_ratio": 1.0}

REMOTE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("clean_process", sys.argv[1])
clean_process = importlib.util.module_from_spec(spec)
spec.loader.exec_module(clean_process)
sys.meta_path.insert(0, clean_process.PackageBlocker())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForTextToWaveform, AutoProcessor, pipeline
torch.set_num_threads(1)
folder, audio, output, again = sys.argv[2:]
model = AutoModelForTextToWaveform.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
prompt = load_file(audio)["audio"]
inputs = processor(["hello", "a b c"], prompt_audio=prompt, prompt_text="yes", sampling_rate=24000)
one = [torch.Generator().manual_seed(row) for row in range(2)]
waveform = model.generate(**inputs, generator=one, max_token_text_ratio=4.0).waveform
speak = pipeline("text-to-speech", model=folder, trust_remote_code=True)
spoken = speak("hello", speaker="tone", seed=3, max_token_text_ratio=4.0)
assert type(speak).__module__.startswith("transformers_modules."), type(speak)
save_file({"waveform": waveform, "spoken": torch.from_numpy(spoken["audio"])}, output)
model.save_pretrained(again)
processor.save_pretrained(again)
"""


@pytest.fixture(scope="module")
def models() -> dict[int, CosyVoiceForTextToWaveform]:
    return {version: tiny_cosyvoice(version) for version in VERSIONS}


def with_speakers(model: CosyVoiceForTextToWaveform) -> CosyVoiceProcessor:
    """A processor that knows the voices `tone`, with a recording, and `plain`, without."""
    processor = tiny_processor(model.config.version)
    features = processor.prompt_features([recording(0.9), recording(0.7, seed=2)], 24000)
    prompt = model.encode_prompt(**features)
    processor.add_speaker("tone", prompt, "yes no")
    processor.add_speaker("other", prompt, row=1)
    processor.mix_speakers("plain", {"tone": 1.0, "other": 3.0})
    return processor


def waveforms(output) -> list[Tensor]:
    return [row[mask.bool()] for row, mask in zip(output.waveform, output.waveform_mask, strict=True)]


@every_version
def test_a_row_of_mixed_modes_equals_the_row_alone(models, version):
    """Every mode at once: recordings, known speakers, instructions; lengths from 1 to 11 characters."""
    model = models[version]
    processor = with_speakers(model)
    rows = [
        {"text": "hello you", "mode": "zero_shot", "prompt_audio": recording(1.1, 1), "prompt_text": "no, 2"},
        {"text": "abc", "mode": "sft", "speaker": "plain"},
        {"text": "q", "mode": "cross_lingual", "speaker": "other"},
        {"text": "one or two.", "mode": "zero_shot", "speaker": "tone"},
        {"text": "well", "mode": "cross_lingual", "prompt_audio": recording(0.6, 3)},
        {"text": "why", "mode": "instruct" if version == 1 else "instruct2", "speaker": "tone", "instruct": "low"},
    ]
    names = sorted({name for row in rows for name in row})
    together = processor(**{name: [row.get(name) for row in rows] for name in names}, sampling_rate=24000)
    output = model.generate(**together, generator=generators(len(rows)), **LIMITS)
    assert output.waveform.shape[0] == len(rows) and torch.isfinite(output.waveform).all()
    for number, row in enumerate(rows):
        inputs = processor(**row, sampling_rate=24000)
        alone = model.generate(**inputs, generator=[torch.Generator().manual_seed(number)], **LIMITS)
        count = int(alone.speech_mask.sum())
        assert count and int(output.speech_mask[number].sum()) == count
        assert torch.equal(output.speech_ids[number, :count], alone.speech_ids[0]), row
        torch.testing.assert_close(waveforms(output)[number], waveforms(alone)[0], atol=2e-5, rtol=1e-4)


@every_version
def test_modes_say_different_things(models, version):
    """What a mode withholds from a model does not reach it."""
    model = models[version]
    processor = with_speakers(model)
    greedy = {"do_sample": False, **LIMITS}
    results = {}
    instruct = "instruct" if version == 1 else "instruct2"
    for mode in ("sft", "zero_shot", "cross_lingual", instruct):
        inputs = processor("hello you", mode=mode, speaker="tone", **({"instruct": "x"} if mode == instruct else {}))
        prompt_tokens = int(inputs["prompt_speech_mask"].sum())
        assert (prompt_tokens > 0) == (mode in ("zero_shot", "cross_lingual", "instruct2")), mode
        results[mode] = model.generate(**inputs, generator=torch.Generator().manual_seed(0), **greedy)
    tokens = {mode: output.speech_ids[0].tolist() for mode, output in results.items()}
    assert tokens["zero_shot"] != tokens["sft"] and tokens[instruct] != tokens["sft"]
    # The language model reads the same in both; the flow has a prompt in one of them.
    assert tokens["sft"] == tokens["cross_lingual"]
    assert not torch.allclose(results["sft"].mel, results["cross_lingual"].mel, atol=1e-3)


@every_version
def test_voice_conversion_keeps_the_tokens_of_the_source(models, version):
    model = models[version]
    processor = with_speakers(model)
    sources = [recording(0.8, 1), recording(0.5, 2)]
    together = processor(source_audio=sources, speaker="tone", sampling_rate=24000)
    output = model.generate(**together, generator=generators(2))
    for number, source in enumerate(sources):
        alone = processor(source_audio=source, speaker="tone", sampling_rate=24000)
        expected, _ = model.encode_speech(alone["source_features"], alone["source_features_mask"])
        count = expected.shape[1]
        assert torch.equal(output.speech_ids[number, :count], expected[0])
        one = model.generate(**alone, generator=[torch.Generator().manual_seed(number)])
        torch.testing.assert_close(waveforms(output)[number], waveforms(one)[0], atol=2e-5, rtol=1e-4)


@every_version
def test_speed_changes_the_length_alone(models, version):
    model = models[version]
    inputs = with_speakers(model)("hello you", speaker="plain")
    options = {"do_sample": False, **LIMITS}
    plain = model.generate(**inputs, generator=generators(1), **options)
    fast = model.generate(**inputs, generator=generators(1), speed=1.7, **options)
    assert torch.equal(plain.speech_ids, fast.speech_ids)
    assert fast.mel.shape[1] == int(plain.mel.shape[1] / 1.7)
    assert fast.waveform.shape[1] == fast.mel.shape[1] * model.vocoder.config.hop_length
    with pytest.raises(ValueError, match="speed: expected a positive number, got 0"):
        model.generate(**inputs, speed=0)


def test_speed_interpolates_each_row_by_itself():
    mel = torch.randn(2, 9, 4)
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    changed, changed_mask = change_speed(mel, mask, 0.5)
    assert changed_mask.sum(1).tolist() == [18, 10]
    alone, _ = change_speed(mel[1:, :5], mask[1:, :5], 0.5)
    assert torch.equal(changed[1, :10], alone[0])


@every_version
def test_the_same_generator_gives_the_same_voice(models, version):
    model = models[version]
    inputs = with_speakers(model)("hello", speaker="tone", mode="cross_lingual")
    first, second, other = (
        model.generate(**inputs, generator=torch.Generator().manual_seed(seed), **LIMITS) for seed in (1, 1, 2)
    )
    assert torch.equal(first.waveform, second.waveform)
    assert first.waveform.shape != other.waveform.shape or not torch.equal(first.waveform, other.waveform)


@every_version
def test_prompts_are_aligned_in_versions_2_and_3(models, version):
    model = models[version]
    features = tiny_processor(version).prompt_features([recording(1.013), recording(0.535)], 24000)
    prompt = model.encode_prompt(**features)
    frames, tokens = prompt.mel_mask.sum(1), prompt.speech_mask.sum(1)
    if version == 1:
        assert torch.equal(frames, features["prompt_mel_mask"].sum(1))
    else:
        assert torch.equal(frames, 2 * tokens)
    for row, count in enumerate(frames.tolist()):
        assert torch.equal(prompt.mel[row, :count], features["prompt_mel"][row, :count])
        assert not prompt.mel[row, count:].any()


@pytest.mark.parametrize("version", [2, 3])
def test_prompts_that_are_given_stay_unaligned(models, version):
    """Tokens and frames as upstream's voice conversion passes them on: five tokens beside thirteen frames."""
    model = models[version]
    names = ("prompt_features", "prompt_fbank", "prompt_mel", "prompt_speech")
    given = dict.fromkeys([*names[:2], *(f"{name}_mask" for name in names)])
    given |= {"prompt_speech_ids": torch.tensor([[3, 1, 4, 1, 5]]), "prompt_mel": torch.randn(1, 13, 20)}
    prompt = model.read_prompt(1, **given, speaker_embedding=torch.ones(1, 192))
    assert torch.equal(prompt.speech_ids, given["prompt_speech_ids"]) and prompt.speech_mask.all()
    assert torch.equal(prompt.mel, given["prompt_mel"]) and prompt.mel_mask.all()


def test_empty_text_is_silence(models):
    """Alone and beside others."""
    model = models[2]
    processor = with_speakers(model)
    alone = model.generate(**processor("", speaker="plain"), **LIMITS)
    assert alone.waveform.shape == (1, 0)
    output = model.generate(**processor(["", "hello"], speaker="plain"), generator=generators(2), **LIMITS)
    assert output.waveform_mask.sum(1).tolist()[0] == 0 < output.waveform_mask.sum(1).tolist()[1]


def test_what_is_missing_is_said(models):
    model = models[2]
    ids = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="expected either input_ids or source_features"):
        model.generate()
    with pytest.raises(ValueError, match="expected a voice"):
        model.generate(input_ids=ids)
    with pytest.raises(ValueError, match="compatibility"):
        model.generate(input_ids=ids, speaker_embedding=torch.ones(1, 192), compatibility="mine")


@every_version
def test_saved_and_loaded_it_is_the_same(models, version, tmp_path):
    model, processor = models[version], with_speakers(models[version])
    model.save_pretrained(tmp_path / "first")
    processor.save_pretrained(tmp_path / "first")
    loaded, loading = AutoModelForTextToWaveform.from_pretrained(tmp_path / "first", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    again = AutoProcessor.from_pretrained(tmp_path / "first")
    assert type(loaded) is CosyVoiceForTextToWaveform and type(again) is CosyVoiceProcessor
    assert isinstance(AutoModel.from_pretrained(tmp_path / "first"), CosyVoiceForTextToWaveform)
    loaded.save_pretrained(tmp_path / "second")
    again.save_pretrained(tmp_path / "second")
    for path in (tmp_path / "first").iterdir():
        if path.name == "tokenizer_config.json":  # transformers notes in it where it was loaded from
            continue
        assert (tmp_path / "second" / path.name).read_bytes() == path.read_bytes(), path.name
    inputs, other = (known("hello", speaker="tone") for known in (processor, again))
    for name, value in inputs.items():
        assert torch.equal(value, other[name]), name
    expected = model.generate(**inputs, generator=generators(1), **LIMITS).waveform
    assert torch.equal(loaded.eval().generate(**other, generator=generators(1), **LIMITS).waveform, expected)


def test_remote_code_equals_the_package(models, tmp_path):
    model, processor = models[2], with_speakers(models[2])
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    save_file({"audio": recording(0.8)}, tmp_path / "audio.safetensors")
    (tmp_path / "remote.py").write_text(REMOTE, encoding="utf-8")
    files = [tmp_path / name for name in ("model", "audio.safetensors", "out.safetensors", "again")]
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
    done = subprocess.run(
        [sys.executable, "-I", str(tmp_path / "remote.py"), clean_process.__file__, *map(str, files)],
        env={**kept, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    output = load_file(tmp_path / "out.safetensors")
    inputs = processor(["hello", "a b c"], prompt_audio=recording(0.8), prompt_text="yes", sampling_rate=24000)
    expected = model.generate(**inputs, generator=generators(2), max_token_text_ratio=4.0).waveform
    torch.testing.assert_close(output["waveform"], expected, atol=1e-6, rtol=1e-5)
    inputs = processor("hello", speaker="tone")
    expected = model.generate(**inputs, generator=generators(1, seed=3), max_token_text_ratio=4.0).waveform
    torch.testing.assert_close(output["spoken"], expected[0], atol=1e-6, rtol=1e-5)
    code = {path.name for path in folder.glob("*.py")}
    assert {path.name for path in (tmp_path / "again").glob("*.py")} == code
    assert (tmp_path / "again" / "speakers.safetensors").is_file()


def test_parts_name_no_code_and_no_place(models, tmp_path):
    models[2].flow.save_pretrained(tmp_path)
    content = {**models[2].config.to_dict(), "flow_config": AutoConfig.from_pretrained(tmp_path)}
    text = CosyVoiceConfig(**content).to_json_string()
    assert str(tmp_path) not in text and text.count("auto_map") == 1


def test_parts_that_do_not_fit_are_refused(models):
    content = models[2].config.to_dict()
    assert CosyVoiceConfig(**content).to_dict() == content
    content["flow_config"] = {**content["flow_config"], "vocab_size": 99}
    with pytest.raises(ValueError, match=r"flow_config.vocab_size: expected 27"):
        CosyVoiceConfig(**content)
    with pytest.raises(ValueError, match=r"lm_config.model_type: expected one of"):
        CosyVoiceConfig(lm_config={"model_type": "llama"})
    with pytest.raises(ValueError, match="version: expected 1, 2 or 3"):
        CosyVoiceConfig(**{**models[2].config.to_dict(), "version": 4})
