"""Names of Paraformer weights: ours, and where FunASR and WeNet keep them.

One ordered table serves both directions: it turns our name into upstream's. Upstream fuses the projections of an
attention into one weight; ours are separate, and each is a block of its rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hf_speechllm.models.configuration_funasr_paraformer import FunasrParaformerConfig
from hf_speechllm.upstream.errors import ConversionError


Rule = tuple[str, "str | Callable[[re.Match], str]"]


class Source(NamedTuple):
    """Upstream's weight `name`; ours is block `part` of the `parts` equal blocks of its rows."""

    name: str
    part: int
    parts: int


# Projection -> (fused weight, block, blocks).
_SELF_ATTENTION = {"q": ("linear_q_k_v", 0, 3), "k": ("linear_q_k_v", 1, 3), "v": ("linear_q_k_v", 2, 3)}
_CROSS_ATTENTION = {"q": ("linear_q", 0, 1), "k": ("linear_k_v", 0, 2), "v": ("linear_k_v", 1, 2)}
_SEPARATE = {"q": ("linear_q", 0, 1), "k": ("linear_k", 0, 1), "v": ("linear_v", 0, 1)}

_PREDICTORS: dict[str, list[Rule]] = {
    "funasr": [
        (r"^model\.predictor\.conv\.", "predictor.cif_conv1d."),
        (r"^model\.predictor\.alpha_proj\.", "predictor.cif_output."),
        (r"^model\.predictor\.upsample\.", "predictor.upsample_cnn."),
        (r"^model\.predictor\.blstm\.", "predictor.blstm."),
        (r"^model\.predictor\.alpha_proj2\.", "predictor.cif_output2."),
    ],
    "wenet": [
        (r"^model\.predictor\.conv\.", "predictor.predictor.cif_conv1d."),
        (r"^model\.predictor\.alpha_proj\.", "predictor.predictor.cif_output."),
        (r"^model\.predictor\.upsample\.", "predictor.tp_upsample_cnn."),
        (r"^model\.predictor\.blstm\.", "predictor.tp_blstm."),
        (r"^model\.predictor\.alpha_proj2\.", "predictor.tp_output."),
        (r"^model\.decoder\.embed_tokens\.", "embed."),
    ],
}

_LINEAR_SUBSAMPLING: list[Rule] = [
    (r"^model\.encoder\.subsampling\.out_proj\.", "encoder.embed.0."),
    (r"^model\.encoder\.subsampling\.layer_norm\.", "encoder.embed.1."),
]
_CONFORMER: list[Rule] = [
    (r"^model\.encoder\.subsampling\.convs\.0\.", "encoder.embed.conv.0."),
    (r"^model\.encoder\.subsampling\.convs\.1\.", "encoder.embed.conv.2."),
    (r"^model\.encoder\.subsampling\.convs\.2\.", "encoder.embed.conv.4."),
    (r"^model\.encoder\.subsampling\.out_proj\.", "encoder.embed.out.0."),
    (r"^(model\.encoder\.layers\.\d+)\.norm_self_attn\.", r"\1.norm_mha."),
    (r"^(model\.encoder\.layers\.\d+)\.norm_feed_forward\.", r"\1.norm_ff."),
    (r"^(model\.encoder\.layers\.\d+)\.norm_feed_forward_macaron\.", r"\1.norm_ff_macaron."),
    (r"^(model\.encoder\.layers\.\d+)\.norm_out\.", r"\1.norm_final."),
    (r"^(model\.encoder\.layers\.\d+)\.conv\.", r"\1.conv_module."),
    (r"^model\.encoder\.norm\.", "encoder.after_norm."),
    (r"^model\.encoder\.layers\.", "encoder.encoders."),
    (r"\.pos_proj\.", ".linear_pos."),
]
# A layer of the ordinary transformer decoder.
_SAN_LAYER: list[Rule] = [
    (r"\.encoder_attn_layer_norm\.", ".norm2."),
    (r"\.final_layernorm\.", ".norm3."),
    (r"^(decoder\.decoders\.\d+)\.fc", r"\1.feed_forward.fc"),
]


def upstream_name(name: str, config: FunasrParaformerConfig, toolkit: str = "funasr") -> Source:
    """Where upstream keeps our weight `name`.

    Args:
        toolkit: `"funasr"` or `"wenet"`.
    """
    fused = _SEPARATE
    if name.startswith("model.encoder.") and config.encoder_type == "sanm":
        fused = _SELF_ATTENTION
    elif re.search(r"\.(?:encoder|hotword)_attn\.", name) and config.decoder_type == "sanm":
        fused = _CROSS_ATTENTION
    part, parts = 0, 1
    if match := re.search(r"\.([qkv])_proj\.", name):
        linear, part, parts = fused[match[1]]
        name = name.replace(match[0], f".{linear}.")
    for pattern, replacement in _rules(config, toolkit):
        name = re.sub(pattern, replacement, name)
    return Source(name, part, parts)


def _rules(config: FunasrParaformerConfig, toolkit: str) -> list[Rule]:
    encoder = [*(_LINEAR_SUBSAMPLING if config.subsampling_type == "linear" else []), *_CONFORMER]
    if config.encoder_type == "sanm":
        last = config.num_hidden_layers - 1
        encoder = [
            (rf"^model\.encoder\.layers\.{last}\.final_layernorm\.", "encoder.after_norm."),
            (r"^model\.encoder\.layers\.0\.", "encoder.encoders0.0."),
            (r"^model\.encoder\.layers\.(\d+)\.", lambda match: f"encoder.encoders.{int(match[1]) - 1}."),
        ]
    layers, last_layer = config.decoder_layers, []
    if config.hotword_type == "contextual":
        last_layer = [(rf"^model\.decoder\.layers\.{layers - 1}\.", "decoder.last_decoder.")]
    return [
        *_PREDICTORS[toolkit],
        *encoder,
        *last_layer,
        *_decoder_rules("decoder", layers),
        *_decoder_rules("seaco_decoder", config.seaco_layers),
        (r"^lm_head\.", "decoder.output_layer."),
        (r"^ctc_head\.", "ctc.ctc_lo."),
        (r"^hotword_head\.", "hotword_output_layer."),
        (r"^model\.(bias_encoder|bias_embed)\.", r"\1."),
        (r"^model\.bias_proj\.", "lstm_proj."),
        *(_SAN_LAYER if config.decoder_type == "transformer" else []),
        (r"\.input_layernorm\.", ".norm1."),
        (r"\.(?:post_attention|memory)_layernorm\.", ".norm2."),
        (r"\.encoder_attn_layer_norm\.", ".norm3."),
        (r"(?:\.self_attn)?\.fsmn\.conv\.", ".self_attn.fsmn_block."),
        (r"\.encoder_attn\.", ".src_attn."),
        (r"\.o_proj\.", ".linear_out."),
        (r"\.mlp\.layer_norm\.", ".feed_forward.norm."),
        (r"\.mlp\.", ".feed_forward."),
        (r"\.fc1\.", ".w_1."),
        (r"\.fc2\.", ".w_2."),
    ]


def _decoder_rules(decoder: str, layers: int) -> list[Rule]:
    """Layers with cross-attention come first here and are a list of their own upstream."""

    def layer(match: re.Match) -> str:
        index = int(match[1])
        return f"{decoder}.decoders.{index}." if index < layers else f"{decoder}.decoders2.{index - layers}."

    return [
        (rf"^model\.{decoder}\.layers\.(\d+)\.", layer),
        (rf"^model\.{decoder}\.final_layer\.", f"{decoder}.decoders3.0."),
        (rf"^model\.{decoder}\.embed_tokens\.", f"{decoder}.embed.0."),
        (rf"^model\.{decoder}\.norm\.", f"{decoder}.after_norm."),
        (rf"^model\.{decoder}\.hotword_attn_layer_norm\.", f"{decoder}.bias_decoder.norm3."),
        (rf"^model\.{decoder}\.hotword_attn\.", f"{decoder}.bias_decoder.src_attn."),
        (rf"^model\.{decoder}\.hotword_proj\.", f"{decoder}.bias_output."),
    ]


def take_weights(
    state: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    config: FunasrParaformerConfig,
    ignored: list[str],
    path: Path,
    toolkit: str = "funasr",
) -> tuple[dict[str, Tensor], list[str]]:
    """Our weights as views of upstream's, and the names that were ignored.

    Args:
        state: upstream's weights.
        expected: names and shapes of the model (its tensors may be on the meta device).
        ignored: patterns of names that carry nothing.
        path: the file, for messages.
    Raises:
        ConversionError: a weight that is missing, unknown, of another shape or of another kind of type.
    """
    weights: dict[str, Tensor] = {}
    used: set[str] = set()
    for name, tensor in expected.items():
        source = upstream_name(name, config, toolkit)
        shape = tuple(tensor.shape)
        if source.parts > 1:
            shape = (shape[0] * source.parts, *shape[1:])
        if source.name not in state:
            raise ConversionError("weight is missing", file=path, key=source.name, expected=shape)
        found = state[source.name]
        if tuple(found.shape) != shape:
            raise ConversionError("shape", file=path, key=source.name, expected=shape, actual=tuple(found.shape))
        if found.is_floating_point() != tensor.is_floating_point():
            raise ConversionError("type", file=path, key=source.name, expected=tensor.dtype, actual=found.dtype)
        rows = found.shape[0] // source.parts if source.parts > 1 else 0
        weights[name] = found if source.parts == 1 else found[source.part * rows : (source.part + 1) * rows]
        used.add(source.name)
    unused = []
    for name in state:
        if name in used:
            continue
        if not any(re.search(pattern, name) for pattern in ignored):
            raise ConversionError("unknown weight", file=path, key=name, actual=tuple(state[name].shape))
        unused.append(name)
    return weights, unused


def upstream_state_dict(
    tensors: Mapping[str, Tensor], config: FunasrParaformerConfig, toolkit: str = "funasr"
) -> dict[str, Tensor]:
    """Tensors under our names (weights, or gradients for a check) under upstream's, fused where upstream fuses.

    A fused tensor of which a part is missing is left out.
    """
    state: dict[str, Tensor] = {}
    fused: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        source = upstream_name(name, config, toolkit)
        if source.parts == 1:
            state[source.name] = tensor.detach()
            continue
        parts = fused.setdefault(source.name, {})
        parts[source.part] = tensor.detach()
        if len(parts) == source.parts:
            state[source.name] = torch.cat([parts[index] for index in range(source.parts)])
    return state
