"""Converts a FunASR pack (Paraformer and its descendants, SenseVoiceSmall) to a transformers folder, and back.

    python conversion/convert_funasr.py PACK OUT
    python conversion/convert_funasr.py --reverse OUT PACK

PACK holds `config.yaml`, `model.pt` (or `model.pb`), `am.mvn`, a token list (`tokens.json`, `tokens.txt`) with an
optional `seg_dict`, or a sentencepiece model, and `configuration.json`, which says which file is which. What the pack
is, `config.yaml: model` decides; names of releases mean nothing. The pack is untrusted: see `hf_speechllm.upstream`.
OUT appears complete or not at all.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
import yaml


sys.path.insert(0, str(Path(__file__).resolve().parent))

from command_line import converter_parser, print_report
from paraformer_names import take_weights, upstream_state_dict
from torch import Tensor

from hf_speechllm.models.configuration_funasr_paraformer import FunasrParaformerConfig
from hf_speechllm.models.feature_extraction_kaldi_fbank import KaldiFbankFeatureExtractor
from hf_speechllm.models.modeling_funasr_paraformer import FunasrParaformerForSpeechRecognition
from hf_speechllm.models.processing_funasr_paraformer import FunasrParaformerProcessor
from hf_speechllm.models.tokenization_funasr_paraformer import FunasrParaformerTokenizer
from hf_speechllm.upstream.checkpoint_file import compact, write_state_dict
from hf_speechllm.upstream.checkpoints import read_state_dict
from hf_speechllm.upstream.errors import ConversionError
from hf_speechllm.upstream.funasr_pack import (
    FunasrPack,
    open_funasr_pack,
    read_seg_dict,
    read_token_list,
    write_seg_dict,
    write_token_list,
)
from hf_speechllm.upstream.funasr_tokens import (
    build_paraformer_char_tokenizer,
    build_paraformer_sentencepiece_tokenizer,
)
from hf_speechllm.upstream.model_folder import require_model_type
from hf_speechllm.upstream.nnet_mvn import read_nnet_mvn, write_nnet_mvn
from hf_speechllm.upstream.safetensors_file import write_safetensors
from hf_speechllm.upstream.sentencepiece_model import read_sentencepiece_model
from hf_speechllm.upstream.staging import sha256_of_file, sha256_of_files, staged_directory, write_report
from hf_speechllm.upstream.typed_config import ConfigReader


# ---------------------------------------------------------------------------------------------------------------------
# Keys of config.yaml: key -> (field of FunasrParaformerConfig, kind, default upstream). A dict as kind translates.

MODEL_TYPES = ("funasr_paraformer", "funasr_sensevoice", "funasr_fsmn_vad", "funasr_ct_transformer")
MODELS = {
    "Paraformer": None,
    "BiCifParaformer": None,
    "ContextualParaformer": "contextual",
    "SeacoParaformer": "seaco",
    "ParaformerStreaming": None,
}
MODEL_KEYS = {
    "ctc_weight": ("ctc_weight", "rate", 0.5),
    "lsm_weight": ("label_smoothing", "rate", 0.0),
    "length_normalized_loss": ("length_normalized_loss", "flag", False),
    "predictor_weight": ("predictor_weight", "number", 0.0),
    "predictor_bias": ("append_eos", "size", 0),
    "sampling_ratio": ("sampling_ratio", "rate", 0.2),
    "share_embedding": ("share_embedding", "flag", False),
    "blank_id": ("pad_token_id", "size", 0),
    "sos": ("bos_token_id", "size", 1),
    "eos": ("eos_token_id", "size", 2),
}
_HOTWORD_KEYS = {
    "inner_dim": ("inner_dim", "count", 256),
    "bias_encoder_dropout_rate": ("hotword_encoder_dropout", "rate", 0.0),
}
CONTEXTUAL_KEYS = {
    **_HOTWORD_KEYS,
    "use_decoder_embedding": ("hotword_embed_from_decoder", "flag", False),
}
SEACO_KEYS = {
    **_HOTWORD_KEYS,
    "bias_encoder_bid": ("hotword_encoder_bidirectional", "flag", False),
    "seaco_lsm_weight": ("seaco_label_smoothing", "rate", 0.0),
    "seaco_length_normalized_loss": ("seaco_length_normalized_loss", "flag", True),
    "train_decoder": ("seaco_train_decoder", "flag", True),
    "seaco_weight": ("seaco_decoder_weight", "number", 0.01),
    "NO_BIAS": ("seaco_no_bias_token_id", "size", 8377),
}
_SHARED_ENCODER = {
    "output_size": ("hidden_size", "count", 256),
    "attention_heads": ("num_attention_heads", "count", 4),
    "linear_units": ("intermediate_size", "count", 2048),
    "num_blocks": ("num_hidden_layers", "count", 6),
    "dropout_rate": ("hidden_dropout", "rate", 0.1),
    "positional_dropout_rate": ("positional_dropout", "rate", 0.1),
    "attention_dropout_rate": ("attention_dropout", "rate", 0.0),
}
_SANM_ENCODER = {
    **_SHARED_ENCODER,
    "kernel_size": ("fsmn_kernel_size", "count", 11),
    "sanm_shfit": ("fsmn_shift", "size", 0),
}
CONFORMER_KEYS = {
    **_SHARED_ENCODER,
    "input_layer": (
        "subsampling_type",
        {"linear": "linear", "conv2d": "conv2d4", "conv2d6": "conv2d6", "conv2d8": "conv2d8"},
        "conv2d",
    ),
    "macaron_style": ("macaron_style", "flag", False),
    "rel_pos_type": ("rel_pos_type", {"legacy": "legacy", "latest": "latest"}, "legacy"),
    "pos_enc_layer_type": (
        "position_embedding_type",
        {"rel_pos": "rel_pos", "legacy_rel_pos": "rel_pos", "abs_pos": "abs_pos"},
        "rel_pos",
    ),
    "selfattention_layer_type": (
        "attention_type",
        {
            "rel_selfattn": "shifted_rel_selfattn",
            "legacy_rel_selfattn": "legacy_rel_selfattn",
            "selfattn": "selfattn",
        },
        "rel_selfattn",
    ),
    "activation_type": (
        "hidden_act",
        {"swish": "silu", "relu": "relu", "tanh": "tanh", "hardtanh": "hardtanh", "selu": "selu"},
        "swish",
    ),
    "use_cnn_module": ("use_conv_module", "flag", True),
    "cnn_module_kernel": ("conv_kernel_size", "count", 31),
}
ENCODERS = {
    "SANMEncoder": _SANM_ENCODER,
    "SANMEncoderChunkOpt": _SANM_ENCODER,
    "ConformerEncoder": CONFORMER_KEYS,
}


def _decoder_keys(prefix: str, sanm: bool) -> dict[str, tuple]:
    """Keys of a decoder's section for the fields with this prefix; upstream's blocks are told apart afterwards."""
    layers = {
        "att_layer_num": (f"{prefix}layers", "count", 6),
        "num_blocks": (f"{prefix}num_blocks", "count", 6),
        "kernel_size": (f"{prefix}fsmn_kernel_size", "count", 21),
        "sanm_shfit": (f"{prefix}fsmn_shift", "optional size", 0),
    }
    return {
        "attention_heads": (f"{prefix}attention_heads", "count", 4),
        "linear_units": (f"{prefix}intermediate_size", "count", 2048),
        "dropout_rate": (f"{prefix}dropout", "rate", 0.1),
        "self_attention_dropout_rate": (f"{prefix}self_attention_dropout", "rate", 0.0),
        "src_attention_dropout_rate": (f"{prefix}cross_attention_dropout", "rate", 0.0),
        **(layers if sanm else {"num_blocks": (f"{prefix}layers", "count", 6)}),
    }


_POSITIONAL_DROPOUT = {"positional_dropout_rate": ("decoder_positional_dropout", "rate", 0.1)}
DECODERS = {
    "ParaformerSANMDecoder": _decoder_keys("decoder_", True) | _POSITIONAL_DROPOUT,
    "ContextualParaformerDecoder": _decoder_keys("decoder_", True) | _POSITIONAL_DROPOUT,
    "ParaformerSANDecoder": _decoder_keys("decoder_", False) | _POSITIONAL_DROPOUT,
}
SEACO_DECODER_KEYS = _decoder_keys("seaco_", True)

_SHARED_PREDICTOR = {
    "idim": ("idim", "count", None),
    "l_order": ("cif_left_order", "size", None),
    "r_order": ("cif_right_order", "size", None),
    "threshold": ("cif_threshold", "number", 1.0),
    "dropout": ("cif_dropout", "rate", 0.1),
    "smooth_factor": ("cif_smooth_factor", "number", 1.0),
    "noise_threshold": ("cif_noise_threshold", "number", 0),
}
_TAIL = {"tail_threshold": ("cif_tail_threshold", "number", 0.0), "tail_mask": ("cif_tail_mask", "flag", True)}
PREDICTORS = {
    "CifPredictor": {**_SHARED_PREDICTOR, "tail_threshold": ("cif_tail_threshold", "number", 0.45)},
    "CifPredictorV2": {**_SHARED_PREDICTOR, **_TAIL},
    "CifPredictorV3": {
        **_SHARED_PREDICTOR,
        **_TAIL,
        "smooth_factor2": ("timestamp_smooth_factor", "number", 1.0),
        "noise_threshold2": ("timestamp_noise_threshold", "number", 0),
        "upsample_times": ("upsample_times", "count", 5),
        "upsample_type": ("timestamp_head", {"cnn": "cnn", "cnn_blstm": "cnn_blstm"}, "cnn"),
        "use_cif1_cnn": ("timestamp_from_conv", "flag", True),
    },
}
FRONTEND_KEYS = {
    "fs": ("sampling_rate", "count", 16000),
    "window": ("window_type", {"hamming": "hamming", "povey": "povey"}, "hamming"),
    "n_mels": ("feature_size", "count", 80),
    "frame_length": ("frame_length_ms", "number", 25),
    "frame_shift": ("frame_shift_ms", "number", 10),
    "lfr_m": ("lfr_m", "count", 1),
    "lfr_n": ("lfr_n", "count", 1),
    "dither": ("dither", "number", 1.0),
}

# Known keys that change nothing in the converted model.
IGNORED_SECTION_KEYS = {
    # `seaco_length_normal` is how the published configurations misspell a key that upstream then does not read.
    "model_conf": {
        *("ignore_id", "use_1st_decoder_loss", "seaco_length_normal", "crit_attn_weight", "crit_attn_smooth"),
        *(
            "target_buffer_length",
            "report_cer",
            "report_wer",
            "sym_space",
            "sym_blank",
            "decoder_attention_chunk_type",
        ),
    },
    "encoder_conf": {
        *("pos_enc_class", "padding_idx", "positionwise_conv_kernel_size", "interctc_use_conditioning", "lora_rank"),
        *("lora_alpha", "lora_dropout", "tf2torch_tensor_name_prefix_torch", "tf2torch_tensor_name_prefix_tf"),
    },
    "decoder_conf": {
        *("pos_enc_class", "lora_rank", "lora_alpha", "lora_dropout", "chunk_multiply_factor", "embeds_id"),
        *("tf2torch_tensor_name_prefix_torch", "tf2torch_tensor_name_prefix_tf"),
    },
    "predictor_conf": {"tf2torch_tensor_name_prefix_torch", "tf2torch_tensor_name_prefix_tf"},
    # Upstream reads neither length; `split_with_space` has no effect there, spaces always split or vanish.
    "frontend_conf": {"cmvn_file", "filter_length_min", "filter_length_max"},
    "tokenizer_conf": {"token_list", "seg_dict", "seg_dict_file", "bpemodel", "split_with_space"},
    "ctc_conf": {"reduce", "ignore_nan_grad", "zero_infinity"},
}
IGNORED_SECTION_KEYS["seaco_decoder_conf"] = IGNORED_SECTION_KEYS["decoder_conf"] | {"positional_dropout_rate"}
IGNORED_KEYS = {
    *("accum_grad", "avg_nbest_model", "batch_size", "bf16", "cudnn_benchmark", "cudnn_deterministic"),
    *("cudnn_enabled", "dataset", "dataset_conf", "debug", "deepspeed_config", "device", "disable_pbar"),
    *("disable_update", "enable_tf32", "fp16", "grad_clip", "hub", "init", "init_param", "input_size", "is_training"),
    *("keep_nbest_models", "key", "log_interval", "log_level", "max_epoch", "model_conf_file", "model_path"),
    *("model_revision", "ncpu", "ngpu", "optim", "optim_conf", "output_dir", "resume", "scheduler", "scheduler_conf"),
    *("seed", "specaug", "specaug_conf", "train_conf", "train_data_set_list", "train_type", "trust_remote_code"),
    *("use_amp", "use_ddp", "use_deepspeed", "valid_data_set_list", "vocab_size", "token_list"),
}
# Values that must be these when the key is present, because they are all that the model can do.
REQUIRED_VALUES = {
    "model_conf.bias_encoder_type": "lstm",
    "encoder_conf.normalize_before": True,
    "encoder_conf.concat_after": False,
    "encoder_conf.positionwise_layer_type": "linear",
    "encoder_conf.interctc_layer_idx": [],
    "encoder_conf.lora_list": None,
    "encoder_conf.zero_triu": False,
    "decoder_conf.input_layer": "embed",
    "decoder_conf.use_output_layer": True,
    "decoder_conf.wo_input_layer": False,
    "decoder_conf.normalize_before": True,
    "decoder_conf.concat_after": False,
    "decoder_conf.lora_list": None,
    "seaco_decoder_conf.use_output_layer": False,
    "seaco_decoder_conf.wo_input_layer": True,
    "seaco_decoder_conf.normalize_before": True,
    "seaco_decoder_conf.concat_after": False,
    "seaco_decoder_conf.lora_list": None,
    "frontend_conf.snip_edges": True,
    "frontend_conf.upsacle_samples": True,
    "tokenizer_conf.space_symbol": "<space>",
    "ctc_conf.dropout_rate": 0.0,
    "ctc_conf.ctc_type": "builtin",
    "normalize": None,
}
_SANM_REQUIRED = {
    "encoder_conf.input_layer": "pe",
    "encoder_conf.selfattention_layer_type": "sanm",
}

# Recomputed tables, counters of nothing, and the embedding that the second decoder of some SeACo packs never uses.
IGNORED_WEIGHTS = [r"(?:^|\.)pe$", r"^seaco_decoder\.embed\.", r"^criterion_", r"^error_calculator\."]
# Under which a trainer's checkpoint holds the weights, in the order in which upstream looks.
WRAPPERS = ("state_dict", "model_state_dict", "model")

BPE_MODEL_NAME = "upstream_bpe.model"

# ---------------------------------------------------------------------------------------------------------------------
# FunASR -> transformers


def convert_funasr_pack(pack_dir: str | Path, out_dir: str | Path) -> dict[str, object]:
    """Converts the pack in `pack_dir` to a folder `out_dir` that `from_pretrained` and `pipeline` load.

    Args:
        pack_dir: folder with the files named above.
        out_dir: must not exist or be empty; its parent must exist.
    Returns:
        The report, which is also written as `conversion_report.json`: names and SHA-256 of inputs and outputs, ignored
        weights and keys, warnings.
    Raises:
        ConversionError: a key, value, weight or shape that the model does not have, named in the message.
        UnsafeArtifactError: a file that is hostile or damaged.
    """
    pack = open_funasr_pack(pack_dir)
    if pack.model_name == "SenseVoiceSmall":
        from convert_sensevoice import convert_sensevoice_pack

        return convert_sensevoice_pack(pack_dir, out_dir)
    if pack.model_name == "FsmnVADStreaming":
        from convert_funasr_vad import convert_vad_pack

        return convert_vad_pack(pack, out_dir)
    if pack.model_name == "CTTransformer":
        from convert_funasr_punctuation import convert_punctuation_pack

        return convert_punctuation_pack(pack, out_dir)
    reader = ConfigReader(pack.config, pack.config_path, REQUIRED_VALUES)
    fields = read_architecture(reader)
    extractor = read_front_end(pack, reader, fields)
    tokenizer, bpe_path, inputs = read_tokenizer(pack, reader, fields)
    fields["vocab_size"] = len(tokenizer)
    reader.refuse_unknown(IGNORED_KEYS)
    for key in ("vocab_size", "input_size"):
        if pack.config.get(key) not in (None, -1, fields[key]):
            raise ConversionError(
                "sizes disagree", file=pack.config_path, key=key, expected=fields[key], actual=pack.config[key]
            )
    state = read_weights(pack)
    check_sizes(state, fields, pack.file("init_param"))
    try:
        config = FunasrParaformerConfig(**fields)
    except ValueError as error:
        raise ConversionError("contradictory configuration", file=pack.config_path, actual=str(error)) from None
    report: dict[str, object] = {
        "converter": "funasr",
        "model": pack.model_name,
        "model_type": config.model_type,
        "ignored_keys": sorted(reader.ignored),
        "inputs": {path.name: sha256_of_file(path) for path in sorted({*inputs, *_read_files(pack)})},
    }
    processor = FunasrParaformerProcessor(extractor, tokenizer)
    return write_model(out_dir, state, config, processor, report, pack.file("init_param"), bpe_path=bpe_path)


def write_model(
    out_dir: str | Path,
    state: Mapping[str, Tensor],
    config: FunasrParaformerConfig,
    processor: FunasrParaformerProcessor,
    report: dict[str, object],
    path: Path,
    *,
    toolkit: str = "funasr",
    bpe_path: Path | None = None,
) -> dict[str, object]:
    """Writes the folder: configuration, code, weights one after the other, processor and report, which is returned.

    Args:
        state: upstream's weights; `path`, their file, is for messages.
    Raises:
        ConversionError: see `take_weights`.
    """
    dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if len(dtypes) != 1 or dtypes.isdisjoint({torch.float32, torch.float16, torch.bfloat16}):
        raise ConversionError(
            "floating point types", file=path, expected="one of float32, float16, bfloat16", actual=dtypes
        )
    with torch.device("meta"):
        model = FunasrParaformerForSpeechRecognition(config).to(next(iter(dtypes)))
    unused = list(IGNORED_WEIGHTS)
    if config.hotword_type == "contextual" and config.hotword_embed_from_decoder:
        unused.append(r"^bias_embed\.")  # upstream builds the table even where it reads the decoder's
    weights, ignored = take_weights(state, model.state_dict(), config, unused, path, toolkit)
    report |= {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "ignored_weights": sorted(ignored),
    }
    with staged_directory(out_dir) as stage:
        # Writes the configuration and the code; the weights follow without passing through the model's memory.
        model.save_pretrained(stage, state_dict={})
        write_safetensors(stage / "model.safetensors", weights)
        processor.save_pretrained(stage)
        if bpe_path is not None:
            shutil.copyfile(bpe_path, stage / BPE_MODEL_NAME)
        write_report(stage, report)
    return report


def read_weights(pack: FunasrPack) -> dict[str, Tensor]:
    """The state dict of the pack, memory mapped, without a trainer's wrapping and the prefix of a parallel trainer."""
    state = read_state_dict(pack.file("init_param"), wrappers=WRAPPERS)
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


def read_architecture(reader: ConfigReader) -> dict[str, object]:
    """Fields of `FunasrParaformerConfig` that `config.yaml` decides."""
    model = reader.top("model", {name: name for name in MODELS}, None)
    hotword_type = MODELS[model]
    keys = MODEL_KEYS | {None: {}, "contextual": CONTEXTUAL_KEYS, "seaco": SEACO_KEYS}[hotword_type]
    fields = reader.read("model_conf", keys, IGNORED_SECTION_KEYS["model_conf"])
    if fields["append_eos"] not in (0, 1):
        raise ConversionError(
            "bad value",
            file=reader.path,
            key="model_conf.predictor_bias",
            expected="0 or 1",
            actual=fields["append_eos"],
        )
    fields |= {"append_eos": bool(fields["append_eos"]), "hotword_type": hotword_type, "cif_training": "exact"}
    fields["is_streaming"] = model == "ParaformerStreaming"
    reader.used.add("normalize")
    reader.require("normalize", reader.configs.get("normalize"))
    reader.read("ctc_conf", {}, IGNORED_SECTION_KEYS["ctc_conf"])
    _read_encoder(reader, fields)
    _read_decoder(reader, fields)
    _read_predictor(reader, fields)
    if hotword_type is not None:
        expect(reader, "model_conf.inner_dim", fields["hidden_size"], fields.pop("inner_dim"))
        fields["hotword_encoder_layers"] = 2 if hotword_type == "seaco" else 1
    return fields


def expect(reader: ConfigReader, key: str, expected: object, actual: object) -> None:
    """Raises ConversionError unless the value of `key` is the one that another key demands."""
    if actual != expected:
        raise ConversionError("keys disagree", file=reader.path, key=key, expected=expected, actual=actual)


def _read_encoder(reader: ConfigReader, fields: dict[str, object]) -> None:
    encoder = reader.top("encoder", {name: name for name in ENCODERS}, None)
    sanm = encoder != "ConformerEncoder"
    fields["encoder_type"] = "sanm" if sanm else "conformer"
    ignored = set(IGNORED_SECTION_KEYS["encoder_conf"])
    required = dict(REQUIRED_VALUES)
    if sanm:
        required |= _SANM_REQUIRED
        content = reader.section("encoder_conf")
        if "input_layer" not in content:
            raise ConversionError("key is missing", file=reader.path, key="encoder_conf.input_layer", expected="pe")
        if encoder == "SANMEncoderChunkOpt":
            required["encoder_conf.input_layer"] = "pe_online"
            fields |= _read_chunks(reader, content)
            ignored |= set(_CHUNK_KEYS)
        elif fields["is_streaming"]:
            raise ConversionError(
                "a streaming model needs a streaming encoder", file=reader.path, key="encoder", actual=encoder
            )
    inner = ConfigReader(reader.configs, reader.path, required)
    fields |= inner.read("encoder_conf", ENCODERS[encoder], ignored)
    reader.used.add("encoder_conf")
    reader.ignored |= {key for key in inner.ignored if key.removeprefix("encoder_conf.") not in _CHUNK_KEYS}
    if not sanm:
        # The old relative attention is the default and is meant by the plain name.
        if fields.pop("rel_pos_type") == "legacy" and fields["attention_type"] == "shifted_rel_selfattn":
            fields["attention_type"] = "legacy_rel_selfattn"
        fields["conformer_style"] = "funasr"


_CHUNK_KEYS = {
    "chunk_size": 16,
    "stride": 10,
    "pad_left": 0,
    "encoder_att_look_back_factor": 1,
    "decoder_att_look_back_factor": 1,
}


def _read_chunks(reader: ConfigReader, content: dict[str, object]) -> dict[str, object]:
    """Window of the stream: the last of the sizes that the model was trained with, the one it is used with."""
    values = {}
    for key, default in _CHUNK_KEYS.items():
        value = content.get(key, default)
        entries = value if isinstance(value, list) else [value]
        kind = "count" if key in ("chunk_size", "stride") else "integer"
        for entry in entries or [None]:
            reader.value(f"encoder_conf.{key}", entry, kind)
        values[key] = entries[-1]
    past, new = values["pad_left"], values["stride"]
    future = values["chunk_size"] - past - new
    if past < 0 or future < 0:
        raise ConversionError(
            "windows are smaller than their steps",
            file=reader.path,
            key="encoder_conf.chunk_size",
            expected=f"at least {past + new}",
            actual=values["chunk_size"],
        )
    return {
        "chunk_size": [past, new, future],
        "encoder_chunk_look_back": values["encoder_att_look_back_factor"],
        "decoder_chunk_look_back": values["decoder_att_look_back_factor"],
    }


def _read_decoder(reader: ConfigReader, fields: dict[str, object]) -> None:
    decoder = reader.top("decoder", {name: name for name in DECODERS}, None)
    if (decoder == "ContextualParaformerDecoder") != (fields["hotword_type"] == "contextual"):
        raise ConversionError("decoder does not fit the model", file=reader.path, key="decoder", actual=decoder)
    fields["decoder_type"] = "transformer" if decoder == "ParaformerSANDecoder" else "sanm"
    fields |= reader.read("decoder_conf", DECODERS[decoder], IGNORED_SECTION_KEYS["decoder_conf"])
    if fields["hotword_type"] == "seaco":
        reader.top("seaco_decoder", {"ParaformerSANMDecoder": "sanm"}, None)
        fields |= reader.read("seaco_decoder_conf", SEACO_DECODER_KEYS, IGNORED_SECTION_KEYS["seaco_decoder_conf"])
    for prefix in ("decoder_", "seaco_"):
        if f"{prefix}num_blocks" in fields:
            # Blocks without cross-attention exist only beyond those with it.
            blocks, layers = fields.pop(f"{prefix}num_blocks"), fields[f"{prefix}layers"]
            fields[f"{prefix}fsmn_layers"] = max(blocks - layers, 0)
            if fields[f"{prefix}fsmn_shift"] is None:
                fields[f"{prefix}fsmn_shift"] = (fields[f"{prefix}fsmn_kernel_size"] - 1) // 2


def _read_predictor(reader: ConfigReader, fields: dict[str, object]) -> None:
    predictor = reader.top("predictor", {name: name for name in PREDICTORS}, None)
    fields |= reader.read("predictor_conf", PREDICTORS[predictor], IGNORED_SECTION_KEYS["predictor_conf"])
    expect(reader, "predictor_conf.idim", fields["hidden_size"], fields.pop("idim"))
    fields["cif_integration"] = "cumulative" if predictor == "CifPredictorV2" else "sequential"
    if predictor == "CifPredictor":
        fields |= {"cif_groups": fields["hidden_size"], "cif_residual": True}


def read_front_end(pack: FunasrPack, reader: ConfigReader, fields: dict[str, object]) -> KaldiFbankFeatureExtractor:
    """The feature extractor with the statistics of `am.mvn`; adds what the model must know of it to `fields`."""
    reader.top("frontend", {"WavFrontend": "offline", "WavFrontendOnline": "online"}, None)
    fbank = reader.read("frontend_conf", FRONTEND_KEYS, IGNORED_SECTION_KEYS["frontend_conf"])
    fields["input_size"] = fbank["feature_size"] * fbank["lfr_m"]
    fields["stacked_frames"] = fbank["lfr_n"]
    fields |= {"frame_shift_ms": fbank["frame_shift_ms"], "sampling_rate": fbank["sampling_rate"]}
    if "frontend_conf.cmvn_file" in pack.files:
        shift, scale = read_nnet_mvn(pack.file("frontend_conf.cmvn_file"), input_size=fields["input_size"])
        fbank |= {"cmvn_mean": (-shift).tolist(), "cmvn_inverse_std": scale.tolist()}
    return KaldiFbankFeatureExtractor(**fbank)


def read_tokenizer(
    pack: FunasrPack, reader: ConfigReader, fields: dict[str, object]
) -> tuple[FunasrParaformerTokenizer, Path | None, list[Path]]:
    """The tokenizer, the sentencepiece model it was built from, and the files that were read."""
    kind = reader.top("tokenizer", {"CharTokenizer": "char", "SentencepiecesTokenizer": "bpe"}, None)
    ids = {
        "blank_id": fields["pad_token_id"],
        "bos_id": fields["bos_token_id"],
        "eos_id": fields["eos_token_id"],
    }
    ignored = IGNORED_SECTION_KEYS["tokenizer_conf"]
    if kind == "bpe":
        reader.read("tokenizer_conf", {}, ignored | {"unk_symbol"})
        path = pack.file("tokenizer_conf.bpemodel")
        model = read_sentencepiece_model(path, user_defined=True)
        return build_paraformer_sentencepiece_tokenizer(model, **ids), path, [path]
    keys = {
        "unk_symbol": ("unk_token", "text", "<unk>"),
        "remove_non_linguistic_symbols": ("remove_non_linguistic_symbols", "flag", False),
    }
    settings = reader.read("tokenizer_conf", keys, ignored | {"non_linguistic_symbols"})
    symbols = reader.section("tokenizer_conf").get("non_linguistic_symbols")
    if symbols is not None:
        if not isinstance(symbols, list) or not all(isinstance(symbol, str) and symbol for symbol in symbols):
            raise ConversionError(
                "not a list of symbols",
                file=reader.path,
                key="tokenizer_conf.non_linguistic_symbols",
                actual=repr(symbols),
            )
        settings["non_linguistic_symbols"] = symbols
    path = pack.file("tokenizer_conf.token_list")
    inputs = [path]
    if "tokenizer_conf.seg_dict_file" in pack.files:
        inputs.append(pack.file("tokenizer_conf.seg_dict_file"))
        settings["seg_dict"] = read_seg_dict(inputs[-1])
    return build_paraformer_char_tokenizer(read_token_list(path), **ids, **settings), None, inputs


def check_sizes(state: Mapping[str, Tensor], fields: dict[str, object], path: Path) -> None:
    """Compares what decides how much is built with the checkpoint, before building.

    Raises:
        ConversionError: another number of layers, or other widths.
    """

    def layers(prefix: str) -> int:
        pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
        return len({match[1] for name in state if (match := pattern.match(name))})

    def compare(key: str, expected: object, actual: object) -> None:
        if expected != actual:
            raise ConversionError(
                "configuration and weights disagree", file=path, key=key, expected=expected, actual=actual
            )

    first = "encoder.encoders.0.feed_forward.w_1.weight"
    if fields["encoder_type"] == "sanm":
        compare("encoder.encoders", fields["num_hidden_layers"] - 1, layers("encoder.encoders"))
        first = "encoder.encoders0.0.feed_forward.w_1.weight"
    else:
        compare("encoder.encoders", fields["num_hidden_layers"], layers("encoder.encoders"))
    contextual = fields["hotword_type"] == "contextual"
    compare("decoder.decoders", fields["decoder_layers"] - contextual, layers("decoder.decoders"))
    compare("decoder.decoders2", fields.get("decoder_fsmn_layers", 0), layers("decoder.decoders2"))
    if fields["hotword_type"] == "seaco":
        compare("seaco_decoder.decoders", fields["seaco_layers"], layers("seaco_decoder.decoders"))
        compare("seaco_decoder.decoders2", fields["seaco_fsmn_layers"], layers("seaco_decoder.decoders2"))
    for name, shape in (
        (first, (fields["intermediate_size"], fields["hidden_size"])),
        ("decoder.output_layer.weight", (fields["vocab_size"], fields["hidden_size"])),
    ):
        compare(name, shape, tuple(state[name].shape) if name in state else "missing")


def _read_files(pack: FunasrPack) -> list[Path]:
    read = ("config", "init_param", "frontend_conf.cmvn_file")
    description = pack.directory / "configuration.json"
    return [pack.files[key] for key in read if key in pack.files] + ([description] if description.exists() else [])


# ---------------------------------------------------------------------------------------------------------------------
# transformers -> FunASR

# Fields that a pack has no place for: they do not change what a converted model computes, or are set at conversion.
_NOT_IN_A_PACK = {
    *("cif_training", "dtype", "hotword_filter_size", "initializer_range", "mwer_weight", "mwer_num_candidates"),
    *("mwer_mask_probability", "padding"),
}


def export_funasr_pack(model_dir: str | Path, pack_dir: str | Path) -> dict[str, object]:
    """Writes the model folder `model_dir` as a pack that the toolkit loads: the inverse of `convert_funasr_pack`.

    Training settings that a pack does not need for inference are written with the templates' usual values.

    Args:
        model_dir: folder with a Paraformer (or SenseVoice) model and its processor.
        pack_dir: must not exist or be empty; its parent must exist.
    Returns:
        A report with SHA-256 of the written files.
    Raises:
        ConversionError: the model has an option that FunASR does not have, or the folder is incomplete.
    """
    source = Path(model_dir)
    model_type = require_model_type(source, MODEL_TYPES)
    if model_type == "funasr_sensevoice":
        from convert_sensevoice import export_sensevoice_pack

        return export_sensevoice_pack(model_dir, pack_dir)
    if model_type == "funasr_fsmn_vad":
        from convert_funasr_vad import export_vad_pack

        return export_vad_pack(model_dir, pack_dir)
    if model_type == "funasr_ct_transformer":
        from convert_funasr_punctuation import export_punctuation_pack

        return export_punctuation_pack(model_dir, pack_dir)
    model = FunasrParaformerForSpeechRecognition.from_pretrained(source, local_files_only=True)
    tokenizer = FunasrParaformerTokenizer.from_pretrained(source, local_files_only=True)
    extractor = KaldiFbankFeatureExtractor.from_pretrained(source, local_files_only=True)
    config, tokens = model.config, tokenizer.get_vocab()
    if sorted(tokens.values()) != list(range(config.vocab_size)):
        raise ConversionError(
            "tokenizer and model disagree",
            file=source,
            key="vocab_size",
            expected=config.vocab_size,
            actual=len(tokens),
        )
    bpe_path = source / BPE_MODEL_NAME if (source / BPE_MODEL_NAME).is_file() else None
    content = upstream_yaml(config, extractor, tokenizer, bpe_path is not None)
    _check_round_trip(content, config, source)
    state = compact(upstream_state_dict(model.state_dict(), config))
    metas: dict[str, object] = {"init_param": "model.pt", "config": "config.yaml"}
    with staged_directory(pack_dir) as stage:
        write_state_dict(stage / "model.pt", state)
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, default_flow_style=False)
        (stage / "config.yaml").write_text(text, encoding="utf-8")
        if bpe_path is not None:
            shutil.copyfile(bpe_path, stage / "bpe.model")
            metas["tokenizer_conf"] = {"bpemodel": "bpe.model"}
        else:
            (stage / "tokens.json").write_text(write_token_list(tokens), encoding="utf-8")
            metas["tokenizer_conf"] = {"token_list": "tokens.json"}
        if tokenizer.seg_dict is not None:
            (stage / "seg_dict").write_text(write_seg_dict(tokenizer.seg_dict), encoding="utf-8")
            metas["tokenizer_conf"] |= {"seg_dict_file": "seg_dict"}
        if extractor.cmvn_mean is not None:
            shift, scale = -torch.tensor(extractor.cmvn_mean), torch.tensor(extractor.cmvn_inverse_std)
            (stage / "am.mvn").write_text(write_nnet_mvn(shift, scale), encoding="utf-8")
            metas["frontend_conf"] = {"cmvn_file": "am.mvn"}
        description = {
            "framework": "pytorch",
            "task": "auto-speech-recognition",
            "model": {"type": "funasr"},
            "pipeline": {"type": "funasr-pipeline"},
            "file_path_metas": metas,
        }
        (stage / "configuration.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        outputs = sha256_of_files(stage)
    return {"converter": "funasr", "direction": "reverse", "model": content["model"], "outputs": outputs}


def upstream_yaml(
    config: FunasrParaformerConfig,
    extractor: KaldiFbankFeatureExtractor,
    tokenizer: FunasrParaformerTokenizer,
    sentencepiece: bool,
) -> dict[str, object]:
    """The content of a `config.yaml`."""

    def section(origin: object, table: Mapping[str, tuple], **fixed: object) -> dict[str, object]:
        values: dict[str, object] = {}
        for key, (field, kind, _) in table.items():
            if key in fixed:
                continue
            value = getattr(origin, field)
            if isinstance(kind, dict):
                inverse = {ours: theirs for theirs, ours in reversed(kind.items())}
                value = inverse.get(value, value)
            values[key] = int(value) if isinstance(value, float) and value.is_integer() and kind == "number" else value
        return values | fixed

    def decoder_section(table: Mapping[str, tuple], prefix: str, **fixed: object) -> dict[str, object]:
        if "att_layer_num" in table:
            layers, more = getattr(config, f"{prefix}layers"), getattr(config, f"{prefix}fsmn_layers")
            fixed["num_blocks"] = layers + more
        return section(config, table, **fixed)

    model = next(name for name in MODELS if _is_model(name, config))
    keys = MODEL_KEYS | {None: {}, "contextual": CONTEXTUAL_KEYS, "seaco": SEACO_KEYS}[config.hotword_type]
    inner = {"inner_dim": config.hidden_size} if config.hotword_type else {}
    model_conf = section(config, keys, predictor_bias=int(config.append_eos), **inner)
    if config.hotword_type:
        model_conf["bias_encoder_type"] = "lstm"
    if config.encoder_type == "sanm":
        encoder = "SANMEncoderChunkOpt" if config.is_streaming else "SANMEncoder"
        fixed: dict[str, object] = {
            "input_layer": "pe_online" if config.is_streaming else "pe",
            "normalize_before": True,
            "selfattention_layer_type": "sanm",
        }
        if config.is_streaming:
            past, new, future = config.chunk_size
            window = (past + new + future, new, past, config.encoder_chunk_look_back, config.decoder_chunk_look_back)
            fixed |= {key: [value] for key, value in zip(_CHUNK_KEYS, window, strict=True)}
    else:
        encoder = "ConformerEncoder"
        fixed = {"rel_pos_type": "legacy"}
        if config.attention_type == "shifted_rel_selfattn":
            fixed["rel_pos_type"] = "latest"
        if config.attention_type == "selfattn":
            fixed["selfattention_layer_type"] = "selfattn"
        else:
            fixed["selfattention_layer_type"] = "rel_selfattn"
    decoder = "ParaformerSANDecoder" if config.decoder_type == "transformer" else "ParaformerSANMDecoder"
    decoder = "ContextualParaformerDecoder" if config.hotword_type == "contextual" else decoder
    if config.timestamp_head is not None:
        predictor = "CifPredictorV3"
    else:
        predictor = "CifPredictorV2" if config.cif_integration == "cumulative" else "CifPredictor"
    content: dict[str, object] = {
        "model": model,
        "model_conf": model_conf,
        "encoder": encoder,
        "encoder_conf": section(config, ENCODERS[encoder], **fixed),
        "decoder": decoder,
        "decoder_conf": decoder_section(DECODERS[decoder], "decoder_"),
    }
    if config.hotword_type == "seaco":
        content["seaco_decoder"] = "ParaformerSANMDecoder"
        content["seaco_decoder_conf"] = decoder_section(
            SEACO_DECODER_KEYS, "seaco_", use_output_layer=False, wo_input_layer=True
        )
    tokenizer_conf: dict[str, object] = {"unk_symbol": tokenizer.unk_token, "split_with_space": True}
    for key in ("non_linguistic_symbols", "remove_non_linguistic_symbols"):
        if tokenizer.init_kwargs.get(key):
            tokenizer_conf[key] = tokenizer.init_kwargs[key]
    content |= {
        "predictor": predictor,
        "predictor_conf": section(config, PREDICTORS[predictor], idim=config.hidden_size),
        "frontend": "WavFrontendOnline" if config.is_streaming else "WavFrontend",
        "frontend_conf": section(extractor, FRONTEND_KEYS),
        "specaug": "SpecAugLFR",
        "specaug_conf": {
            "apply_time_warp": False,
            "apply_freq_mask": True,
            "freq_mask_width_range": [0, 30],
            "lfr_rate": extractor.lfr_n,
            "num_freq_mask": 1,
            "apply_time_mask": True,
            "time_mask_width_range": [0, 12],
            "num_time_mask": 1,
        },
        "train_conf": {"accum_grad": 1, "grad_clip": 5, "max_epoch": 150, "keep_nbest_models": 10},
        "optim": "adam",
        "optim_conf": {"lr": 0.0005},
        "scheduler": "warmuplr",
        "scheduler_conf": {"warmup_steps": 30000},
        "dataset": "AudioDataset",
        "dataset_conf": {"index_ds": "IndexDSJsonl", "batch_sampler": "BatchSampler", "batch_size": 1},
        "tokenizer": "SentencepiecesTokenizer" if sentencepiece else "CharTokenizer",
        "tokenizer_conf": tokenizer_conf,
        "ctc_conf": {"dropout_rate": 0.0, "ctc_type": "builtin", "reduce": True, "ignore_nan_grad": True},
        "normalize": None,
    }
    return content


def _is_model(name: str, config: FunasrParaformerConfig) -> bool:
    if config.hotword_type is not None or MODELS[name] is not None:
        return MODELS[name] == config.hotword_type
    if config.is_streaming or name == "ParaformerStreaming":
        return config.is_streaming and name == "ParaformerStreaming"
    return (name == "BiCifParaformer") == (config.timestamp_head is not None)


def _check_round_trip(content: dict[str, object], config: FunasrParaformerConfig, source: Path) -> None:
    """Reads the written configuration back: an option that FunASR does not have is named, not lost."""
    reader = ConfigReader(content, source / "config.yaml", REQUIRED_VALUES)
    again = FunasrParaformerConfig(
        **read_architecture(reader),
        vocab_size=config.vocab_size,
        input_size=config.input_size,
        stacked_frames=config.stacked_frames,
        frame_shift_ms=config.frame_shift_ms,
        sampling_rate=config.sampling_rate,
    ).to_dict()
    ours = config.to_dict()
    read = set(again) & set(ours)
    unused = {"chunk_size", "encoder_chunk_look_back", "decoder_chunk_look_back"} if not config.is_streaming else set()
    for prefix, used in (
        ("seaco_", config.hotword_type == "seaco"),
        ("hotword_", config.hotword_type is not None),
        ("timestamp_", config.timestamp_head is not None),
        ("fsmn_", config.encoder_type == "sanm"),
        ("decoder_fsmn_", config.decoder_type == "sanm"),
    ):
        if not used:
            unused |= {field for field in read if field.startswith(prefix)}
    if config.timestamp_head is None:
        unused.add("upsample_times")
    for field in sorted(read & set(FunasrParaformerConfig.__annotations__) - unused - _NOT_IN_A_PACK):
        if again[field] != ours[field]:
            raise ConversionError(
                "FunASR has no such option", file=source, key=field, expected=again[field], actual=ours[field]
            )


def main(arguments: list[str] | None = None) -> int:
    """Command line, see `print_report`."""
    options = converter_parser(__doc__, "write a FunASR pack from a model folder").parse_args(arguments)
    run = export_funasr_pack if options.reverse else convert_funasr_pack
    return print_report(lambda: run(options.source, options.destination))


if __name__ == "__main__":
    sys.exit(main())
