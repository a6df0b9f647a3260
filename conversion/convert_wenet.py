"""Converts a WeNet pack (U2, U2++, U2++ MoE, Paraformer) to a transformers folder, and U2 models back.

    python conversion/convert_wenet.py PACK OUT
    python conversion/convert_wenet.py --reverse OUT PACK

PACK holds `final.pt`, `train.yaml`, `units.txt` (or `words.txt`), and as needed `global_cmvn`, a sentencepiece
`*.model` and a list of non-linguistic symbols. Both generations of `train.yaml` are read: the current one and the
flat one of before December 2023. The pack is untrusted: see `hf_speechllm.upstream`. OUT appears complete or not
at all.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import torch
import yaml
from command_line import converter_parser, print_report

from hf_speechllm.models.configuration_wenet_u2pp import WenetU2ppConfig
from hf_speechllm.models.feature_extraction_kaldi_fbank import KaldiFbankFeatureExtractor
from hf_speechllm.models.modeling_wenet_u2pp import WenetU2ppForSpeechRecognition
from hf_speechllm.models.processing_wenet_u2pp import WenetU2ppProcessor
from hf_speechllm.models.tokenization_wenet_u2pp import WenetU2ppTokenizer
from hf_speechllm.upstream.checkpoints import read_state_dict
from hf_speechllm.upstream.cmvn import read_cmvn, write_json_cmvn
from hf_speechllm.upstream.errors import ConversionError
from hf_speechllm.upstream.model_folder import require_model_type
from hf_speechllm.upstream.sentencepiece_model import read_sentencepiece_model
from hf_speechllm.upstream.staging import sha256_of_file, sha256_of_files, staged_directory, write_report
from hf_speechllm.upstream.tokens import build_bpe_tokenizer, build_char_tokenizer
from hf_speechllm.upstream.typed_config import ConfigReader
from hf_speechllm.upstream.units import read_non_linguistic_symbols, read_units, write_units
from hf_speechllm.upstream.yaml_config import read_yaml_mapping


# ---------------------------------------------------------------------------------------------------------------------
# Names of weights. Every rule is applied once, in this order, to the whole name.

WENET_TO_HF = [
    (r"^encoder\.global_cmvn\.mean$", "model.encoder.cmvn.mean"),
    (r"^encoder\.global_cmvn\.istd$", "model.encoder.cmvn.inverse_std"),
    (r"^encoder\.embed\.conv\.0\.", "model.encoder.subsampling.convs.0."),
    (r"^encoder\.embed\.conv\.2\.", "model.encoder.subsampling.convs.1."),
    (r"^encoder\.embed\.conv\.4\.", "model.encoder.subsampling.convs.2."),
    (r"^encoder\.embed\.(?:out\.0|linear)\.", "model.encoder.subsampling.out_proj."),
    (r"^encoder\.embed\.out\.1\.", "model.encoder.subsampling.layer_norm."),
    (r"^encoder\.encoders\.", "model.encoder.layers."),
    (r"^encoder\.after_norm\.", "model.encoder.norm."),
    (r"^ctc\.ctc_lo\.", "ctc_head."),
    (r"^decoder\.right_decoder\.output_layer\.", "right_decoder_head."),
    (r"^decoder\.(?:left_decoder\.)?output_layer\.", "decoder_head."),
    (r"^decoder\.right_decoder\.", "model.right_decoder."),
    (r"^decoder\.(?:left_decoder\.)?", "model.decoder."),
    (r"^(model\.(?:right_)?decoder)\.embed\.0\.", r"\1.embed_tokens."),
    (r"^(model\.(?:right_)?decoder)\.decoders\.", r"\1.layers."),
    (r"^(model\.(?:right_)?decoder)\.after_norm\.", r"\1.norm."),
    (r"^(model\.(?:right_)?decoder\.layers\.\d+)\.norm1\.", r"\1.norm_self_attn."),
    (r"^(model\.(?:right_)?decoder\.layers\.\d+)\.norm2\.", r"\1.norm_cross_attn."),
    (r"^(model\.(?:right_)?decoder\.layers\.\d+)\.norm3\.", r"\1.norm_feed_forward."),
    (r"^(model\.encoder\.layers\.\d+)\.(?:norm1|norm_mha)\.", r"\1.norm_self_attn."),
    (r"^(model\.encoder\.layers\.\d+)\.(?:norm2|norm_ff)\.", r"\1.norm_feed_forward."),
    (r"^(model\.encoder\.layers\.\d+)\.norm_ff_macaron\.", r"\1.norm_feed_forward_macaron."),
    (r"^(model\.encoder\.layers\.\d+)\.norm_final\.", r"\1.norm_out."),
    (r"\.conv_module\.", ".conv."),
    (r"\.src_attn\.", ".cross_attn."),
    (r"\.linear_([qkv])\.", r".\1_proj."),
    (r"\.linear_out\.", ".o_proj."),
    (r"\.linear_pos\.", ".pos_proj."),
    (r"\.experts\.(\d+)\.w_1\.weight$", r".experts.up_proj#\1"),  # "#e": slice e of a stacked weight
    (r"\.experts\.(\d+)\.w_1\.bias$", r".experts.up_proj_bias#\1"),
    (r"\.experts\.(\d+)\.w_2\.weight$", r".experts.down_proj#\1"),
    (r"\.experts\.(\d+)\.w_2\.bias$", r".experts.down_proj_bias#\1"),
    (r"\.w_1\.", ".fc1."),
    (r"\.w_2\.", ".fc2."),
]

# `feed_forward.gate.weight` is the router of a mixture of experts or the gate of a gated feed-forward.
_GATE = re.compile(r"\.gate\.weight$")
_GATE_NAMES = {"moe": ".router.weight", "gated": ".gate_proj.weight", "dense": ".gate.weight"}

HF_TO_WENET = [
    (r"^model\.encoder\.cmvn\.mean$", "encoder.global_cmvn.mean"),
    (r"^model\.encoder\.cmvn\.inverse_std$", "encoder.global_cmvn.istd"),
    (r"^model\.encoder\.subsampling\.convs\.0\.", "encoder.embed.conv.0."),
    (r"^model\.encoder\.subsampling\.convs\.1\.", "encoder.embed.conv.2."),
    (r"^model\.encoder\.subsampling\.convs\.2\.", "encoder.embed.conv.4."),
    (r"^model\.encoder\.subsampling\.layer_norm\.", "encoder.embed.out.1."),
    (r"^(model\.(?:right_)?decoder)\.embed_tokens\.", r"\1.embed.0."),
    (r"^(model\.(?:right_)?decoder\.layers\.\d+)\.norm_self_attn\.", r"\1.norm1."),
    (r"^(model\.(?:right_)?decoder\.layers\.\d+)\.norm_cross_attn\.", r"\1.norm2."),
    (r"^(model\.(?:right_)?decoder\.layers\.\d+)\.norm_feed_forward\.", r"\1.norm3."),
    (r"^(model\.(?:right_)?decoder)\.layers\.", r"\1.decoders."),
    (r"^(model\.(?:right_)?decoder)\.norm\.", r"\1.after_norm."),
    (r"^model\.encoder\.norm\.", "encoder.after_norm."),
    (r"^(model\.encoder\.layers\.\d+)\.norm_feed_forward_macaron\.", r"\1.norm_ff_macaron."),
    (r"^(model\.encoder\.layers\.\d+)\.norm_out\.", r"\1.norm_final."),
    (r"^model\.encoder\.layers\.", "encoder.encoders."),
    (r"^ctc_head\.", "ctc.ctc_lo."),
    (r"^(encoder\.encoders\.\d+)\.conv\.", r"\1.conv_module."),
    (r"\.cross_attn\.", ".src_attn."),
    (r"\.([qkv])_proj\.", r".linear_\1."),
    (r"\.o_proj\.", ".linear_out."),
    (r"\.pos_proj\.", ".linear_pos."),
    (r"\.(?:router|gate_proj)\.weight$", ".gate.weight"),
    (r"\.experts\.up_proj#(\d+)$", r".experts.\1.w_1.weight"),
    (r"\.experts\.up_proj_bias#(\d+)$", r".experts.\1.w_1.bias"),
    (r"\.experts\.down_proj#(\d+)$", r".experts.\1.w_2.weight"),
    (r"\.experts\.down_proj_bias#(\d+)$", r".experts.\1.w_2.bias"),
    (r"\.fc1\.", ".w_1."),
    (r"\.fc2\.", ".w_2."),
]

# Recomputed tables, and projections that checkpoints of before May 2022 carry although nothing uses them.
IGNORED_WEIGHTS = [r"(?:^|\.)pe$", r"\.concat_linear[12]?\.(?:weight|bias)$"]

# ---------------------------------------------------------------------------------------------------------------------
# Keys of train.yaml: key -> (field of WenetU2ppConfig, kind, default upstream). A dict as kind translates values.

_ACTIVATIONS = {
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "tanh": "tanh",
    "hardtanh": "hardtanh",
    "selu": "selu",
}
_MLPS = {"position_wise_feed_forward": "dense", "moe": "moe", "gated": "gated"}
_NORMS = {"layer_norm": "layer_norm", "rms_norm": "rms_norm"}
_CONV_NORMS = {"batch_norm": "batch_norm", **_NORMS}
_SUBSAMPLINGS = {"linear": "linear", "conv2d": "conv2d4", "conv2d6": "conv2d6", "conv2d8": "conv2d8"}
_POSITIONS = {"rel_pos": "rel_pos", "abs_pos": "abs_pos", "no_pos": "no_pos"}
_ATTENTIONS = {"rel_selfattn": "rel_selfattn", "selfattn": "selfattn"}

_SHARED_ENCODER = {
    "output_size": ("hidden_size", "count", 256),
    "attention_heads": ("num_attention_heads", "count", 4),
    "linear_units": ("intermediate_size", "count", 2048),
    "num_blocks": ("num_hidden_layers", "count", 6),
    "dropout_rate": ("hidden_dropout", "rate", 0.1),
    "positional_dropout_rate": ("positional_dropout", "rate", 0.1),
    "attention_dropout_rate": ("attention_dropout", "rate", 0.0),
    "input_layer": ("subsampling_type", _SUBSAMPLINGS, "conv2d"),
    "normalize_before": ("normalize_before", "flag", True),
    "static_chunk_size": ("static_chunk_size", "size", 0),
    "use_dynamic_chunk": ("use_dynamic_chunk", "flag", False),
    "use_dynamic_left_chunk": ("use_dynamic_left_chunk", "flag", False),
    "query_bias": ("query_bias", "flag", True),
    "key_bias": ("key_bias", "flag", True),
    "value_bias": ("value_bias", "flag", True),
    "layer_norm_type": ("norm_type", _NORMS, "layer_norm"),
    "norm_eps": ("norm_eps", "number", 1e-5),
    "n_kv_head": ("num_key_value_heads", "optional count", None),
    "head_dim": ("head_dim", "optional count", None),
    "mlp_type": ("mlp_type", _MLPS, "position_wise_feed_forward"),
    "mlp_bias": ("mlp_bias", "flag", True),
    "n_expert": ("num_experts", "count", 8),
    "n_expert_activated": ("num_experts_per_tok", "count", 2),
}
ENCODER_KEYS = {
    "conformer": {
        **_SHARED_ENCODER,
        "pos_enc_layer_type": ("position_embedding_type", _POSITIONS, "rel_pos"),
        "selfattention_layer_type": ("attention_type", _ATTENTIONS, "rel_selfattn"),
        "activation_type": ("hidden_act", _ACTIVATIONS, "swish"),
        "macaron_style": ("macaron_style", "flag", True),
        "use_cnn_module": ("use_conv_module", "flag", True),
        "cnn_module_kernel": ("conv_kernel_size", "count", 15),
        "causal": ("conv_causal", "flag", False),
        "cnn_module_norm": ("conv_norm_type", _CONV_NORMS, "batch_norm"),
        "conv_bias": ("conv_bias", "flag", True),
        "conv_norm_eps": ("conv_norm_eps", "number", 1e-5),
        "conv_inner_factor": ("conv_inner_factor", "count", 2),
        "final_norm": ("final_norm", "flag", True),
    },
    "transformer": {
        **_SHARED_ENCODER,
        "pos_enc_layer_type": ("position_embedding_type", _POSITIONS, "abs_pos"),
        "selfattention_layer_type": ("attention_type", {"selfattn": "selfattn"}, "selfattn"),
        "activation_type": ("hidden_act", _ACTIVATIONS, "relu"),
    },
}
_SHARED_DECODER = {
    "attention_heads": ("decoder_attention_heads", "count", 4),
    "linear_units": ("decoder_intermediate_size", "count", 2048),
    "num_blocks": ("decoder_layers", "count", 6),
    "dropout_rate": ("decoder_dropout", "rate", 0.1),
    "positional_dropout_rate": ("decoder_positional_dropout", "rate", 0.1),
    "self_attention_dropout_rate": ("decoder_self_attention_dropout", "rate", 0.0),
    "src_attention_dropout_rate": ("decoder_cross_attention_dropout", "rate", 0.0),
    "normalize_before": ("decoder_normalize_before", "flag", True),
    "query_bias": ("decoder_query_bias", "flag", True),
    "key_bias": ("decoder_key_bias", "flag", True),
    "value_bias": ("decoder_value_bias", "flag", True),
    "activation_type": ("decoder_hidden_act", _ACTIVATIONS, "relu"),
    "tie_word_embedding": ("tie_word_embeddings", "flag", False),
    "layer_norm_type": ("decoder_norm_type", _NORMS, "layer_norm"),
    "norm_eps": ("decoder_norm_eps", "number", 1e-5),
    "n_kv_head": ("decoder_num_key_value_heads", "optional count", None),
    "head_dim": ("decoder_head_dim", "optional count", None),
    "mlp_type": ("decoder_mlp_type", _MLPS, "position_wise_feed_forward"),
    "mlp_bias": ("decoder_mlp_bias", "flag", True),
    "n_expert": ("decoder_num_experts", "count", 8),
    "n_expert_activated": ("decoder_num_experts_per_tok", "count", 2),
}
DECODER_KEYS = {
    "transformer": {
        **_SHARED_DECODER,
        "src_query_bias": ("decoder_cross_query_bias", "flag", True),
        "src_key_bias": ("decoder_cross_key_bias", "flag", True),
        "src_value_bias": ("decoder_cross_value_bias", "flag", True),
    },
    "bitransformer": {**_SHARED_DECODER, "r_num_blocks": ("right_decoder_layers", "size", 0)},
}
MODEL_KEYS = {
    "ctc_weight": ("ctc_weight", "rate", 0.5),
    "reverse_weight": ("reverse_weight", "rate", 0.0),
    "lsm_weight": ("label_smoothing", "rate", 0.0),
    "length_normalized_loss": ("length_normalized_loss", "flag", False),
    "apply_non_blank_embedding": ("apply_non_blank_embedding", "flag", False),
}
FBANK_KEYS = {
    "num_mel_bins": ("feature_size", "count", 80),
    "frame_length": ("frame_length_ms", "number", 25),
    "frame_shift": ("frame_shift_ms", "number", 10),
    "dither": ("dither", "number", 0.0),
    "window_type": ("window_type", {"povey": "povey", "hamming": "hamming"}, "povey"),
}

# Known keys that change nothing in the converted model.
IGNORED_ENCODER_KEYS = {"positionwise_conv_kernel_size", "gradient_checkpointing", "use_sdpa"}
IGNORED_DECODER_KEYS = {"gradient_checkpointing", "use_sdpa"}
IGNORED_MODEL_KEYS = {"ignore_id"}
IGNORED_TOKENIZER_KEYS = {"is_multilingual", "num_languages"}
IGNORED_KEYS = {
    *("accum_grad", "dataset", "dtype", "epoch", "grad_clip", "init_infos", "lfmmi_dir", "log_interval", "max_epoch"),
    *("model_dir", "optim", "optim_conf", "raw_wav", "save_interval", "save_states", "scheduler", "scheduler_conf"),
    *("train_engine", "use_amp"),
}
IGNORED_DATASET_KEYS = {
    *("batch_conf", "cycle", "filter_conf", "list_shuffle", "list_shuffle_conf", "shuffle", "shuffle_conf", "sort"),
    *("sort_conf", "spec_aug", "spec_aug_conf", "spec_sub", "spec_sub_conf", "spec_trim", "spec_trim_conf"),
    *("speed_perturb", "speed_perturb_conf"),
}
# Values that must be these when the key is present, because they are all that the model can do.
REQUIRED_VALUES = {
    "encoder_conf.concat_after": False,
    "decoder_conf.input_layer": "embed",
    "decoder_conf.use_output_layer": True,
    "decoder_conf.src_attention": True,
    "dataset_conf.feats_type": "fbank",
    "tokenizer_conf.connect_symbol": "",
    "model": "asr_model",
    "ctc": "ctc",
}

BPE_MODEL_NAME = "upstream_bpe.model"

# ---------------------------------------------------------------------------------------------------------------------
# WeNet -> transformers


def convert_wenet_pack(pack_dir: str | Path, out_dir: str | Path) -> dict[str, object]:
    """Converts the pack in `pack_dir` to a folder `out_dir` that `from_pretrained` and `pipeline` load.

    Args:
        pack_dir: folder with the files named above.
        out_dir: must not exist or be empty; its parent must exist.
    Returns:
        The report, which is also written as `conversion_report.json`: names and SHA-256 of inputs and outputs, where
        the CMVN came from, ignored weights and keys, warnings.
    Raises:
        ConversionError: a key, value, weight or shape that the model does not have, named in the message.
        UnsafeArtifactError: a file that is hostile or damaged.
    """
    pack, yaml_path = Path(pack_dir), Path(pack_dir) / "train.yaml"
    if not pack.is_dir():
        raise ConversionError("pack is not a directory", file=pack)
    configs = read_yaml_mapping(yaml_path)
    if configs.get("model") == "paraformer":
        from convert_wenet_paraformer import convert_wenet_paraformer_pack

        return convert_wenet_paraformer_pack(pack, configs, out_dir)
    reader = ConfigReader(configs, yaml_path, REQUIRED_VALUES)
    fields, fbank = _read_architecture(reader)
    inputs = [yaml_path]

    tokenizer, bpe_path, warnings = _build_tokenizer(pack, reader, fields, inputs)
    cmvn_path, cmvn_is_json = find_cmvn(pack, reader)
    reader.refuse_unknown(IGNORED_KEYS)
    state = read_state_dict(pack / "final.pt")
    inputs.append(pack / "final.pt")
    cmvn_source = _add_cmvn(state, cmvn_path, cmvn_is_json, fields, inputs)
    fields["has_cmvn"] = cmvn_source != "none"
    _check_sizes(state, fields, pack / "final.pt")
    try:
        config = WenetU2ppConfig(**fields)
    except ValueError as error:
        raise ConversionError("contradictory configuration", file=yaml_path, actual=str(error)) from None
    weights, ignored = _rename(state, config, pack / "final.pt")
    model = _load(weights, config, pack / "final.pt")
    processor = WenetU2ppProcessor(
        KaldiFbankFeatureExtractor(**fbank),
        tokenizer,
        subsampling_rate=config.subsampling_rate,
        right_context=config.right_context,
    )

    report: dict[str, object] = {
        "converter": "wenet",
        "model_type": config.model_type,
        "yaml_generation": "new" if "tokenizer" in configs or "tokenizer_conf" in configs else "flat",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "cmvn": cmvn_source,
        "ignored_weights": sorted(ignored),
        "ignored_keys": sorted(reader.ignored),
        "warnings": warnings,
        "inputs": {path.name: sha256_of_file(path) for path in sorted(inputs)},
    }
    with staged_directory(out_dir) as stage:
        model.save_pretrained(stage)
        processor.save_pretrained(stage)
        if bpe_path is not None:
            shutil.copyfile(bpe_path, stage / BPE_MODEL_NAME)
        write_report(stage, report)
    return report


def _read_architecture(reader: ConfigReader) -> tuple[dict[str, object], dict[str, object]]:
    """Fields of `WenetU2ppConfig` and of the feature extractor from either generation of `train.yaml`."""
    for key in ("model", "ctc"):
        reader.used.add(key)
        if key in reader.configs:
            reader.require(key, reader.configs[key])
    encoder = reader.top("encoder", {name: name for name in ENCODER_KEYS}, "conformer")
    fields: dict[str, object] = {"encoder_type": encoder}
    fields |= reader.read("encoder_conf", ENCODER_KEYS[encoder], IGNORED_ENCODER_KEYS)
    if encoder == "transformer":
        fields |= {"macaron_style": False, "use_conv_module": False}
    reader.used.add("decoder")
    if "decoder" in reader.configs and reader.configs["decoder"] is None:
        reader.section("decoder_conf")
        fields |= {"decoder_layers": 0, "right_decoder_layers": 0}
    else:
        decoder = reader.top("decoder", {name: name for name in DECODER_KEYS}, "bitransformer")
        fields |= reader.read("decoder_conf", DECODER_KEYS[decoder], IGNORED_DECODER_KEYS)
    fields |= reader.read("model_conf", MODEL_KEYS, IGNORED_MODEL_KEYS)

    if "output_dim" not in reader.configs or "input_dim" not in reader.configs:
        missing = "output_dim" if "output_dim" not in reader.configs else "input_dim"
        raise ConversionError("key is missing", file=reader.path, key=missing)
    fields["vocab_size"] = reader.top("output_dim", "count", None)
    fields["input_size"] = reader.top("input_dim", "count", None)
    if reader.top("vocab_size", "count", fields["vocab_size"]) != fields["vocab_size"]:
        raise ConversionError(
            "vocabulary sizes disagree",
            file=reader.path,
            key="vocab_size",
            expected=fields["vocab_size"],
            actual=reader.configs["vocab_size"],
        )
    fields["pad_token_id"] = reader.read("ctc_conf", {"ctc_blank_id": ("id", "size", 0)}, set())["id"]
    special = reader.section("tokenizer_conf").get("special_tokens")
    special = {} if special is None else special
    if not isinstance(special, dict):
        raise ConversionError(
            "not a mapping", file=reader.path, key="tokenizer_conf.special_tokens", actual=repr(special)
        )
    last = fields["vocab_size"] - 1
    for field, token in (("bos_token_id", "<sos>"), ("eos_token_id", "<eos>")):
        fields[field] = reader.value(f"tokenizer_conf.special_tokens.{token}", special.get(token, last), "size")
    if special.get("<blank>", fields["pad_token_id"]) != fields["pad_token_id"]:
        raise ConversionError(
            "blank ids disagree",
            file=reader.path,
            key="tokenizer_conf.special_tokens.<blank>",
            expected=fields["pad_token_id"],
            actual=special["<blank>"],
        )

    fbank = read_dataset(reader)
    if fbank["feature_size"] != fields["input_size"]:
        raise ConversionError(
            "feature sizes disagree",
            file=reader.path,
            key="dataset_conf.fbank_conf.num_mel_bins",
            expected=f"input_dim {fields['input_size']}",
            actual=fbank["feature_size"],
        )
    fields |= {"frame_shift_ms": fbank["frame_shift_ms"], "sampling_rate": fbank["sampling_rate"]}
    return fields, fbank


def read_dataset(reader: ConfigReader) -> dict[str, object]:
    """Arguments of the feature extractor from `dataset_conf`."""
    dataset = reader.section("dataset_conf")
    for key in dataset:
        full = f"dataset_conf.{key}"
        if key in IGNORED_DATASET_KEYS:
            reader.ignored.add(full)
        elif full in REQUIRED_VALUES:
            reader.require(full, dataset[key])
        elif key not in ("fbank_conf", "resample_conf"):
            raise ConversionError("unknown key", file=reader.path, key=full, actual=repr(dataset[key]))
    inner = ConfigReader(
        {f"dataset_conf.{key}": dataset.get(key) for key in ("fbank_conf", "resample_conf")},
        reader.path,
        REQUIRED_VALUES,
    )
    fbank = inner.read("dataset_conf.fbank_conf", FBANK_KEYS, set())
    return fbank | inner.read(
        "dataset_conf.resample_conf", {"resample_rate": ("sampling_rate", "count", 16000)}, set()
    )


def _build_tokenizer(
    pack: Path, reader: ConfigReader, fields: dict[str, object], inputs: list[Path]
) -> tuple[WenetU2ppTokenizer, Path | None, list[str]]:
    """The tokenizer, the sentencepiece model it was built from, and warnings. Read files are added to `inputs`."""
    settings = reader.section("tokenizer_conf")
    known = {"symbol_table_path", "split_with_space", "bpe_path", "non_lang_syms_path", "special_tokens"}
    for key in settings:
        full = f"tokenizer_conf.{key}"
        if key in IGNORED_TOKENIZER_KEYS:
            reader.ignored.add(full)
        elif full in REQUIRED_VALUES:
            reader.require(full, settings[key])
        elif key not in known:
            raise ConversionError("unknown key", file=reader.path, key=full, actual=repr(settings[key]))

    def named(key: str) -> Path | None:
        """The file of the pack with the base name that the yaml gives for `key`."""
        value = settings.get(key)
        if value is None:
            return None
        name = str(reader.value(f"tokenizer_conf.{key}", value, "text")).replace("\\", "/").rsplit("/", 1)[-1]
        return pack / name if name not in ("", ".", "..") and (pack / name).is_file() else None

    units_path = named("symbol_table_path") or next(
        (pack / name for name in ("units.txt", "words.txt") if (pack / name).exists()), pack / "units.txt"
    )
    units = read_units(units_path)
    inputs.append(units_path)
    if len(units) != fields["vocab_size"]:
        raise ConversionError(
            "vocabulary size",
            file=units_path,
            key="units",
            expected=f"output_dim {fields['vocab_size']}",
            actual=len(units),
        )
    special = settings.get("special_tokens") or {}
    unk_id = special.get("<unk>", units.get("<unk>"))
    names = {index: token for token, index in units.items()}
    if unk_id not in names or isinstance(unk_id, bool):
        raise ConversionError("no unit for unknown text", file=units_path, key="<unk>", actual=unk_id)
    arguments = {
        "blank_id": fields["pad_token_id"],
        "bos_id": fields["bos_token_id"],
        "eos_id": fields["eos_token_id"],
        "unk_token": names[unk_id],
    }
    symbols_path = named("non_lang_syms_path")
    if settings.get("non_lang_syms_path") is not None and symbols_path is None:
        raise ConversionError("file of the pack is missing", file=pack, key="tokenizer_conf.non_lang_syms_path")
    if symbols_path is not None:
        arguments["non_linguistic_symbols"] = read_non_linguistic_symbols(symbols_path)
        inputs.append(symbols_path)

    models = sorted(pack.glob("*.model"))
    flat = "tokenizer" not in reader.configs
    kind = reader.top("tokenizer", {"char": "char", "bpe": "bpe"}, "bpe" if flat and models else "char")
    split = reader.value("tokenizer_conf.split_with_space", settings.get("split_with_space") or False, "flag")
    warnings: list[str] = []
    if kind == "bpe":
        bpe_path = named("bpe_path") or (models[0] if len(models) == 1 else None)
        if bpe_path is None:
            raise ConversionError(
                "no single sentencepiece model", file=pack, key="*.model", actual=[m.name for m in models]
            )
        inputs.append(bpe_path)
        return build_bpe_tokenizer(units, read_sentencepiece_model(bpe_path), **arguments), bpe_path, warnings
    pieces = sum(token.startswith("▁") and len(token) > 1 for token in units)
    if pieces:
        warnings.append(
            f"{units_path.name} has {pieces} sentencepiece-style units but the pack has no *.model: "
            "decoding is right, new label text is split into characters"
        )
    return build_char_tokenizer(units, split_with_space=split, **arguments), None, warnings


def find_cmvn(pack: Path, reader: ConfigReader) -> tuple[Path | None, bool]:
    """The statistics file that the yaml asks for (`None`: none) and whether it is JSON.

    A file called `global_cmvn` in the pack goes before the name that the yaml gives, as in the toolkit.
    """
    reader.used |= {"cmvn", "cmvn_file", "is_json_cmvn"}
    if reader.configs.get("cmvn") not in (None, "global_cmvn"):
        reader.value("cmvn", reader.configs["cmvn"], {"global_cmvn": "global_cmvn"})
    settings = reader.section("cmvn_conf")
    for key in settings:
        if key not in ("cmvn_file", "is_json_cmvn"):
            raise ConversionError("unknown key", file=reader.path, key=f"cmvn_conf.{key}", actual=repr(settings[key]))
    settings = settings or reader.configs
    name = settings.get("cmvn_file")
    if reader.configs.get("cmvn") is None and reader.configs.get("cmvn_file") is None:
        return None, True
    path = pack / "global_cmvn"
    if name is not None and not path.exists():
        path = pack / (reader.value("cmvn_file", name, "text").replace("\\", "/").rsplit("/", 1)[-1] or "global_cmvn")
    return path, reader.value("is_json_cmvn", settings.get("is_json_cmvn", True), "flag")


def _add_cmvn(
    state: dict[str, torch.Tensor], path: Path | None, is_json: bool, fields: dict[str, object], inputs: list[Path]
) -> str:
    """Adds the statistics of the file to `state` unless it has them; returns "state dict", "file" or "none"."""
    names = ("encoder.global_cmvn.mean", "encoder.global_cmvn.istd")
    present = [name in state for name in names]
    if all(present):
        return "state dict"
    if any(present):
        raise ConversionError("half of the CMVN is missing", file="final.pt", key=names[present.index(False)])
    if path is None:
        return "none"
    state[names[0]], state[names[1]] = read_cmvn(path, is_json=is_json, input_size=fields["input_size"])
    inputs.append(path)
    return "file"


def _check_sizes(state: dict[str, torch.Tensor], fields: dict[str, object], path: Path) -> None:
    """Compares what decides how much is built (layers, experts, widths) with the checkpoint, before building."""

    def layers(prefix: str) -> int:
        pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
        return len({match[1] for name in state if (match := pattern.match(name))})

    def expect(key: str, expected: object, actual: object) -> None:
        if expected != actual:
            raise ConversionError(
                "configuration and weights disagree", file=path, key=key, expected=expected, actual=actual
            )

    def shape(name: str, expected: tuple[int, ...]) -> None:
        if name not in state:
            raise ConversionError("weight is missing", file=path, key=name, expected=expected)
        expect(name, expected, tuple(state[name].shape))

    expect("encoder.encoders", fields["num_hidden_layers"], layers("encoder.encoders"))
    shape("ctc.ctc_lo.weight", (fields["vocab_size"], fields["hidden_size"]))
    decoders = [("encoder.encoders", "", "intermediate_size", "num_experts", "mlp_type")]
    if fields["decoder_layers"]:
        bidirectional = any(name.startswith("decoder.left_decoder.") for name in state)
        left = "decoder.left_decoder.decoders" if bidirectional else "decoder.decoders"
        expect(left, fields["decoder_layers"], layers(left))
        expect(
            "decoder.right_decoder.decoders",
            fields.get("right_decoder_layers", 0),
            layers("decoder.right_decoder.decoders"),
        )
        decoders.append((left, "decoder_", "decoder_intermediate_size", "decoder_num_experts", "decoder_mlp_type"))
    for prefix, _, width, experts, mlp in decoders:
        first = f"{prefix}.0.feed_forward"
        if fields[mlp] == "moe":
            expect(f"{first}.experts", fields[experts], layers(f"{first}.experts"))
            shape(f"{first}.experts.0.w_1.weight", (fields[width], fields["hidden_size"]))
        else:
            shape(f"{first}.w_1.weight", (fields[width], fields["hidden_size"]))
    if fields.get("use_conv_module"):
        inner = fields["hidden_size"] * fields["conv_inner_factor"] // 2
        shape("encoder.encoders.0.conv_module.depthwise_conv.weight", (inner, 1, fields["conv_kernel_size"]))


def _rename(
    state: dict[str, torch.Tensor], config: WenetU2ppConfig, path: Path
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The weights under their new names with experts stacked, and the names that were ignored."""
    weights: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[int, torch.Tensor]] = {}
    ignored, sources = [], {}
    unused_right = config.decoder_layers > 0 and config.right_decoder_layers == 0
    for name, tensor in state.items():
        if any(re.search(pattern, name) for pattern in IGNORED_WEIGHTS) or (
            unused_right and name.startswith("decoder.right_decoder.")  # upstream builds it even with no blocks
        ):
            ignored.append(name)
            continue
        renamed = name
        for pattern, replacement in WENET_TO_HF:
            renamed = re.sub(pattern, replacement, renamed)
        mlp_type = config.mlp_type if renamed.startswith("model.encoder.") else config.decoder_mlp_type
        renamed = _GATE.sub(_GATE_NAMES[mlp_type], renamed)
        if renamed in sources:
            raise ConversionError("two weights have the same meaning", file=path, key=name, actual=sources[renamed])
        sources[renamed] = name
        if "#" in renamed:
            stacked, _, index = renamed.partition("#")
            experts.setdefault(stacked, {})[int(index)] = tensor
        else:
            weights[renamed] = tensor
    for stacked, parts in experts.items():
        shapes = {tuple(part.shape) for part in parts.values()}
        if sorted(parts) != list(range(len(parts))) or len(shapes) != 1:
            raise ConversionError(
                "experts are incomplete or differ in shape",
                file=path,
                key=stacked,
                expected=f"experts 0..{len(parts) - 1} of one shape",
                actual=f"{sorted(parts)}, {sorted(shapes)}",
            )
        weights[stacked] = torch.stack([parts[index] for index in range(len(parts))])
    for name, tensor in weights.items():
        if name.endswith(".num_batches_tracked") and tensor.is_floating_point():
            if tensor.numel() != 1 or not 0 <= float(tensor) < 2**53:
                raise ConversionError("bad counter", file=path, key=sources[name], actual=tensor)
            weights[name] = tensor.to(torch.int64)  # averaging of checkpoints makes counters fractional
    return weights, ignored


def _load(weights: dict[str, torch.Tensor], config: WenetU2ppConfig, path: Path) -> WenetU2ppForSpeechRecognition:
    """Builds the model without memory, compares names and shapes, then gives it the weights."""
    dtypes = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
    if len(dtypes) != 1 or dtypes.isdisjoint({torch.float32, torch.float16, torch.bfloat16}):
        raise ConversionError(
            "floating point types", file=path, expected="one of float32, float16, bfloat16", actual=dtypes
        )
    with torch.device("meta"):
        model = WenetU2ppForSpeechRecognition(config)
    expected = model.state_dict()
    for name, tensor in expected.items():
        if name not in weights:
            raise ConversionError("weight is missing", file=path, key=name, expected=tuple(tensor.shape))
        if weights[name].shape != tensor.shape:
            raise ConversionError(
                "shape", file=path, key=name, expected=tuple(tensor.shape), actual=tuple(weights[name].shape)
            )
        if weights[name].is_floating_point() != tensor.is_floating_point():
            raise ConversionError("type", file=path, key=name, expected=tensor.dtype, actual=weights[name].dtype)
    for name in weights:
        if name not in expected:
            raise ConversionError("unknown weight", file=path, key=name, actual=tuple(weights[name].shape))
    if config.tie_word_embeddings:
        for head, embedding in model._tied_weights_keys.items():
            if not torch.equal(weights[head], weights[embedding]):
                raise ConversionError("tied weights differ", file=path, key=head, expected=f"equal to {embedding}")
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    model.config.dtype = next(iter(dtypes))
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# transformers -> WeNet


def export_wenet_pack(model_dir: str | Path, pack_dir: str | Path) -> dict[str, object]:
    """Writes the model folder `model_dir` as a pack that the toolkit loads: the inverse of `convert_wenet_pack`.

    Training settings that a pack does not need for inference are written with the recipes' usual values.

    Args:
        model_dir: folder with a `wenet_u2pp` model and its processor.
        pack_dir: must not exist or be empty; its parent must exist.
    Returns:
        A report with SHA-256 of the written files.
    Raises:
        ConversionError: the folder's tokenizer needs a sentencepiece model that the folder does not carry, or
            `pack_dir` is in the way.
    """
    source = Path(model_dir)
    require_model_type(source, [WenetU2ppConfig.model_type])
    model = WenetU2ppForSpeechRecognition.from_pretrained(source, local_files_only=True)
    tokenizer = WenetU2ppTokenizer.from_pretrained(source, local_files_only=True)
    extractor = KaldiFbankFeatureExtractor.from_pretrained(source, local_files_only=True)
    config = model.config
    units = tokenizer.get_vocab()
    if sorted(units.values()) != list(range(config.vocab_size)):
        raise ConversionError(
            "tokenizer and model disagree",
            file=source,
            key="vocab_size",
            expected=config.vocab_size,
            actual=len(units),
        )
    if tokenizer.unit_kind == "bpe" and not (source / BPE_MODEL_NAME).is_file():
        raise ConversionError("sentencepiece model is missing", file=source / BPE_MODEL_NAME)

    state = to_wenet_state_dict(model.state_dict(), model.config)
    symbols = tokenizer.init_kwargs.get("non_linguistic_symbols")
    configs = _upstream_yaml(config, extractor, tokenizer, symbols)
    with staged_directory(pack_dir) as stage:
        torch.save(state, stage / "final.pt")
        text = yaml.safe_dump(configs, sort_keys=True, allow_unicode=True, default_flow_style=False)
        (stage / "train.yaml").write_text(text, encoding="utf-8")
        (stage / "units.txt").write_text(write_units(units), encoding="utf-8")
        if config.has_cmvn:
            cmvn = model.model.encoder.cmvn
            (stage / "global_cmvn").write_text(write_json_cmvn(cmvn.mean, cmvn.inverse_std) + "\n", encoding="utf-8")
        if tokenizer.unit_kind == "bpe":
            shutil.copyfile(source / BPE_MODEL_NAME, stage / "bpe.model")
        if symbols:
            (stage / "non_lang_syms.txt").write_text("".join(f"{symbol}\n" for symbol in symbols), encoding="utf-8")
        outputs = sha256_of_files(stage)
    return {"converter": "wenet", "direction": "reverse", "outputs": outputs}


def to_wenet_state_dict(tensors: dict[str, torch.Tensor], config: WenetU2ppConfig) -> dict[str, torch.Tensor]:
    """Tensors under our parameter names (weights, or gradients for a check) under upstream's, experts unstacked."""
    conformer = config.encoder_type == "conformer"
    out_proj = "linear" if config.subsampling_type in ("conv2d6", "conv2d8") else "out.0"
    left = "decoder.left_decoder" if config.right_decoder_layers else "decoder"
    rules = [
        (r"^model\.encoder\.subsampling\.out_proj\.", f"encoder.embed.{out_proj}."),
        (r"^(model\.encoder\.layers\.\d+)\.norm_self_attn\.", r"\1.norm_mha." if conformer else r"\1.norm1."),
        (r"^(model\.encoder\.layers\.\d+)\.norm_feed_forward\.", r"\1.norm_ff." if conformer else r"\1.norm2."),
        *HF_TO_WENET,
        (r"^right_decoder_head\.", "decoder.right_decoder.output_layer."),
        (r"^decoder_head\.", f"{left}.output_layer."),
        (r"^model\.right_decoder\.", "decoder.right_decoder."),
        (r"^model\.decoder\.", f"{left}."),
    ]
    state = {}
    for name, tensor in tensors.items():
        parts = {name: tensor}
        if re.search(r"\.experts\.(up|down)_proj(_bias)?$", name):
            parts = {f"{name}#{index}": part for index, part in enumerate(tensor)}
        for renamed, part in parts.items():
            for pattern, replacement in rules:
                renamed = re.sub(pattern, replacement, renamed)
            state[renamed] = part.detach().clone().contiguous()
    return state


def _upstream_yaml(
    config: WenetU2ppConfig,
    extractor: KaldiFbankFeatureExtractor,
    tokenizer: WenetU2ppTokenizer,
    symbols: list[str] | None,
) -> dict[str, object]:
    def section(source: object, table: dict[str, tuple]) -> dict[str, object]:
        values = {}
        for key, (field, kind, _) in table.items():
            value = getattr(source, field)
            if isinstance(kind, dict):
                value = {ours: theirs for theirs, ours in kind.items()}[value]
            if value is not None:
                values[key] = value
        return values

    if config.decoder_layers == 0:
        decoder = None
    else:
        decoder = "bitransformer" if config.right_decoder_layers else "transformer"
    fbank = section(extractor, FBANK_KEYS)
    for key in ("frame_length", "frame_shift"):
        fbank[key] = int(fbank[key]) if float(fbank[key]).is_integer() else fbank[key]
    bpe = tokenizer.unit_kind == "bpe"
    configs: dict[str, object] = {
        "accum_grad": 1,
        "ctc": "ctc",
        "ctc_conf": {"ctc_blank_id": config.pad_token_id},
        "dataset": "asr",
        "dataset_conf": {
            "batch_conf": {"batch_size": 16, "batch_type": "static"},
            "fbank_conf": fbank,
            "filter_conf": {"max_length": 40960, "min_length": 0, "token_max_length": 200, "token_min_length": 1},
            "resample_conf": {"resample_rate": extractor.sampling_rate},
            "shuffle": True,
            "shuffle_conf": {"shuffle_size": 1500},
            "sort": True,
            "sort_conf": {"sort_size": 500},
            "spec_aug": True,
            "spec_aug_conf": {"max_f": 10, "max_t": 50, "num_f_mask": 2, "num_t_mask": 2},
            "speed_perturb": True,
        },
        "decoder": decoder,
        "decoder_conf": {} if decoder is None else section(config, DECODER_KEYS[decoder]),
        "encoder": config.encoder_type,
        "encoder_conf": section(config, ENCODER_KEYS[config.encoder_type]),
        "grad_clip": 5,
        "input_dim": config.input_size,
        "log_interval": 100,
        "max_epoch": 100,
        "model": "asr_model",
        "model_conf": section(config, MODEL_KEYS),
        "optim": "adam",
        "optim_conf": {"lr": 0.001},
        "output_dim": config.vocab_size,
        "scheduler": "warmuplr",
        "scheduler_conf": {"warmup_steps": 25000},
        "tokenizer": "bpe" if bpe else "char",
        "tokenizer_conf": {
            "bpe_path": "bpe.model" if bpe else None,
            "is_multilingual": False,
            "non_lang_syms_path": "non_lang_syms.txt" if symbols else None,
            "num_languages": 1,
            "special_tokens": {
                "<blank>": config.pad_token_id,
                "<eos>": config.eos_token_id,
                "<sos>": config.bos_token_id,
                "<unk>": tokenizer.unk_token_id,
            },
            "split_with_space": tokenizer.unit_kind == "word",
            "symbol_table_path": "units.txt",
        },
        "vocab_size": config.vocab_size,
    }
    if config.has_cmvn:
        configs |= {"cmvn": "global_cmvn", "cmvn_conf": {"cmvn_file": "global_cmvn", "is_json_cmvn": True}}
    return configs


def main(arguments: list[str] | None = None) -> int:
    """Command line, see `print_report`."""
    options = converter_parser(__doc__, "write a WeNet pack from a model folder").parse_args(arguments)
    run = export_wenet_pack if options.reverse else convert_wenet_pack
    return print_report(lambda: run(options.source, options.destination))


if __name__ == "__main__":
    sys.exit(main())
