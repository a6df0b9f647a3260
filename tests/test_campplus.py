"""The CAM++ speaker encoder: batches, conversion of graphs and of state dicts, saving."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_s3_tokenizer import CAMPPLUS_SIZES, tiny_campplus
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoFeatureExtractor, AutoModel

from hf_speechllm.models.configuration_campplus import CampplusConfig
from hf_speechllm.models.feature_extraction_campplus import CampplusFeatureExtractor
from hf_speechllm.models.feature_extraction_kaldi_fbank import AudioError
from hf_speechllm.upstream.errors import ConversionError, UnsafeArtifactError


sys.path.insert(0, str(Path(__file__).parents[1] / "conversion"))
import campplus as conversion


GOLDEN = Path(__file__).parent / "golden" / "cosyvoice" / "campplus"


def test_a_recording_of_a_batch_equals_alone():
    model = tiny_campplus()
    generator = torch.Generator().manual_seed(0)
    items = [torch.randn(length, 16, generator=generator) for length in (45, 14, 30, 28, 1)]
    padded = pad_sequence(items, batch_first=True, padding_value=5.0)
    mask = torch.arange(45) < torch.tensor([[len(item)] for item in items])
    with torch.no_grad():
        together = model(padded, mask).embeddings
        for row, item in enumerate(items):
            torch.testing.assert_close(together[row], model(item[None]).embeddings[0], atol=1e-5, rtol=1e-5)
    assert torch.isfinite(together).all()
    assert float((together[0] - together[1]).abs().max()) > 1e-3


def test_graph_becomes_a_folder_that_saves_as_it_was_loaded(tmp_path):
    report = conversion.convert(GOLDEN / "campplus.onnx", tmp_path / "model")
    assert report["inputs"].keys() == {"campplus.onnx"}
    model, loading = AutoModel.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert model.config.num_block_layers == [12, 24, 16] and model.config.block_dilations == [1, 2, 2]
    model.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "model" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "model")
    assert isinstance(extractor, CampplusFeatureExtractor)
    audio = 0.1 * torch.randn(8000, generator=torch.Generator().manual_seed(3))
    inputs = extractor([audio, audio[:4000]], sampling_rate=16000)
    assert inputs["input_features"].shape == (2, 48, 80)
    torch.testing.assert_close(inputs["input_features"][1, :23].mean(dim=0), torch.zeros(80), atol=1e-5, rtol=0)
    with torch.no_grad():
        alone = model(**extractor(audio[:4000], sampling_rate=16000)).embeddings
        torch.testing.assert_close(model(**inputs).embeddings[1:], alone, atol=1e-5, rtol=1e-5)


def test_norms_of_a_state_dict_are_multiplied_in():
    _, from_graph = conversion.read(GOLDEN / "campplus.onnx")
    _, from_state = conversion.read(GOLDEN / "campplus.pt")
    for name, tensor in from_graph.items():
        torch.testing.assert_close(from_state[name], tensor, atol=1e-5, rtol=1e-5)


def test_wrong_state_dicts_are_named(tmp_path):
    state = torch.load(GOLDEN / "campplus.pt", weights_only=True)
    path = tmp_path / "campplus.pt"
    changes = {
        "missing": lambda s: s.pop("xvector.block2.tdnnd3.nonlinear2.batchnorm.running_var"),
        "unknown weight": lambda s: s.update({"xvector.block1.tdnnd1.extra": torch.zeros(1)}),
        "shape": lambda s: s.update({"xvector.transit2.linear.weight": torch.zeros(3, 128, 1)}),
        "float32": lambda s: s.update({"head.conv1.weight": s["head.conv1.weight"].double()}),
    }
    for message, change in changes.items():
        broken = dict(state)
        change(broken)
        torch.save(broken, path)
        with pytest.raises(ConversionError, match=message):
            conversion.read(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UnsafeArtifactError):
        conversion.read(path)


def test_extractor_refuses_what_is_no_recording():
    extractor = CampplusFeatureExtractor()
    with pytest.raises(AudioError, match="at least one window of 25 ms, got 399 samples"):
        extractor(np.zeros(399, np.float32), sampling_rate=16000)
    with pytest.raises(AudioError, match="expected 16000, got 24000"):
        extractor(np.zeros(4000, np.float32), sampling_rate=24000)
    assert torch.isfinite(extractor(np.zeros(4000, np.float32), sampling_rate=16000)["input_features"]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_mel_bins": 81}, "multiple of 8"),
        ({"num_head_blocks": [2]}, "2 stages"),
        ({"block_dilations": [1]}, "block_dilations"),
        ({"kernel_size": 4}, "odd"),
    ],
)
def test_contradictory_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        CampplusConfig(**{**CAMPPLUS_SIZES, **changes})
