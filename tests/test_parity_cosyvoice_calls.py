"""What conversion/check_parity.py makes of the calls that a CosyVoice case describes."""

import sys
from pathlib import Path

import pytest
import torch


sys.path.insert(0, str(Path(__file__).parents[1] / "conversion"))
from parity.case import Case
from parity.cosyvoice_calls import Call, mode_of_inputs, read_call


def case_of(folder: Path, what: str, name: str = "call", inputs: tuple[str, ...] = (), **facts) -> Case:
    """A case of one call with recordings of these names beside it."""
    for file in ("prompt.wav", "prompt-16k.flac", "source.wav"):
        (folder / file).touch()
    tensors = {f"{name}.in.{key}": torch.zeros(1) for key in inputs} | {f"{name}.wav0": torch.zeros(1)}
    facts = {"text": "of all", "prompt_text": "said", "tensors": {f"{name}.wav0": {"what": what}}} | facts
    return Case(folder, facts, tensors, 0.0, 0.0)


CALLS = [
    (
        "inference_zero_shot(text, prompt_text, prompt.wav), piece 0",
        Call("zero_shot", "of all", "said", prompt_audio=Path("prompt.wav")),
    ),
    (
        "inference_zero_shot(..., stream=True), piece 0",
        Call("zero_shot", "of all", "said", prompt_audio=Path("prompt.wav"), stream=True),
    ),
    (
        'inference_instruct2("one (1)", "two, \\"2\\"<|endofprompt|>", prompt-16k.flac, speed=1.5) (0)',
        Call("instruct2", "one (1)", None, 'two, "2"<|endofprompt|>', prompt_audio=Path("prompt-16k.flac"), speed=1.5),
    ),
    (
        'inference_sft("中文", "中文女", text_frontend=False)',
        Call("sft", "中文", speaker="中文女", normalize=False),
    ),
    (
        "CosyVoice.inference_instruct(text, spk_id, instruct_text, stream=False)",
        Call("instruct", "of all", None, "softly", speaker="her"),
    ),
    (
        'inference_zero_shot(text, "", "", zero_shot_spk_id="mine")',
        Call("zero_shot", "of all", "", speaker="mine", saved_prompt=True),
    ),
    (
        "inference_vc(source.wav, prompt.wav)",
        Call("vc", source_audio=Path("source.wav"), prompt_audio=Path("prompt.wav")),
    ),
    ("inference_cross_lingual(what?, piece 1", Call("cross_lingual", "of all", prompt_audio=Path("prompt.wav"))),
]  # fmt: skip


@pytest.mark.parametrize(("what", "expected"), CALLS)
def test_written_calls(tmp_path, what, expected):
    for field in ("prompt_audio", "source_audio"):
        if (path := getattr(expected, field)) is not None:
            setattr(expected, field, tmp_path / path.name)
    assert read_call(case_of(tmp_path, what, spk_id="her", instruct_text="softly"), "call") == expected


@pytest.mark.parametrize(
    ("name", "mode", "stream"),
    [
        ("sft_stream", "sft", True),
        ("stream_vc", "vc", True),
        ("voice_conversion", "vc", False),
        ("instruct2_b", "instruct2", False),
        ("instruct", "instruct", False),
        ("cross_lingual_48k", "cross_lingual", False),
    ],
)
def test_calls_by_their_names(tmp_path, name, mode, stream):
    call = read_call(case_of(tmp_path, "the samples", name), name)
    assert (call.mode, call.stream) == (mode, stream)


def test_calls_by_their_inputs(tmp_path):
    recorded = ("flow_prompt_speech_token", "prompt_speech_feat")
    expected = {
        (*recorded, "llm_prompt_speech_token", "prompt_text"): "zero_shot",
        (*recorded, "source_speech_token"): "vc",
        (*recorded, "prompt_text", "text"): "instruct2",
        (*recorded, "text"): "cross_lingual",
        ("prompt_text", "text"): "instruct",
        ("text",): "sft",
    }
    for inputs, mode in expected.items():
        assert mode_of_inputs(set(inputs)) == mode
        assert read_call(case_of(tmp_path, "the samples", inputs=inputs), "call").mode == mode
    listed = case_of(tmp_path, "", inputs_passed={"call": ["text", "prompt_text"]}, text={"call": "mine"})
    assert read_call(listed, "call").mode == "instruct" and read_call(listed, "call").text == "mine"
