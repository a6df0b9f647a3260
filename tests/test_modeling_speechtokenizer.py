"""SpeechTokenizer: batches, levels, saving, and codebooks that learn."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_speechtokenizer import TINY, tiny_codec, waves
from torch import distributed, multiprocessing
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioTokenization,
    EncodecFeatureExtractor,
)

from hf_speechllm.hub import clean_process
from hf_speechllm.models.configuration_speechtokenizer import SpeechTokenizerConfig
from hf_speechllm.models.modeling_speechtokenizer import SpeechTokenizerModel
from hf_speechllm.models.residual_vector_quantizer import EmaCodebook, kmeans, nearest


# Loads a folder by remote code in a process that has only transformers.
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
extractor = AutoFeatureExtractor.from_pretrained(sys.argv[2])
audio = load_file(sys.argv[3])["audio"].numpy()
inputs = extractor(audio, sampling_rate=extractor.sampling_rate, return_tensors="pt")
with torch.no_grad():
    codes = model.encode(**inputs).audio_codes
    save_file({"codes": codes.contiguous(), "audio": model.decode(codes).audio_values.contiguous()}, sys.argv[4])
model.save_pretrained(sys.argv[5])
print(json.dumps({"class": type(model).__module__}))
"""


@pytest.fixture(scope="module")
def codec() -> SpeechTokenizerModel:
    return tiny_codec()


def batch_of(items: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    values = pad_sequence(items, batch_first=True)
    lengths = torch.tensor([len(item) for item in items])
    return {"input_values": values, "attention_mask": (torch.arange(values.shape[1]) < lengths[:, None]).long()}


# -- batches ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("changes", [{}, {"hidden_act": "snake", "num_lstm_layers": 2}, {"num_residual_layers": 2}])
@torch.no_grad()
def test_item_of_a_batch_equals_the_item_alone(changes):
    """Lengths that need zeros, reflection over the end, and an equal pair; what lies in the padding is not seen."""
    model, items = tiny_codec(**changes), waves(3, 401, 96, 401, 250)
    batch = batch_of(items)
    batch["input_values"] += 7.0 * (1 - batch["attention_mask"])
    codes = model.encode(**batch)
    audio = model.decode(codes.audio_codes)
    output = model(**batch)
    for row, item in enumerate(items):
        alone = model.encode(item[None])
        frames = -(-len(item) // 8)
        assert codes.code_lengths[row] == frames == alone.audio_codes.shape[-1]
        assert torch.equal(codes.audio_codes[row, :, :frames], alone.audio_codes[0])
        assert (codes.audio_codes[row, :, frames:] == -1).all()
        for values in (audio.audio_values, output.audio_values):
            expected = model.decode(alone.audio_codes).audio_values[0]
            torch.testing.assert_close(values[row, :, : frames * 8], expected, rtol=0, atol=1e-6)
            assert not values[row, :, frames * 8 :].any()
        features = model(item[None]).semantic_features[0]
        torch.testing.assert_close(output.semantic_features[row, :frames], features, rtol=0, atol=1e-6)
        assert not output.semantic_features[row, frames:].any()
    assert audio.audio_lengths.tolist() == [8 * -(-len(item) // 8) for item in items]


@torch.no_grad()
def test_inputs_of_the_feature_extractor(codec):
    """`padding_mask`, a channel axis, and a plain waveform say the same."""
    items = waves(300, 411)
    inputs = EncodecFeatureExtractor(feature_size=1, sampling_rate=16000)(
        [item.numpy() for item in items], sampling_rate=16000, return_tensors="pt"
    )
    assert inputs["input_values"].shape == (2, 1, 411) and "padding_mask" in inputs
    expected = codec.encode(**batch_of(items)).audio_codes
    assert torch.equal(codec.encode(**inputs).audio_codes, expected)
    assert torch.equal(codec(**inputs).audio_codes, expected)


@torch.no_grad()
def test_output_is_trimmed_when_asked(codec):
    batch = batch_of(waves(301, 411))
    codes = codec.encode(**batch).audio_codes
    whole = codec.decode(codes)
    trimmed = codec.decode(codes, num_samples=batch["attention_mask"].sum(dim=1))
    assert whole.audio_values.shape[-1] == 416 and trimmed.audio_values.shape[-1] == 411
    assert trimmed.audio_lengths.tolist() == [301, 411]
    assert torch.equal(trimmed.audio_values[0, :, :301], whole.audio_values[0, :, :301])
    assert not trimmed.audio_values[0, :, 301:].any()


# -- levels -----------------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_any_range_of_levels(codec):
    audio = torch.stack(waves(400, 400))
    codes = codec.encode(audio).audio_codes
    for first in range(3):
        for last in range(first + 1, 4):
            part = codec.encode(audio, num_quantizers=last, first_quantizer=first).audio_codes
            assert torch.equal(part, codes[:, first:last])
            vectors = sum(codec.quantizer.levels[q].embed[codes[:, q]] for q in range(first, last))
            torch.testing.assert_close(codec.get_quantized(part, first), vectors, rtol=0, atol=1e-6)
            decoded = codec.decode(part, first_quantizer=first).audio_values
            torch.testing.assert_close(decoded, codec.decoder(vectors.transpose(1, 2)), rtol=0, atol=1e-6)
    # Upstream's way of starting at a later level: nothing is subtracted.
    frames = codec.encoder(audio[:, None]).transpose(1, 2)
    raw = codec.encode(audio, first_quantizer=1, first_quantizer_from="input").audio_codes
    nearest_to_frames = torch.cdist(frames, codec.quantizer.levels[1].embed).argmin(dim=-1)
    assert torch.equal(raw[:, 0], nearest_to_frames) and not torch.equal(raw, codes[:, 1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first_quantizer": 3}, "first_quantizer, num_quantizers: expected 0 <= first < number <= 3, got 3 and 3"),
        ({"num_quantizers": 4}, "got 0 and 4"),
        ({"num_quantizers": 0}, "got 0 and 0"),
        ({"first_quantizer_from": "middle"}, "expected 'residual' or 'input', got 'middle'"),
        ({"attention_mask": torch.tensor([[0] * 3 + [1] * 37])}, "attention_mask: expected 1 for what is real and 0"),
        ({"attention_mask": torch.zeros(1, 40)}, "attention_mask: expected at least 1 in every item"),
        ({"attention_mask": torch.ones(1, 41)}, r"attention_mask: expected the shape \(1, 40\), got \(1, 41\)"),
        ({"attention_mask": torch.ones(1, 40), "padding_mask": torch.ones(1, 40)}, "expected one of them, got both"),
    ],
)
def test_encode_says_what_is_wrong(codec, options, message):
    with pytest.raises(ValueError, match=message):
        codec.encode(torch.zeros(1, 40), **options)


@pytest.mark.parametrize(
    ("codes", "options", "message"),
    [
        (torch.zeros(1, 4, 5, dtype=torch.long), {}, "got 0 and 4"),
        (torch.zeros(1, 3, 5, dtype=torch.long), {"first_quantizer": 1}, "got 1 and 4"),
        (torch.full((1, 3, 5), 16), {}, r"audio_codes: expected -1..15, got 16..16"),
        (torch.tensor([[[1, 2, 3], [1, -1, 3]]]), {}, "in all levels of a frame or in none"),
        (torch.zeros(1, 5, dtype=torch.long), {}, r"expected \(batch, quantizers, frames\), got \(1, 5\)"),
        (torch.full((1, 3, 5), -1), {}, "audio_codes: expected at least 1 in every item"),
    ],
)
def test_decode_says_what_is_wrong(codec, codes, options, message):
    with pytest.raises(ValueError, match=message):
        codec.decode(codes, **options)


def test_input_without_samples_or_with_two_channels_is_refused(codec):
    for shape in ((1, 0), (1, 2, 40), (40,)):
        with pytest.raises(ValueError, match="expected"):
            codec.encode(torch.zeros(shape))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_lstm_layers": 0},
        {"hidden_act": "relu"},
        {"upsampling_ratios": [4, 0]},
        {"num_filters": 1},
        {"codebook_decay": 1.5},
        {"num_quantizers": 0},
    ],
)
def test_configuration_refuses(changes):
    with pytest.raises(
        ValueError, match=f"{'use_bidirectional_lstm' if 'num_lstm_layers' in changes else [*changes][0]}: expected"
    ):
        SpeechTokenizerConfig(**TINY | changes)


# -- saving -----------------------------------------------------------------------------------------------------------
def test_save_load_save_is_bit_equal(tmp_path):
    for changes in ({}, {"hidden_act": "snake", "semantic_hidden_size": 8}):
        model = tiny_codec(**changes)
        folders = [tmp_path / f"{len(changes)}_{name}" for name in ("a", "b")]
        model.save_pretrained(folders[0])
        loaded, info = SpeechTokenizerModel.from_pretrained(folders[0], output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
        loaded.save_pretrained(folders[1])
        assert {path.name for path in folders[0].iterdir()} == {path.name for path in folders[1].iterdir()}
        for path in folders[0].iterdir():
            assert (folders[1] / path.name).read_bytes() == path.read_bytes(), path.name


def test_new_model_has_torch_defaults():
    """Magnitude = norm of the direction, so that the weight is what torch draws; codebooks wait for data."""
    model = SpeechTokenizerModel(SpeechTokenizerConfig(**TINY))
    for module in model.modules():
        if isinstance(module, torch.nn.Conv1d | torch.nn.ConvTranspose1d):
            pair = module.parametrizations.weight
            torch.testing.assert_close(module.weight, pair.original1)
            assert pair.original1.abs().max() <= pair.original1[0].numel() ** -0.5
    assert not any(level.inited or level.embed.any() for level in model.quantizer.levels)


@torch.no_grad()
def test_folded_weight_norm_gives_the_same_and_loads(tmp_path):
    model, audio = tiny_codec(), torch.stack(waves(400))
    before = model(audio)
    model.remove_weight_norm()
    model.save_pretrained(tmp_path)
    loaded = SpeechTokenizerModel.from_pretrained(tmp_path)
    assert not loaded.config.use_weight_norm and "encoder.input_conv.conv.weight" in loaded.state_dict()
    for folded in (model, loaded):
        after = folded(audio)
        assert torch.equal(after.audio_codes, before.audio_codes)
        torch.testing.assert_close(after.audio_values, before.audio_values, rtol=0, atol=1e-6)


@torch.no_grad()
def test_half_precision_keeps_the_codebooks(tmp_path):
    tiny_codec().save_pretrained(tmp_path)
    model = SpeechTokenizerModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.quantizer.levels[0].embed.dtype == torch.float32
    assert model.encoder.input_conv.conv.bias.dtype == torch.bfloat16
    output = model(torch.stack(waves(400)))
    assert output.audio_values.dtype == torch.bfloat16 and output.audio_values.isfinite().all()


def test_auto_classes(tmp_path):
    tiny_codec().save_pretrained(tmp_path)
    EncodecFeatureExtractor(feature_size=1, sampling_rate=16000).save_pretrained(tmp_path)
    for auto in (AutoModel, AutoModelForAudioTokenization):
        assert type(auto.from_pretrained(tmp_path)) is SpeechTokenizerModel
    assert type(AutoFeatureExtractor.from_pretrained(tmp_path)) is EncodecFeatureExtractor
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.hop_length == 8 and config.frame_rate == 2000.0
    auto_map = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["auto_map"]
    model = "modeling_speechtokenizer.SpeechTokenizerModel"
    assert auto_map == {
        "AutoConfig": "configuration_speechtokenizer.SpeechTokenizerConfig",
        "AutoModel": model,
        "AutoModelForAudioTokenization": model,
    }


def test_published_shape():
    """Parameters of the published model: 482 MB of float32 with its codebooks and their averages."""
    with torch.device("meta"):
        model = SpeechTokenizerModel(SpeechTokenizerConfig())
    sizes = [tensor.numel() for tensor in model.state_dict().values()]
    assert 4 * sum(sizes) == pytest.approx(482e6, rel=0.01)
    assert model.config.hop_length == 320 and model.config.frame_rate == 50.0


def test_remote_code_in_a_clean_process(tmp_path):
    """Codes and audio equal ours, and what it saves is complete again."""
    model = tiny_codec()
    model.save_pretrained(tmp_path / "model")
    EncodecFeatureExtractor(feature_size=1, sampling_rate=16000).save_pretrained(tmp_path / "model")
    (audio,) = waves(1000)
    save_file({"audio": audio}, tmp_path / "audio.safetensors")
    (tmp_path / "remote.py").write_text(REMOTE, encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
    arguments = ("remote.py", clean_process.__file__, "model", "audio.safetensors", "output.safetensors", "again")
    done = subprocess.run(
        [sys.executable, "-I", *(str(tmp_path / part) for part in arguments)],
        env={**environment, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.strip().splitlines()[-1])["class"].startswith("transformers_modules.")
    output = load_file(tmp_path / "output.safetensors")
    with torch.no_grad():
        codes = model.encode(audio[None]).audio_codes
        assert torch.equal(output["codes"], codes)
        assert torch.equal(output["audio"], model.decode(codes).audio_values)
    code = {path.name for path in (tmp_path / "model").glob("*.py")}
    assert {"modeling_speechtokenizer.py", "seanet.py", "residual_vector_quantizer.py"} <= code
    assert {path.name for path in (tmp_path / "again").glob("*.py")} == code


# -- codebooks --------------------------------------------------------------------------------------------------------
def clusters(count: int, each: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors around `count` far-apart centres: `(count * each, 5)`, and the centres."""
    generator = torch.Generator().manual_seed(seed)
    centres = 10 * torch.randn(count, 5, generator=generator)
    noise = 0.01 * torch.randn(count * each, 5, generator=generator)
    return centres.repeat_interleave(each, dim=0) + noise, centres


def test_kmeans_finds_clusters_and_keeps_empty_ones():
    """A k-means from random rows may merge two clusters; no mean is NaN, and every vector is near its own."""
    vectors, _ = clusters(6, 50)
    means, sizes = kmeans(vectors, 40, 20, torch.Generator().manual_seed(1))
    assert means.isfinite().all() and sizes.sum() == 300
    assert (vectors - means[nearest(vectors, means)]).norm(dim=1).max() < 0.2
    few, sizes = kmeans(vectors[:3], 8, 5, torch.Generator().manual_seed(1))
    assert few.isfinite().all() and sizes.sum() == 3


def test_first_training_batch_makes_the_codewords():
    """They are means of that batch, also after its update, for which upstream divides them by the cluster's size.

    The next batch does not start anew, and evaluation never starts.
    """
    model, audio = tiny_codec(trained=False), torch.stack(waves(800, 800))
    model(audio)
    assert not any(level.inited for level in model.quantizer.levels)
    model.train()
    output = model(audio, generator=torch.Generator().manual_seed(3))
    assert all(level.inited for level in model.quantizer.levels)
    assert len(output.audio_codes[:, 0].unique()) > 8
    distance = model.encoder(audio[:, None]).transpose(1, 2) - model.get_quantized(output.audio_codes[:, :1])
    frames = model.encoder(audio[:, None]).transpose(1, 2).flatten(0, 1)
    assert distance.square().mean() < 0.6 * frames.var(dim=0).mean()
    embed = model.quantizer.levels[0].embed.clone()
    model(torch.stack(waves(800, 800, seed=5)))
    moved = (model.quantizer.levels[0].embed - embed).norm() / embed.norm()
    assert 0 < moved < 0.2


def test_training_draws_from_the_generator():
    audio, results = torch.stack(waves(400, 400)), []
    for global_seed in (1, 2):
        model = tiny_codec(trained=False).train()
        torch.manual_seed(global_seed)
        model(audio, generator=torch.Generator().manual_seed(3))
        results.append(model.quantizer.levels[0].embed.clone())
    assert torch.equal(*results)


def test_dead_codeword_is_replaced_by_a_vector_of_the_batch():
    """Not only for the moment, as upstream: it is there after the step and the next batch finds it."""
    codebook = EmaCodebook(4, 5, decay=0.99, dead_code_threshold=2.0, kmeans_iterations=1)
    vectors, centres = clusters(4, 25)
    codebook.embed.copy_(centres)
    codebook.embed[2] = 1e3
    codebook.cluster_size.copy_(torch.tensor([9.0, 9.0, 1.0, 9.0]))
    codebook.embed_avg.copy_(codebook.embed * codebook.cluster_size[:, None])
    assert 2 not in codebook.encode(vectors)
    before = codebook.embed.clone()
    codebook.update(vectors, codebook.encode(vectors), torch.Generator().manual_seed(0))
    assert (vectors - codebook.embed[2]).norm(dim=1).min() < 1e-2
    assert codebook.cluster_size[2] == 2.0 and 2 in codebook.encode(vectors)
    torch.testing.assert_close(codebook.embed[[0, 1]], before[[0, 1]], rtol=0, atol=0.05)

    kept = EmaCodebook(4, 5, decay=0.99, dead_code_threshold=0.0, kmeans_iterations=1)
    kept.load_state_dict(
        {**codebook.state_dict(), "embed": before, "embed_avg": before, "cluster_size": torch.ones(4)}
    )
    kept.update(vectors, kept.encode(vectors))
    assert kept.embed[2].norm() > 1e3


def test_gradient_passes_the_quantizer_straight():
    model, audio = tiny_codec().train(), torch.stack(waves(400))
    output = model(audio)
    assert output.commitment_loss > 0
    output.audio_values.square().mean().backward(retain_graph=True)
    through = model.encoder.input_conv.conv.parametrizations.weight.original1.grad.clone()
    assert through.abs().max() > 0
    assert model.eval()(audio).commitment_loss == 0


def _train_codebook(rank: int, folder: str) -> None:
    """One process of two: half of the vectors."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    vectors = load_file(f"{folder}/vectors.safetensors")["vectors"].chunk(2)[rank]
    codebook = EmaCodebook(6, 5, decay=0.9, dead_code_threshold=1.5, kmeans_iterations=5)
    torch.manual_seed(rank)
    codebook.initialize(vectors)
    start = codebook.embed.clone()
    for _ in range(4):
        codebook.update(vectors, codebook.encode(vectors))
    save_file({"start": start, **codebook.state_dict()}, f"{folder}/{rank}.safetensors")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_share_one_codebook(tmp_path):
    """Both have the same after every step; without dead codewords, that of one process with all vectors."""
    vectors, _ = clusters(6, 40)
    vectors = vectors[torch.randperm(len(vectors), generator=torch.Generator().manual_seed(2))]
    save_file({"vectors": vectors}, tmp_path / "vectors.safetensors")
    multiprocessing.spawn(_train_codebook, args=(str(tmp_path),), nprocs=2)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    assert first["cluster_size"].sum() > 50
