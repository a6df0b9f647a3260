"""S3 speech tokenizers: batches, windows, training, conversion, saving."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_s3_tokenizer import S3_SIZES, VERSIONS, tiny_s3_recogniser, tiny_s3_tokenizer
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForAudioTokenization, AutoModelForCTC

from hf_speechllm.hub import clean_process
from hf_speechllm.models.configuration_s3_tokenizer import S3TokenizerConfig
from hf_speechllm.models.feature_extraction_kaldi_fbank import AudioError
from hf_speechllm.models.feature_extraction_s3_tokenizer import S3FeatureExtractor
from hf_speechllm.models.finite_scalar_quantizer import FiniteScalarQuantizer
from hf_speechllm.models.modeling_s3_tokenizer import S3TokenizerModel
from hf_speechllm.upstream.errors import ConversionError


sys.path.insert(0, str(Path(__file__).parents[1] / "conversion"))
import s3_tokenizer as conversion


GOLDEN = Path(__file__).parent / "golden" / "cosyvoice"
every_version = pytest.mark.parametrize("version", VERSIONS)

REMOTE = """
import importlib.util, sys
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
inputs = extractor(load_file(sys.argv[3])["audio"].numpy(), sampling_rate=16000)
save_file({"tokens": model.encode(**inputs).token_ids}, sys.argv[4])
model.save_pretrained(sys.argv[5])
assert type(model).__module__.startswith("transformers_modules.")
"""


def features(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, S3_SIZES["num_mel_bins"], generator=generator) for length in lengths]


def batch_of(items: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    padded = pad_sequence(items, batch_first=True, padding_value=3.0)
    lengths = torch.tensor([len(item) for item in items])
    return {"input_features": padded, "attention_mask": (torch.arange(padded.shape[1]) < lengths[:, None]).long()}


@every_version
def test_a_recording_of_a_batch_has_the_tokens_it_has_alone(version):
    model = tiny_s3_tokenizer(version)
    items = features(41, 7, 30, 1)
    together = model.encode(**batch_of(items))
    for row, item in enumerate(items):
        alone = model.encode(item[None])
        count = model.config.num_tokens(len(item))
        assert alone.token_ids.shape == (1, count) and int(together.token_mask[row].sum()) == count
        assert torch.equal(together.token_ids[row, :count], alone.token_ids[0])
        assert not together.token_ids[row, count:].any()
        torch.testing.assert_close(together.last_hidden_state[row, :count], alone.last_hidden_state[0])
    assert len(together.token_ids.unique()) > 3, "all tokens alike would equal anything"


@every_version
def test_rate_and_count(version):
    model = tiny_s3_tokenizer(version)
    assert model.config.token_rate == (50 if version == "v1_50hz" else 25)
    for frames in range(1, 14):
        assert model.encode(features(frames)[0][None]).token_ids.shape[1] == model.config.num_tokens(frames)


def test_long_recordings_are_computed_in_windows():
    """Windows of 40 frames, 24 apart: of the 16 shared frames, 8 (2 tokens) come from each window."""
    model = tiny_s3_tokenizer(window_frames=40, window_stride=24)
    long, short = features(100, 33)
    tokens = model.encode(long[None]).token_ids[0]
    assert len(tokens) == model.config.num_tokens(100)
    windows = [model.encode(long[start : start + 40][None]).token_ids[0] for start in range(0, 84, 24)]
    expected = torch.cat([windows[0][:-2], *(window[2:-2] for window in windows[1:-1]), windows[-1][2:]])
    assert torch.equal(tokens, expected)
    for frames in range(41, 99):
        assert model.encode(long[None, :frames]).token_ids.shape[1] == model.config.num_tokens(frames), frames
    together = model.encode(**batch_of([long, short]))
    assert torch.equal(together.token_ids[0], tokens)
    assert torch.equal(together.token_ids[1, :9], model.encode(short[None]).token_ids[0])


def test_a_recording_without_a_frame_has_no_tokens():
    model = tiny_s3_tokenizer()
    assert model.encode(torch.zeros(2, 0, 16)).token_ids.shape == (2, 0)
    together = model.encode(torch.randn(2, 9, 16), torch.tensor([[1] * 9, [0] * 9]))
    assert together.token_mask.sum(dim=1).tolist() == [3, 0]


def test_scalar_quantiser_counts_in_its_base():
    quantizer = FiniteScalarQuantizer(4, levels=3, size=4)
    tokens = torch.arange(81)
    digits = quantizer.decode(tokens)
    assert digits.unique().tolist() == [-1, 0, 1] and len(digits.unique(dim=0)) == 81
    # Digit 0 counts least.
    assert digits[1].tolist() == [0, -1, -1, -1]
    with torch.no_grad():
        quantizer.project_down.weight.copy_(torch.eye(4) * 20)
        quantizer.project_down.bias.zero_()
    assert torch.equal(quantizer.encode(digits), tokens)
    five = FiniteScalarQuantizer(2, levels=5, size=2)
    assert five.decode(torch.arange(25)).unique().tolist() == [-2, -1, 0, 1, 2]
    assert float(five.bounded(torch.full((1, 2), 1e6)).abs().max()) <= 2.0


def test_a_new_projection_can_be_brought_to_the_scale_of_its_input():
    torch.manual_seed(0)
    quantizer = FiniteScalarQuantizer(16, levels=3, size=6)
    vectors = 5 + 0.01 * torch.randn(500, 16)
    torch.nn.init.normal_(quantizer.project_down.weight, std=0.02)
    assert len(quantizer.encode(vectors).unique()) == 1
    quantizer.standardize(vectors)
    projected = quantizer.project_down(vectors)
    torch.testing.assert_close(projected.mean(0), torch.zeros(6), atol=1e-3, rtol=0)
    torch.testing.assert_close(projected.std(0), torch.ones(6), atol=1e-3, rtol=0)
    assert len(quantizer.encode(vectors).unique()) > 100


@every_version
def test_training_reaches_every_weight(version):
    model = tiny_s3_recogniser(version).train()
    inputs = batch_of(features(60, 44, 52))
    labels = torch.tensor([[1, 2, 3], [4, 5, -100], [6, 7, 8]])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for step in range(30):
        optimizer.zero_grad()
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        if step == 0:
            missing = [
                name
                for name, parameter in model.named_parameters()
                if parameter.requires_grad and (parameter.grad is None or not bool(parameter.grad.any()))
            ]
            assert missing == []
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]


def test_quantisation_can_begin_later():
    """Without it the recogniser is the same before and after the coordinates were standardised; then tokens vary."""
    model = tiny_s3_recogniser(initializer_range=0.02).eval()
    inputs = batch_of(features(60, 44, 52))
    with torch.no_grad():
        before = model(**inputs, quantize=False).logits
        assert len(model(**inputs).token_ids[0].unique()) == 1
        model.standardize_quantizer(inputs["input_features"], inputs["attention_mask"])
        torch.testing.assert_close(model(**inputs, quantize=False).logits, before, atol=1e-5, rtol=1e-4)
        assert len(model(**inputs).token_ids.unique()) > 8


def test_recogniser_of_a_batch_equals_alone():
    model = tiny_s3_recogniser().eval()
    items = features(40, 23)
    with torch.no_grad():
        together = model(**batch_of(items))
        for row, item in enumerate(items):
            alone = model(item[None])
            count = alone.logits.shape[1]
            torch.testing.assert_close(together.logits[row, :count], alone.logits[0])
            assert (together.logits[row, count:].argmax(-1) == model.config.pad_token_id).all()
    with pytest.raises(ValueError, match="at most 3000 frames"):
        model(torch.zeros(1, 3001, 16))


def test_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = tiny_s3_recogniser().train()
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model(**batch_of(features(40, 23)), labels=torch.tensor([[1, 2], [3, -100]])).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_a_trained_tokenizer_is_saved_alone(tmp_path):
    recogniser = tiny_s3_recogniser().eval()
    recogniser.save_pretrained(tmp_path / "recogniser")
    assert isinstance(AutoModelForCTC.from_pretrained(tmp_path / "recogniser"), type(recogniser))
    recogniser.tokenizer.save_pretrained(tmp_path / "tokenizer")
    model = AutoModelForAudioTokenization.from_pretrained(tmp_path / "tokenizer")
    inputs = batch_of(features(40, 23))
    assert torch.equal(model.encode(**inputs).token_ids, recogniser(**inputs).token_ids)
    # And straight out of the recogniser's folder.
    model = AutoModel.from_pretrained(tmp_path / "recogniser")
    assert torch.equal(model.encode(**inputs).token_ids, recogniser(**inputs).token_ids)


@pytest.mark.parametrize("case", ["s3_v1", "s3_v2", "s3_v3"])
def test_graph_becomes_a_model_that_saves_as_it_was_loaded(case, tmp_path):
    (graph,) = (GOLDEN / case).glob("*.onnx")
    report = conversion.convert(graph, tmp_path / "model")
    assert report["inputs"].keys() == {graph.name}
    model, loading = AutoModel.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    model.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "model" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_loading_rebuilds_the_table_of_positions(tmp_path):
    model = tiny_s3_tokenizer("v1_50hz")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in weights.items() if k != "positions"}, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.positions, model.positions)


def test_remote_code_equals_the_package(tmp_path):
    (graph,) = (GOLDEN / "s3_v2").glob("*.onnx")
    conversion.convert(graph, tmp_path / "model")
    audio = 0.3 * torch.randn(12000, generator=torch.Generator().manual_seed(1))
    save_file({"audio": audio}, tmp_path / "audio.safetensors")
    script = tmp_path / "remote.py"
    script.write_text(REMOTE, encoding="utf-8")
    files = [tmp_path / name for name in ("model", "audio.safetensors", "tokens.safetensors", "again")]
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-I", str(script), clean_process.__file__, *map(str, files)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "model")
    tokens = AutoModel.from_pretrained(tmp_path / "model").encode(**extractor(audio, sampling_rate=16000)).token_ids
    assert torch.equal(load_file(tmp_path / "tokens.safetensors")["tokens"], tokens)
    assert (tmp_path / "again" / "modeling_s3_tokenizer.py").is_file()


def test_state_dict_with_a_wrong_weight_is_named(tmp_path):
    (path,) = (GOLDEN / "s3_v2").glob("*.pt")
    state = torch.load(path, weights_only=True)
    changes = {
        "weight is missing": lambda s: s.pop("encoder.blocks.1.mlp.0.bias"),
        "unknown weight": lambda s: s.update({"encoder.blocks.0.attn.key.bias": torch.zeros(64)}),
        "float32": lambda s: s.update({"encoder.conv2.bias": torch.zeros(64, dtype=torch.float16)}),
        "expected": lambda s: s.update({"encoder.conv2.bias": torch.zeros(63)}),
    }
    for message, change in changes.items():
        broken = dict(state)
        change(broken)
        target = tmp_path / "speech_tokenizer_v2_25hz.pt"
        torch.save(broken, target)
        with pytest.raises(ConversionError, match=message):
            conversion.read(target)


def test_extractor_refuses_and_masks():
    extractor = S3FeatureExtractor(feature_size=16)
    inputs = extractor([np.zeros(1600, np.float32), 0.1 * np.ones(700, np.float32)], sampling_rate=16000)
    assert inputs["input_features"].shape == (2, 10, 16)
    assert inputs["attention_mask"].sum(dim=1).tolist() == [10, 4]
    for bad, message in ((np.array([0.0, np.nan]), "NaN"), (np.zeros((2, 2, 2)), "dimensions")):
        with pytest.raises(AudioError, match=message):
            extractor(bad, sampling_rate=16000)
    with pytest.raises(AudioError, match="expected 16000, got 8000"):
        extractor(np.zeros(800, np.float32), sampling_rate=8000)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantizer": "rvq"}, "quantizer"),
        ({"position_embedding": "alibi"}, "position_embedding"),
        ({"num_attention_heads": 3}, "multiple of num_attention_heads"),
        ({"fsq_levels": 4}, "odd"),
        ({"codebook_size": 28}, "fsq_levels"),
        ({"window_stride": 2599}, "window_stride"),
        ({"position_embedding": "sinusoidal", "max_positions": 700}, "max_positions"),
    ],
)
def test_contradictory_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        S3TokenizerConfig(**{**S3_SIZES, **changes})


def test_published_sizes():
    """Four bytes for each of 130.6, 123.7 and 242.0 million parameters: the weights of the published files."""
    versions = {
        522_516_480: {**VERSIONS["v1_50hz"], "codebook_size": 4096},
        494_858_272: {},
        968_038_432: {"num_hidden_layers": 12},
    }
    for size, changes in versions.items():
        with torch.device("meta"):
            model = S3TokenizerModel(S3TokenizerConfig(**changes))
        assert sum(tensor.numel() for tensor in model.state_dict().values()) * 4 == size
