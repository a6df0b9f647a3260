"""Conversion of the flow of a CosyVoice pack (versions 1, 2 and 3) to a transformers folder, and back.

    python conversion/cosyvoice_flow.py PACK OUT
    python conversion/cosyvoice_flow.py --reverse MODEL_FOLDER PACK

A pack holds `cosyvoice.yaml`, `cosyvoice2.yaml` or `cosyvoice3.yaml`, whose classes say the version, and `flow.pt`. It
is untrusted: see `hf_speechllm.upstream`. Every key and every weight is named in the tables below; any other is an
error that names it. The folder that is written appears complete or not at all.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from command_line import converter_parser, print_report
from cosyvoice_pack import find_yaml
from torch import Tensor

from hf_speechllm.models.configuration_cosyvoice2_flow import CosyVoice2FlowConfig
from hf_speechllm.models.configuration_cosyvoice3_flow import CosyVoice3FlowConfig
from hf_speechllm.models.configuration_cosyvoice_flow import CosyVoiceFlowConfig
from hf_speechllm.models.diffusion_transformer import rotary_frequencies
from hf_speechllm.models.modeling_cosyvoice2_flow import CosyVoice2FlowModel
from hf_speechllm.models.modeling_cosyvoice3_flow import CosyVoice3FlowModel
from hf_speechllm.models.modeling_cosyvoice_flow import CosyVoiceFlowModel
from hf_speechllm.models.token_to_mel import TokenToMelModel
from hf_speechllm.upstream.checkpoint_file import write_state_dict
from hf_speechllm.upstream.checkpoints import read_state_dict
from hf_speechllm.upstream.errors import ConversionError
from hf_speechllm.upstream.hyperpyyaml import Call, read_hyperpyyaml
from hf_speechllm.upstream.model_folder import require_model_type
from hf_speechllm.upstream.safetensors_file import read_safetensors, write_safetensors
from hf_speechllm.upstream.staging import sha256_of_file, sha256_of_files, staged_directory, write_report
from hf_speechllm.upstream.typed_config import ConfigReader, KeyTable


Config = CosyVoiceFlowConfig | CosyVoice2FlowConfig | CosyVoice3FlowConfig
WEIGHTS_NAME, MODEL_WEIGHTS_NAME = "flow.pt", "model.safetensors"
# What a trainer's checkpoint has beside the weights.
CHECKPOINT_SCALARS = frozenset({"epoch", "step"})
MODELS: dict[type, type[TokenToMelModel]] = {
    CosyVoiceFlowConfig: CosyVoiceFlowModel,
    CosyVoice2FlowConfig: CosyVoice2FlowModel,
    CosyVoice3FlowConfig: CosyVoice3FlowModel,
}
# Larger numbers are no model; a list of modules is built before the first shape is compared.
MAX_LAYERS, MAX_WIDTH = 256, 1 << 16

# ---------------------------------------------------------------------------------------------------------------------
# Keys: key -> (our field, kind, upstream's default), by the class that the yaml names.

FLOW_KEYS: KeyTable = {
    "input_size": ("embedding_size", "count", 512),
    "output_size": ("num_mel_bins", "count", 80),
    "spk_embed_dim": ("speaker_embedding_size", "count", 192),
    "vocab_size": ("vocab_size", "count", 4096),
    "input_frame_rate": ("input_frame_rate", "count", 50),
}
CAUSAL_FLOW_KEYS: KeyTable = {**FLOW_KEYS, "pre_lookahead_len": ("num_lookahead_tokens", "size", 3)}
DIT_FLOW_KEYS: KeyTable = {**CAUSAL_FLOW_KEYS, "token_mel_ratio": ("token_mel_ratio", "count", 2)}

ENCODER_KEYS: KeyTable = {
    "output_size": ("hidden_size", "count", 256),
    "attention_heads": ("num_attention_heads", "count", 4),
    "linear_units": ("intermediate_size", "count", 2048),
    "num_blocks": ("num_hidden_layers", "size", 6),
    "dropout_rate": ("hidden_dropout", "rate", 0.1),
    "positional_dropout_rate": ("position_dropout", "rate", 0.1),
    "attention_dropout_rate": ("attention_dropout", "rate", 0.0),
    "normalize_before": ("normalize_before", "flag", True),
    "macaron_style": ("macaron_style", "flag", True),
    "key_bias": ("key_bias", "flag", True),
    "activation_type": (
        "hidden_act",
        {"swish": "silu", "relu": "relu", "gelu": "gelu", "tanh": "tanh", "hardtanh": "hardtanh", "selu": "selu"},
        "swish",
    ),
}
UPSAMPLING_ENCODER_KEYS: KeyTable = {**ENCODER_KEYS, "static_chunk_size": ("encoder_chunk_size", "size", 0)}
# What the code can do otherwise, but no pack does. `None` = upstream's default is another value, so the key must be
# there.
ENCODER_REQUIRED = {
    "input_layer": ("linear", "conv2d"),
    "pos_enc_layer_type": ("rel_pos_espnet", "abs_pos"),
    "selfattention_layer_type": ("rel_selfattn", "rel_selfattn"),
    "use_cnn_module": (False, True),
    "use_dynamic_chunk": (False, False),
    "use_dynamic_left_chunk": (False, False),
    "global_cmvn": (None, None),
}
# Of the convolution module that no flow has, and of training only.
ENCODER_IGNORED = {
    *("causal", "cnn_module_kernel", "cnn_module_norm", "gradient_checkpointing", "positionwise_conv_kernel_size"),
}

REGULATOR_KEYS: KeyTable = {"groups": ("regulator_groups", "count", 1)}

UNET_KEYS: KeyTable = {
    "dropout": ("estimator_dropout", "rate", 0.05),
    "attention_head_dim": ("estimator_head_dim", "count", 64),
    "n_blocks": ("estimator_layers_per_stage", "size", 1),
    "num_mid_blocks": ("estimator_num_mid_stages", "size", 2),
    "num_heads": ("estimator_num_attention_heads", "count", 4),
    "act_fn": ("estimator_hidden_act", {"gelu": "gelu", "gelu-approximate": "gelu_pytorch_tanh"}, "snake"),
}
CAUSAL_UNET_KEYS: KeyTable = {**UNET_KEYS, "static_chunk_size": ("estimator_chunk_size", "size", 50)}
DIT_KEYS: KeyTable = {
    "dim": ("estimator_hidden_size", "count", None),
    "depth": ("estimator_num_hidden_layers", "size", 8),
    "heads": ("estimator_num_attention_heads", "count", 8),
    "dim_head": ("estimator_head_dim", "count", 64),
    "dropout": ("estimator_dropout", "rate", 0.1),
    "static_chunk_size": ("estimator_chunk_size", "size", 50),
}
# Read by nothing: upstream gives its masks -1, so that the attention sees everything on its left whatever a yaml says.
ESTIMATOR_IGNORED = {"num_decoding_left_chunks"}

CFM_KEYS: KeyTable = {
    "sigma_min": ("sigma_min", "number", 1e-4),
    "training_cfg_rate": ("condition_dropout", "rate", None),
    "inference_cfg_rate": ("guidance_scale", "number", None),
}
CFM_IGNORED = {"reg_loss_type"}  # read by nothing
DECODER_IGNORED = {"in_channels", "n_spks", "spk_emb_dim"}  # sizes of a network that CosyVoice replaces
FLOW_IGNORED = {"decoder_conf", "only_mask_loss", "output_type"}  # read by nothing


class FlowReader:
    """The settings of one flow, class by class.

    Args:
        call: what the key `flow` would build. path: the yaml, for messages.
    """

    def __init__(self, call: object, path: Path) -> None:
        self.path = path
        self.flow = self.arguments("flow", call)
        self.ignored: set[str] = set()

    def arguments(self, key: str, value: object) -> dict[str, object]:
        """The keyword arguments of a `!new:`."""
        if not isinstance(value, Call) or value.kind != "new" or not isinstance(value.arguments, dict):
            raise ConversionError(
                "no object to build",
                file=self.path,
                key=key,
                expected="!new:",
                actual=value if value is None else repr(value)[:100],
            )
        return value.arguments

    def part(self, key: str, name: str, target: str) -> dict[str, object]:
        """The arguments of the object `name` of the flow (or of one of its objects, `a.b`), of the class `target`."""
        *owners, last = name.split(".")
        owner = self.flow
        for step in owners:
            owner = self.arguments(f"flow.{step}", owner.get(step))
        value = owner.get(last)
        arguments = self.arguments(key, value)
        if value.target != target:
            raise ConversionError("class", file=self.path, key=key, expected=target, actual=value.target)
        return arguments

    def read(self, key: str, content: dict[str, object], table: KeyTable, ignored: set[str]) -> dict[str, object]:
        """The fields of `table`; any other key is refused. A default of `None` makes a key necessary."""
        for name, (_, _, default) in table.items():
            if default is None and name not in content:
                raise ConversionError("key is missing", file=self.path, key=f"{key}.{name}")
        reader = ConfigReader({key: content}, self.path, {})
        fields = reader.read(key, table, ignored)
        self.ignored |= reader.ignored
        for name, (field, kind, _) in table.items():
            limit = MAX_LAYERS if field.startswith("num_") or "_num_" in field or "layers" in field else MAX_WIDTH
            if kind in ("count", "size") and field not in ("vocab_size", "input_frame_rate") and fields[field] > limit:
                raise ConversionError(
                    "bad value", file=self.path, key=f"{key}.{name}", expected=f"at most {limit}", actual=fields[field]
                )
        return fields

    def must_be(self, key: str, actual: object, expected: object) -> None:
        """Refuse any value but one."""
        if actual != expected or isinstance(actual, bool) != isinstance(expected, bool):
            raise ConversionError(
                "not supported", file=self.path, key=key, expected=repr(expected), actual=repr(actual)
            )


def read_config(settings: dict[str, object], path: Path, pack: Path) -> Config:
    """Our configuration of the flow that the yaml describes.

    Args:
        settings: what `read_hyperpyyaml` gives. path: the yaml. pack: its folder.

    Raises:
        ConversionError: a class or a key that no flow has, or a value that it cannot have.
    """
    return read_config_and_ignored(settings, path)[0]


def read_config_and_ignored(settings: dict[str, object], path: Path) -> tuple[Config, list[str]]:
    """As [`read_config`], with the keys that were ignored."""
    call = settings.get("flow")
    reader = FlowReader(call, path)
    readers = {
        "cosyvoice.flow.flow.MaskedDiffWithXvec": _read_version_1,
        "cosyvoice.flow.flow.CausalMaskedDiffWithXvec": _read_version_2,
        "cosyvoice.flow.flow.CausalMaskedDiffWithDiT": _read_version_3,
    }
    if call.target not in readers:
        raise ConversionError("class", file=path, key="flow", expected=sorted(readers), actual=call.target)
    try:
        return readers[call.target](reader), sorted(reader.ignored)
    except ValueError as error:
        if isinstance(error, ConversionError):
            raise
        raise ConversionError("contradictory configuration", file=path, key="flow", actual=str(error)) from None


def _without(content: dict[str, object], *names: str) -> dict[str, object]:
    return {key: value for key, value in content.items() if key not in names}


def _read_version_1(reader: FlowReader) -> CosyVoiceFlowConfig:
    content = _without(reader.flow, "encoder", "length_regulator", "decoder")
    fields = reader.read("flow", content, FLOW_KEYS, FLOW_IGNORED)
    encoder = reader.part("flow.encoder", "encoder", "cosyvoice.transformer.encoder.ConformerEncoder")
    reader.must_be("flow.encoder.static_chunk_size", encoder.get("static_chunk_size", 0), 0)
    fields |= _read_encoder(reader, _without(encoder, "static_chunk_size"), ENCODER_KEYS, fields["embedding_size"])
    regulator = reader.part(
        "flow.length_regulator", "length_regulator", "cosyvoice.flow.length_regulator.InterpolateRegulator"
    )
    bins = fields["num_mel_bins"]
    reader.must_be("flow.length_regulator.channels", regulator.get("channels"), bins)
    reader.must_be("flow.length_regulator.out_channels", regulator.get("out_channels") or bins, bins)
    ratios = regulator.get("sampling_ratios")
    # Only their number counts: each is a convolution that keeps the rate.
    if not isinstance(ratios, list) or len(ratios) > MAX_LAYERS:
        raise ConversionError(
            "bad value",
            file=reader.path,
            key="flow.length_regulator.sampling_ratios",
            expected=f"a list of at most {MAX_LAYERS}",
            actual=repr(ratios)[:100],
        )
    rest = _without(regulator, "channels", "out_channels", "sampling_ratios")
    fields |= reader.read("flow.length_regulator", rest, REGULATOR_KEYS, set())
    fields |= _read_decoder(reader, "cosyvoice.flow.flow_matching.ConditionalCFM")
    fields |= _read_unet(reader, "cosyvoice.flow.decoder.ConditionalDecoder", UNET_KEYS, bins)
    return CosyVoiceFlowConfig(**fields, num_regulator_layers=len(ratios))


def _read_version_2(reader: FlowReader) -> CosyVoice2FlowConfig:
    content = _without(reader.flow, "encoder", "decoder", "token_mel_ratio")
    reader.must_be("flow.token_mel_ratio", reader.flow.get("token_mel_ratio", 2), 2)
    fields = reader.read("flow", content, CAUSAL_FLOW_KEYS, FLOW_IGNORED)
    encoder = reader.part("flow.encoder", "encoder", "cosyvoice.transformer.upsample_encoder.UpsampleConformerEncoder")
    encoder = {"pos_enc_layer_type": "rel_pos", **encoder}
    fields |= _read_encoder(reader, encoder, UPSAMPLING_ENCODER_KEYS, fields["embedding_size"])
    fields |= _read_decoder(reader, "cosyvoice.flow.flow_matching.CausalConditionalCFM")
    target = "cosyvoice.flow.decoder.CausalConditionalDecoder"
    fields |= _read_unet(reader, target, CAUSAL_UNET_KEYS, fields["num_mel_bins"])
    return CosyVoice2FlowConfig(**fields)


def _read_version_3(reader: FlowReader) -> CosyVoice3FlowConfig:
    content = _without(reader.flow, "pre_lookahead_layer", "decoder")
    fields = reader.read("flow", content, DIT_FLOW_KEYS, FLOW_IGNORED)
    bins = fields["num_mel_bins"]
    lookahead = reader.part(
        "flow.pre_lookahead_layer",
        "pre_lookahead_layer",
        "cosyvoice.transformer.upsample_encoder.PreLookaheadLayer",
    )
    reader.must_be("flow.pre_lookahead_layer.in_channels", lookahead.get("in_channels"), fields["embedding_size"])
    reader.must_be(
        "flow.pre_lookahead_layer.pre_lookahead_len",
        lookahead.get("pre_lookahead_len", 1),
        fields["num_lookahead_tokens"],
    )
    rest = _without(lookahead, "in_channels", "pre_lookahead_len")
    fields |= reader.read("flow.pre_lookahead_layer", rest, {"channels": ("lookahead_channels", "count", None)}, set())
    fields |= _read_decoder(reader, "cosyvoice.flow.flow_matching.CausalConditionalCFM")
    key = "flow.decoder.estimator"
    dit = reader.part(key, "decoder.estimator", "cosyvoice.flow.DiT.dit.DiT")
    for name, default in (("mel_dim", 80), ("mu_dim", bins), ("spk_dim", None), ("out_channels", bins)):
        reader.must_be(f"{key}.{name}", dit.get(name, default), bins)
    reader.must_be(f"{key}.long_skip_connection", dit.get("long_skip_connection", False), False)
    rest = _without(dit, "mel_dim", "mu_dim", "spk_dim", "out_channels", "long_skip_connection", "ff_mult")
    fields |= reader.read(key, rest, DIT_KEYS, ESTIMATOR_IGNORED)
    factor = ConfigReader({}, reader.path, {}).value(f"{key}.ff_mult", dit.get("ff_mult", 4), "number")
    fields["estimator_intermediate_size"] = int(fields["estimator_hidden_size"] * min(factor, MAX_LAYERS))
    return CosyVoice3FlowConfig(**fields)


def _read_encoder(
    reader: FlowReader, content: dict[str, object], table: KeyTable, embedding_size: object
) -> dict[str, object]:
    key = "flow.encoder"
    reader.must_be(f"{key}.input_size", content.get("input_size"), embedding_size)
    for name, (expected, default) in ENCODER_REQUIRED.items():
        reader.must_be(f"{key}.{name}", content.get(name, default), expected)
    return reader.read(key, _without(content, "input_size", *ENCODER_REQUIRED), table, ENCODER_IGNORED)


def _read_decoder(reader: FlowReader, target: str) -> dict[str, object]:
    key = "flow.decoder"
    decoder = reader.part(key, "decoder", target)
    reader.read(key, _without(decoder, "cfm_params", "estimator"), {}, DECODER_IGNORED)
    wrapped = reader.part(f"{key}.cfm_params", "decoder.cfm_params", "omegaconf.DictConfig")
    content = wrapped.get("content")
    if not isinstance(content, dict) or set(wrapped) != {"content"}:
        raise ConversionError(
            "bad value", file=reader.path, key=f"{key}.cfm_params", expected="content", actual=sorted(wrapped)
        )
    key = f"{key}.cfm_params.content"
    reader.must_be(f"{key}.solver", content.get("solver", "euler"), "euler")
    schedule = content.get("t_scheduler")
    if not isinstance(schedule, str):
        raise ConversionError(
            "bad value", file=reader.path, key=f"{key}.t_scheduler", expected="text", actual=schedule
        )
    fields = reader.read(key, _without(content, "solver", "t_scheduler"), CFM_KEYS, CFM_IGNORED)
    # Upstream compares with "cosine" and takes anything else as equal steps.
    return fields | {"time_schedule": "cosine" if schedule == "cosine" else "linear"}


def _read_unet(reader: FlowReader, target: str, table: KeyTable, bins: int) -> dict[str, object]:
    key = "flow.decoder.estimator"
    unet = reader.part(key, "decoder.estimator", target)
    reader.must_be(f"{key}.in_channels", unet.get("in_channels"), 4 * bins)
    reader.must_be(f"{key}.out_channels", unet.get("out_channels"), bins)
    channels = unet.get("channels", [256, 256])
    if not isinstance(channels, list) or not 1 <= len(channels) <= 8:
        raise ConversionError(
            "bad value",
            file=reader.path,
            key=f"{key}.channels",
            expected="a list of 1..8",
            actual=repr(channels)[:100],
        )
    checker = ConfigReader({}, reader.path, {})
    sizes = [checker.value(f"{key}.channels[{index}]", size, "count") for index, size in enumerate(channels)]
    if max(sizes) > MAX_WIDTH:
        raise ConversionError(
            "bad value", file=reader.path, key=f"{key}.channels", expected=f"at most {MAX_WIDTH}", actual=max(sizes)
        )
    rest = _without(unet, "in_channels", "out_channels", "channels")
    return reader.read(key, rest, table, ESTIMATOR_IGNORED) | {"estimator_channels": sizes}


# ---------------------------------------------------------------------------------------------------------------------
# Names of weights: upstream's → ours.

ATTENTION_NAMES = {
    "linear_q": "q_proj",
    "linear_k": "k_proj",
    "linear_v": "v_proj",
    "linear_out": "o_proj",
    "linear_pos": "pos_proj",
}
LAYER_NAMES = {
    **{f"self_attn.{theirs}": f"self_attn.{ours}" for theirs, ours in ATTENTION_NAMES.items()},
    "self_attn.pos_bias_u": "self_attn.pos_bias_u",
    "self_attn.pos_bias_v": "self_attn.pos_bias_v",
    "feed_forward.w_1": "mlp.fc1",
    "feed_forward.w_2": "mlp.fc2",
    "feed_forward_macaron.w_1": "macaron_mlp.fc1",
    "feed_forward_macaron.w_2": "macaron_mlp.fc2",
    "norm_mha": "input_layernorm",
    "norm_ff": "post_attention_layernorm",
    "norm_ff_macaron": "macaron_layernorm",
}
UNET_LAYER_NAMES = {
    "norm1": "input_layernorm",
    "attn1.to_q": "self_attn.q_proj",
    "attn1.to_k": "self_attn.k_proj",
    "attn1.to_v": "self_attn.v_proj",
    "attn1.to_out.0": "self_attn.o_proj",
    "norm3": "post_attention_layernorm",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
DIT_LAYER_NAMES = {
    "attn_norm.linear": "modulation",
    "attn.to_q": "self_attn.q_proj",
    "attn.to_k": "self_attn.k_proj",
    "attn.to_v": "self_attn.v_proj",
    "attn.to_out.0": "self_attn.o_proj",
    "ff.ff.0.0": "mlp.fc1",
    "ff.ff.2": "mlp.fc2",
}
# A buffer that follows from the configuration.
ROTARY_BUFFER = "decoder.estimator.rotary_embed.inv_freq"


def module_names(config: Config) -> dict[str, str]:
    """Every module (or parameter) that has weights: upstream's name → ours, in upstream's order."""
    names = {"input_embedding": "embed_tokens", "spk_embed_affine_layer": "speaker_proj"}

    def layers(theirs: str, ours: str, count: int) -> None:
        for index in range(count):
            for their_part, our_part in LAYER_NAMES.items():
                names[f"{theirs}.{index}.{their_part}"] = f"{ours}.{index}.{our_part}"

    if not isinstance(config, CosyVoice3FlowConfig):
        names |= {
            "encoder.embed.out.0": "encoder.embed.proj",
            "encoder.embed.out.1": "encoder.embed.layer_norm",
            "encoder.after_norm": "encoder.layer_norm",
        }
        layers("encoder.encoders", "encoder.layers", config.num_hidden_layers)
    if isinstance(config, CosyVoice2FlowConfig):
        names |= {
            "encoder.pre_lookahead_layer.conv1": "encoder.lookahead.conv1",
            "encoder.pre_lookahead_layer.conv2": "encoder.lookahead.conv2",
            "encoder.up_layer.conv": "encoder.upsample_conv",
            "encoder.up_embed.out.0": "encoder.upsampled_embed.proj",
            "encoder.up_embed.out.1": "encoder.upsampled_embed.layer_norm",
        }
        layers("encoder.up_encoders", "encoder.upsampled_layers", config.num_upsampled_layers)
    if isinstance(config, CosyVoice3FlowConfig):
        names |= {
            "pre_lookahead_layer.conv1": "lookahead.conv1",
            "pre_lookahead_layer.conv2": "lookahead.conv2",
            **_dit_names(config),
        }
        return names
    names["encoder_proj"] = "encoder_proj"
    if isinstance(config, CosyVoiceFlowConfig):
        for index in range(config.num_regulator_layers):
            names[f"length_regulator.model.{3 * index}"] = f"length_regulator.convs.{index}"
            names[f"length_regulator.model.{3 * index + 1}"] = f"length_regulator.norms.{index}"
        names[f"length_regulator.model.{3 * config.num_regulator_layers}"] = "length_regulator.out_proj"
    return names | _unet_names(config)


def _unet_names(config: CosyVoiceFlowConfig | CosyVoice2FlowConfig) -> dict[str, str]:
    theirs, ours = "decoder.estimator", "estimator"
    names = {f"{theirs}.time_mlp.linear_1": f"{ours}.time_fc1", f"{theirs}.time_mlp.linear_2": f"{ours}.time_fc2"}
    # The causal block has a transposition before its norm.
    norm = 2 if config.estimator_is_causal else 1
    rates = len(config.estimator_channels)
    for kind, count in (("down", rates), ("mid", config.estimator_num_mid_stages), ("up", rates)):
        for index in range(count):
            block, stage = f"{theirs}.{kind}_blocks.{index}", f"{ours}.{kind}_stages.{index}"
            names[f"{block}.0.mlp.1"] = f"{stage}.residual.time_proj"
            for half in ("block1", "block2"):
                names[f"{block}.0.{half}.block.0"] = f"{stage}.residual.{half}.conv"
                names[f"{block}.0.{half}.block.{norm}"] = f"{stage}.residual.{half}.norm"
            names[f"{block}.0.res_conv"] = f"{stage}.residual.shortcut"
            for layer in range(config.estimator_layers_per_stage):
                for their_part, our_part in UNET_LAYER_NAMES.items():
                    names[f"{block}.1.{layer}.{their_part}"] = f"{stage}.layers.{layer}.{our_part}"
            if kind != "mid":
                # The last convolution of a side keeps the rate and stands alone.
                resample = f"{block}.2" if index == rates - 1 else f"{block}.2.conv"
                names[resample] = f"{stage}.resample"
    names[f"{theirs}.final_block.block.0"] = f"{ours}.final_block.conv"
    names[f"{theirs}.final_block.block.{norm}"] = f"{ours}.final_block.norm"
    return names | {f"{theirs}.final_proj": f"{ours}.out_proj"}


def _dit_names(config: CosyVoice3FlowConfig) -> dict[str, str]:
    theirs, ours = "decoder.estimator", "estimator"
    names = {
        f"{theirs}.time_embed.time_mlp.0": f"{ours}.time_fc1",
        f"{theirs}.time_embed.time_mlp.2": f"{ours}.time_fc2",
        f"{theirs}.input_embed.proj": f"{ours}.input.proj",
        f"{theirs}.input_embed.conv_pos_embed.conv1.0": f"{ours}.input.conv1",
        f"{theirs}.input_embed.conv_pos_embed.conv2.0": f"{ours}.input.conv2",
    }
    for index in range(config.estimator_num_hidden_layers):
        for their_part, our_part in DIT_LAYER_NAMES.items():
            names[f"{theirs}.transformer_blocks.{index}.{their_part}"] = f"{ours}.layers.{index}.{our_part}"
    return names | {
        f"{theirs}.norm_out.linear": f"{ours}.final_modulation",
        f"{theirs}.proj_out": f"{ours}.out_proj",
    }


def weight_names(config: Config) -> dict[str, str]:
    """Every weight of the model: upstream's name → ours. Which of a module's names exist, our model says."""
    expected = set(_shapes(config))
    names = {}
    for theirs, ours in module_names(config).items():
        for suffix in ("", ".weight", ".bias"):
            if f"{ours}{suffix}" in expected:
                names[f"{theirs}{suffix}"] = f"{ours}{suffix}"
    return names


def _shapes(config: Config) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = MODELS[type(config)](config)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def convert_weights(state: dict[str, Tensor], config: Config, path: Path) -> dict[str, Tensor]:
    """Tensors under upstream's names under ours: all that the model has, in the shapes that it has.

    Raises:
        ConversionError: a weight too many or too few, another shape, or a type that is no floating-point number.
    """
    state = {name: tensor for name, tensor in state.items() if name not in CHECKPOINT_SCALARS}
    names, shapes = weight_names(config), _shapes(config)
    if isinstance(config, CosyVoice3FlowConfig):
        state = dict(state)
        _check_rotary(state.pop(ROTARY_BUFFER, None), config, path)
    weights = {}
    for name, tensor in state.items():
        if name not in names:
            raise ConversionError("unknown weight", file=path, key=name, actual=tuple(tensor.shape))
        expected = shapes[names[name]]
        if tensor.shape != expected:
            raise ConversionError("shape", file=path, key=name, expected=tuple(expected), actual=tuple(tensor.shape))
        if not tensor.is_floating_point():
            raise ConversionError("type of a weight", file=path, key=name, expected="float", actual=tensor.dtype)
        weights[names[name]] = tensor
    for theirs, ours in names.items():
        if ours not in weights:
            raise ConversionError("weight is missing", file=path, key=theirs, expected=tuple(shapes[ours]))
    return weights


def _check_rotary(buffer: Tensor | None, config: CosyVoice3FlowConfig, path: Path) -> None:
    """The rotary frequencies are computed; a pack with others would be another model."""
    expected = rotary_frequencies(config.estimator_head_dim)
    if buffer is None:
        raise ConversionError("weight is missing", file=path, key=ROTARY_BUFFER, expected=tuple(expected.shape))
    if buffer.shape != expected.shape:
        raise ConversionError(
            "shape", file=path, key=ROTARY_BUFFER, expected=tuple(expected.shape), actual=tuple(buffer.shape)
        )
    if not torch.allclose(buffer.float(), expected, rtol=1e-2, atol=0.0):  # half precision is enough to tell
        raise ConversionError("not supported", file=path, key=ROTARY_BUFFER, expected="base 10000", actual="another")


def restore_weights(weights: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The inverse of [`convert_weights`], in upstream's order of modules, with the buffer that it drops.

    Raises:
        ConversionError: a weight too many or too few.
    """
    names = weight_names(config)
    if unknown := sorted(set(weights) - set(names.values())):
        raise ConversionError("unknown weight", key=unknown[0], actual=tuple(weights[unknown[0]].shape))
    state = {}
    for theirs, ours in names.items():
        if ours not in weights:
            raise ConversionError("weight is missing", key=ours)
        state[theirs] = weights[ours]
    if isinstance(config, CosyVoice3FlowConfig):
        state[ROTARY_BUFFER] = rotary_frequencies(config.estimator_head_dim)
    return state


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def convert(pack: Path, out: Path) -> dict[str, object]:
    """Converts the flow of the folder `pack` to a folder `out` that `AutoModel.from_pretrained` loads.

    Args:
        out: must not exist or be empty; its parent must exist.
    Returns:
        The report, which is also written as `conversion_report.json`: SHA-256 of inputs and outputs, ignored keys.
    Raises:
        ConversionError: a key, value, weight or shape that the model does not have, named in the message.
        UnsafeArtifactError: a file that is hostile or damaged.
    """
    yaml_path = find_yaml(Path(pack))
    config, ignored = read_config_and_ignored(read_hyperpyyaml(yaml_path), yaml_path)
    weights_path = Path(pack) / WEIGHTS_NAME
    weights = convert_weights(read_state_dict(weights_path, allowed_scalars=CHECKPOINT_SCALARS), config, weights_path)
    config.dtype = next(iter(weights.values())).dtype
    with torch.device("meta"):
        model = MODELS[type(config)](config)
    report: dict[str, object] = {
        "converter": "cosyvoice_flow",
        "model_type": config.model_type,
        "parameters": sum(tensor.numel() for tensor in weights.values()),
        "ignored_keys": ignored,
        "inputs": {path.name: sha256_of_file(path) for path in (yaml_path, weights_path)},
    }
    with staged_directory(out) as stage:
        # The weights are memory mapped and go from file to file.
        model.save_pretrained(stage, state_dict={})
        write_safetensors(stage / MODEL_WEIGHTS_NAME, weights)
        write_report(stage, report)
    return report


def restore(model_dir: Path, pack: Path) -> dict[str, object]:
    """Writes `flow.pt` of the model folder `model_dir` into a new folder `pack`: the inverse of [`convert`].

    Args:
        pack: must not exist or be empty; its parent must exist.
    Returns:
        A report with SHA-256 of the written file.
    Raises:
        ConversionError: the folder is no flow, or `pack` is in the way.
    """
    config = load_config(Path(model_dir))
    state = restore_weights(read_safetensors(Path(model_dir) / MODEL_WEIGHTS_NAME), config)
    with staged_directory(pack) as stage:
        write_state_dict(stage / WEIGHTS_NAME, state)
        outputs = sha256_of_files(stage)
    return {"converter": "cosyvoice_flow", "direction": "reverse", "outputs": outputs}


def load_config(model_dir: Path) -> Config:
    """The configuration of a model folder.

    Raises:
        ConversionError: another model, or values that no flow has.
    """
    path = model_dir / "config.json"
    by_type = {config.model_type: config for config in MODELS}
    kind = by_type[require_model_type(model_dir, by_type)]
    try:
        return kind.from_pretrained(model_dir, local_files_only=True)
    except ValueError as error:
        raise ConversionError("contradictory configuration", file=path, actual=str(error)) from None


def main(arguments: list[str] | None = None) -> int:
    """Command line, see `print_report`."""
    options = converter_parser(__doc__, "write an upstream pack from a model folder").parse_args(arguments)
    run = restore if options.reverse else convert
    return print_report(lambda: run(options.source, options.destination))


if __name__ == "__main__":
    sys.exit(main())
