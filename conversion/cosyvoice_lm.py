"""Conversion of CosyVoice's language model, `llm.pt` and the `llm` section of the yaml, to our names, and back.

The class that the yaml names tells the version: `TransformerLM` 1, `Qwen2LM` 2, `CosyVoice3LM` 3. A pack is untrusted:
see `hf_speechllm.upstream`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
import yaml
from cosyvoice_pack import QWEN_FOLDER, YAML_NAMES, find_yaml
from cosyvoice_tokenizer import end_of_prompt_id
from torch import Tensor

from hf_speechllm.models.configuration_cosyvoice_lm import CosyVoiceLmConfig
from hf_speechllm.models.configuration_cosyvoice_transformer_lm import CosyVoiceTransformerLmConfig
from hf_speechllm.models.modeling_cosyvoice_lm import CosyVoiceLmForCausalLM
from hf_speechllm.models.modeling_cosyvoice_transformer_lm import CosyVoiceTransformerLm
from hf_speechllm.upstream.checkpoint_file import compact, write_state_dict
from hf_speechllm.upstream.checkpoints import read_state_dict
from hf_speechllm.upstream.errors import ConversionError
from hf_speechllm.upstream.hyperpyyaml import Call, read_hyperpyyaml
from hf_speechllm.upstream.json_config import read_json_mapping
from hf_speechllm.upstream.model_folder import require_model_type
from hf_speechllm.upstream.safetensors_file import read_safetensors, write_safetensors
from hf_speechllm.upstream.staging import sha256_of_file, sha256_of_files, staged_directory, write_report
from hf_speechllm.upstream.typed_config import ConfigReader


LmConfig = CosyVoiceLmConfig | CosyVoiceTransformerLmConfig

WEIGHTS_NAME = "llm.pt"
CLASSES = {
    "cosyvoice.llm.llm.TransformerLM": 1,
    "cosyvoice.llm.llm.Qwen2LM": 2,
    "cosyvoice.llm.llm.CosyVoice3LM": 3,
}
# A trainer's checkpoint has these numbers beside the weights.
CHECKPOINT_SCALARS = frozenset({"epoch", "step"})
MAX_JSON_BYTES = 1 << 20

# Key of `llm` -> (our field, kind, upstream's default).
SHARED_KEYS = {
    "speech_token_size": ("speech_vocab_size", "count", None),
    "length_normalized_loss": ("length_normalized_loss", "flag", True),
    "lsm_weight": ("label_smoothing", "rate", 0.0),
}
V1_KEYS = {
    **SHARED_KEYS,
    "text_encoder_input_size": ("text_embedding_size", "count", None),
    "llm_input_size": ("input_size", "count", None),
    "llm_output_size": ("hidden_size", "count", None),
    "text_token_size": ("text_vocab_size", "count", None),
    "spk_embed_dim": ("speaker_embedding_size", "count", 192),
}
ACTIVATIONS = {
    **{name: name for name in ("hardtanh", "tanh", "relu", "selu", "gelu")},
    "swish": "silu",
}
# `linear_legacy` has a ReLU behind the norm.
INPUT_LAYERS = {"linear": "plain", "linear_legacy": "rectified"}
ENCODER_KEYS = {
    "attention_heads": ("num_heads", "count", 4),
    "linear_units": ("intermediate_size", "count", 2048),
    "num_blocks": ("num_layers", "count", 6),
    "dropout_rate": ("dropout", "rate", 0.1),
    "positional_dropout_rate": ("positional_dropout", "rate", 0.1),
    "attention_dropout_rate": ("attention_dropout", "rate", 0.0),
    "static_chunk_size": ("chunk_size", "size", 0),
    "key_bias": ("key_bias", "flag", True),
    "input_layer": ("input_layer", INPUT_LAYERS, "conv2d"),
}
REQUIRED_ENCODER_VALUES = {
    "normalize_before": (True, True),
    "pos_enc_layer_type": ("rel_pos_espnet", "abs_pos"),
    "selfattention_layer_type": ("rel_selfattn", "selfattn"),
    "use_dynamic_chunk": (False, False),
    "use_dynamic_left_chunk": (False, False),
    "global_cmvn": (None, None),
}
# Of the conformer only; value that is supported, and upstream's default.
REQUIRED_CONFORMER_VALUES = {
    **REQUIRED_ENCODER_VALUES,
    "pos_enc_layer_type": ("rel_pos_espnet", "rel_pos"),
    "selfattention_layer_type": ("rel_selfattn", "rel_selfattn"),
    "macaron_style": (False, True),
    "use_cnn_module": (False, True),
    "positionwise_conv_kernel_size": (1, 1),
}
# They change nothing without a convolution, or nothing but memory.
IGNORED_ENCODER_KEYS = {"gradient_checkpointing", "cnn_module_kernel", "causal", "cnn_module_norm"}
SAMPLING_KEYS = {
    "top_p": ("ras_top_p", "rate", 0.8),
    "top_k": ("ras_top_k", "count", 25),
    "win_size": ("ras_window", "count", 10),
    "tau_r": ("ras_threshold", "number", 0.1),
}
# Key of CosyVoice-BlankEN/config.json -> (field of Qwen2Config, kind, default of transformers 4.51).
QWEN_KEYS = {
    "vocab_size": ("text_vocab_size", "count", 151936),
    "hidden_size": ("hidden_size", "count", 4096),
    "intermediate_size": ("intermediate_size", "count", 22016),
    "num_hidden_layers": ("num_hidden_layers", "count", 32),
    "num_attention_heads": ("num_attention_heads", "count", 32),
    "num_key_value_heads": ("num_key_value_heads", "count", 32),
    "hidden_act": ("hidden_act", "text", "silu"),
    "max_position_embeddings": ("max_position_embeddings", "count", 32768),
    "initializer_range": ("initializer_range", "number", 0.02),
    "rms_norm_eps": ("rms_norm_eps", "number", 1e-6),
    "attention_dropout": ("attention_dropout", "rate", 0.0),
}
REQUIRED_QWEN_VALUES = {
    "model_type": "qwen2",
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}
IGNORED_QWEN_KEYS = {
    *("_name_or_path", "architectures", "bos_token_id", "dtype", "max_window_layers", "sliding_window", "torch_dtype"),
    *("transformers_version", "use_cache", "use_mrope"),
}

# Ordered: the first pattern that matches is applied.
V1_RENAMES = [
    (r"text_encoder_affine_layer\.", "text_proj."),
    (r"spk_embed_affine_layer\.", "speaker_proj."),
    (r"llm_embedding\.", "prompt_embedding."),
    (r"llm_decoder\.", "lm_head."),
    (r"(text_embedding|speech_embedding)\.", r"\1."),
    (r"text_encoder\.", "text_encoder."),
    (r"llm\.", "decoder."),
]
V1_ENCODER_RENAMES = [
    (r"embed\.out\.0\.", "input_proj."),
    (r"embed\.out\.1\.", "input_norm."),
    (r"after_norm\.", "norm."),
    (r"encoders\.(\d{1,4})\.self_attn\.linear_([qkv])\.", r"layers.\1.self_attn.\2_proj."),
    (r"encoders\.(\d{1,4})\.self_attn\.linear_out\.", r"layers.\1.self_attn.o_proj."),
    (r"encoders\.(\d{1,4})\.self_attn\.linear_pos\.", r"layers.\1.self_attn.pos_proj."),
    (r"encoders\.(\d{1,4})\.self_attn\.(pos_bias_[uv])$", r"layers.\1.self_attn.\2"),
    (r"encoders\.(\d{1,4})\.feed_forward\.w_([12])\.", r"layers.\1.mlp.fc\2."),
    # The conformer's names of the norms, then the transformer's.
    (r"encoders\.(\d{1,4})\.(?:norm_mha|norm1)\.", r"layers.\1.input_layernorm."),
    (r"encoders\.(\d{1,4})\.(?:norm_ff|norm2)\.", r"layers.\1.post_attention_layernorm."),
]
V1_BACK_ENCODER_RENAMES = [
    (r"input_proj\.", "embed.out.0."),
    (r"input_norm\.", "embed.out.1."),
    (r"norm\.", "after_norm."),
    (r"layers\.(\d+)\.self_attn\.([qkv])_proj\.", r"encoders.\1.self_attn.linear_\2."),
    (r"layers\.(\d+)\.self_attn\.o_proj\.", r"encoders.\1.self_attn.linear_out."),
    (r"layers\.(\d+)\.self_attn\.pos_proj\.", r"encoders.\1.self_attn.linear_pos."),
    (r"layers\.(\d+)\.self_attn\.(pos_bias_[uv])$", r"encoders.\1.self_attn.\2"),
    (r"layers\.(\d+)\.mlp\.fc([12])\.", r"encoders.\1.feed_forward.w_\2."),
]
V1_BACK_NORMS = {
    "text_encoder": {"input_layernorm": "norm_mha", "post_attention_layernorm": "norm_ff"},
    "decoder": {"input_layernorm": "norm1", "post_attention_layernorm": "norm2"},
}
V1_BACK_TOP = {
    "text_proj": "text_encoder_affine_layer",
    "speaker_proj": "spk_embed_affine_layer",
    "prompt_embedding": "llm_embedding",
    "lm_head": "llm_decoder",
    "text_embedding": "text_embedding",
    "speech_embedding": "speech_embedding",
}
_QWEN_PREFIX = "llm.model."
_TEXT_TABLE, _TEXT_HEAD = f"{_QWEN_PREFIX}model.embed_tokens.weight", f"{_QWEN_PREFIX}lm_head.weight"
_TABLE = "model.embed_tokens.weight"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


# ---------------------------------------------------------------------------------------------------------------------
# Configuration


def read_config(settings: dict[str, object], path: Path, pack: Path) -> LmConfig:
    """Our configuration from the `llm` section of a yaml.

    Args:
        settings: the yaml as data, see `read_hyperpyyaml`. path: its file, for messages.
        pack: the folder with `CosyVoice-BlankEN/config.json`, which versions 2 and 3 need.
    Raises:
        ConversionError: a key, class or value that the models do not have, named in the message.
    """
    call = _call(settings.get("llm"), "llm", path)
    if call.kind != "new" or call.target not in CLASSES:
        raise ConversionError("unknown class", file=path, key="llm", expected=sorted(CLASSES), actual=call.target)
    arguments = _arguments(call, "llm", path)
    version = CLASSES[call.target]
    sampling = _sampling_fields(arguments.pop("sampling", None), path)
    inner = _call(arguments.pop("llm", None), "llm.llm", path)
    try:
        if version == 1:
            encoder = _call(arguments.pop("text_encoder", None), "llm.text_encoder", path)
            return _read_v1(arguments, encoder, inner, sampling, path)
        return _read_qwen(arguments, inner, sampling, version, path, pack)
    except ValueError as error:
        if isinstance(error, ConversionError):
            raise
        raise ConversionError("contradictory configuration", file=path, actual=str(error)) from None


def _read_v1(
    arguments: dict[str, object], encoder: Call, decoder: Call, sampling: dict[str, object], path: Path
) -> CosyVoiceTransformerLmConfig:
    fields = sampling | _fields(arguments, "llm", V1_KEYS, path)
    text = _encoder_fields(encoder, "llm.text_encoder", path)
    speech = _encoder_fields(decoder, "llm.llm", path)
    for key, expected, actual in (
        ("llm.text_encoder.input_size", fields["text_embedding_size"], text.pop("input_size")),
        ("llm.llm.input_size", fields["input_size"], speech.pop("input_size")),
        ("llm.llm.output_size", fields["hidden_size"], speech.pop("output_size")),
        ("llm.llm.static_chunk_size", 1, speech.pop("chunk_size")),
    ):
        if actual != expected:
            raise ConversionError("not supported", file=path, key=key, expected=expected, actual=actual)
    fields["text_encoder_hidden_size"] = text.pop("output_size")
    fields |= {f"text_encoder_{name}": value for name, value in text.items()}
    fields |= {"num_attention_heads": speech.pop("num_heads"), "num_hidden_layers": speech.pop("num_layers")}
    return CosyVoiceTransformerLmConfig(**fields, **speech)


def _encoder_fields(call: Call, key: str, path: Path) -> dict[str, object]:
    """Shape of one of version 1's two networks, by the names of `RelativeTransformer`."""
    required = {
        "cosyvoice.transformer.encoder.ConformerEncoder": (REQUIRED_CONFORMER_VALUES, "swish"),
        "cosyvoice.transformer.encoder.TransformerEncoder": (REQUIRED_ENCODER_VALUES, "relu"),
    }
    if call.kind != "new" or call.target not in required:
        raise ConversionError("unknown class", file=path, key=key, expected=sorted(required), actual=call.target)
    arguments = _arguments(call, key, path)
    values, activation = required[call.target]
    for name, (expected, default) in values.items():
        actual = arguments.pop(name, default)
        if actual != expected or isinstance(actual, bool) != isinstance(expected, bool):
            raise ConversionError("not supported", file=path, key=f"{key}.{name}", expected=expected, actual=actual)
    table = {
        **ENCODER_KEYS,
        "input_size": ("input_size", "count", None),
        "output_size": ("output_size", "count", 256),
        "activation_type": ("hidden_act", ACTIVATIONS, activation),
    }
    fields = _fields(arguments, key, table, path, IGNORED_ENCODER_KEYS)
    fields["rectify_input"] = fields.pop("input_layer") == "rectified"
    return fields


def _read_qwen(
    arguments: dict[str, object], inner: Call, sampling: dict[str, object], version: int, path: Path, pack: Path
) -> CosyVoiceLmConfig:
    if inner.kind != "new" or inner.target != "cosyvoice.llm.llm.Qwen2Encoder":
        raise ConversionError("unknown class", file=path, key="llm.llm", actual=inner.target)
    # The path is replaced by that of the folder in the pack.
    for key in _arguments(inner, "llm.llm", path):
        if key != "pretrain_path":
            raise ConversionError("unknown key", file=path, key=f"llm.llm.{key}")
    ratio = arguments.pop("mix_ratio", [5, 15])
    if not isinstance(ratio, list) or len(ratio) != 2:
        raise ConversionError("bad value", file=path, key="llm.mix_ratio", expected="two counts", actual=repr(ratio))
    table = {
        **SHARED_KEYS,
        "llm_input_size": ("input_size", "count", None),
        "llm_output_size": ("output_size", "count", None),
    }
    if version == 2:
        # Accepted by the recipe of version 2 and unused by its class.
        arguments = {key: value for key, value in arguments.items() if key != "spk_embed_dim"}
    fields = _fields(arguments, "llm", table, path)
    reader = ConfigReader({}, path, {})
    fields["mix_ratio"] = [reader.value("llm.mix_ratio", part, "count") for part in ratio]
    qwen = _read_qwen_config(pack / QWEN_FOLDER / "config.json")
    for name in ("input_size", "output_size"):
        if (actual := fields.pop(name)) != qwen["hidden_size"]:
            raise ConversionError(
                "sizes disagree", file=path, key=f"llm.llm_{name}", expected=qwen["hidden_size"], actual=actual
            )
    if version == 3 and (end := end_of_prompt_id(pack / QWEN_FOLDER)) is not None:
        fields["end_of_prompt_id"] = end
    return CosyVoiceLmConfig(version=version, **sampling, **fields, **qwen)


def _read_qwen_config(path: Path) -> dict[str, object]:
    """Fields of our configuration from the `config.json` of a `Qwen2ForCausalLM`."""
    reader = ConfigReader(read_json_mapping(path, MAX_JSON_BYTES), path, REQUIRED_QWEN_VALUES)
    for key in REQUIRED_QWEN_VALUES:
        reader.used.add(key)
        if key in reader.configs:
            reader.require(key, reader.configs[key])
    fields = {field: reader.top(key, kind, default) for key, (field, kind, default) in QWEN_KEYS.items()}
    theta = reader.top("rope_theta", "number", 10000.0)
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    end = reader.top("eos_token_id", "optional size", None)
    pad = reader.top("pad_token_id", "optional size", None)
    fields["pad_token_id"] = next((token for token in (pad, end) if token is not None), 0)
    reader.refuse_unknown(IGNORED_QWEN_KEYS)
    heads = fields["num_attention_heads"]
    if fields["hidden_size"] % heads or heads % fields["num_key_value_heads"]:
        raise ConversionError("sizes disagree", file=path, key="num_attention_heads", actual=heads)
    return fields


def _sampling_fields(value: object, path: Path) -> dict[str, object]:
    call = _call(value, "llm.sampling", path)
    if call.kind != "name" or call.target != "cosyvoice.utils.common.ras_sampling":
        raise ConversionError("unknown class", file=path, key="llm.sampling", actual=call.target)
    return _fields(_arguments(call, "llm.sampling", path), "llm.sampling", SAMPLING_KEYS, path)


def _call(value: object, key: str, path: Path) -> Call:
    if not isinstance(value, Call):
        raise ConversionError("key is missing or no tag", file=path, key=key, actual=repr(value))
    return value


def _arguments(call: Call, key: str, path: Path) -> dict[str, object]:
    if not isinstance(call.arguments, dict):
        raise ConversionError("arguments have no names", file=path, key=key)
    return dict(call.arguments)


def _fields(
    arguments: Mapping[str, object],
    section: str,
    table: Mapping[str, tuple[str, str | dict[str, str], object]],
    path: Path,
    ignored: set[str] = frozenset(),
) -> dict[str, object]:
    """The fields of `table`, by our names; a key without a default must be there, any other key is refused."""
    for key, (_, _, default) in table.items():
        if default is None and key not in arguments:
            raise ConversionError("key is missing", file=path, key=f"{section}.{key}")
    return ConfigReader({section: dict(arguments)}, path, {}).read(section, table, ignored)


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def convert_weights(state: dict[str, Tensor], config: LmConfig, path: Path) -> dict[str, Tensor]:
    """Upstream's tensors under our names: complete, and of the shapes of the model.

    Raises:
        ConversionError: an unknown or missing weight, another shape or type, or an untied text head.
    """
    state = {name: tensor for name, tensor in state.items() if name not in CHECKPOINT_SCALARS}
    for name, tensor in state.items():
        if tensor.dtype not in _FLOATS:
            raise ConversionError("type", file=path, key=name, expected=_FLOATS, actual=tensor.dtype)
    is_v1 = isinstance(config, CosyVoiceTransformerLmConfig)
    if is_v1:
        weights = {_v1_name(name, path): tensor for name, tensor in state.items()}
    else:
        weights = _one_table(state, config, path)
    with torch.device("meta"):
        model = CosyVoiceTransformerLm(config) if is_v1 else CosyVoiceLmForCausalLM(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    names = {_v1_name(name, path): name for name in state} if is_v1 else {}
    for name, tensor in weights.items():
        shown = names.get(name, name)
        if name not in expected:
            raise ConversionError("unknown weight", file=path, key=shown, actual=tuple(tensor.shape))
        if tuple(tensor.shape) != expected[name]:
            raise ConversionError("shape", file=path, key=shown, expected=expected[name], actual=tuple(tensor.shape))
    for name in sorted(expected.keys() - weights.keys()):
        raise ConversionError("weight is missing", file=path, key=name, expected=expected[name])
    return weights


def _v1_name(name: str, path: Path) -> str:
    for pattern, replacement in V1_RENAMES:
        if found := re.match(pattern, name):
            top, rest = found.expand(replacement), name[found.end() :]
            if top not in ("text_encoder.", "decoder."):
                return top + rest
            for inner, inner_replacement in V1_ENCODER_RENAMES:
                if inner_found := re.match(inner, rest):
                    return top + inner_found.expand(inner_replacement) + rest[inner_found.end() :]
    raise ConversionError("unknown weight", file=path, key=name)


def _one_table(state: dict[str, Tensor], config: CosyVoiceLmConfig, path: Path) -> dict[str, Tensor]:
    """Text, speech and special embeddings as one table; Qwen2's own weights keep their names."""
    state = dict(state)
    shapes = {
        _TEXT_TABLE: config.text_vocab_size,
        "speech_embedding.weight": config.num_speech_rows,
    }
    if config.num_condition_rows:
        shapes["llm_embedding.weight"] = config.num_condition_rows
    tables = []
    for name, rows in shapes.items():
        if name not in state:
            raise ConversionError("weight is missing", file=path, key=name, expected=(rows, config.hidden_size))
        if tuple(state[name].shape) != (rows, config.hidden_size):
            raise ConversionError(
                "shape", file=path, key=name, expected=(rows, config.hidden_size), actual=tuple(state[name].shape)
            )
        tables.append(state[name])
    head = state.pop(_TEXT_HEAD, None)
    if head is not None and not torch.equal(head, state[_TEXT_TABLE]):
        raise ConversionError(
            "head of the text differs from the embedding, which it shares", file=path, key=_TEXT_HEAD
        )
    dtype = tables[0].dtype
    whole = torch.zeros(config.vocab_size, config.hidden_size, dtype=dtype)
    start = 0
    for table in tables:
        whole[start : start + table.shape[0]] = table
        start += table.shape[0]
    weights = {_TABLE: whole}
    for name in shapes:
        del state[name]
    for name, tensor in state.items():
        if name.startswith("llm_decoder."):
            weights[f"lm_head.{name.removeprefix('llm_decoder.')}"] = tensor
        elif name.startswith(f"{_QWEN_PREFIX}model."):
            weights[name.removeprefix(_QWEN_PREFIX)] = tensor
        else:
            raise ConversionError("unknown weight", file=path, key=name, actual=tuple(tensor.shape))
    return weights


def restore_weights(weights: Mapping[str, Tensor], config: LmConfig) -> dict[str, Tensor]:
    """Our tensors under upstream's names, the inverse of `convert_weights`; tables that upstream ties share memory."""
    if isinstance(config, CosyVoiceTransformerLmConfig):
        return {_v1_back_name(name): tensor for name, tensor in weights.items()}
    state = {}
    for name, tensor in weights.items():
        if name == _TABLE:
            sizes = (config.text_vocab_size, config.num_speech_rows, config.num_condition_rows)
            text, speech, condition = tensor[: sum(sizes)].split(sizes)
            state[_TEXT_TABLE] = state[_TEXT_HEAD] = text
            state["speech_embedding.weight"] = speech
            if config.num_condition_rows:
                state["llm_embedding.weight"] = condition
        elif name.startswith("lm_head."):
            state[f"llm_decoder.{name.removeprefix('lm_head.')}"] = tensor
        else:
            state[f"{_QWEN_PREFIX}{name}"] = tensor
    return state


def _v1_back_name(name: str) -> str:
    top, _, rest = name.partition(".")
    if top in V1_BACK_TOP:
        return f"{V1_BACK_TOP[top]}.{rest}"
    prefix = "text_encoder." if top == "text_encoder" else "llm."
    for pattern, replacement in V1_BACK_ENCODER_RENAMES:
        if found := re.match(pattern, rest):
            return prefix + found.expand(replacement) + rest[found.end() :]
    _, layer, norm, kind = rest.split(".")
    return f"{prefix}encoders.{layer}.{V1_BACK_NORMS[top][norm]}.{kind}"


# ---------------------------------------------------------------------------------------------------------------------
# The component alone


def convert(pack: Path, out: Path, weights_name: str = WEIGHTS_NAME) -> dict[str, object]:
    """Converts the language model of a pack to a folder `out` that `from_pretrained` loads.

    Args:
        weights_name: the file of weights, `llm.pt`, or `llm.rl.pt` of version 3.
    Returns:
        The report, which is also written as `conversion_report.json`.
    """
    path = find_yaml(pack)
    config = read_config(read_hyperpyyaml(path), path, pack)
    weights_path = pack / weights_name
    weights = convert_weights(read_state_dict(weights_path, allowed_scalars=CHECKPOINT_SCALARS), config, weights_path)
    config.dtype = next(iter(weights.values())).dtype
    is_v1 = isinstance(config, CosyVoiceTransformerLmConfig)
    with torch.device("meta"):
        model = CosyVoiceTransformerLm(config) if is_v1 else CosyVoiceLmForCausalLM(config)
    inputs = [path, weights_path] if is_v1 else [path, weights_path, pack / QWEN_FOLDER / "config.json"]
    report: dict[str, object] = {
        "converter": "cosyvoice_lm",
        "model_type": config.model_type,
        "parameters": sum(tensor.numel() for tensor in weights.values()),
        "inputs": {file.relative_to(pack).as_posix(): sha256_of_file(file) for file in inputs},
    }
    with staged_directory(out) as stage:
        # The weights are memory mapped and go from file to file.
        model.save_pretrained(stage, state_dict={})
        write_safetensors(stage / "model.safetensors", weights)
        write_report(stage, report)
    return report


def restore(model_dir: Path, pack: Path) -> dict[str, object]:
    """Writes a pack that holds the language model alone: yaml, `llm.pt`, and for Qwen2 `CosyVoice-BlankEN`.

    Upstream builds its Qwen2 from that folder before it loads `llm.pt`, so that the weights are in both.
    """
    kinds = {"cosyvoice_lm": CosyVoiceLmConfig, "cosyvoice_transformer_lm": CosyVoiceTransformerLmConfig}
    config = kinds[require_model_type(model_dir, kinds)].from_pretrained(model_dir)
    state = restore_weights(read_safetensors(model_dir / "model.safetensors"), config)
    report: dict[str, object] = {
        "converter": "cosyvoice_lm",
        "direction": "to upstream",
        "inputs": {name: sha256_of_file(model_dir / name) for name in ("config.json", "model.safetensors")},
    }
    version = 1 if isinstance(config, CosyVoiceTransformerLmConfig) else config.version
    with staged_directory(pack) as stage:
        (stage / YAML_NAMES[version - 1]).write_text(upstream_yaml(config), encoding="utf-8")
        write_state_dict(stage / WEIGHTS_NAME, compact(state))
        if version > 1:
            write_qwen_folder(stage / QWEN_FOLDER, state, config)
        report["outputs"] = sha256_of_files(stage)
    return report


def write_qwen_folder(folder: Path, state: Mapping[str, Tensor], config: CosyVoiceLmConfig) -> None:
    """`config.json` and `model.safetensors` of the `Qwen2ForCausalLM` that upstream starts from."""
    folder.mkdir(exist_ok=True)
    text = json.dumps(upstream_qwen_config(config), indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    qwen = {name.removeprefix(_QWEN_PREFIX): tensor for name, tensor in state.items() if name.startswith(_QWEN_PREFIX)}
    del qwen["lm_head.weight"]
    write_safetensors(folder / "model.safetensors", qwen)


def upstream_qwen_config(config: CosyVoiceLmConfig) -> dict[str, object]:
    """`CosyVoice-BlankEN/config.json`."""
    fields = {key: getattr(config, field) for key, (field, _, _) in QWEN_KEYS.items()}
    return {
        "architectures": ["Qwen2ForCausalLM"],
        **fields,
        **REQUIRED_QWEN_VALUES,
        "rope_theta": config.rope_parameters["rope_theta"],
        "bos_token_id": config.pad_token_id,
        "eos_token_id": config.pad_token_id,
        "torch_dtype": str(config.dtype or torch.float32).removeprefix("torch."),
    }


def upstream_yaml(config: LmConfig) -> str:
    """A yaml with the `llm` section alone."""
    return yaml.dump({"llm": upstream_section(config)}, Dumper=_HyperDumper, sort_keys=False)


def upstream_section(config: LmConfig) -> Call:
    """The `llm` section of the yaml."""
    sampling = Call(
        "name",
        "cosyvoice.utils.common.ras_sampling",
        {key: getattr(config, field) for key, (field, _, _) in SAMPLING_KEYS.items()},
    )
    if isinstance(config, CosyVoiceTransformerLmConfig):
        fields = {key: getattr(config, field) for key, (field, _, _) in V1_KEYS.items()}
        text = _upstream_encoder(config, "ConformerEncoder", "text_encoder_", "text_encoder_num_heads")
        speech = _upstream_encoder(config, "TransformerEncoder", "", "num_attention_heads")
        fields |= {"text_encoder": text, "llm": speech, "sampling": sampling}
        return Call("new", "cosyvoice.llm.llm.TransformerLM", fields)
    fields = {key: getattr(config, field) for key, (field, _, _) in SHARED_KEYS.items()}
    fields |= {"llm_input_size": config.hidden_size, "llm_output_size": config.hidden_size}
    fields["mix_ratio"] = config.mix_ratio
    fields["llm"] = Call("new", "cosyvoice.llm.llm.Qwen2Encoder", {"pretrain_path": ""})
    fields["sampling"] = sampling
    name = {version: target for target, version in CLASSES.items()}[config.version]
    return Call("new", name, fields)


def _upstream_encoder(config: CosyVoiceTransformerLmConfig, kind: str, prefix: str, heads: str) -> Call:
    conformer = kind == "ConformerEncoder"
    activation = {ours: theirs for theirs, ours in ACTIVATIONS.items()}[getattr(config, f"{prefix}hidden_act")]
    required = REQUIRED_CONFORMER_VALUES if conformer else REQUIRED_ENCODER_VALUES
    layers = "text_encoder_num_layers" if conformer else "num_hidden_layers"
    arguments: dict[str, object] = {
        "input_size": config.text_embedding_size if conformer else config.input_size,
        "output_size": getattr(config, f"{prefix}hidden_size"),
        "attention_heads": getattr(config, heads),
        "linear_units": getattr(config, f"{prefix}intermediate_size"),
        "num_blocks": getattr(config, layers),
        "dropout_rate": getattr(config, f"{prefix}dropout"),
        "positional_dropout_rate": getattr(config, f"{prefix}positional_dropout"),
        "attention_dropout_rate": getattr(config, f"{prefix}attention_dropout"),
        "input_layer": "linear_legacy" if getattr(config, f"{prefix}rectify_input") else "linear",
        "static_chunk_size": config.text_encoder_chunk_size if conformer else 1,
        "key_bias": getattr(config, f"{prefix}key_bias"),
        "activation_type": activation,
    }
    arguments |= {key: value for key, (value, default) in required.items() if value != default}
    return Call("new", f"cosyvoice.transformer.encoder.{kind}", arguments)


class _HyperDumper(yaml.SafeDumper):
    """Writes a [`Call`] as its tag."""


_HyperDumper.add_representer(
    Call, lambda dumper, call: dumper.represent_mapping(f"!{call.kind}:{call.target}", call.arguments)
)
