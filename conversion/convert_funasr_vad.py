"""Conversion of an FSMN-VAD pack of FunASR to a transformers folder, and back.

`convert_funasr.py` is the command line; it calls these functions for a pack whose `config.yaml` says
`model: FsmnVADStreaming`, and for a folder whose `config.json` says `funasr_fsmn_vad`. A pack holds `model.pt`,
`config.yaml`, `configuration.json` and `am.mvn`. It is untrusted: see `hf_speechllm.upstream`. The folder that is
written appears complete or not at all.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
import yaml

from hf_speechllm.models.configuration_funasr_fsmn_vad import FunasrFsmnVadConfig
from hf_speechllm.models.modeling_funasr_fsmn_vad import FunasrFsmnVadForAudioFrameClassification
from hf_speechllm.upstream.checkpoints import read_state_dict
from hf_speechllm.upstream.errors import ConversionError
from hf_speechllm.upstream.funasr_pack import FunasrPack, open_funasr_pack
from hf_speechllm.upstream.nnet_mvn import read_nnet_mvn, write_nnet_mvn
from hf_speechllm.upstream.staging import sha256_of_file, sha256_of_files, staged_directory, write_report
from hf_speechllm.upstream.typed_config import ConfigReader


UPSTREAM_MODEL = "FsmnVADStreaming"

# ---------------------------------------------------------------------------------------------------------------------
# Keys of config.yaml: key -> (our field, kind, default upstream). The encoder has no defaults: published values.

ENCODER_KEYS = {
    "input_dim": ("input_size", "count", 400),
    "input_affine_dim": ("input_affine_size", "count", 140),
    "fsmn_layers": ("num_hidden_layers", "count", 4),
    "linear_dim": ("hidden_size", "count", 250),
    "proj_dim": ("projection_size", "count", 128),
    "lorder": ("memory_size", "count", 20),
    "output_affine_dim": ("output_affine_size", "count", 140),
    "output_dim": ("num_classes", "count", 248),
}
MODEL_KEYS = {
    "max_end_silence_time": ("max_end_silence_ms", "size", 800),
    "max_start_silence_time": ("max_start_silence_ms", "size", 3000),
    "window_size_ms": ("window_ms", "count", 200),
    "sil_to_speech_time_thres": ("silence_to_speech_ms", "size", 150),
    "speech_to_sil_time_thres": ("speech_to_silence_ms", "size", 150),
    "speech_2_noise_ratio": ("speech_noise_ratio", "number", 1.0),
    "lookback_time_start_point": ("lookback_ms", "size", 200),
    "lookahead_time_end_point": ("lookahead_ms", "size", 100),
    "max_single_segment_time": ("max_segment_ms", "count", 60000),
    "noise_frame_num_used_for_snr": ("num_noise_frames", "count", 100),
    "speech_noise_thres": ("speech_noise_threshold", "number", 0.6),
}
# Of another kind than ours: read as they are, and translated.
RAW_MODEL_KEYS = {
    "detect_mode": ("detect_mode", "size", 1),
    "do_extend": ("do_extend", "size", 1),
    "fe_prior_thres": ("fe_prior_thres", "rate", 1e-4),
    "frame_in_ms": ("frame_in_ms", "number", 10),
    "frame_length_ms": ("frame_length_ms", "number", 25),
    "sample_rate": ("sample_rate", "count", 16000),
    "silence_pdf_num": ("silence_pdf_num", "count", 1),
}
FRONTEND_KEYS = {
    "fs": ("sampling_rate", "count", 16000),
    "window": ("window_type", {"hamming": "hamming", "povey": "povey"}, "hamming"),
    "n_mels": ("num_mel_bins", "count", 80),
    "frame_length": ("frame_length_ms", "number", 25),
    "frame_shift": ("frame_shift_ms", "number", 10),
    "lfr_m": ("stacked_frames", "count", 1),
}

# Known keys that change nothing: upstream reads none of them, or only in training.
IGNORED_MODEL_KEYS = {
    *("dcd_block_size", "do_end_point_detection", "do_start_point_detection", "nn_eval_block_size"),
    *("output_frame_probs", "snr_mode", "speech_noise_thresh_high", "speech_noise_thresh_low"),
    # Of no kind of the reader: negative numbers and a list. `_read_architecture` takes them itself.
    *("decibel_thres", "sil_pdf_ids", "snr_thres"),
}
IGNORED_FRONTEND_KEYS = {"cmvn_file", "dither", "filter_length_max", "filter_length_min"}
IGNORED_KEYS = {
    *("dataset", "dataset_conf", "normalize_conf", "optim", "optim_conf", "scheduler", "scheduler_conf"),
    *("specaug", "specaug_conf", "tokenizer", "tokenizer_conf", "train_conf"),
    # What the toolkit adds when it writes the configuration of a run.
    *("batch_size", "debug", "device", "disable_log", "disable_update", "enable_tf32", "excludes", "frontend_path"),
    *("hub", "hub_revision", "init_param", "is_training", "model_path", "model_revision", "ncpu", "ngpu"),
    *("output_dir", "seed", "trust_remote_code", "vocab_size"),
}
# Values that must be these when the key is present, because they are all that the model can do.
REQUIRED_VALUES = {
    "encoder": "FSMN",
    "encoder_conf.lstride": 1,
    "encoder_conf.rorder": 0,
    "encoder_conf.use_softmax": True,
    "frontend_conf.lfr_n": 1,
    "frontend_conf.snip_edges": True,
    "frontend_conf.upsacle_samples": True,
    "model": UPSTREAM_MODEL,
    "normalize": None,
}
# Without a memory of the future its stride means nothing.
IGNORED_ENCODER_KEYS = {"rstride"}
FRONTENDS = ("WavFrontend", "WavFrontendOnline")

# ---------------------------------------------------------------------------------------------------------------------
# Names of weights.

LAYER_NAMES = {
    "linear.linear.weight": "down_proj.weight",
    "affine.linear.weight": "up_proj.weight",
    "affine.linear.bias": "up_proj.bias",
}
# Upstream's convolution is one over images: `(channels, 1, frames, 1)`.
MEMORY_NAME, OUR_MEMORY_NAME = "fsmn_block.conv_left.weight", "memory.conv.weight"
OTHER_NAMES = {
    f"encoder.{theirs}.linear.{part}": f"{ours}.{part}"
    for theirs, ours in (
        ("in_linear1", "input_fc1"),
        ("in_linear2", "input_fc2"),
        ("out_linear1", "output_fc"),
        ("out_linear2", "classifier"),
    )
    for part in ("weight", "bias")
}
_LAYER = re.compile(r"encoder\.fsmn\.(\d{1,4})\.(.+)")

# ---------------------------------------------------------------------------------------------------------------------
# FunASR -> transformers


def convert_vad_pack(pack: str | Path | FunasrPack, out_dir: str | Path) -> dict[str, object]:
    """Converts an FSMN-VAD pack to a folder `out_dir` that `AutoModel` loads.

    Args:
        pack: the folder, or what `open_funasr_pack` gives for it.
        out_dir: must not exist or be empty; its parent must exist.
    Returns:
        The report, which is also written as `conversion_report.json`: names and SHA-256 of inputs and outputs, ignored
        keys.
    Raises:
        ConversionError: a key, value, weight or shape that the model does not have, named in the message.
        UnsafeArtifactError: a file that is hostile or damaged.
    """
    if not isinstance(pack, FunasrPack):
        pack = open_funasr_pack(pack)
    weights_path, mvn_path = pack.file("init_param"), pack.file("frontend_conf.cmvn_file")
    fields, ignored = _read_architecture(pack)
    try:
        config = FunasrFsmnVadConfig(**fields)
    except ValueError as error:
        raise ConversionError("contradictory configuration", file=pack.config_path, actual=str(error)) from None
    shift, scale = read_nnet_mvn(mvn_path, input_size=config.input_size)
    state = read_state_dict(weights_path, wrappers=("state_dict", "model_state_dict", "model"))
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    _check_layers(state, config, weights_path)
    weights = from_upstream_state_dict(state, weights_path)
    weights |= {"cmvn_mean": -shift, "cmvn_inverse_std": scale}
    model = _load(weights, config, weights_path)
    report: dict[str, object] = {
        "converter": "funasr",
        "model": UPSTREAM_MODEL,
        "model_type": config.model_type,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "ignored_keys": ignored,
        "inputs": {path.name: sha256_of_file(path) for path in sorted({pack.config_path, weights_path, mvn_path})},
    }
    with staged_directory(out_dir) as stage:
        model.save_pretrained(stage)
        model.new_feature_extractor().save_pretrained(stage)
        write_report(stage, report)
    return report


def _read_architecture(pack: FunasrPack) -> tuple[dict[str, object], list[str]]:
    """Fields of the configuration, and the keys that were ignored."""
    reader = ConfigReader(pack.config, pack.config_path, REQUIRED_VALUES)
    for key in ("encoder", "model", "normalize"):
        reader.used.add(key)
        if key in reader.configs or key != "normalize":
            reader.require(key, reader.configs.get(key))
    frontend = reader.top("frontend", {name: name for name in FRONTENDS}, "WavFrontendOnline")
    fields = reader.read("encoder_conf", ENCODER_KEYS, IGNORED_ENCODER_KEYS)
    fields |= reader.read("frontend_conf", FRONTEND_KEYS, IGNORED_FRONTEND_KEYS)
    model = reader.read("model_conf", MODEL_KEYS | RAW_MODEL_KEYS, IGNORED_MODEL_KEYS)
    raw = {field: model.pop(field) for field, _, _ in RAW_MODEL_KEYS.values()}
    content = reader.section("model_conf")
    reader.ignored -= {f"model_conf.{key}" for key in ("decibel_thres", "sil_pdf_ids", "snr_thres")}
    for key, field in (("decibel_thres", "decibel_threshold"), ("snr_thres", "snr_threshold")):
        value = content.get(key, -100.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not -1e6 <= value <= 1e6:
            raise ConversionError(
                "bad value", file=reader.path, key=f"model_conf.{key}", expected="number", actual=repr(value)
            )
        model[field] = float(value)
    silence = content.get("sil_pdf_ids", [0])
    if not isinstance(silence, list) or not silence or any(type(index) is not int for index in silence):
        raise ConversionError(
            "bad value",
            file=reader.path,
            key="model_conf.sil_pdf_ids",
            expected="list of classes",
            actual=repr(silence),
        )
    for key, expected, actual in (
        ("frame_in_ms", fields["frame_shift_ms"], raw["frame_in_ms"]),
        ("frame_length_ms", fields["frame_length_ms"], raw["frame_length_ms"]),
        ("sample_rate", fields["sampling_rate"], raw["sample_rate"]),
        ("silence_pdf_num", len(silence), raw["silence_pdf_num"]),
        ("detect_mode", "0 or 1", "0 or 1" if raw["detect_mode"] in (0, 1) else raw["detect_mode"]),
        ("do_extend", "0 or 1", "0 or 1" if raw["do_extend"] in (0, 1) else raw["do_extend"]),
        # From 1 on upstream takes every frame for silence.
        ("fe_prior_thres", "below 1", "below 1" if raw["fe_prior_thres"] < 1 else raw["fe_prior_thres"]),
    ):
        if expected != actual:
            raise ConversionError(
                "not supported", file=reader.path, key=f"model_conf.{key}", expected=expected, actual=actual
            )
    model |= {
        "silence_ids": silence,
        "single_utterance": raw["detect_mode"] == 0,
        "extend": raw["do_extend"] == 1,
    }
    stated = reader.top("input_size", "optional integer", None)
    if stated not in (None, fields["input_size"]):
        raise ConversionError(
            "sizes disagree", file=reader.path, key="input_size", expected=fields["input_size"], actual=stated
        )
    reader.refuse_unknown(IGNORED_KEYS)
    if frontend == "WavFrontend":
        reader.ignored.add("frontend")  # the same features, computed in one piece
    return fields | model, sorted(reader.ignored)


def _check_layers(state: dict[str, torch.Tensor], config: FunasrFsmnVadConfig, path: Path) -> None:
    """Compares the number of layers and the widths with the weights before anything is built."""
    layers = len({match[1] for name in state if (match := _LAYER.fullmatch(name))})
    if layers != config.num_hidden_layers:
        raise ConversionError(
            "configuration and weights disagree",
            file=path,
            key="encoder.fsmn",
            expected=f"{config.num_hidden_layers} layers",
            actual=layers,
        )
    for name, shape in (
        ("encoder.in_linear1.linear.weight", (config.input_affine_size, config.input_size)),
        ("encoder.in_linear2.linear.weight", (config.hidden_size, config.input_affine_size)),
        (f"encoder.fsmn.0.{MEMORY_NAME}", (config.projection_size, 1, config.memory_size, 1)),
        ("encoder.out_linear2.linear.weight", (config.num_classes, config.output_affine_size)),
    ):
        actual = tuple(state[name].shape) if name in state else "missing"
        if actual != shape:
            raise ConversionError(
                "configuration and weights disagree", file=path, key=name, expected=shape, actual=actual
            )


def from_upstream_state_dict(state: dict[str, torch.Tensor], path: Path | None = None) -> dict[str, torch.Tensor]:
    """Tensors under upstream's names under ours.

    Raises:
        ConversionError: a name that the model does not have.
    """
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        match = _LAYER.fullmatch(name)
        if name in OTHER_NAMES:
            weights[OTHER_NAMES[name]] = tensor
        elif match and match[2] in LAYER_NAMES:
            weights[f"layers.{match[1]}.{LAYER_NAMES[match[2]]}"] = tensor
        elif match and match[2] == MEMORY_NAME and tensor.dim() == 4 and tensor.shape[-1] == 1:
            weights[f"layers.{match[1]}.{OUR_MEMORY_NAME}"] = tensor[..., 0]
        else:
            raise ConversionError("unknown weight", file=path, key=name, actual=tuple(tensor.shape))
    return weights


def _load(
    weights: dict[str, torch.Tensor], config: FunasrFsmnVadConfig, path: Path
) -> FunasrFsmnVadForAudioFrameClassification:
    """Builds the model, compares names, shapes and types, then gives it the weights."""
    dtypes = {tensor.dtype for tensor in weights.values()}
    if dtypes != {torch.float32}:
        raise ConversionError("types of weights", file=path, expected="float32", actual=dtypes)
    with torch.device("meta"):
        model = FunasrFsmnVadForAudioFrameClassification(config)
    expected = model.state_dict()
    for name, tensor in expected.items():
        actual = tuple(weights[name].shape) if name in weights else "missing"
        if actual != tuple(tensor.shape):
            raise ConversionError("shape", file=path, key=name, expected=tuple(tensor.shape), actual=actual)
    for name in weights:
        if name not in expected:
            raise ConversionError("unknown weight", file=path, key=name, actual=tuple(weights[name].shape))
    model.load_state_dict({name: tensor.contiguous() for name, tensor in weights.items()}, strict=True, assign=True)
    model.config.dtype = torch.float32
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# transformers -> FunASR


def export_vad_pack(model_dir: str | Path, pack_dir: str | Path) -> dict[str, object]:
    """Writes the model folder `model_dir` as a pack that FunASR loads: the inverse of `convert_vad_pack`.

    Args:
        model_dir: folder with a `funasr_fsmn_vad` model.
        pack_dir: must not exist or be empty; its parent must exist.
    Returns:
        A report with SHA-256 of the written files.
    Raises:
        ConversionError: the folder lacks something, or `pack_dir` is in the way.
    """
    source = Path(model_dir)
    if not (source / "config.json").is_file():
        raise ConversionError("file of the model folder is missing", file=source, key="config.json")
    model = FunasrFsmnVadForAudioFrameClassification.from_pretrained(source, local_files_only=True, dtype="float32")
    with staged_directory(pack_dir) as stage:
        torch.save(to_upstream_state_dict(model.state_dict()), stage / "model.pt")
        text = yaml.safe_dump(_upstream_yaml(model.config), sort_keys=False, allow_unicode=True)
        (stage / "config.yaml").write_text(text, encoding="utf-8")
        mvn = write_nnet_mvn(-model.cmvn_mean, model.cmvn_inverse_std)
        (stage / "am.mvn").write_text(mvn, encoding="utf-8")
        description = {
            "framework": "pytorch",
            "task": "voice-activity-detection",
            "model": {"type": "funasr"},
            "pipeline": {"type": "funasr-pipeline"},
            "file_path_metas": {
                "init_param": "model.pt",
                "config": "config.yaml",
                "frontend_conf": {"cmvn_file": "am.mvn"},
            },
        }
        (stage / "configuration.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
        outputs = sha256_of_files(stage)
    return {"converter": "funasr", "direction": "reverse", "model": UPSTREAM_MODEL, "outputs": outputs}


def to_upstream_state_dict(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors under our names under upstream's; the normalisation of the features goes into `am.mvn`."""
    state = {theirs: tensors[ours].detach() for theirs, ours in OTHER_NAMES.items()}
    layers = {name.split(".")[1] for name in tensors if name.startswith("layers.")}
    for layer in sorted(layers, key=int):
        for theirs, ours in LAYER_NAMES.items():
            state[f"encoder.fsmn.{layer}.{theirs}"] = tensors[f"layers.{layer}.{ours}"].detach()
        memory = tensors[f"layers.{layer}.{OUR_MEMORY_NAME}"].detach()
        state[f"encoder.fsmn.{layer}.{MEMORY_NAME}"] = memory[..., None].contiguous()
    return state


def _upstream_yaml(config: FunasrFsmnVadConfig) -> dict[str, object]:
    def section(table: dict[str, tuple]) -> dict[str, object]:
        values = {key: getattr(config, field) for key, (field, _, _) in table.items()}
        return {
            key: int(value) if kind == "number" and float(value).is_integer() else value
            for (key, value), (_, kind, _) in zip(values.items(), table.values(), strict=True)
        }

    frontend = section(FRONTEND_KEYS)
    return {
        "frontend": "WavFrontendOnline",
        "frontend_conf": frontend | {"dither": 0.0, "lfr_n": 1},
        "model": UPSTREAM_MODEL,
        "model_conf": section(MODEL_KEYS)
        | {
            "sample_rate": config.sampling_rate,
            "detect_mode": 0 if config.single_utterance else 1,
            "do_extend": int(config.extend),
            "decibel_thres": config.decibel_threshold,
            "snr_thres": config.snr_threshold,
            "silence_pdf_num": len(config.silence_ids),
            "sil_pdf_ids": list(config.silence_ids),
            "frame_in_ms": frontend["frame_shift"],
            "frame_length_ms": frontend["frame_length"],
        },
        "encoder": "FSMN",
        "encoder_conf": section(ENCODER_KEYS) | {"rorder": 0, "lstride": 1, "rstride": 0},
    }
