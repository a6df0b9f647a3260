"""Conversion of a SenseVoice-Small pack of FunASR to a transformers folder, and back.

`convert_funasr.py` is the command line; it calls these functions for a pack whose `config.yaml` says
`model: SenseVoiceSmall`, and for a folder whose `config.json` says `funasr_sensevoice`. A pack holds `model.pt`,
`config.yaml`, `configuration.json`, `am.mvn` and a sentencepiece model. It is untrusted: see `hf_speechllm.upstream`.
The folder that is written appears complete or not at all.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch
import yaml

from hf_speechllm.models.configuration_funasr_sensevoice import FunasrSenseVoiceConfig
from hf_speechllm.models.feature_extraction_kaldi_fbank import KaldiFbankFeatureExtractor
from hf_speechllm.models.modeling_funasr_sensevoice import FunasrSenseVoiceForSpeechRecognition
from hf_speechllm.models.processing_funasr_sensevoice import EMOTIONS, EVENTS, FunasrSenseVoiceProcessor
from hf_speechllm.models.tokenization_funasr_sensevoice import FunasrSenseVoiceTokenizer
from hf_speechllm.upstream.checkpoints import read_state_dict
from hf_speechllm.upstream.errors import ConversionError
from hf_speechllm.upstream.funasr_pack import FunasrPack, open_funasr_pack
from hf_speechllm.upstream.nnet_mvn import read_nnet_mvn, write_nnet_mvn
from hf_speechllm.upstream.safetensors_file import write_safetensors
from hf_speechllm.upstream.sentencepiece_model import read_sentencepiece_model
from hf_speechllm.upstream.sentencepiece_tokenizer import build_sentencepiece_tokenizer
from hf_speechllm.upstream.staging import sha256_of_file, sha256_of_files, staged_directory, write_report
from hf_speechllm.upstream.typed_config import ConfigReader


UPSTREAM_MODEL = "SenseVoiceSmall"
BPE_MODEL_NAME = "upstream_bpe.model"

# ---------------------------------------------------------------------------------------------------------------------
# Keys of config.yaml: key -> (our field, kind, default upstream).

ENCODER_KEYS = {
    "output_size": ("hidden_size", "count", 256),
    "attention_heads": ("num_attention_heads", "count", 4),
    "linear_units": ("intermediate_size", "count", 2048),
    "num_blocks": ("num_blocks", "count", 6),
    "tp_blocks": ("num_timestamp_prediction_layers", "size", 0),
    "dropout_rate": ("hidden_dropout", "rate", 0.1),
    "attention_dropout_rate": ("attention_dropout", "rate", 0.0),
    "kernel_size": ("fsmn_kernel_size", "count", 11),
    "sanm_shfit": ("fsmn_shift", "size", 0),
}
MODEL_KEYS = {
    "length_normalized_loss": ("length_normalized_loss", "flag", False),
    "lsm_weight": ("label_smoothing", "rate", 0.0),
    "blank_id": ("pad_token_id", "size", 0),
    "sos": ("bos_token_id", "size", 1),
    "eos": ("eos_token_id", "size", 2),
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

# Known keys that change nothing in the converted model. The encoder's class takes those below and uses none of them.
IGNORED_ENCODER_KEYS = {
    *("input_layer", "normalize_before", "padding_idx", "pos_enc_class", "positional_dropout_rate"),
    *("positionwise_conv_kernel_size", "positionwise_layer_type", "selfattention_layer_type"),
}
IGNORED_MODEL_KEYS = {"ignore_id"}
IGNORED_FRONTEND_KEYS = {"cmvn_file", "filter_length_max", "filter_length_min"}
IGNORED_CTC_KEYS = {"ignore_nan_grad", "reduce"}
IGNORED_TOKENIZER_KEYS = {"bpemodel", "split_with_space", "unk_symbol"}
IGNORED_KEYS = {
    *("dataset", "dataset_conf", "normalize_conf", "optim", "optim_conf", "scheduler"),
    *("scheduler_conf", "specaug", "specaug_conf", "train_conf"),
    # What the toolkit's trainer adds when it writes the configuration of a run.
    *("batch_size", "debug", "device", "disable_log", "disable_update", "enable_tf32", "excludes", "frontend_path"),
    *("hub", "hub_revision", "init_param", "is_training", "model_path", "model_revision", "ncpu", "ngpu"),
    *("output_dir", "seed", "tokenizer_path", "train_data_set_list", "trust_remote_code", "valid_data_set_list"),
}
# Values that must be these when the key is present, because they are all that the model can do.
REQUIRED_VALUES = {
    "ctc_conf.ctc_type": "builtin",
    "ctc_conf.dropout_rate": 0.0,
    "ctc_conf.extra_linear": True,
    "encoder": "SenseVoiceEncoderSmall",
    "encoder_conf.concat_after": False,
    "encoder_conf.stochastic_depth_rate": 0.0,
    "frontend": "WavFrontend",
    "frontend_conf.snip_edges": True,
    "frontend_conf.upsacle_samples": True,
    "model": UPSTREAM_MODEL,
    "normalize": None,
    "tokenizer": "SentencepiecesTokenizer",
}

# ---------------------------------------------------------------------------------------------------------------------
# Names of weights inside of a layer, and outside of the layers. `linear_q_k_v` is three projections in one.

LAYER_NAMES = {
    "self_attn.linear_out.weight": "self_attn.o_proj.weight",
    "self_attn.linear_out.bias": "self_attn.o_proj.bias",
    "self_attn.fsmn_block.weight": "self_attn.fsmn.conv.weight",
    "feed_forward.w_1.weight": "mlp.fc1.weight",
    "feed_forward.w_1.bias": "mlp.fc1.bias",
    "feed_forward.w_2.weight": "mlp.fc2.weight",
    "feed_forward.w_2.bias": "mlp.fc2.bias",
    "norm1.weight": "input_layernorm.weight",
    "norm1.bias": "input_layernorm.bias",
    "norm2.weight": "post_attention_layernorm.weight",
    "norm2.bias": "post_attention_layernorm.bias",
}
OTHER_NAMES = {
    "embed.weight": "model.prompt_embeddings.weight",
    "ctc.ctc_lo.weight": "ctc_head.weight",
    "ctc.ctc_lo.bias": "ctc_head.bias",
}
_LAYER = re.compile(r"encoder\.(encoders0|encoders|tp_encoders)\.(\d{1,4})\.(.+)")
_FUSED = re.compile(r"self_attn\.linear_q_k_v\.(weight|bias)")
_NORM = re.compile(r"encoder\.(after_norm|tp_norm)\.(weight|bias)")

# ---------------------------------------------------------------------------------------------------------------------
# FunASR -> transformers


def convert_sensevoice_pack(pack: str | Path | FunasrPack, out_dir: str | Path) -> dict[str, object]:
    """Converts a SenseVoice pack to a folder `out_dir` that `from_pretrained` and `pipeline` load.

    Args:
        pack: the folder, or what `open_funasr_pack` gives for it.
        out_dir: must not exist or be empty; its parent must exist.
    Returns:
        The report, which is also written as `conversion_report.json`: names and SHA-256 of inputs and outputs,
        ignored keys, warnings.
    Raises:
        ConversionError: a key, value, weight or shape that the model does not have, named in the message.
        UnsafeArtifactError: a file that is hostile or damaged.
    """
    if not isinstance(pack, FunasrPack):
        pack = open_funasr_pack(pack)
    weights_path = pack.file("init_param")
    fields, frontend, ignored = _read_architecture(pack)
    tokenizer_path, mvn_path = pack.file("tokenizer_conf.bpemodel"), pack.file("frontend_conf.cmvn_file")
    sentencepiece = read_sentencepiece_model(tokenizer_path, user_defined=True, byte_fallback=True)
    tokenizer = build_sentencepiece_tokenizer(sentencepiece, blank_id=fields["pad_token_id"])
    fields["vocab_size"] = len(sentencepiece.pieces)
    shift, scale = read_nnet_mvn(mvn_path, input_size=fields["input_size"])

    state = read_state_dict(weights_path, wrappers=("state_dict", "model_state_dict", "model"))
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    fields["num_prompts"] = _check_sizes(state, fields, weights_path)
    warnings = _add_tags(fields, tokenizer, tokenizer_path)
    try:
        config = FunasrSenseVoiceConfig(**fields)
    except ValueError as error:
        raise ConversionError("contradictory configuration", file=pack.config_path, actual=str(error)) from None
    weights = from_upstream_state_dict(state, config, weights_path)
    model = _load(weights, config, weights_path)
    extractor = KaldiFbankFeatureExtractor(
        **frontend, cmvn_mean=(-shift.double()).tolist(), cmvn_inverse_std=scale.double().tolist()
    )
    processor = FunasrSenseVoiceProcessor(extractor, tokenizer)

    inputs = {pack.config_path, weights_path, tokenizer_path, mvn_path}
    report: dict[str, object] = {
        "converter": "funasr",
        "upstream_model": UPSTREAM_MODEL,
        "model_type": config.model_type,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "ignored_keys": ignored,
        "warnings": warnings,
        "inputs": {path.name: sha256_of_file(path) for path in sorted(inputs)},
    }
    with staged_directory(out_dir) as stage:
        # The weights are memory mapped and go from file to file; transformers would copy the split projections.
        model.save_pretrained(stage, state_dict={})
        write_safetensors(stage / "model.safetensors", weights)
        processor.save_pretrained(stage)
        shutil.copyfile(tokenizer_path, stage / BPE_MODEL_NAME)
        write_report(stage, report)
    return report


def _read_architecture(pack: FunasrPack) -> tuple[dict[str, object], dict[str, object], list[str]]:
    """Fields of the configuration and of the feature extractor, and the keys that were ignored."""
    reader = ConfigReader(pack.config, pack.config_path, REQUIRED_VALUES)
    for key in ("encoder", "frontend", "model", "normalize", "tokenizer"):
        reader.used.add(key)
        if key in reader.configs or key in ("encoder", "model"):
            reader.require(key, reader.configs.get(key))
    fields = reader.read("encoder_conf", ENCODER_KEYS, IGNORED_ENCODER_KEYS)
    fields |= reader.read("model_conf", MODEL_KEYS, IGNORED_MODEL_KEYS)
    reader.read("ctc_conf", {}, IGNORED_CTC_KEYS)
    reader.read("tokenizer_conf", {}, IGNORED_TOKENIZER_KEYS)
    frontend = reader.read("frontend_conf", FRONTEND_KEYS, IGNORED_FRONTEND_KEYS)
    blocks = fields.pop("num_blocks")
    fields["num_hidden_layers"] = blocks + fields["num_timestamp_prediction_layers"]
    fields["input_size"] = frontend["feature_size"] * frontend["lfr_m"]
    for key, expected in (("input_size", fields["input_size"]), ("vocab_size", None)):
        stated = reader.top(key, "optional integer", None)
        if None not in (stated, expected) and stated != expected:
            raise ConversionError(
                "sizes disagree", file=reader.path, key=key, expected=f"n_mels * lfr_m = {expected}", actual=stated
            )
    fields["subsampling_rate"] = frontend["lfr_n"]
    fields |= {name: frontend[name] for name in ("frame_shift_ms", "sampling_rate")}
    reader.refuse_unknown(IGNORED_KEYS)
    return fields, frontend, sorted(reader.ignored)


def _add_tags(fields: dict[str, object], tokenizer: FunasrSenseVoiceTokenizer, path: Path) -> list[str]:
    """Adds the ids of the tags, found by their names, to `fields`; warns where upstream's code has other ids."""
    usual = FunasrSenseVoiceConfig()
    present = set(tokenizer.tag_names())
    wanted = {
        "language_token_ids": usual.language_token_ids,
        "emotion_token_ids": EMOTIONS,
        "event_token_ids": EVENTS,
        "textnorm_token_ids": usual.textnorm_token_ids,
    }
    for field, names in wanted.items():
        fields[field] = {name: tokenizer.tag_id(name) for name in names if name in present}
    missing = [f"<|{name}|>" for name in usual.textnorm_token_ids if name not in present]
    if missing or not fields["language_token_ids"]:
        raise ConversionError(
            "tags are missing", file=path, key="pieces", expected=missing or "the tag of a language", actual="absent"
        )
    return [
        f"{path.name}: <|{name}|> is unit {fields[field][name]}; upstream's code takes {unit} for it"
        for field in ("language_token_ids", "emotion_token_ids", "textnorm_token_ids")
        for name, unit in getattr(usual, field).items()
        if fields[field].get(name, unit) != unit
    ]


def _check_sizes(state: dict[str, torch.Tensor], fields: dict[str, object], path: Path) -> int:
    """Compares what decides how much is built with the checkpoint, before building; returns the number of prompts."""

    def layers(prefix: str) -> int:
        pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
        return len({match[1] for name in state if (match := pattern.match(name))})

    def expect(key: str, expected: object, actual: object) -> None:
        if expected != actual:
            raise ConversionError(
                "configuration and weights disagree", file=path, key=key, expected=expected, actual=actual
            )

    timed = fields["num_timestamp_prediction_layers"]
    expect("encoder.encoders0", 1, layers("encoder.encoders0"))
    expect("encoder.encoders", fields["num_hidden_layers"] - timed - 1, layers("encoder.encoders"))
    expect("encoder.tp_encoders", timed, layers("encoder.tp_encoders"))
    size, width, input_size = fields["hidden_size"], fields["intermediate_size"], fields["input_size"]
    prompts = len(state["embed.weight"]) if "embed.weight" in state and state["embed.weight"].dim() else 0
    first = "encoder.encoders0.0"
    for name, shape in (
        ("ctc.ctc_lo.weight", (fields["vocab_size"], size)),
        (f"{first}.self_attn.linear_q_k_v.weight", (3 * size, input_size)),
        (f"{first}.feed_forward.w_1.weight", (width, size)),
        (f"{first}.self_attn.fsmn_block.weight", (size, 1, fields["fsmn_kernel_size"])),
        ("embed.weight", (prompts, input_size)),
    ):
        if name not in state:
            raise ConversionError("weight is missing", file=path, key=name, expected=shape)
        expect(name, shape, tuple(state[name].shape))
    return prompts


def from_upstream_state_dict(
    state: dict[str, torch.Tensor], config: FunasrSenseVoiceConfig, path: Path | None = None
) -> dict[str, torch.Tensor]:
    """Tensors under upstream's names (weights, or gradients for a check) under ours, projections split."""
    blocks = config.num_hidden_layers - config.num_timestamp_prediction_layers
    first_of = {"encoders0": 0, "encoders": 1, "tp_encoders": blocks}
    norm_of = {"after_norm": blocks - 1, "tp_norm": config.num_hidden_layers - 1}
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if name in OTHER_NAMES:
            weights[OTHER_NAMES[name]] = tensor
        elif match := _NORM.fullmatch(name):
            weights[f"model.encoder.layers.{norm_of[match[1]]}.final_layernorm.{match[2]}"] = tensor
        elif match := _LAYER.fullmatch(name):
            prefix = f"model.encoder.layers.{first_of[match[1]] + int(match[2])}"
            if fused := _FUSED.fullmatch(match[3]):
                if tensor.shape[0] != 3 * config.hidden_size:
                    raise ConversionError(
                        "shape", file=path, key=name, expected=3 * config.hidden_size, actual=tuple(tensor.shape)
                    )
                for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                    weights[f"{prefix}.self_attn.{letter}_proj.{fused[1]}"] = part
            elif match[3] in LAYER_NAMES:
                weights[f"{prefix}.{LAYER_NAMES[match[3]]}"] = tensor
            else:
                raise ConversionError("unknown weight", file=path, key=name, actual=tuple(tensor.shape))
        else:
            raise ConversionError("unknown weight", file=path, key=name, actual=tuple(tensor.shape))
    return weights


def _load(
    weights: dict[str, torch.Tensor], config: FunasrSenseVoiceConfig, path: Path
) -> FunasrSenseVoiceForSpeechRecognition:
    """Builds the model without memory, compares names, shapes and types, then gives it the weights."""
    dtypes = {tensor.dtype for tensor in weights.values()}
    if len(dtypes) != 1 or dtypes.isdisjoint({torch.float32, torch.float16, torch.bfloat16}):
        raise ConversionError(
            "types of weights", file=path, expected="one of float32, float16, bfloat16", actual=dtypes
        )
    with torch.device("meta"):
        model = FunasrSenseVoiceForSpeechRecognition(config)
    expected = model.state_dict()
    for name, tensor in expected.items():
        if name not in weights:
            raise ConversionError("weight is missing", file=path, key=name, expected=tuple(tensor.shape))
        if weights[name].shape != tensor.shape:
            raise ConversionError(
                "shape", file=path, key=name, expected=tuple(tensor.shape), actual=tuple(weights[name].shape)
            )
    for name in weights:
        if name not in expected:
            raise ConversionError("unknown weight", file=path, key=name, actual=tuple(weights[name].shape))
    model.load_state_dict(weights, strict=True, assign=True)
    model.config.dtype = next(iter(dtypes))
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# transformers -> FunASR


def export_sensevoice_pack(model_dir: str | Path, pack_dir: str | Path) -> dict[str, object]:
    """Writes the model folder `model_dir` as a pack that FunASR loads: the inverse of `convert_sensevoice_pack`.

    Training settings that a pack does not need for inference are written with the published values.

    Args:
        model_dir: folder with a `funasr_sensevoice` model, its processor and the conversion's sentencepiece model.
        pack_dir: must not exist or be empty; its parent must exist.
    Returns:
        A report with SHA-256 of the written files, and warnings.
    Raises:
        ConversionError: the folder lacks something, its parts disagree, or `pack_dir` is in the way.
    """
    source = Path(model_dir)
    for name in ("config.json", BPE_MODEL_NAME):
        if not (source / name).is_file():
            raise ConversionError("file of the model folder is missing", file=source, key=name)
    model = FunasrSenseVoiceForSpeechRecognition.from_pretrained(source, local_files_only=True)
    tokenizer = FunasrSenseVoiceTokenizer.from_pretrained(source, local_files_only=True)
    extractor = KaldiFbankFeatureExtractor.from_pretrained(source, local_files_only=True)
    config = model.config
    if len(tokenizer) != config.vocab_size:
        raise ConversionError(
            "tokenizer and model disagree",
            file=source,
            key="vocab_size",
            expected=config.vocab_size,
            actual=len(tokenizer),
        )
    if extractor.cmvn_mean is None:
        raise ConversionError("statistics are missing", file=source, key="cmvn_mean")

    fields: dict[str, object] = {}
    warnings = _add_tags(fields, tokenizer, source / BPE_MODEL_NAME)
    with staged_directory(pack_dir) as stage:
        torch.save(to_upstream_state_dict(model.state_dict(), config), stage / "model.pt")
        text = yaml.safe_dump(_upstream_yaml(config, extractor), sort_keys=False, allow_unicode=True)
        (stage / "config.yaml").write_text(text, encoding="utf-8")
        mean, inverse_std = (torch.tensor(v) for v in (extractor.cmvn_mean, extractor.cmvn_inverse_std))
        (stage / "am.mvn").write_text(write_nnet_mvn(-mean, inverse_std), encoding="utf-8")
        shutil.copyfile(source / BPE_MODEL_NAME, stage / "bpe.model")
        description = {
            "framework": "pytorch",
            "task": "auto-speech-recognition",
            "model": {"type": "funasr"},
            "pipeline": {"type": "funasr-pipeline"},
            "file_path_metas": {
                "init_param": "model.pt",
                "config": "config.yaml",
                "tokenizer_conf": {"bpemodel": "bpe.model"},
                "frontend_conf": {"cmvn_file": "am.mvn"},
            },
        }
        (stage / "configuration.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
        outputs = sha256_of_files(stage)
    return {"converter": "funasr", "direction": "reverse", "warnings": warnings, "outputs": outputs}


def to_upstream_state_dict(
    tensors: dict[str, torch.Tensor], config: FunasrSenseVoiceConfig
) -> dict[str, torch.Tensor]:
    """Tensors under our names (weights, or gradients for a check) under upstream's, projections fused."""
    blocks = config.num_hidden_layers - config.num_timestamp_prediction_layers
    state = {theirs: tensors[ours].detach() for theirs, ours in OTHER_NAMES.items()}
    for index in range(config.num_hidden_layers):
        if index == 0:
            prefix = "encoder.encoders0.0"
        else:
            prefix = f"encoder.encoders.{index - 1}" if index < blocks else f"encoder.tp_encoders.{index - blocks}"
        layer = f"model.encoder.layers.{index}"
        for part in ("weight", "bias"):
            projections = [tensors[f"{layer}.self_attn.{letter}_proj.{part}"] for letter in "qkv"]
            state[f"{prefix}.self_attn.linear_q_k_v.{part}"] = torch.cat(projections).detach()
        for theirs, ours in LAYER_NAMES.items():
            state[f"{prefix}.{theirs}"] = tensors[f"{layer}.{ours}"].detach()
    for norm, index in (("after_norm", blocks - 1), ("tp_norm", config.num_hidden_layers - 1)):
        for part in ("weight", "bias"):
            name = f"model.encoder.layers.{index}.final_layernorm.{part}"
            state[f"encoder.{norm}.{part}"] = tensors[name].detach()
    return state


def _upstream_yaml(config: FunasrSenseVoiceConfig, extractor: KaldiFbankFeatureExtractor) -> dict[str, object]:
    def section(source: object, table: dict[str, tuple], skipped: str = "") -> dict[str, object]:
        return {key: getattr(source, field) for key, (field, _, _) in table.items() if key != skipped}

    encoder = section(config, ENCODER_KEYS, "num_blocks")
    encoder["num_blocks"] = config.num_hidden_layers - config.num_timestamp_prediction_layers
    frontend = section(extractor, FRONTEND_KEYS)
    for key in ("frame_length", "frame_shift"):
        frontend[key] = int(frontend[key]) if float(frontend[key]).is_integer() else frontend[key]
    specaug = {
        "apply_time_warp": False,
        "apply_freq_mask": True,
        "freq_mask_width_range": [0, 30],
        "lfr_rate": config.subsampling_rate,
        "num_freq_mask": 1,
        "apply_time_mask": True,
        "time_mask_width_range": [0, 12],
        "num_time_mask": 1,
    }
    return {
        "encoder": "SenseVoiceEncoderSmall",
        "encoder_conf": encoder
        | {"positional_dropout_rate": config.hidden_dropout, "input_layer": "pe", "normalize_before": True},
        "model": UPSTREAM_MODEL,
        "model_conf": section(config, MODEL_KEYS) | {"ignore_id": -1},
        "tokenizer": "SentencepiecesTokenizer",
        "tokenizer_conf": {"bpemodel": None, "unk_symbol": "<unk>", "split_with_space": True},
        "frontend": "WavFrontend",
        "frontend_conf": frontend,
        "specaug": "SpecAugLFR",
        "specaug_conf": specaug,
    }
