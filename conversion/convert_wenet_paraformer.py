"""Converts a WeNet pack of a Paraformer (`model: paraformer`); `convert_wenet.py` calls this.

The network is FunASR's with other names for the predictor and the embedding, other epsilons in its norms, and a CTC
head. Stacking of frames and CMVN are in the model there; here they are in the feature extractor.
"""

from __future__ import annotations

import re
from pathlib import Path

from convert_funasr import write_model
from convert_wenet import IGNORED_KEYS, find_cmvn, read_dataset
from torch import Tensor

from hf_speechllm.models.configuration_funasr_paraformer import FunasrParaformerConfig
from hf_speechllm.models.feature_extraction_kaldi_fbank import KaldiFbankFeatureExtractor
from hf_speechllm.models.processing_funasr_paraformer import FunasrParaformerProcessor
from hf_speechllm.models.tokenization_funasr_paraformer import FunasrParaformerTokenizer
from hf_speechllm.upstream.checkpoints import read_state_dict
from hf_speechllm.upstream.cmvn import read_cmvn
from hf_speechllm.upstream.errors import ConversionError
from hf_speechllm.upstream.funasr_pack import read_seg_dict
from hf_speechllm.upstream.funasr_tokens import build_paraformer_char_tokenizer
from hf_speechllm.upstream.staging import sha256_of_file
from hf_speechllm.upstream.typed_config import ConfigReader
from hf_speechllm.upstream.units import read_units


ENCODER_KEYS = {
    "output_size": ("hidden_size", "count", 256),
    "attention_heads": ("num_attention_heads", "count", 4),
    "linear_units": ("intermediate_size", "count", 2048),
    "num_blocks": ("num_hidden_layers", "count", 6),
    "dropout_rate": ("hidden_dropout", "rate", 0.1),
    "positional_dropout_rate": ("positional_dropout", "rate", 0.1),
    "attention_dropout_rate": ("attention_dropout", "rate", 0.0),
    "kernel_size": ("fsmn_kernel_size", "count", 11),
    "sanm_shfit": ("fsmn_shift", "size", 0),
}
DECODER_KEYS = {
    "attention_heads": ("decoder_attention_heads", "count", 4),
    "linear_units": ("decoder_intermediate_size", "count", 2048),
    "num_blocks": ("num_blocks", "count", 6),
    "att_layer_num": ("decoder_layers", "count", 16),
    "dropout_rate": ("decoder_dropout", "rate", 0.1),
    "positional_dropout_rate": ("decoder_positional_dropout", "rate", 0.1),
    "self_attention_dropout_rate": ("decoder_self_attention_dropout", "rate", 0.0),
    "src_attention_dropout_rate": ("decoder_cross_attention_dropout", "rate", 0.0),
    "kernel_size": ("decoder_fsmn_kernel_size", "count", 11),
    "sanm_shfit": ("decoder_fsmn_shift", "size", 0),
}
PREDICTOR_KEYS = {
    "idim": ("idim", "count", None),
    "l_order": ("cif_left_order", "size", None),
    "r_order": ("cif_right_order", "size", None),
    "threshold": ("cif_threshold", "number", 1.0),
    "dropout": ("cif_dropout", "rate", 0.1),
    "smooth_factor": ("cif_smooth_factor", "number", 1.0),
    "noise_threshold": ("cif_noise_threshold", "number", 0.0),
    "tail_threshold": ("cif_tail_threshold", "number", 0.45),
    "residual": ("cif_residual", "flag", True),
    "cnn_groups": ("cif_groups", "size", 0),
    "smooth_factor2": ("timestamp_smooth_factor", "number", 0.25),
    "noise_threshold2": ("timestamp_noise_threshold", "number", 0.01),
    "upsample_times": ("upsample_times", "count", 3),
}
MODEL_KEYS = {
    "ctc_weight": ("ctc_weight", "rate", 0.5),
    "lsm_weight": ("label_smoothing", "rate", 0.0),
    "length_normalized_loss": ("length_normalized_loss", "flag", False),
    "sampler": ("sampler", "flag", True),
    "sampling_ratio": ("sampling_ratio", "rate", 0.75),
    "add_eos": ("append_eos", "flag", True),
}
REQUIRED_VALUES = {
    "model": "paraformer",
    "encoder": "sanm_encoder",
    "decoder": "sanm_decoder",
    "predictor": "paraformer_predictor",
    "ctc": "ctc",
    "tokenizer": "paraformer",
    "encoder_conf.input_layer": "paraformer_dummy",
    "encoder_conf.pos_enc_layer_type": "abs_pos_paraformer",
    "encoder_conf.normalize_before": True,
    "encoder_conf.static_chunk_size": 0,
    "encoder_conf.use_dynamic_chunk": False,
    "encoder_conf.use_dynamic_left_chunk": False,
    "decoder_conf.input_layer": "embed",
    "decoder_conf.use_output_layer": True,
    "decoder_conf.src_attention": True,
    "decoder_conf.normalize_before": True,
    "model_conf.apply_non_blank_embedding": False,
    "dataset_conf.feats_type": "fbank",
    "tokenizer_conf.connect_symbol": "",
}
# Upstream stacks by these numbers, whatever the file says.
_STACK = {"lfr_m": 7, "lfr_n": 6}
_CMVN_NAMES = ("encoder.global_cmvn.mean", "encoder.global_cmvn.istd")


def convert_wenet_paraformer_pack(pack: Path, configs: dict[str, object], out_dir: str | Path) -> dict[str, object]:
    """Converts `pack`, whose `train.yaml` holds `configs`; see `convert_wenet_pack`."""
    reader = ConfigReader(configs, pack / "train.yaml", REQUIRED_VALUES)
    fields = _read_architecture(reader)
    fbank = read_dataset(reader) | reader.read(
        "lfr_conf", {key: (key, "count", value) for key, value in _STACK.items()}, set()
    )
    for key, value in _STACK.items():
        _expect(reader, f"lfr_conf.{key}", value, fbank[key])
    _expect(reader, "input_dim", fbank["feature_size"] * fbank["lfr_m"], fields["input_size"])
    fields |= {"frame_shift_ms": fbank["frame_shift_ms"], "sampling_rate": fbank["sampling_rate"]}
    tokenizer, inputs = _build_tokenizer(pack, reader, fields)
    cmvn_path, cmvn_is_json = find_cmvn(pack, reader)
    reader.refuse_unknown(IGNORED_KEYS)

    weights = pack / "final.pt"
    state = read_state_dict(weights)
    source = "state dict"
    if any(name in state for name in _CMVN_NAMES):
        mean, inverse_std = _statistics(state, fields["input_size"], weights)
    elif cmvn_path is not None:
        mean, inverse_std = read_cmvn(cmvn_path, is_json=cmvn_is_json, input_size=fields["input_size"])
        inputs.append(cmvn_path)
        source = "file"
    else:
        mean = inverse_std = None
        source = "none"
    if mean is not None:
        fbank |= {"cmvn_mean": mean.tolist(), "cmvn_inverse_std": inverse_std.tolist()}
    _check_sizes(state, fields, weights)
    fields["has_ctc_head"] = "ctc.ctc_lo.weight" in state
    try:
        config = FunasrParaformerConfig(**fields)
    except ValueError as error:
        raise ConversionError("contradictory configuration", file=reader.path, actual=str(error)) from None
    report: dict[str, object] = {
        "converter": "wenet",
        "model_type": config.model_type,
        "cmvn": source,
        "ignored_keys": sorted(reader.ignored),
        "inputs": {path.name: sha256_of_file(path) for path in sorted([reader.path, weights, *inputs])},
    }
    processor = FunasrParaformerProcessor(KaldiFbankFeatureExtractor(**fbank), tokenizer)
    state = {name: tensor for name, tensor in state.items() if name not in _CMVN_NAMES}
    return write_model(out_dir, state, config, processor, report, weights, toolkit="wenet")


def _read_architecture(reader: ConfigReader) -> dict[str, object]:
    for key in ("model", "encoder", "decoder", "predictor", "ctc", "tokenizer"):
        reader.used.add(key)
        if key in reader.configs or key not in ("ctc",):
            reader.require(key, reader.configs.get(key))
    fields = reader.read("encoder_conf", ENCODER_KEYS, {"gradient_checkpointing", "use_sdpa"})
    fields |= reader.read("decoder_conf", DECODER_KEYS, {"gradient_checkpointing", "use_sdpa"})
    _expect(reader, "decoder_conf.num_blocks", fields["decoder_layers"], fields.pop("num_blocks"))
    fields |= reader.read("predictor_conf", PREDICTOR_KEYS, set())
    _expect(reader, "predictor_conf.idim", fields["hidden_size"], fields.pop("idim"))
    fields["cif_groups"] = fields["cif_groups"] or fields["hidden_size"]
    fields |= reader.read("model_conf", MODEL_KEYS, {"ignore_id"})
    if not fields.pop("sampler"):
        fields["sampling_ratio"] = 0.0
    for key, field in (("output_dim", "vocab_size"), ("input_dim", "input_size")):
        fields[field] = reader.top(key, "count", None)
    _expect(reader, "vocab_size", fields["vocab_size"], reader.top("vocab_size", "count", fields["vocab_size"]))
    blank = reader.read("ctc_conf", {"ctc_blank_id": ("id", "size", 0)}, set())["id"]
    return fields | {
        "pad_token_id": blank,
        # Norms of the decoder's layers follow FunASR, all others are torch's.
        "layer_norm_eps": 1e-5,
        "decoder_norm_eps": 1e-12,
        "decoder_final_norm_eps": 1e-5,
        "cif_integration": "sequential",
        "timestamp_head": "cnn_blstm",
        # loss = decoder + ctc_weight * ctc + length + length of the timestamp head, the lengths always per token.
        "decoder_weight": 1.0,
        "predictor_weight": 1.0,
        "timestamp_loss_scale": 1.0,
        "predictor_length_normalized": True,
    }


def _expect(reader: ConfigReader, key: str, expected: object, actual: object) -> None:
    if actual != expected:
        raise ConversionError("keys disagree", file=reader.path, key=key, expected=expected, actual=actual)


def _build_tokenizer(
    pack: Path, reader: ConfigReader, fields: dict[str, object]
) -> tuple[FunasrParaformerTokenizer, list[Path]]:
    """The tokenizer and the files that were read; the ids of the special tokens are added to `fields`."""
    settings = reader.section("tokenizer_conf")
    for key, value in settings.items():
        full = f"tokenizer_conf.{key}"
        if key in ("is_multilingual", "num_languages", "split_with_space"):
            reader.ignored.add(full)
        elif full in REQUIRED_VALUES:
            reader.require(full, value)
        elif key not in ("symbol_table_path", "seg_dict_path", "special_tokens"):
            raise ConversionError("unknown key", file=reader.path, key=full, actual=repr(value))
    special = settings.get("special_tokens")
    if not isinstance(special, dict):
        raise ConversionError(
            "not a mapping", file=reader.path, key="tokenizer_conf.special_tokens", actual=repr(special)
        )
    path = pack / "units.txt"
    units, inputs = read_units(path), [path]
    _expect(reader, "output_dim", len(units), fields["vocab_size"])
    names = {index: token for token, index in units.items()}
    ids = {}
    for token, field in (
        ("<blank>", "pad_token_id"),
        ("<sos>", "bos_token_id"),
        ("<eos>", "eos_token_id"),
        ("<unk>", "unk"),
    ):
        ids[field] = reader.value(f"tokenizer_conf.special_tokens.{token}", special.get(token), "size")
        if ids[field] not in names:
            raise ConversionError("id is not in the table of units", file=path, key=token, actual=ids[field])
    _expect(reader, "tokenizer_conf.special_tokens.<blank>", fields["pad_token_id"], ids["pad_token_id"])
    unk = ids.pop("unk")
    fields |= ids
    words = None
    if settings.get("seg_dict_path") is not None:
        words = read_seg_dict(pack / "seg_dict")
        inputs.append(pack / "seg_dict")
    tokenizer = build_paraformer_char_tokenizer(
        units,
        seg_dict=words or {},
        blank_id=ids["pad_token_id"],
        bos_id=ids["bos_token_id"],
        eos_id=ids["eos_token_id"],
        unk_token=names[unk],
        segmentation="wenet",
    )
    return tokenizer, inputs


def _statistics(state: dict[str, Tensor], input_size: int, path: Path) -> tuple[Tensor, Tensor]:
    """Mean and inverse standard deviation from the state dict."""
    for name in _CMVN_NAMES:
        if name not in state or tuple(state[name].shape) != (input_size,):
            actual = tuple(state[name].shape) if name in state else "missing"
            raise ConversionError("statistics", file=path, key=name, expected=(input_size,), actual=actual)
    return state[_CMVN_NAMES[0]].float(), state[_CMVN_NAMES[1]].float()


def _check_sizes(state: dict[str, Tensor], fields: dict[str, object], path: Path) -> None:
    """Compares the numbers of layers with the checkpoint, before anything is built."""
    for prefix, expected in (
        ("encoder.encoders", fields["num_hidden_layers"] - 1),
        ("decoder.decoders", fields["decoder_layers"]),
    ):
        pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
        actual = len({match[1] for name in state if (match := pattern.match(name))})
        if actual != expected:
            raise ConversionError(
                "configuration and weights disagree", file=path, key=prefix, expected=expected, actual=actual
            )
    first = "encoder.encoders0.0.feed_forward.w_1.weight"
    shape = (fields["intermediate_size"], fields["hidden_size"])
    if first not in state or tuple(state[first].shape) != shape:
        actual = tuple(state[first].shape) if first in state else "missing"
        raise ConversionError(
            "configuration and weights disagree", file=path, key=first, expected=shape, actual=actual
        )
