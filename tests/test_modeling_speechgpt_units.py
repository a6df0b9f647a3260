"""Speech units: batches, pieces of long recordings, ids and runs, saving, remote code."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_speechgpt_units import BASE, LARGE, noise, padded, tiny_units
from transformers import AutoFeatureExtractor, AutoModel, HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

from hf_speechllm.hub import clean_process
from hf_speechllm.models.configuration_speechgpt_units import SpeechGptUnitsConfig
from hf_speechllm.models.modeling_speechgpt_units import SpeechGptUnitsModel, merge_repeats
from hf_speechllm.models.unit_string import parse_unit_string, unit_string


BATCH_NORM = {**BASE, "conv_pos_batch_norm": True}
NETWORKS = pytest.mark.parametrize("hubert", [BASE, LARGE, BATCH_NORM], ids=["group", "layer", "batch_norm"])
LENGTHS = (9000, 4000, 399, 400, 0, 8999)


# ---------------------------------------------------------------------------------------------------------------------
# Features


@NETWORKS
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_layer_is_hidden_state_of_transformers_model(hubert, layer):
    model, wave = tiny_units(hubert=hubert), noise(5000)[0][None]
    with torch.no_grad():
        states = model.hubert(wave, output_hidden_states=True).hidden_states
        features = model(wave, layer=layer).last_hidden_state
    torch.testing.assert_close(features, states[layer], atol=5e-6, rtol=1e-6)


def test_later_layers_are_not_computed():
    model = tiny_units(layer=1)
    for later in model.hubert.encoder.layers[1:]:
        later.register_forward_hook(lambda *_: pytest.fail("a layer after the chosen one ran"))
    assert model.encode(noise(2000)[0][None]).lengths.tolist() == [6]


@NETWORKS
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("at_once", [160_000, 14_000, 0])
def test_item_of_a_batch_equals_the_item_alone(hubert, normalize, gradient, at_once, monkeypatch):
    """Without gradients a CPU takes a large batch in small ones, of similar lengths."""
    if gradient and at_once < 160_000:
        pytest.skip("with gradients all go together")
    monkeypatch.setattr("hf_speechllm.models.modeling_speechgpt_units._CPU_SAMPLES", at_once)
    model = tiny_units(hubert=hubert, normalize=normalize)
    waves = noise(*LENGTHS)
    with torch.set_grad_enabled(gradient):
        together = model(*padded(waves))
        assert together.last_hidden_state.requires_grad == gradient
    assert (
        together.lengths.tolist() == [model.config.num_frames(length) for length in LENGTHS] == [27, 12, 0, 1, 0, 27]
    )
    for row, wave in enumerate(waves):
        alone = model(wave[None]).last_hidden_state[0]
        torch.testing.assert_close(together.last_hidden_state[row, : len(alone)], alone, atol=1e-5, rtol=1e-4)
        assert (together.last_hidden_state[row, len(alone) :] == 0).all()


@NETWORKS
def test_one_recording_with_padding(hubert):
    model, wave = tiny_units(hubert=hubert), noise(3000)[0][None]
    mask = torch.cat([torch.ones(1, 3000), torch.zeros(1, 2000)], dim=1)
    padded_wave = torch.cat([wave, torch.full((1, 2000), 0.7)], dim=1)
    torch.testing.assert_close(model(padded_wave, mask).last_hidden_state, model(wave).last_hidden_state)


def test_hardly_any_padding():
    """The norm must not see it either."""
    model, waves = tiny_units(), noise(4000, 3900, 3950)
    with torch.no_grad():
        together = model(*padded(waves))
    for row, wave in enumerate(waves):
        alone = model(wave[None]).last_hidden_state[0]
        torch.testing.assert_close(together.last_hidden_state[row, : len(alone)], alone, atol=1e-5, rtol=1e-4)


def test_naive_padding_is_wrong():
    """What the exact statistics are for: `HubertModel` on the padded batch gives something else."""
    model = tiny_units()
    batch, mask = padded(noise(9000, 4000))
    with torch.no_grad():
        naive = model.hubert(batch, attention_mask=mask, output_hidden_states=True).hidden_states[2]
        ours = model(batch, mask).last_hidden_state
    assert (naive[1, :12] - ours[1, :12]).abs().max() > 0.05


def test_normalize_is_a_layer_norm_over_the_recording():
    loud, plain = tiny_units(normalize=True, hubert=LARGE), tiny_units(hubert=LARGE)
    plain.load_state_dict(loud.state_dict())
    wave = noise(3000)[0] * 3 + 0.2
    normal = (wave - wave.mean()) / (wave.var(correction=0) + 1e-5).sqrt()
    with torch.no_grad():
        expected, actual = plain(normal[None]).last_hidden_state, loud(wave[None]).last_hidden_state
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        assert (plain(wave[None]).last_hidden_state - actual).abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# Long recordings


@NETWORKS
@pytest.mark.parametrize("normalize", [False, True])
def test_pieces_with_all_of_the_context_are_one_pass(hubert, normalize):
    """Convolutions and their statistics are exact; what is left to the context is attention."""
    model = tiny_units(hubert=hubert, normalize=normalize, context_samples=10**6)
    wave = noise(30000)[0][None]
    with torch.no_grad():
        whole = model(wave).last_hidden_state
        for size in (400, 1000, 3333, 8000, 29999):
            pieces = model.extract_features(wave, max_chunk_samples=size).last_hidden_state
            torch.testing.assert_close(pieces, whole, atol=2e-5, rtol=1e-4)


def test_statistics_over_several_stretches(monkeypatch):
    monkeypatch.setattr("hf_speechllm.models.modeling_speechgpt_units._STATISTICS_FRAMES", 70)
    model, wave = tiny_units(context_samples=10**6), noise(12345)[0][None]
    with torch.no_grad():
        pieces = model.extract_features(wave, max_chunk_samples=2000).last_hidden_state
        torch.testing.assert_close(pieces, model(wave).last_hidden_state, atol=2e-5, rtol=1e-4)


@NETWORKS
@pytest.mark.parametrize("values", [1, 5000, 1 << 21])
def test_convolutions_in_tiles(hubert, values, monkeypatch):
    """One frame, some frames and several recordings at a time through all layers."""
    monkeypatch.setattr("hf_speechllm.models.modeling_speechgpt_units._TILE_VALUES", values)
    model, waves = tiny_units(hubert=hubert), torch.stack(noise(2800, 2800, 2800)) + 0.3
    with torch.no_grad():
        tiles, whole = model._convolve(waves, None), model.hubert.feature_extractor(waves).transpose(1, 2)
    torch.testing.assert_close(tiles, whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_statistics_are_those_of_the_convolution(bias):
    model, waves = tiny_units(hubert={**BASE, "conv_bias": bias}), noise(2000, 1000)
    mean, variance = model._statistics(padded(waves)[0], [2000, 1000])
    for row, wave in enumerate(waves):
        hidden = model.hubert.feature_extractor.conv_layers[0].conv(wave[None, None])
        expected = torch.var_mean(hidden.double(), dim=2, correction=0)
        torch.testing.assert_close((variance[row].double(), mean[row].double()), (expected[0][0], expected[1][0]))


def test_adapters_around_convolutions_count():
    peft = pytest.importorskip("peft")
    model, wave = tiny_units(hubert=LARGE), noise(3000)[0][None]
    with torch.no_grad():
        plain = model(wave).last_hidden_state
    targets = r"hubert\.feature_extractor\.conv_layers\.[12]\.conv"
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    with torch.no_grad():
        changed = adapted(wave).last_hidden_state
        assert not torch.allclose(changed, plain, atol=1e-3)
        merged = adapted.merge_and_unload()(wave).last_hidden_state
    torch.testing.assert_close(merged, changed, atol=1e-5, rtol=1e-4)


def test_more_context_comes_nearer_to_one_pass():
    model, wave = tiny_units(hubert=LARGE), noise(60000)[0][None]
    with torch.no_grad():
        whole = model(wave).last_hidden_state
        errors = []
        for context in (0, 3200, 12800):
            model.config.context_samples = context
            pieces = model.extract_features(wave, max_chunk_samples=16000).last_hidden_state
            assert pieces.shape == whole.shape
            errors.append((pieces - whole).abs().mean().item())
    assert errors[0] > errors[1] > errors[2]


def test_upstreams_pieces_are_recordings_of_their_own():
    model, wave = tiny_units(), noise(10000)[0]
    with torch.no_grad():
        pieces = model.extract_features(wave[None], max_chunk_samples=3000, seamless_chunks=False)
        alone = torch.cat([model(part[None]).last_hidden_state[0] for part in wave.split(3000)])
    torch.testing.assert_close(pieces.last_hidden_state[0], alone, atol=1e-5, rtol=1e-4)
    # Each cut loses frames; a rest of less than a frame is left out.
    assert pieces.lengths.tolist() == [9 * 3 + 2] and model.config.num_frames(10000) == 31
    with torch.no_grad():
        rest = model.extract_features(wave[None, :9100], max_chunk_samples=3000, seamless_chunks=False)
    assert rest.lengths.tolist() == [27]


@pytest.mark.parametrize("seamless", [False, True])
def test_long_and_short_recordings_in_one_batch(seamless):
    model = tiny_units(max_chunk_samples=4000, context_samples=3200, seamless_chunks=seamless)
    waves = noise(9000, 1500, 0, 13000, 4000)
    together = model.encode(*padded(waves))
    for row, wave in enumerate(waves):
        alone = model.encode(wave[None])
        count = int(alone.lengths[0])
        assert together.lengths[row] == count
        assert torch.equal(together.unit_ids[row, :count], alone.unit_ids[0])
        assert (together.unit_ids[row, count:] == -1).all()


# ---------------------------------------------------------------------------------------------------------------------
# Ids


def test_quantize_is_the_nearest_centre(monkeypatch):
    model, vectors = tiny_units(), torch.randn(3, 50, 24)
    expected = torch.cdist(vectors, model.codebook[None].expand(3, -1, -1)).argmin(dim=-1)
    assert torch.equal(model.quantize(vectors), expected)
    monkeypatch.setattr("hf_speechllm.models.modeling_speechgpt_units._DISTANCES", 100)
    assert torch.equal(model.quantize(vectors), expected)
    assert model.quantize(torch.randn(2, 0, 24)).shape == (2, 0)


def test_merge_repeats():
    ids = torch.tensor([[5, 5, 5, 2, 2, 5], [1, 1, -1, -1, -1, -1], [7, 8, 9, 9, 7, -1], [-1] * 6])
    reduced, durations, counts = merge_repeats(ids, torch.tensor([6, 2, 5, 0]))
    assert reduced.tolist() == [[5, 2, 5, -1], [1, -1, -1, -1], [7, 8, 9, 7], [-1] * 4]
    assert durations.tolist() == [[3, 2, 1, 0], [2, 0, 0, 0], [1, 1, 2, 1], [0] * 4]
    assert counts.tolist() == [3, 1, 4, 0]
    assert [part.shape for part in merge_repeats(torch.empty(2, 0, dtype=torch.long), torch.zeros(2).long())] == [
        (2, 0),
        (2, 0),
        (2,),
    ]


def test_encode_of_several_recordings():
    model = tiny_units()
    waves = noise(9000, 4000, 100)
    output = model.encode(*padded(waves))
    for row, wave in enumerate(waves):
        alone = model.encode(wave[None])
        frames, runs = int(alone.lengths[0]), int(alone.reduced_lengths[0])
        assert torch.equal(output.unit_ids[row, :frames], alone.unit_ids[0])
        assert torch.equal(output.reduced_ids[row, :runs], alone.reduced_ids[0])
        again = output.reduced_ids[row, :runs].repeat_interleave(output.durations[row, :runs])
        assert torch.equal(again, alone.unit_ids[0])
    assert output.reduced_lengths[2] == 0 and len(set(output.unit_ids[0].tolist())) > 3


def test_tuple_is_the_output_class():
    model, wave = tiny_units(), noise(2000)[0][None]
    hidden, mask = model(wave, return_dict=False)
    named = model(wave)
    assert torch.equal(hidden, named.last_hidden_state) and torch.equal(mask, named.attention_mask)


def test_new_codebook_means_nothing_yet():
    config = tiny_units().config
    assert not SpeechGptUnitsModel(config).codebook.any()


def test_unit_strings():
    ids = torch.tensor([6, 5, 0, 999, -1, -1])
    assert unit_string(ids) == "<sosp><6><5><0><999><eosp>" == unit_string([6, 5, 0, 999])
    assert unit_string([], start="", end="") == "" and unit_string([]) == "<sosp><eosp>"
    assert parse_unit_string(f"[ua] {unit_string(ids)}<eoa> <12 > <x3>") == [6, 5, 0, 999]
    many = torch.arange(3000) % 1000
    assert parse_unit_string(unit_string(many)) == many.tolist()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model(torch.zeros(1, 800), layer=4), "layer: expected 1..3, got 4"),
        (lambda model: model(torch.zeros(1, 800), layer=0), "layer: expected 1..3, got 0"),
        (lambda model: model(torch.zeros(800)), "expected .batch, samples., got .800,."),
        (lambda model: model(torch.zeros(1, 800), torch.ones(1, 799)), "the shape of input_values"),
        (lambda model: model(torch.zeros(1, 3), torch.tensor([[0, 1, 1]])), "padding on the right"),
        (lambda model: model.encode(torch.zeros(1, 800), max_chunk_samples=399), "max_chunk_samples: .* 400"),
    ],
)
def test_wrong_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny_units())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": 4}, r"layer: expected 1\.\.3"),
        ({"num_units": 0}, "num_units"),
        ({"max_chunk_samples": 100}, "max_chunk_samples: expected at least 400"),
        ({"context_samples": -1}, "context_samples"),
    ],
)
def test_contradictory_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        SpeechGptUnitsConfig(hubert_config=dict(BASE), **{"layer": 2, **changes})


def test_frames_of_a_recording():
    config = SpeechGptUnitsConfig()
    assert (config.receptive_field, config.hop_length) == (400, 320)
    network = HubertModel(HubertConfig(**BASE))
    for samples in (400, 719, 720, 16000, 31999):
        assert config.num_frames(samples) == network._get_feat_extract_output_lengths(samples)
    assert config.num_frames(399) == config.num_frames(0) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Saving, other precisions, remote code


def save(folder, model: SpeechGptUnitsModel):
    model.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True).save_pretrained(folder)
    return folder


def test_saved_and_loaded_and_saved(tmp_path):
    model = tiny_units(hubert=LARGE, normalize=True)
    save(tmp_path / "first", model)
    loaded, info = AutoModel.from_pretrained(tmp_path / "first", output_loading_info=True)
    assert type(loaded) is SpeechGptUnitsModel and not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    save(tmp_path / "second", loaded)
    for path in (tmp_path / "first").iterdir():
        assert (tmp_path / "second" / path.name).read_bytes() == path.read_bytes(), path.name
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "first")
    waves = noise(5000, 3000)
    inputs = extractor([wave.numpy() for wave in waves], sampling_rate=16000, return_tensors="pt", padding=True)
    for name, expected in model.encode(*padded(waves)).items():
        assert torch.equal(loaded.encode(**inputs)[name], expected), name


def test_half_precision(tmp_path):
    save(tmp_path, tiny_units())
    model = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    batch, mask = padded(noise(5000, 3000))
    output = model.encode(batch, mask)
    assert output.lengths.tolist() == [15, 9] and model(batch, mask).last_hidden_state.dtype == torch.bfloat16


REMOTE = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("clean_process", sys.argv[1])
clean_process = importlib.util.module_from_spec(spec)
spec.loader.exec_module(clean_process)
sys.meta_path.insert(0, clean_process.PackageBlocker())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoFeatureExtractor, AutoModel
torch.set_num_threads(1)
model = AutoModel.from_pretrained(sys.argv[2], trust_remote_code=True).eval()
extractor = AutoFeatureExtractor.from_pretrained(sys.argv[2], trust_remote_code=True)
audio = load_file(sys.argv[3])
inputs = extractor([audio["a"].numpy(), audio["b"].numpy()], sampling_rate=16000, return_tensors="pt", padding=True)
save_file(dict(model.encode(**inputs).items()), sys.argv[4])
model.save_pretrained(sys.argv[5])
print(json.dumps({"module": type(model).__module__, "extractor": type(extractor).__module__}))
"""


def test_remote_code_in_a_clean_process(tmp_path):
    model = tiny_units()
    save(tmp_path / "model", model)
    waves = noise(6000, 4000)
    save_file({"a": waves[0], "b": waves[1]}, tmp_path / "audio.safetensors")
    (tmp_path / "remote.py").write_text(REMOTE, encoding="utf-8")
    names = ("remote.py", clean_process.__file__, "model", "audio.safetensors", "output.safetensors", "again")
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
    report = json.loads(done.stdout.strip().splitlines()[-1])
    assert report["module"].startswith("transformers_modules.") and report["extractor"].startswith("transformers.")
    for name, tensor in load_file(tmp_path / "output.safetensors").items():
        assert torch.equal(tensor, model.encode(*padded(waves))[name]), name
    code = {path.name for path in (tmp_path / "model").glob("*.py")}
    assert {"modeling_speechgpt_units.py", "unit_string.py"} <= code
    assert {path.name for path in (tmp_path / "again").glob("*.py")} == code
