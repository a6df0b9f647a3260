"""An S3 speech tokenizer against S3Tokenizer: features, encoder, what is rounded, tokens, a recording over 30 s."""

from pathlib import Path

import torch
from s3_tokenizer import convert, read
from torch import Tensor
from transformers import AutoFeatureExtractor, AutoModel

import hf_speechllm  # noqa: F401  registers the Auto classes
from hf_speechllm.models.modeling_s3_tokenizer import S3TokenizerModel
from hf_speechllm.upstream.checkpoints import read_state_dict

from .case import Case


def check_s3_tokenizer(case: Case, work: Path) -> None:
    """Convert the graph of `case` into `work` and check every expected value."""
    graph = next(iter(sorted(case.directory.glob("speech_tokenizer*.onnx"))))
    convert(graph, work / "model")
    model = AutoModel.from_pretrained(work / "model").eval()
    extractor = AutoFeatureExtractor.from_pretrained(work / "model")
    tensors = case.tensors
    case.use("mel_len", "long.n_frames")
    with torch.no_grad():
        row = extractor(tensors["wav0"], sampling_rate=16000)["input_features"].transpose(1, 2)
        case.use("wav0")
        case.compare("mel", row, tensors["mel"][:1, :, : row.shape[2]])
        mask = torch.arange(tensors["mel"].shape[2]) < tensors["mel_len"][:, None]
        output = model(tensors["mel"].transpose(1, 2), mask)
        lengths = output.token_mask.sum(dim=1)
        case.compare("hidden_len", lengths.to(tensors["hidden_len"].dtype))
        case.compare("ids_len", lengths.to(tensors["ids_len"].dtype))
        case.compare("hidden", output.last_hidden_state, where=output.token_mask[..., None])
        case.compare("ids", output.token_ids, where=output.token_mask)
        own = output.last_hidden_state[0, : int(lengths[0])]
        if "margin" in tensors:
            case.compare("margin", margin(model, own))
        if "fsq_pre_round" in tensors:
            case.compare("fsq_pre_round", model.quantizer.bounded(own))
        features = extractor(long_recording(case.facts["seed"] + 50), sampling_rate=16000)
        case.compare("long.n_frames", torch.tensor(features["input_features"].shape[1]), tensors["long.n_frames"])
        case.compare("long.ids", model(**features).token_ids)
    check_state_dict(case, model)


def check_state_dict(case: Case, model: S3TokenizerModel) -> None:
    """The state dict beside the graph says the same as the graph."""
    path = next(iter(sorted(case.directory.glob("speech_tokenizer*.pt"))))
    state = read_state_dict(path)
    case.compare("sd_keys_count", torch.tensor(len(state)))
    _, weights = read(path, num_attention_heads=model.config.num_attention_heads)
    same = all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    case.record("state_dict", None, "equal", same)


def margin(model: S3TokenizerModel, hidden_states: Tensor) -> Tensor:
    """By how much the second code is farther than the best, `(n,)`."""
    nearest = model.quantizer.distances(hidden_states).topk(2, dim=-1, largest=False).values.sqrt()
    return nearest[:, 1] - nearest[:, 0]


def long_recording(seed: int) -> Tensor:
    """The 33 s of the case's `wave_recipe`: a swinging harmonic tone with pauses and a little noise, `(528000,)`."""
    rate, seconds, pitch = 16000, 33, 140.0
    time = torch.arange(rate * seconds, dtype=torch.float32) / rate
    frequency = pitch * (1 + 0.2 * torch.sin(2 * torch.pi * 2.1 * time))
    phase = 2 * torch.pi * torch.cumsum(frequency / rate, dim=0)
    tone = sum(torch.sin(harmonic * phase) / harmonic for harmonic in range(1, 9))
    envelope = 0.5 + 0.5 * torch.clamp(torch.sin(2 * torch.pi * 1.7 * time), -0.6, 1.0)
    noise = torch.randn(len(time), generator=torch.Generator().manual_seed(seed))
    wave = 0.2 * tone * envelope + 0.01 * noise
    return wave / wave.abs().max() * 0.7
