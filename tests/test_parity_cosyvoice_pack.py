"""conversion/check_parity.py on a complete CosyVoice pack: which calls and tensors it looks at, and what it notices.

The expected values are our own: upstream's are in golden cases that are too large for the repository. What is tested
is that nothing of a case is left out.
"""

import json
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from tiny_cosyvoice import recording
from tiny_cosyvoice_pack import CODES, write_pack
from torch import Tensor
from transformers import AutoModelForTextToWaveform, AutoProcessor

from hf_speechllm.models.modeling_cosyvoice import CosyVoicePrompt


sys.path.insert(0, str(Path(__file__).parents[1] / "conversion"))
import check_parity
import convert_cosyvoice


# Two sentences, because each is longer than the shortest that is divided.
TEXT = ("hello you and all " * 5).strip()
CALLS = {
    "sft": (f'inference_sft("{TEXT}. {TEXT}", "中文女")', {"speaker": "中文女"}, (f"{TEXT}.", f" {TEXT}.")),
    "voices": ("inference_zero_shot(text, '', '', zero_shot_spk_id='mine', speed=2.0)", {"speaker": "mine"}, ("hi.",)),
    "zero_shot": (
        'inference_zero_shot("yes", prompt_text, prompt.wav)',
        {"prompt_audio": "prompt.wav", "prompt_text": "he"},
        ("yes.",),
    ),
}


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Path:
    """A pack, and what our model makes of it in upstream's way."""
    folder = tmp_path_factory.mktemp("cases") / "case"
    write_pack(folder)
    weights = torch.load(folder / "llm.pt")
    # It ends as soon as it may.
    weights["llm_decoder.bias"][CODES] += 100
    torch.save(weights, folder / "llm.pt")
    soundfile.write(folder / "prompt.wav", recording(0.8).numpy(), 24000)
    convert_cosyvoice.convert_cosyvoice_pack(folder, folder.parent / "model")
    model = AutoModelForTextToWaveform.from_pretrained(folder.parent / "model").eval()
    processor = AutoProcessor.from_pretrained(folder.parent / "model")
    tensors: dict[str, Tensor] = {}
    described: dict[str, dict[str, str]] = {}
    with torch.no_grad():
        for name, (what, options, sentences) in CALLS.items():
            if "prompt_audio" in options:
                options = options | {"prompt_audio": folder / options["prompt_audio"]}
            for number, sentence in enumerate(sentences):
                made = speak(model, processor, sentence, options, 2.0 if "speed" in what else 1.0)
                part = "in" if number == 0 else f"in{number}"
                tensors |= {f"{name}.{part}.{key}": value for key, value in made[0].items()}
                tensors |= {f"{name}.{key}{number}": value for key, value in made[1].items()}
            described |= {key: {"what": what} for key in tensors if key.startswith(f"{name}.")}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "io.safetensors")
    facts = {"case": "tiny", "text": "hi", "prompt_text": "he", "tensors": described}
    (folder / "case.json").write_text(json.dumps(facts), encoding="utf-8")
    return folder


def speak(model, processor, text: str, options: dict, speed: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What goes into the models, and what comes out of them, with upstream's names and shapes."""
    inputs = dict(processor(text, normalize=False, compatibility="upstream", **options))
    names = [name for name in inputs if name.startswith("prompt_") and "input" not in name and "attention" not in name]
    given = dict.fromkeys(("prompt_features", "prompt_fbank", "prompt_mel", "prompt_speech_ids"))
    given |= {f"{name.removesuffix('_ids')}_mask": None for name in given} | {name: inputs[name] for name in names}
    prompt = model.read_prompt(1, **given, speaker_embedding=inputs.get("speaker_embedding"))
    output = model.generate(**inputs, do_sample=False, compatibility="upstream")
    tokens = output.speech_ids
    mel, mask = model.token_to_mel(tokens, torch.ones_like(tokens), prompt)
    fast = torch.nn.functional.interpolate(mel.transpose(1, 2), size=int(mel.shape[1] / speed), mode="linear")
    heard = fast.transpose(1, 2) if speed != 1.0 else mel
    samples = heard.shape[1] * model.config.vocoder_config.hop_length
    noise = torch.randn(1, samples, 9, generator=torch.Generator().manual_seed(0))
    waveform, _ = model.mel_to_waveform(heard, mask[:, : heard.shape[1]], compatibility="upstream", noise=noise)
    before = {
        "text": inputs["input_ids"].int(),
        "prompt_text": inputs["prompt_input_ids"].int(),
        "flow_prompt_speech_token": prompt.speech_ids.int(),
        "prompt_speech_feat": prompt.mel,
        "flow_embedding": prompt.speaker_embedding,
    }
    after = {"speech_token": tokens.int(), "mel": mel.transpose(1, 2)[:, ::4], "noise": noise, "wav": waveform}
    return before, after


def check(case: Path, capsys) -> tuple[list[dict], list[str]]:
    passed, failed = check_parity.check_case(case)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    names = [line["name"] for line in lines if not line["pass"]]
    assert (passed, failed) == (len(lines) - len(names), len(names))
    return lines, names


def test_everything_is_looked_at(case, capsys):
    lines, failed = check(case, capsys)
    assert not failed
    # What goes in is five tensors a sentence, what comes out three; four sentences.
    assert len(lines) == 4 * 8


def test_what_differs_is_noticed(case, capsys):
    tensors = load_file(case / "io.safetensors")
    facts = json.loads((case / "case.json").read_text(encoding="utf-8"))
    changed = {
        "sft.in1.text": tensors["sft.in1.text"] + 1,
        "sft.mel1": tensors["sft.mel1"] + 0.01,
        "voices.wav0": tensors["voices.wav0"] + 0.01,
        "zero_shot.in.prompt_text": tensors["zero_shot.in.prompt_text"][:, :-1],
        "zero_shot.energy": torch.zeros(3),
        "other.wav0": torch.zeros(1, 480),
    }
    try:
        save_file(tensors | changed, case / "io.safetensors")
        described = facts["tensors"] | {"other.wav0": {"what": "inference_sft(text, 'nobody')"}}
        (case / "case.json").write_text(json.dumps(facts | {"tensors": described}), encoding="utf-8")
        _, failed = check(case, capsys)
    finally:
        save_file(tensors, case / "io.safetensors")
        (case / "case.json").write_text(json.dumps(facts), encoding="utf-8")
    # A call that cannot run is said once more under the names that it leaves.
    assert set(changed) | {"other.run"} <= set(failed)
    assert not {"sft.in.text", "sft.mel0", "voices.mel0", "voices.in.text", "zero_shot.in.text"} & set(failed)


@torch.no_grad()
def test_streams_of_version_1_are_cut_as_the_model_cuts_them():
    """The pieces that are checked against upstream's are those of the model's own stream."""
    from parity.cosyvoice_pack import PackChecks
    from tiny_cosyvoice import SPEECH_SIZE, tiny_cosyvoice

    model = tiny_cosyvoice(1)
    flow, draw = model.flow, torch.Generator().manual_seed(0)
    tokens = torch.randint(SPEECH_SIZE, (1, 2 * 50 + flow.stream_overlap_tokens + 7), generator=draw)
    empty = torch.zeros(1, 0, dtype=torch.long)
    prompt = CosyVoicePrompt(
        empty, empty, torch.zeros(1, 0, flow.config.num_mel_bins), empty, torch.randn(1, 192, generator=draw)
    )
    noise = torch.randn(1, 2000, flow.config.num_mel_bins, generator=draw)
    seen: list[Tensor] = []
    checks = object.__new__(PackChecks)
    checks.model, checks.mels, checks.draws = model, 0, {"flow": [noise]}
    checks.check_mel = lambda mel: None
    checks.vocode = lambda mel, state, draws, is_last: seen.append(mel)
    checks.check_overlapping_stream(tokens, prompt)
    state = flow.start_stream(prompt.speaker_embedding)
    pieces = []
    for token in tokens[0]:
        assert len(state.waiting[0]) < state.hop_tokens + flow.stream_overlap_tokens
        output, state = flow.stream_mel(state, token[None, None])
        pieces.append(output.mel)
    output, state = flow.stream_mel(state, empty, is_last=True)
    expected = [piece.shape[1] for piece in [*pieces, output.mel] if piece.shape[1]]
    assert [mel.shape[1] for mel in seen] == expected and len(expected) > 1
