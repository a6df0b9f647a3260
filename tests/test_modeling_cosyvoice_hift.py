"""HiFT vocoders: batches, streams, noise, saving, folding, training."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_cosyvoice_hift import mel_of, noise_for, tiny_config, tiny_hift
from torch import Tensor
from transformers import AutoModel, AutoModelForTextToWaveform

from hf_speechllm.hub import clean_process
from hf_speechllm.models import modeling_cosyvoice_hift
from hf_speechllm.models.configuration_cosyvoice3_hift import CosyVoice3HiftConfig
from hf_speechllm.models.cross_fade import cross_fade, hamming_window
from hf_speechllm.models.edge_convolution import WholePass
from hf_speechllm.models.modeling_cosyvoice3_hift import upstream_noise_state
from hf_speechllm.models.modeling_cosyvoice_hift import CosyVoiceHiftModel


# Loads a folder by remote code in a process that has only transformers.
REMOTE = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("clean_process", sys.argv[1])
clean_process = importlib.util.module_from_spec(spec)
spec.loader.exec_module(clean_process)
sys.meta_path.insert(0, clean_process.PackageBlocker())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel
torch.set_num_threads(1)
model = AutoModel.from_pretrained(sys.argv[2], trust_remote_code=True).eval()
inputs = load_file(sys.argv[3])
with torch.no_grad():
    waveform = model(inputs["mel"], noise=inputs["noise"], phase=inputs["phase"]).waveform
    state = model.start_stream(1, noise=inputs["noise"], phase=inputs["phase"])
    streamed = [model.stream(inputs["mel"], state, is_last=True)[0]]
save_file({"waveform": waveform, "streamed": torch.cat(streamed, dim=1)}, sys.argv[4])
model.save_pretrained(sys.argv[5])
print(json.dumps({"class": type(model).__module__}))
"""

# The first numbers of the noise of the published version 3, from upstream's own construction on torch 2.13.
PUBLISHED = [0.922826, 0.477448, 0.827052, 0.283457]

every_version = pytest.mark.parametrize("version", [1, 2, 3])


@pytest.fixture(scope="module")
def models() -> dict[int, CosyVoiceHiftModel]:
    return {version: tiny_hift(version) for version in (1, 2, 3)}


def stream(model: CosyVoiceHiftModel, mel: Tensor, sizes: list[int], **options) -> list[Tensor]:
    """Pieces of the waveform of `mel` in pieces of `sizes` frames, the last of which is what is left."""
    state, pieces, first = model.start_stream(len(mel), **options), [], 0
    for size in [*sizes, mel.shape[1]]:
        last = first + size >= mel.shape[1]
        waveform, state = model.stream(mel[:, first : first + size], state, is_last=last)
        pieces.append(waveform)
        first += size
        if last:
            assert state is None
            return pieces


# -- one pass ---------------------------------------------------------------------------------------------------------
@every_version
@torch.no_grad()
def test_output(models, version):
    model = models[version]
    mel, hop = mel_of(30), model.config.hop_length
    output = model(mel, **noise_for(model, 30))
    assert output.waveform.shape == output.waveform_mask.shape == output.source.shape == (1, 30 * hop)
    assert output.f0.shape == (1, 30) and output.waveform_mask.all()
    voiced = output.f0 > model.config.voiced_threshold
    assert voiced.any() and not voiced.all(), "the test wants both kinds of frames"
    assert 0.01 < output.waveform.abs().max() <= model.config.audio_limit
    tuple_output = model(mel, return_dict=False, **noise_for(model, 30))
    assert torch.equal(tuple_output[0], output.waveform) and len(tuple_output) == 4
    empty = model(mel[:, :0])
    assert empty.waveform.shape == (1, 0) and empty.f0.shape == (1, 0)


@every_version
@pytest.mark.parametrize("apart", [False, True])
@torch.no_grad()
def test_item_of_a_batch_equals_the_item_alone(models, monkeypatch, version, apart):
    """Whatever lies in the padding, and whether the batch is computed as one or, on a CPU, row by row."""
    model, lengths = models[version], [30, 1, 17, 30]
    if not apart:
        monkeypatch.setattr(modeling_cosyvoice_hift, "lengths_to_encode_apart", lambda *arguments: None)
    else:
        lengths = [30, 16, 17, 30]
    mel, drawn = mel_of(30, rows=4), noise_for(model, 30, rows=4)
    mask = (torch.arange(30) < torch.tensor(lengths)[:, None]).long()
    spoiled = mel + 50.0 * (1 - mask)[..., None]
    output = model(spoiled, mel_mask=mask, **drawn)
    hop = model.config.hop_length
    for row, length in enumerate(lengths):
        own = {"noise": drawn["noise"][row : row + 1, : length * hop], "phase": drawn["phase"][row : row + 1]}
        alone = model(mel[row : row + 1, :length], **own)
        for name in ("waveform", "source"):
            expected = getattr(alone, name)[0]
            torch.testing.assert_close(getattr(output, name)[row, : length * hop], expected, rtol=0, atol=1e-5)
            assert not getattr(output, name)[row, length * hop :].any()
        torch.testing.assert_close(output.f0[row, :length], alone.f0[0], rtol=1e-6, atol=1e-5)
        assert output.waveform_mask[row].sum() == length * hop


@every_version
@torch.no_grad()
def test_noise_comes_from_the_generator_or_the_argument(models, version):
    model, mel = models[version], mel_of(9)
    same = [model(mel, generator=torch.Generator().manual_seed(5)).waveform for _ in range(2)]
    assert torch.equal(*same)
    other = model(mel, generator=torch.Generator().manual_seed(6)).waveform
    # Version 3 has its own noise.
    assert torch.equal(same[0], other) == (version == 3)
    before = torch.get_rng_state()
    model(mel, generator=torch.Generator().manual_seed(5))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(model(mel, **noise_for(model, 9)).waveform, same[0])


@torch.no_grad()
def test_given_pitch_is_used(models):
    model, mel, drawn = models[2], mel_of(12), noise_for(models[2], 12)
    found = model(mel, **drawn)
    assert torch.equal(model(mel, f0=found.f0, **drawn).waveform, found.waveform)
    assert not torch.equal(model(mel, f0=2 * found.f0, **drawn).source, found.source)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"mel": torch.zeros(1, 5, 19)}, "mel: expected"),
        ({"mel": torch.zeros(5, 20)}, "mel: expected"),
        ({"mel": torch.zeros(1, 5, 20), "mel_mask": torch.ones(1, 4)}, "mel_mask: expected"),
        ({"mel": torch.zeros(1, 3, 20), "mel_mask": torch.tensor([[0, 1, 1]])}, "mel_mask: expected"),
        ({"mel": torch.zeros(1, 5, 20), "noise": torch.zeros(1, 7, 9)}, "noise: expected"),
        ({"mel": torch.zeros(1, 5, 20), "phase": torch.zeros(1, 8)}, "phase: expected"),
        ({"mel": torch.zeros(1, 5, 20), "compatibility": "later"}, "compatibility: expected"),
    ],
)
def test_wrong_arguments_are_named(models, arguments, message):
    with pytest.raises(ValueError, match=message):
        models[1](**arguments)


def test_wrong_sizes_are_named():
    for version, changes, message in (
        (2, {"upsample_kernel_sizes": [8, 10, 7]}, "upsample_kernel_sizes"),
        (2, {"resblock_kernel_sizes": [3, 6]}, "resblock kernel sizes"),
        (2, {"source_resblock_kernel_sizes": [7]}, "source_resblock_kernel_sizes"),
        (2, {"phase_interpolation": "cubic"}, "phase_interpolation"),
        (2, {"hidden_size": 4}, "hidden_size"),
        (2, {"istft_n_fft": 15}, "istft_n_fft"),
        (3, {"look_ahead_frames": -1}, "look_ahead_frames"),
        (3, {"layers_before_noise": [[1 << 20, 1 << 20], [1, 1]]}, "layers_before_noise"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_config(version, **changes)


# -- streams ----------------------------------------------------------------------------------------------------------
@every_version
@pytest.mark.parametrize("sizes", [[1] * 40, [3, 0, 7, 1, 12], [40], [2, 38], [39]])
@torch.no_grad()
def test_stream_equals_one_pass(models, version, sizes):
    model, mel = models[version], mel_of(40, rows=2)
    drawn = noise_for(model, 40, rows=2)
    expected = model(mel, **drawn).waveform
    pieces = stream(model, mel, sizes, **drawn)
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=0, atol=1e-5)


@every_version
@torch.no_grad()
def test_stream_is_late_by_what_it_says(models, version):
    model, mel, hop = models[version], mel_of(60), models[version].config.hop_length
    pieces = stream(model, mel, [1] * 59, **noise_for(model, 60))
    given = torch.tensor([piece.shape[1] for piece in pieces[:-1]]).cumsum(0)
    late = int((torch.arange(1, len(given) + 1) * hop - given)[30:].max())
    assert model.stream_lookahead - 3 * hop <= late <= model.stream_lookahead


@every_version
@torch.no_grad()
def test_streams_do_not_change_what_they_get(models, version):
    """One state goes on in two ways; and two streams are independent."""
    model, mel = models[version], mel_of(30)
    drawn = noise_for(model, 30)
    _, state = model.stream(mel[:, :13], model.start_stream(**drawn))
    first, _ = model.stream(mel[:, 13:], state, is_last=True)
    model.stream(mel_of(20, seed=3), state)
    second, _ = model.stream(mel[:, 13:], state, is_last=True)
    assert torch.equal(first, second)


@torch.no_grad()
def test_own_noise_of_version_3_goes_on_in_a_stream(models):
    model, mel = models[3], mel_of(25)
    torch.testing.assert_close(torch.cat(stream(model, mel, [4, 9]), dim=1), model(mel).waveform, rtol=0, atol=1e-5)


@torch.no_grad()
def test_stream_ends_of_nothing_and_noise_that_ends(models):
    model = models[2]
    waveform, state = model.stream(mel_of(0), model.start_stream(), is_last=True)
    assert waveform.shape == (1, 0) and state is None
    with pytest.raises(ValueError, match="noise: expected at least"):
        stream(model, mel_of(30), [30], **noise_for(model, 20))
    with pytest.raises(ValueError, match="batch of 2"):
        model.stream(mel_of(3), model.start_stream(2))


@pytest.mark.parametrize("version", [1, 2])
@torch.no_grad()
def test_upstream_streaming_overlaps_and_fades(models, version):
    """What upstream's `token2wav` does with the pieces of a flow, written out."""
    model = models[version]
    frames, hop = model.config.overlap_frames, model.config.hop_length
    overlap, sizes = frames * hop, [frames + 12, 25, 30]
    mel = mel_of(sum(sizes))
    noise = torch.randn(1, 200 * hop, 9, generator=torch.Generator().manual_seed(2))
    phase = noise_for(model, 1)["phase"]
    window = hamming_window(2 * overlap)
    pieces, cached, taken, first = [], None, 0, 0
    for index, size in enumerate(sizes):
        piece = mel[:, max(0, first - frames if cached else 0) : first + size]
        first += size
        drawn = noise[:, taken : taken + piece.shape[1] * hop]
        taken += drawn.shape[1]
        source = None if cached is None else cached[0]
        output = model(piece, noise=drawn, phase=phase, cached_source=source, compatibility="upstream")
        waveform = output.waveform if cached is None else cross_fade(output.waveform, cached[1], window)
        cached = (output.source[:, -overlap:], waveform[:, -overlap:])
        pieces.append(waveform if index == 2 else waveform[:, :-overlap])
    found = stream(model, mel, sizes, noise=noise, phase=phase, compatibility="upstream")
    assert torch.equal(torch.cat(found, dim=1), torch.cat(pieces, dim=1))


@every_version
@torch.no_grad()
def test_pitch_of_upstream_is_of_single_precision(models, version):
    """Versions 1 and 2; its errors, which differ with the length, sum up in the phase."""
    model, mel = models[version], mel_of(40)
    single = model.f0_predictor(mel.transpose(1, 2), WholePass(None, masked=version != 3))
    exact = model.f0_predictor(mel.double().transpose(1, 2), WholePass(None, masked=version != 3)).float()
    assert not torch.equal(single, exact)
    torch.testing.assert_close(single, exact, rtol=1e-3, atol=1e-3)
    assert torch.equal(model.predict_f0(mel), exact)
    assert torch.equal(model.predict_f0(mel, compatibility="upstream"), exact if version == 3 else single)


@torch.no_grad()
def test_upstream_streaming_of_version_3_begins_anew(models):
    """Every piece is the whole history vocoded, without the samples given and those that may still change."""
    model, sizes = models[3], [3, 9, 14, 6]
    ahead = model.config.f0_look_ahead_frames + model.config.look_ahead_frames + 1
    mel, hop = mel_of(sum(sizes)), model.config.hop_length
    for noise in ({}, {"noise": torch.rand(1, 100 * hop, 9, generator=torch.Generator().manual_seed(2))}):
        found = stream(model, mel, sizes, compatibility="upstream", **noise)
        settled = [0, *(max(sum(sizes[: count + 1]) - ahead, 0) for count in range(3)), sum(sizes)]
        for count, piece in enumerate(found):
            frames = sum(sizes[: count + 1])
            drawn = {name: value[:, : frames * hop] for name, value in noise.items()}
            expected = model(mel[:, :frames], compatibility="upstream", **drawn).waveform
            assert torch.equal(piece, expected[:, settled[count] * hop : settled[count + 1] * hop])


# -- noise of version 3 -----------------------------------------------------------------------------------------------
def test_noise_is_that_of_upstream():
    """The recipe with torch's own modules, whose first weights come from the same generator."""
    config = tiny_config(3)
    torch.manual_seed(0)
    torch.randn(1, 80, 15000)
    torch.nn.Embedding(7, 3)
    torch.nn.Linear(5, 2)
    torch.nn.Conv1d(20, 8, 4)
    for _ in range(4):
        torch.nn.Conv1d(8, 8, 3)
    torch.nn.Linear(8, 1)
    torch.rand(1, 9)
    expected = torch.rand(1, 5000, 9)[0]
    model = tiny_hift(3)
    noise, state = model.fixed_noise.draw(3333, 9)
    rest, _ = model.fixed_noise.draw(1667, 9, state)
    assert torch.equal(torch.cat((noise, rest)), expected)
    assert torch.equal(model.fixed_noise.state, upstream_noise_state(config))


@torch.no_grad()
def test_noise_of_version_3_is_drawn_when_it_is_needed(models):
    """Upstream draws 300 s of it at import, out of the generator that everybody uses; here that one is left alone."""
    model, before = models[3], torch.get_rng_state()
    assert sum(buffer.numel() for name, buffer in model.named_buffers() if "noise" in name) < 10_000
    first, second = model(mel_of(20)).waveform, model(mel_of(20)).waveform
    assert torch.equal(first, second) and torch.equal(torch.get_rng_state(), before)


def test_published_noise():
    """The state behind the published sizes is where it was when upstream itself was run."""
    generator = torch.Generator()
    generator.set_state(upstream_noise_state(CosyVoice3HiftConfig()))
    first = torch.rand(4, generator=generator)
    torch.testing.assert_close(first, torch.tensor(PUBLISHED), rtol=0, atol=1e-6)


# -- saving, folding, half precision ----------------------------------------------------------------------------------
@every_version
@torch.no_grad()
def test_save_load_save(models, tmp_path, version):
    model = models[version]
    model.save_pretrained(tmp_path / "first")
    for auto_class in (AutoModel, AutoModelForTextToWaveform):
        again, info = auto_class.from_pretrained(tmp_path / "first", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
    again.eval().save_pretrained(tmp_path / "second")
    for path in (tmp_path / "first").iterdir():
        assert (tmp_path / "second" / path.name).read_bytes() == path.read_bytes(), path.name
    drawn = noise_for(model, 7)
    assert torch.equal(again(mel_of(7), **drawn).waveform, model(mel_of(7), **drawn).waveform)


@every_version
@torch.no_grad()
def test_folding_keeps_the_function(tmp_path, version):
    model = tiny_hift(version)
    drawn = noise_for(model, 20)
    expected = model(mel_of(20), **drawn).waveform
    model.fold_weight_norm()
    assert not any("parametrizations" in name for name in model.state_dict())
    torch.testing.assert_close(model(mel_of(20), **drawn).waveform, expected, rtol=0, atol=1e-4)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert not again.config.weight_norm
    assert torch.equal(again(mel_of(20), **drawn).waveform, model(mel_of(20), **drawn).waveform)
    again.apply_weight_norm()
    assert again.config.weight_norm and any("parametrizations" in name for name in again.state_dict())
    folded = model(mel_of(20), **drawn).waveform
    torch.testing.assert_close(again(mel_of(20), **drawn).waveform, folded, rtol=0, atol=1e-4)


@every_version
@torch.no_grad()
def test_half_precision_runs(version):
    model = tiny_hift(version).to(torch.bfloat16)
    output = model(mel_of(8), **noise_for(model, 8))
    assert torch.isfinite(output.waveform).all() and output.f0.dtype == torch.float32


@pytest.mark.parametrize("version", [1, 3])
def test_remote_code_equals_the_package(models, tmp_path, version):
    model = models[version]
    model.save_pretrained(tmp_path / "model")
    inputs = {"mel": mel_of(9), **noise_for(model, 9)}
    save_file(inputs, tmp_path / "inputs.safetensors")
    script = tmp_path / "remote.py"
    script.write_text(REMOTE, encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
    files = [tmp_path / name for name in ("model", "inputs.safetensors", "out.safetensors", "again")]
    done = subprocess.run(
        [sys.executable, "-I", str(script), clean_process.__file__, *map(str, files)],
        env={**environment, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["class"].startswith("transformers_modules.")
    found = load_file(files[2])
    with torch.no_grad():
        expected = model(**inputs).waveform
    assert torch.equal(found["waveform"], expected)
    torch.testing.assert_close(found["streamed"], expected, rtol=0, atol=1e-5)
    for path in files[0].iterdir():
        assert (files[3] / path.name).read_bytes() == path.read_bytes(), path.name


# -- training ---------------------------------------------------------------------------------------------------------
@every_version
def test_gradients_with_and_without_checkpointing(version):
    """Every parameter learns; the fundamental frequency by its own output, since the sines carry no gradient."""
    gradients = []
    for checkpointing in (False, True):
        model = tiny_hift(version).train()
        if checkpointing:
            # transformers 5.17 knows the second name, 5.23 deprecates it.
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
            assert all(block.gradient_checkpointing for block in (*model.resblocks, *model.source_resblocks))
        drawn = noise_for(model, 12, rows=2)
        mask = (torch.arange(12) < torch.tensor([12, 8])[:, None]).long()
        output = model(mel_of(12, rows=2), mel_mask=mask, **drawn)
        (output.waveform.square().mean() + 1e-3 * output.f0.square().mean()).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.abs().sum() > 0, name
        assert torch.equal(gradient, gradients[1][name]), name


def test_training_draws_normal_noise_in_version_3(models):
    model = tiny_hift(3).train()
    torch.manual_seed(3)
    noise = model._noise(2, 4000, None, torch.device("cpu"))
    assert noise.min() < -1 and not torch.equal(noise[0], noise[1])
