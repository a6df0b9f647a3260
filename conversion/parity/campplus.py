"""The CAM++ speaker encoder against torch and onnxruntime."""

from pathlib import Path

import torch
from campplus import convert, read
from transformers import AutoModel

import hf_speechllm  # noqa: F401  registers the Auto classes
from hf_speechllm.models.modeling_campplus import CampplusModel

from .case import Case


def check_campplus(case: Case, work: Path) -> None:
    """Convert the graph of `case` into `work`, and read the state dict beside it."""
    convert(case.directory / "campplus.onnx", work / "model")
    model = AutoModel.from_pretrained(work / "model").eval()
    config, weights = read(case.directory / "campplus.pt")
    from_torch = CampplusModel(config).eval()
    from_torch.load_state_dict(weights)
    case.use("fbank")
    with torch.no_grad():
        case.compare("embedding_ort", model(case.tensors["fbank"]).embeddings)
        case.compare("embedding", from_torch(case.tensors["fbank"]).embeddings)
