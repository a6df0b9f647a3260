"""The CAM++ speaker encoder of a CosyVoice pack: weights out of `campplus.onnx`, or out of a state dict of 3D-Speaker.

In the graph, a norm that follows a convolution is part of it, and such a convolution's weights have no name: they are
known by the path of the node that uses them. A state dict still has those norms; they are multiplied in here.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from hf_speechllm.models.configuration_campplus import CampplusConfig
from hf_speechllm.models.feature_extraction_campplus import CampplusFeatureExtractor
from hf_speechllm.models.modeling_campplus import CampplusModel
from hf_speechllm.upstream.checkpoints import read_state_dict
from hf_speechllm.upstream.errors import ConversionError
from hf_speechllm.upstream.onnx_graph import OnnxGraph, read_onnx_graph
from hf_speechllm.upstream.safetensors_file import write_safetensors
from hf_speechllm.upstream.staging import sha256_of_file, staged_directory, write_report


GRAPH_NAME = "campplus.onnx"
NORM_PARTS = ("weight", "bias", "running_mean", "running_var")
_TORCH_EPS = 1e-5


def module_names(config: CampplusConfig) -> tuple[dict[str, tuple[str, str | None]], dict[str, str]]:
    """Upstream's modules → ours.

    Returns:
        convolutions: upstream's name → (ours, the norm behind it that is multiplied in); norms that stay.
    """
    convolutions: dict[str, tuple[str, str | None]] = {
        "head.conv1": ("head.conv1", "head.bn1"),
        "head.conv2": ("head.conv2", "head.bn2"),
        "xvector.tdnn.linear": ("tdnn", "xvector.tdnn.nonlinear.batchnorm"),
        "xvector.dense.linear": ("dense", None),
    }
    norms = {"xvector.dense.nonlinear.batchnorm": "norm"}
    for stage, blocks in enumerate(config.num_head_blocks):
        for block in range(blocks):
            theirs, ours = f"head.layer{stage + 1}.{block}", f"head.stages.{stage}.{block}"
            convolutions[f"{theirs}.conv1"] = (f"{ours}.conv1", f"{theirs}.bn1")
            convolutions[f"{theirs}.conv2"] = (f"{ours}.conv2", f"{theirs}.bn2")
            if block == 0:
                convolutions[f"{theirs}.shortcut.0"] = (f"{ours}.shortcut", f"{theirs}.shortcut.1")
    last = len(config.num_block_layers)
    for block, layers in enumerate(config.num_block_layers, start=1):
        for layer in range(1, layers + 1):
            theirs, ours = f"xvector.block{block}.tdnnd{layer}", f"blocks.{block - 1}.{layer - 1}"
            norms[f"{theirs}.nonlinear1.batchnorm"] = f"{ours}.norm"
            convolutions[f"{theirs}.linear1"] = (f"{ours}.bottleneck", f"{theirs}.nonlinear2.batchnorm")
            for part, name in (("linear_local", "conv"), ("linear1", "fc1"), ("linear2", "fc2")):
                convolutions[f"{theirs}.cam_layer.{part}"] = (f"{ours}.gate.{name}", None)
        norms[f"xvector.transit{block}.nonlinear.batchnorm"] = f"transitions.{block - 1}.norm"
        behind = "xvector.out_nonlinear.batchnorm" if block == last else None
        convolutions[f"xvector.transit{block}.linear"] = (f"transitions.{block - 1}.proj", behind)
    return convolutions, norms


def read(path: Path) -> tuple[CampplusConfig, dict[str, Tensor]]:
    """Configuration and weights, under our names, of an `.onnx` graph or of a state dict.

    Raises:
        ConversionError: a weight that is missing, unknown or of another shape, named in the message.
        UnsafeArtifactError: a file that is hostile or damaged.
    """
    if path.suffix == ".onnx":
        graph = read_onnx_graph(path)
        state, dilations = graph_weights(graph), graph_dilations(graph)
        config = config_of(state, dilations, path)
        return config, convert_weights(state, config, path, folded=True)
    state = read_state_dict(path)
    state = {name: tensor for name, tensor in state.items() if not name.endswith(".num_batches_tracked")}
    config = config_of(state, {}, path)
    return config, convert_weights(state, config, path, folded=False)


def graph_weights(graph: OnnxGraph) -> dict[str, Tensor]:
    """The weights of a graph by the names that they had in torch; a folded norm is the bias of its convolution."""
    state: dict[str, Tensor] = {}
    for node in graph.nodes:
        name = torch_name(node.name, node.op_type)
        if node.op_type == "Conv":
            for part, tensor in zip(("weight", "bias"), node.inputs[1:], strict=False):
                if tensor in graph.tensors:
                    state[f"{name}.{part}"] = graph.tensors[tensor]
        elif node.op_type == "BatchNormalization":
            for part, tensor in zip(NORM_PARTS, node.inputs[1:], strict=False):
                # The last norm has no scale and shift; its graph has constants of one and zero for them.
                if tensor in graph.tensors and not (name.startswith("xvector.dense") and part in ("weight", "bias")):
                    state[f"{name}.{part}"] = graph.tensors[tensor]
    return state


def torch_name(path: str, operation: str) -> str:
    """`/head/layer1/layer1.0/conv1/Conv` → `head.layer1.0.conv1`: a numbered part repeats the name of its parent."""
    parts = path.strip("/").removesuffix(f"/{operation}").split("/")
    names = [
        part for part, following in zip(parts, [*parts[1:], ""], strict=True) if not following.startswith(f"{part}.")
    ]
    return ".".join(names)


def graph_dilations(graph: OnnxGraph) -> dict[int, int]:
    """Dilation of every dense block, from 1."""
    dilations = {}
    for node in graph.nodes:
        found = re.fullmatch(r"/xvector/block(\d+)/tdnnd1/cam_layer/linear_local/Conv", node.name)
        if found and isinstance(sizes := node.attributes.get("dilations"), list):
            dilations[int(found[1])] = sizes[0]
    return dilations


def config_of(state: dict[str, Tensor], dilations: dict[int, int], path: Path) -> CampplusConfig:
    """The configuration that weights make; dilations that a file does not say are the published ones."""

    def shape(name: str) -> torch.Size:
        if name not in state:
            raise ConversionError("weight is missing", file=path, key=name)
        return state[name].shape

    def count(pattern: str) -> int:
        return len({found[1] for name in state if (found := re.match(pattern, name))})

    blocks = count(r"xvector\.block(\d+)\.")
    layers = [count(rf"xvector\.block{block}\.tdnnd(\d+)\.") for block in range(1, blocks + 1)]
    head_channels = shape("head.conv1.weight")[0]
    local = shape("xvector.block1.tdnnd1.cam_layer.linear_local.weight")
    initial_size, head_size = shape("xvector.tdnn.linear.weight")[:2]
    try:
        return CampplusConfig(
            num_mel_bins=head_size // head_channels * 8,
            head_channels=head_channels,
            num_head_blocks=[count(rf"head\.layer{stage}\.(\d+)\.") for stage in (1, 2)],
            initial_size=initial_size,
            growth_rate=local[0],
            bottleneck_size=local[1],
            num_block_layers=layers,
            block_dilations=[dilations.get(block, 1 if block == 1 else 2) for block in range(1, blocks + 1)],
            kernel_size=local[2],
            embedding_size=shape("xvector.dense.linear.weight")[0],
        )
    except ValueError as error:
        raise ConversionError("contradictory weights", file=path, actual=str(error)) from None


def convert_weights(state: dict[str, Tensor], config: CampplusConfig, path: Path, folded: bool) -> dict[str, Tensor]:
    """Upstream's names → ours, complete and of the right shapes.

    Args:
        folded: whether the norms behind convolutions are already part of them.
    Raises:
        ConversionError: a weight that is missing, unknown, or of another shape or type.
    """
    convolutions, norms = module_names(config)
    rest = dict(state)

    def take(name: str) -> Tensor:
        if name not in rest:
            raise ConversionError("weight is missing", file=path, key=name)
        tensor = rest.pop(name)
        if tensor.dtype != torch.float32:
            raise ConversionError("type of a weight", file=path, key=name, expected="float32", actual=tensor.dtype)
        return tensor

    weights: dict[str, Tensor] = {}
    for theirs, (ours, norm) in convolutions.items():
        kernel = take(f"{theirs}.weight")
        bias = take(f"{theirs}.bias") if f"{theirs}.bias" in rest else None
        if norm is not None and not folded:
            kernel, bias = fold_norm(kernel, *(take(f"{norm}.{part}") for part in NORM_PARTS))
        # The last map is a convolution of width 1 over a single frame.
        weights[f"{ours}.weight"] = kernel[..., 0] if ours == "dense" and kernel.dim() == 3 else kernel
        if bias is not None:
            weights[f"{ours}.bias"] = bias
    for theirs, ours in norms.items():
        for part in NORM_PARTS[2:] if ours == "norm" else NORM_PARTS:
            weights[f"{ours}.{part}"] = take(f"{theirs}.{part}")
        weights[f"{ours}.num_batches_tracked"] = torch.zeros((), dtype=torch.int64)
    for name, tensor in rest.items():
        raise ConversionError("unknown weight", file=path, key=name, actual=tuple(tensor.shape))
    with torch.device("meta"):
        expected = CampplusModel(config).state_dict()
    for name in sorted(expected.keys() ^ weights.keys()):
        raise ConversionError("weights of the model and of the file differ", file=path, key=name)
    for name, tensor in expected.items():
        if weights[name].shape != tensor.shape:
            raise ConversionError(
                "shape", file=path, key=name, expected=tuple(tensor.shape), actual=tuple(weights[name].shape)
            )
    return weights


def fold_norm(kernel: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Kernel and bias of a convolution without a bias and the norm behind it."""
    factor = scale * torch.rsqrt(variance + _TORCH_EPS)
    return kernel * factor.view(-1, *[1] * (kernel.dim() - 1)), shift - mean * factor


def convert(path: Path, out: Path) -> dict[str, object]:
    """Writes the encoder in `path` as a folder that `AutoModel.from_pretrained` loads.

    Raises:
        ConversionError: see [`read`].
    """
    config, weights = read(path)
    config.architectures = ["CampplusModel"]
    config.dtype = torch.float32
    report: dict[str, object] = {
        "converter": "campplus",
        "model_type": config.model_type,
        "parameters": sum(tensor.numel() for tensor in weights.values()),
        "inputs": {path.name: sha256_of_file(path)},
    }
    with torch.device("meta"):
        model = CampplusModel(config)
    with staged_directory(out) as stage:
        model.save_pretrained(stage, state_dict={})
        write_safetensors(stage / "model.safetensors", weights)
        CampplusFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(stage)
        write_report(stage, report)
    return report
