"""The unit vocoder: batches, durations, voices, pitch, weight norm, saving, remote code."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_speechgpt_units import GENERATOR, tiny_vocoder
from transformers import AutoModel, AutoModelForTextToWaveform

from hf_speechllm.hub import clean_process
from hf_speechllm.models.configuration_speechgpt_unit_vocoder import SpeechGptUnitVocoderConfig
from hf_speechllm.models.modeling_speechgpt_unit_vocoder import SpeechGptUnitVocoderModel


VOICES = {"num_speakers": 3, "speakers": ["ann", "bob", "cy"], "num_styles": 2, "styles": ["calm", "loud"]}
# Upsampling whose kernel and rate differ by an odd number leaves one step more per layer.
ODD = {"hifigan_config": {**GENERATOR, "upsample_rates": [5, 4, 2], "upsample_kernel_sizes": [11, 7, 5]}}
UNITS = ([1, 2, 3, 4, 5, 6, 7], [9], [4, 4, 4, 2], [], list(range(20)))


def batch_of(rows) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[3] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask


# ---------------------------------------------------------------------------------------------------------------------
# Batches


@pytest.mark.parametrize("changes", [{}, VOICES, ODD], ids=["plain", "voices", "odd"])
@pytest.mark.parametrize("predict", [False, True])
@pytest.mark.parametrize("gradient", [False, True])
def test_item_of_a_batch_equals_the_item_alone(changes, predict, gradient):
    """Without gradients each goes by itself on a CPU; with them all go together, masked before every convolution."""
    model = tiny_vocoder(**changes).double()
    voices = {"speaker_id": torch.tensor([0, 1, 2, 0, 1]), "style_id": torch.tensor([1, 0, 1, 0, 0])}
    voices = voices if "num_speakers" in changes else {}
    with torch.set_grad_enabled(gradient):
        together = model(*batch_of(UNITS), predict_durations=predict, **voices)
    for row, units in enumerate(UNITS):
        if not units:
            assert together.lengths[row] == 0 and (together.waveform[row] == 0).all()
            continue
        alone = model(
            torch.tensor([units]),
            predict_durations=predict,
            **{name: value[row : row + 1] for name, value in voices.items()},
        )
        length = int(together.lengths[row])
        assert length == alone.waveform.shape[1] == model.config.num_samples(int(alone.durations.sum()))
        torch.testing.assert_close(together.waveform[row, :length], alone.waveform[0], atol=1e-10, rtol=1e-8)
        assert (together.waveform[row, length:] == 0).all()
        assert torch.equal(together.durations[row, : len(units)], alone.durations[0])
        assert alone.waveform.std() > 1e-3, "the waveform says something"


def test_dropped_units_are_not_there():
    model = tiny_vocoder(**VOICES)
    with_holes = model(torch.tensor([[4, -1, 5, -1, 6], [-7, -1, 7, 8, 9]]), speaker_id=1)
    without = model(torch.tensor([[4, 5, 6], [7, 8, 9]]), speaker_id=1)
    torch.testing.assert_close(with_holes.waveform, without.waveform, atol=1e-6, rtol=1e-5)
    assert torch.equal(with_holes.lengths, without.lengths)
    nothing = model(torch.tensor([[-1, -1]]))
    assert nothing.waveform.shape == (1, 0) and nothing.lengths.tolist() == [0]


def test_no_bleeding_into_the_end():
    """What stands in the padding changes nothing."""
    model = tiny_vocoder()
    ids, mask = batch_of(UNITS)
    other = torch.where(mask.bool(), ids, 17)
    assert torch.equal(model(ids, mask).waveform, model(other, mask).waveform)


# ---------------------------------------------------------------------------------------------------------------------
# Durations


def test_durations_given_are_repeats():
    model, units = tiny_vocoder(), torch.tensor([[3, 8, 1]])
    repeated = model(torch.tensor([[3, 3, 1, 1, 1]]), predict_durations=False)
    given = model(units, durations=torch.tensor([[2, 0, 3]]))
    assert torch.equal(model.synthesize(units[0], durations=torch.tensor([2, 0, 3])), given.waveform[0])
    several = model.synthesize_batch([units[0], [1]], durations=[[2, 0, 3], [4]])
    torch.testing.assert_close(several[0], given.waveform[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(several[1], model.synthesize([1], durations=[4]), atol=1e-5, rtol=1e-4)
    assert torch.equal(given.waveform, repeated.waveform)
    predicted = model(units)
    again = model(units, durations=predicted.durations)
    assert torch.equal(predicted.waveform, again.waveform) and again.log_durations is None
    assert predicted.durations.max() > 1, "more than the least"


def test_rounding_is_upstreams():
    """Halves go to the even number, and nothing is shorter than a frame."""
    frames = torch.tensor([0.2, 1.5, 2.5, 3.49, 3.51, -0.9])
    assert SpeechGptUnitVocoderModel.frames_of((frames.double() + 1).log()).tolist() == [1, 2, 2, 3, 4, 1]


def test_duration_loss():
    model = tiny_vocoder().train()
    units, labels = torch.tensor([[3, 8, 1], [5, 0, 0]]), torch.tensor([[2, 1, 7], [4, 0, 0]])
    model.duration_predictor.dropout.p = 0.0
    output = model(
        torch.tensor([[3, 3]] * 2), predict_durations=False, duration_unit_ids=units, duration_labels=labels
    )
    squares = []
    for row, count in ((0, 3), (1, 1)):
        said = model.predict_log_durations(units[row : row + 1, :count], torch.ones(1, count, dtype=torch.bool))[0]
        squares += ((said - (labels[row, :count] + 1).log()) ** 2).tolist()
    assert output.loss.item() == pytest.approx(sum(squares) / 4, rel=1e-5)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.duration_predictor.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Pitch and voices


def test_pitch_is_aligned_by_whole_numbers():
    model = tiny_vocoder(use_f0=True, num_f0_bins=5)
    units, bins = torch.tensor([[3, 8, 1]]), torch.tensor([[0, 4, 2]])
    fine = model(units, predict_durations=False, f0=bins.repeat_interleave(2, dim=1))
    coarse = model(units.repeat_interleave(2, dim=1), predict_durations=False, f0=bins.repeat_interleave(2, dim=1))
    assert torch.equal(fine.waveform, coarse.waveform)
    other = model(units, predict_durations=False, f0=torch.tensor([[1, 4, 2]]))
    assert (other.waveform - model(units, predict_durations=False, f0=bins).waveform).abs().max() > 1e-3
    # Pitch of a dropped unit goes with it.
    holes = model(torch.tensor([[3, -1, 8, 1]]), predict_durations=False, f0=torch.tensor([[0, 3, 4, 2]]))
    assert torch.equal(holes.waveform, model(units, predict_durations=False, f0=bins).waveform)
    with pytest.raises(ValueError, match=r"f0\[0\]: expected a multiple or a divisor of 3 frames, got 4"):
        model(units, predict_durations=False, f0=torch.zeros(1, 4))


def test_pitch_in_a_batch():
    model = tiny_vocoder(use_f0=True)
    ids, mask = batch_of([[1, 2, 3, 4], [5, 6]])
    pitch = torch.tensor([[0.1, 0.5, 0.2, 0.9], [0.7, 0.3, 5.0, 5.0]])
    together = model(ids, mask, predict_durations=False, f0=pitch)
    alone = model(ids[1:, :2], predict_durations=False, f0=pitch[1:, :2])
    torch.testing.assert_close(together.waveform[1, :640], alone.waveform[0], atol=1e-5, rtol=1e-4)
    masked = model(ids, mask, predict_durations=False, f0=pitch, f0_attention_mask=mask)
    assert torch.equal(masked.waveform, together.waveform)


def test_voices():
    model, units = tiny_vocoder(**VOICES), "<sosp><3><8><1><eosp>"
    first = model.synthesize(units, speaker="bob", style="loud")
    assert torch.equal(first, model.synthesize(units, speaker=np.int64(1), style=torch.tensor(1)))
    assert torch.equal(first, model.synthesize([3, 8, 1], speaker=1, style=1))
    assert (first[:320] - model.synthesize(units, speaker="ann", style="loud")[:320]).abs().max() > 1e-3
    assert (first[:320] - model.synthesize(units, speaker="bob", style="calm")[:320]).abs().max() > 1e-3
    assert torch.equal(model.synthesize(units), model.synthesize(units, "ann", "calm")), "the first by default"
    vectors = tiny_vocoder(speaker_embedding_size=4)
    sound = vectors(torch.tensor([[3, 8]]), speaker_embeddings=torch.randn(1, 4)).waveform
    assert (sound - vectors(torch.tensor([[3, 8]]), speaker_embeddings=torch.zeros(1, 4)).waveform).abs().max() > 1e-3


def test_synthesize_batch():
    model = tiny_vocoder(**VOICES)
    rows = ["<sosp><3><8><1><eosp>", "", [4, 4, 2, 19], torch.tensor([7])]
    waves = model.synthesize_batch(rows, speaker=["cy", 0, 1, "ann"], style="loud")
    for row, speaker, wave in zip(rows, (2, 0, 1, 0), waves, strict=True):
        torch.testing.assert_close(wave, model.synthesize(row, speaker, 1), atol=1e-5, rtol=1e-4)
    assert waves[1].shape == (0,) and not waves[0].requires_grad and model.synthesize_batch([]) == []


@pytest.mark.parametrize(
    ("changes", "call", "message"),
    [
        ({}, lambda model: model(torch.tensor([[20]])), r"unit_ids: expected 0\.\.19, got 20"),
        ({}, lambda model: model(torch.tensor([1])), "unit_ids: expected .batch, units."),
        ({}, lambda model: model(torch.tensor([[1]]), speaker_id=0), "speaker_id: expected none"),
        ({}, lambda model: model(torch.tensor([[1]]), f0=torch.zeros(1, 1)), "f0: expected none"),
        ({}, lambda model: model(torch.tensor([[1]]), durations=torch.tensor([[-1]])), "durations: expected"),
        ({}, lambda model: model(torch.tensor([[1]]), durations=torch.tensor([[1, 1]])), "durations: expected"),
        (VOICES, lambda model: model(torch.tensor([[1]]), speaker_id=3), r"speaker_id: expected 0\.\.2, got 3"),
        (VOICES, lambda model: model(torch.tensor([[1]]), style_id=-1), r"style_id: expected 0\.\.1, got -1"),
        (VOICES, lambda model: model.synthesize([1], speaker="dee"), "speaker: expected a number or one of .*'dee'"),
        (VOICES, lambda model: model.synthesize_batch([[1], [2]], speaker=[0]), "one for each of 2 utterances"),
        (VOICES, lambda model: model.synthesize_batch([[1], [2]], speaker=["ann", None]), "a number or one of .*None"),
        (
            {},
            lambda model: model.synthesize([1, 2], durations=[3]),
            r"durations: expected one for each of \[2\] units",
        ),
        ({"use_f0": True}, lambda model: model(torch.tensor([[1]])), "f0: expected pitch"),
        (
            {"speaker_embedding_size": 4},
            lambda model: model(torch.tensor([[1]])),
            "speaker_embeddings: expected .1, 4.",
        ),
        (
            {"duration_hidden_size": 0},
            lambda model: model(torch.tensor([[1]]), predict_durations=True),
            "predict_durations: expected false",
        ),
        ({"duration_kernel_size": 5}, lambda model: model(torch.tensor([[1, 2, 3]])), "duration_kernel_size"),
    ],
)
def test_wrong_calls(changes, call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny_vocoder(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hifigan_config": {**GENERATOR, "model_in_dim": 9}}, "model_in_dim: expected 8, .* got 9"),
        ({"num_speakers": 2, "speaker_embedding_size": 3}, "speaker_embedding_size"),
        ({"speakers": ["a"]}, "speakers: expected at most 0"),
        ({"num_styles": 3, "styles": ["a", "a"]}, "styles: .* twice"),
        ({"hifigan_config": {**GENERATOR, "model_in_dim": 8, "upsample_kernel_sizes": [3] * 5}}, "none smaller"),
        ({"hifigan_config": {**GENERATOR, "model_in_dim": 8, "normalize_before": True}}, "normalize_before"),
    ],
)
def test_contradictory_configurations(changes, message):
    fields = {"num_units": 20, "embedding_size": 8, **changes}
    if "hifigan_config" not in fields:
        width = 8 * (1 + bool(fields.get("num_speakers")) + bool(fields.get("num_styles")))
        fields["hifigan_config"] = {**GENERATOR, "model_in_dim": width}
    with pytest.raises(ValueError, match=message):
        SpeechGptUnitVocoderConfig(**fields)


# ---------------------------------------------------------------------------------------------------------------------
# Weight norm, saving, remote code


def test_weight_norm_comes_and_goes(tmp_path):
    model, units = tiny_vocoder(), torch.tensor([[3, 8, 1]])
    before = model(units).waveform
    model.apply_weight_norm()
    torch.testing.assert_close(model(units).waveform, before, atol=1e-6, rtol=1e-5)
    assert "generator.conv_pre.parametrizations.weight.original0" in dict(model.named_parameters())
    model.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert loaded.config.weight_norm and not info["missing_keys"] and not info["unexpected_keys"]
    loaded.fold_weight_norm()
    torch.testing.assert_close(loaded.eval()(units).waveform, before, atol=1e-6, rtol=1e-5)
    assert loaded.state_dict().keys() == tiny_vocoder().state_dict().keys() and not loaded.config.weight_norm


def test_new_model_has_upstreams_embeddings():
    torch.manual_seed(0)
    model = SpeechGptUnitVocoderModel(tiny_vocoder().config)
    assert 0.8 < model.unit_embeddings.weight.std() < 1.2
    assert 0.008 < model.generator.conv_pre.weight.std() < 0.012


def test_saved_and_loaded_and_saved(tmp_path):
    model = tiny_vocoder(**VOICES)
    model.save_pretrained(tmp_path / "first")
    for auto_model in (AutoModelForTextToWaveform, AutoModel):
        loaded, info = auto_model.from_pretrained(tmp_path / "first", output_loading_info=True)
        assert type(loaded) is SpeechGptUnitVocoderModel and not info["missing_keys"] and not info["unexpected_keys"]
    loaded.save_pretrained(tmp_path / "second")
    for path in (tmp_path / "first").iterdir():
        assert (tmp_path / "second" / path.name).read_bytes() == path.read_bytes(), path.name
    assert torch.equal(loaded.synthesize([1, 2], "cy"), model.synthesize([1, 2], "cy"))
    assert len(model(torch.tensor([[1]]), return_dict=False)) == 5


REMOTE = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("clean_process", sys.argv[1])
clean_process = importlib.util.module_from_spec(spec)
spec.loader.exec_module(clean_process)
sys.meta_path.insert(0, clean_process.PackageBlocker())
import torch
from safetensors.torch import save_file
from transformers import AutoModelForTextToWaveform
torch.set_num_threads(1)
model = AutoModelForTextToWaveform.from_pretrained(sys.argv[2], trust_remote_code=True).eval()
save_file({"waveform": model.synthesize("<sosp><3><8><1><eosp>", "bob")}, sys.argv[3])
model.save_pretrained(sys.argv[4])
print(json.dumps({"module": type(model).__module__}))
"""


def test_remote_code_in_a_clean_process(tmp_path):
    model = tiny_vocoder(**VOICES)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "remote.py").write_text(REMOTE, encoding="utf-8")
    names = ("remote.py", clean_process.__file__, "model", "output.safetensors", "again")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
    done = subprocess.run(
        [sys.executable, "-I", *names],
        cwd=tmp_path,
        env={**environment, "HF_HOME": str(tmp_path / "c"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.strip().splitlines()[-1])["module"].startswith("transformers_modules.")
    expected = model.synthesize("<sosp><3><8><1><eosp>", "bob")
    assert torch.equal(load_file(tmp_path / "output.safetensors")["waveform"], expected)
    code = {path.name for path in (tmp_path / "model").glob("*.py")}
    assert {"modeling_speechgpt_unit_vocoder.py", "unit_string.py"} <= code
    assert {path.name for path in (tmp_path / "again").glob("*.py")} == code
