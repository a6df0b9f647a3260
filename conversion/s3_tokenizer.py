"""The S3 speech tokenizer of a CosyVoice pack: weights out of its ONNX graph, or out of S3Tokenizer's state dict.

An exported graph has lost most names: a weight is known by the node that uses it. The first two convolutions outside
of the blocks are the subsampling; in a block, the path of a node (`/blocks.0/attn/query/MatMul`) says what it is.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from hf_speechllm.models.configuration_s3_tokenizer import S3TokenizerConfig
from hf_speechllm.models.feature_extraction_s3_tokenizer import S3FeatureExtractor
from hf_speechllm.models.modeling_s3_tokenizer import S3TokenizerModel
from hf_speechllm.upstream.checkpoints import read_state_dict
from hf_speechllm.upstream.errors import ConversionError
from hf_speechllm.upstream.onnx_graph import OnnxGraph, OnnxNode, read_onnx_graph
from hf_speechllm.upstream.safetensors_file import write_safetensors
from hf_speechllm.upstream.staging import sha256_of_file, staged_directory, write_report


GRAPH_NAMES = (
    *("speech_tokenizer_v1.onnx", "speech_tokenizer_v2.onnx", "speech_tokenizer_v3.onnx"),
    "speech_tokenizer_v3.batch.onnx",
)
# Parts of a block: upstream's name in S3Tokenizer -> ours.
BLOCK_NAMES = {
    **{f"attn.query.{part}": f"self_attn.q_proj.{part}" for part in ("weight", "bias")},
    "attn.key.weight": "self_attn.k_proj.weight",
    **{f"attn.value.{part}": f"self_attn.v_proj.{part}" for part in ("weight", "bias")},
    **{f"attn.out.{part}": f"self_attn.o_proj.{part}" for part in ("weight", "bias")},
    "attn.fsmn_block.weight": "fsmn.conv.weight",
    **{f"attn_ln.{part}": f"self_attn_layer_norm.{part}" for part in ("weight", "bias")},
    **{f"mlp.0.{part}": f"fc1.{part}" for part in ("weight", "bias")},
    **{f"mlp.2.{part}": f"fc2.{part}" for part in ("weight", "bias")},
    **{f"mlp_ln.{part}": f"final_layer_norm.{part}" for part in ("weight", "bias")},
}
OUTER_NAMES = {
    **{f"encoder.conv{n}.{part}": f"conv{n}.{part}" for n in (1, 2) for part in ("weight", "bias")},
    "encoder.positional_embedding": "positions",
    "quantizer._codebook.embed": "quantizer.codebook",
    **{f"quantizer._codebook.project_down.{part}": f"quantizer.project_down.{part}" for part in ("weight", "bias")},
}
# S3Tokenizer computes rotary positions for heads of this size, whatever the width.
ROTARY_HEAD_DIM = 64
PUBLISHED_HEAD_DIM = 64


def weight_names(num_layers: int) -> dict[str, str]:
    """Every name of S3Tokenizer's state dicts → ours; a version has a part of them."""
    names = dict(OUTER_NAMES)
    for layer in range(num_layers):
        names |= {f"encoder.blocks.{layer}.{a}": f"layers.{layer}.{b}" for a, b in BLOCK_NAMES.items()}
    return names


def read(path: Path, num_attention_heads: int | None = None) -> tuple[S3TokenizerConfig, dict[str, Tensor]]:
    """Configuration and weights, under our names, of an `.onnx` graph or a `.pt` state dict of S3Tokenizer.

    Args:
        num_attention_heads: heads of a state dict of version 1, which does not say; by default heads of 64.
    Raises:
        ConversionError: a weight that is missing, unknown or of another shape, named in the message.
        UnsafeArtifactError: a file that is hostile or damaged.
    """
    if path.suffix == ".onnx":
        graph = read_onnx_graph(path)
        state = graph_weights(graph, path)
        known = graph_facts(graph, path)
    else:
        state = read_state_dict(path)
        # Strides leave no trace in weights; S3Tokenizer's files are named by their version.
        known = {"conv1_stride": 1 if path.stem == "speech_tokenizer_v1" else 2}
        if num_attention_heads is not None:
            known["num_attention_heads"] = num_attention_heads
    config = config_of(state, known, path)
    weights = convert_weights(state, config, path)
    return config, weights


# ---------------------------------------------------------------------------------------------------------------------
# An ONNX graph


_BLOCK_NODE = re.compile(
    r"/blocks\.(\d+)/(attn|mlp|attn_ln|mlp_ln)/(?:(query|key|value|out|fsmn_block|mlp\.[02])/)?(\w+)"
)


def graph_weights(graph: OnnxGraph, path: Path) -> dict[str, Tensor]:
    """The weights of a graph under S3Tokenizer's names, transposed to torch's layout; views of the file."""
    state: dict[str, Tensor] = {}
    outer = [node for node in graph.nodes if node.op_type == "Conv" and not node.name.startswith("/blocks.")]
    if len(outer) != 2:
        raise ConversionError("convolutions before the blocks", file=path, expected=2, actual=len(outer))
    for number, node in enumerate(outer, start=1):
        state[f"encoder.conv{number}.weight"] = weight(graph, node.inputs[1], node, path)
        state[f"encoder.conv{number}.bias"] = weight(graph, node.inputs[2], node, path)
    if "encoders.positional_embedding" in graph.tensors:
        state["encoder.positional_embedding"] = graph.tensors["encoders.positional_embedding"]
    for node in graph.nodes:
        if found := _BLOCK_NODE.fullmatch(node.name):
            block, part, linear, operation = found.groups()
            prefix = f"encoder.blocks.{block}.{part if linear is None else f'{part}.{linear}'}".replace(
                "mlp.mlp", "mlp"
            )
            state |= block_weights(graph, node, prefix, linear, operation, path)
        elif "/quantizer/" in node.name or node.name.startswith("/quantizer"):
            state |= quantizer_weights(graph, node, path)
    return state


def block_weights(
    graph: OnnxGraph, node: OnnxNode, prefix: str, linear: str | None, operation: str, path: Path
) -> dict[str, Tensor]:
    """What one node of a block says: a part of a linear map, of a norm, or the memory's filters."""
    if linear == "fsmn_block":
        return {f"{prefix}.weight": weight(graph, node.inputs[1], node, path)} if operation == "Conv" else {}
    if linear is not None:
        if operation == "MatMul":
            return {f"{prefix}.weight": weight(graph, node.inputs[1], node, path).T}
        return {f"{prefix}.bias": vector(graph, node, path)} if operation == "Add" else {}
    if prefix.endswith("_ln"):
        if operation == "LayerNormalization":
            scale, shift = (weight(graph, name, node, path) for name in node.inputs[1:3])
            return {f"{prefix}.weight": scale, f"{prefix}.bias": shift}
        if operation == "Mul":
            return {f"{prefix}.weight": vector(graph, node, path)}
        # A decomposed norm adds its epsilon first, a single number, and its bias last.
        if operation.startswith("Add") and (known := constants(graph, node)) and known[0].numel() > 1:
            return {f"{prefix}.bias": known[0]}
    return {}


def quantizer_weights(graph: OnnxGraph, node: OnnxNode, path: Path) -> dict[str, Tensor]:
    """The projection of a scalar quantiser, or the codebook of a vector quantiser (stored transposed)."""
    known = constants(graph, node)
    if node.op_type == "MatMul" and "_codebook" not in node.name and known:
        return {"quantizer._codebook.project_down.weight": known[0].T}
    if node.name.endswith("_codebook/Pow_1") and known:
        return {"quantizer._codebook.embed": known[0].T}
    for name in node.inputs:
        if name == "quantizer.project_in.bias":
            return {"quantizer._codebook.project_down.bias": weight(graph, name, node, path)}
    return {}


def constants(graph: OnnxGraph, node: OnnxNode) -> list[Tensor]:
    return [graph.tensors[name] for name in node.inputs if name in graph.tensors]


def weight(graph: OnnxGraph, name: str, node: OnnxNode, path: Path) -> Tensor:
    if name not in graph.tensors:
        raise ConversionError("weight is computed by the graph", file=path, key=node.name, actual=name)
    return graph.tensors[name]


def vector(graph: OnnxGraph, node: OnnxNode, path: Path) -> Tensor:
    known = constants(graph, node)
    if len(known) != 1:
        raise ConversionError("weights of a node", file=path, key=node.name, expected=1, actual=len(known))
    return known[0]


def graph_facts(graph: OnnxGraph, path: Path) -> dict[str, object]:
    """What a graph says beside its weights: the first stride, epsilons of norms, and how many heads version 1 has."""
    facts: dict[str, object] = {}
    outer = [node for node in graph.nodes if node.op_type == "Conv" and not node.name.startswith("/blocks.")]
    strides = [node.attributes.get("strides", [1]) for node in outer]
    if strides not in ([[1], [2]], [[2], [2]]):
        raise ConversionError("strides of the convolutions", file=path, expected="1 or 2, and 2", actual=strides)
    facts["conv1_stride"] = strides[0][0]
    by_name = {node.name: node for node in graph.nodes}
    for field, part in (("attention_norm_eps", "attn_ln"), ("norm_eps", "mlp_ln")):
        fused = by_name.get(f"/blocks.0/{part}/LayerNormalization")
        added = by_name.get(f"/blocks.0/{part}/Add")
        if fused is not None:
            facts[field] = round(float(fused.attributes.get("epsilon", 1e-5)), 9)
        elif added is not None and (known := constants(graph, added)):
            facts[field] = round(float(known[0].flatten()[0]), 9)
    # The shape to which queries are brought ends in (heads, -1): two constants, of which the first is the number.
    shape = by_name.get("/blocks.0/attn/Concat")
    if shape is not None:
        numbers = [int(known) for known in constants(graph, shape) if known.numel() == 1]
        if len(numbers) == 2 and numbers[0] > 0:
            facts["num_attention_heads"] = numbers[0]
    return facts


# ---------------------------------------------------------------------------------------------------------------------
# Configuration and names


def config_of(state: dict[str, Tensor], known: dict[str, object], path: Path) -> S3TokenizerConfig:
    """The configuration that the weights and the facts of a file make."""

    def shape(name: str) -> torch.Size:
        if name not in state:
            raise ConversionError("weight is missing", file=path, key=name)
        return state[name].shape

    size, mel_bins = shape("encoder.conv1.weight")[:2]
    blocks = {int(name.split(".")[2]) for name in state if name.startswith("encoder.blocks.")}
    rotary = "encoder.positional_embedding" not in state
    facts: dict[str, object] = {
        "num_mel_bins": mel_bins,
        "hidden_size": size,
        "intermediate_size": shape("encoder.blocks.0.mlp.0.weight")[0],
        "num_hidden_layers": len(blocks),
        "num_attention_heads": max(1, size // (ROTARY_HEAD_DIM if rotary else PUBLISHED_HEAD_DIM)),
        "position_embedding": "rotary" if rotary else "sinusoidal",
        "use_fsmn": "encoder.blocks.0.attn.fsmn_block.weight" in state,
        "attention_norm_eps": 1e-5,
    }
    if not rotary:
        facts["max_positions"] = shape("encoder.positional_embedding")[0]
    if facts["use_fsmn"]:
        facts["fsmn_kernel_size"] = shape("encoder.blocks.0.attn.fsmn_block.weight")[2]
    if "quantizer._codebook.embed" in state:
        facts |= {"quantizer": "vq", "codebook_size": shape("quantizer._codebook.embed")[0]}
    else:
        digits = shape("quantizer._codebook.project_down.weight")[0]
        facts |= {"quantizer": "fsq", "fsq_size": digits, "codebook_size": 3**digits if digits <= 16 else 0}
    try:
        return S3TokenizerConfig(**(facts | known))
    except ValueError as error:
        raise ConversionError("contradictory weights", file=path, actual=str(error)) from None


def convert_weights(state: dict[str, Tensor], config: S3TokenizerConfig, path: Path) -> dict[str, Tensor]:
    """Upstream's names → ours, complete and of the right shapes.

    Raises:
        ConversionError: a weight that is missing, unknown, or of another shape or type.
    """
    names = weight_names(config.num_hidden_layers)
    weights: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name not in names:
            raise ConversionError("unknown weight", file=path, key=name, actual=tuple(tensor.shape))
        weights[names[name]] = tensor
    with torch.device("meta"):
        model = S3TokenizerModel(config)
    theirs = {ours: name for name, ours in names.items()}
    expected = model.state_dict()
    for ours in weights.keys() - expected.keys():
        raise ConversionError("unknown weight", file=path, key=theirs[ours], actual=tuple(weights[ours].shape))
    for ours, tensor in expected.items():
        if ours not in weights:
            raise ConversionError("weight is missing", file=path, key=theirs[ours], expected=tuple(tensor.shape))
        found = weights[ours]
        if found.shape != tensor.shape or found.dtype != torch.float32:
            raise ConversionError(
                "weight",
                file=path,
                key=theirs[ours],
                expected=f"float32 {tuple(tensor.shape)}",
                actual=f"{found.dtype} {tuple(found.shape)}",
            )
    return weights


def convert(path: Path, out: Path) -> dict[str, object]:
    """Writes the tokenizer in `path` as a folder that `AutoModel.from_pretrained` loads.

    Raises:
        ConversionError: see [`read`].
    """
    config, weights = read(path)
    config.architectures = ["S3TokenizerModel"]
    config.dtype = torch.float32
    report: dict[str, object] = {
        "converter": "s3_tokenizer",
        "model_type": config.model_type,
        "parameters": sum(tensor.numel() for tensor in weights.values()),
        "inputs": {path.name: sha256_of_file(path)},
    }
    with torch.device("meta"):
        model = S3TokenizerModel(config)
    with staged_directory(out) as stage:
        model.save_pretrained(stage, state_dict={})
        write_safetensors(stage / "model.safetensors", weights)
        S3FeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(stage)
        write_report(stage, report)
    return report
