"""Conversion of a SpeechTokenizer folder to a transformers folder, and back.

    python conversion/convert_speechtokenizer.py PACK OUT
    python conversion/convert_speechtokenizer.py --reverse MODEL_FOLDER PACK

A pack holds `config.json` and the weights as `SpeechTokenizer.pt` (fnlp/SpeechTokenizer), `ckpt.dev`
(fnlp/AnyGPT-speech-modules) or `SpeechTokenizer_best_dev.pt` (what upstream's trainer writes). It is untrusted: see
`hf_speechllm.upstream`. Every key and every weight is named in the tables below; any other is an error that names it.
The folder that is written appears complete or not at all.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from command_line import converter_parser, print_report
from transformers import EncodecFeatureExtractor

from hf_speechllm.models.configuration_speechtokenizer import SpeechTokenizerConfig
from hf_speechllm.models.modeling_speechtokenizer import SpeechTokenizerModel
from hf_speechllm.upstream.checkpoints import read_state_dict
from hf_speechllm.upstream.errors import ConversionError
from hf_speechllm.upstream.json_config import read_json_mapping
from hf_speechllm.upstream.model_folder import require_model_type
from hf_speechllm.upstream.safetensors_file import write_safetensors
from hf_speechllm.upstream.staging import sha256_of_file, sha256_of_files, staged_directory, write_report
from hf_speechllm.upstream.typed_config import ConfigReader


CONFIG_NAME = "config.json"
WEIGHT_NAMES = ("SpeechTokenizer.pt", "ckpt.dev", "SpeechTokenizer_best_dev.pt")

# ---------------------------------------------------------------------------------------------------------------------
# Keys of config.json: key -> (our field, kind). Upstream has no defaults: each must be there.

KEYS = {
    "n_filters": ("num_filters", "count"),
    "dimension": ("hidden_size", "count"),
    "semantic_dimension": ("semantic_hidden_size", "count"),
    "bidirectional": ("use_bidirectional_lstm", "flag"),
    "dilation_base": ("dilation_growth_rate", "count"),
    "residual_kernel_size": ("residual_kernel_size", "count"),
    "n_residual_layers": ("num_residual_layers", "count"),
    "lstm_layers": ("num_lstm_layers", "size"),
    # ELU and CELU are the same with the alpha of 1 that upstream gives them.
    "activation": ("hidden_act", {"ELU": "elu", "CELU": "elu", "Snake": "snake"}),
    "codebook_size": ("codebook_size", "count"),
    "n_q": ("num_quantizers", "count"),
    "sample_rate": ("sampling_rate", "count"),
}
_ACTIVATIONS = {"elu": "ELU", "snake": "Snake"}
# Larger sizes are no model: some make modules before the first shape is compared, others overflow a shape.
LIMITS = {
    **{"n_residual_layers": 16, "lstm_layers": 16, "n_q": 256, "dilation_base": 64, "residual_kernel_size": 1 << 10},
    **{"n_filters": 1 << 16, "dimension": 1 << 16, "semantic_dimension": 1 << 16, "codebook_size": 1 << 24},
}
MAX_STRIDES, MAX_STRIDE, MAX_CHANNELS = 16, 1 << 12, 1 << 20

# Known keys that change nothing in the converted model: how it was trained (upstream's trainer, and the HiFi-GAN
# configuration that the published files grew out of).
IGNORED_KEYS = {
    *("adam_b1", "adam_b2", "batch_size", "betas", "commitment_loss_lambda", "dist_config", "distill_loss_lambda"),
    *("distill_type", "drop_last", "epochs", "fmax", "fmax_for_loss", "fmin", "hop_size", "initial_learning_rate"),
    *("intial_learning_rate", "lambda_distill", "lambda_sim", "learning_rate", "log_steps", "lr_decay"),
    *("mel_loss_lambdas", "n_fft", "num_ckpt_keep", "num_freq", "num_gpus", "num_mels", "num_warmup_steps"),
    *("num_workers", "recon_loss_lambda", "resblock", "resblock_dilation_sizes", "resblock_kernel_sizes"),
    *("results_folder", "save_model_steps", "seed", "segment_size", "semantic_model_layer"),
    *("semantic_model_path", "showpiece_num", "split_batches", "stdout_steps", "train_files"),
    *("upsample_initial_channel", "upsample_kernel_sizes", "upsample_rates", "valid_files", "wd", "win_size"),
}
# Constants of upstream's code that no pack can say otherwise.
FIXED_FIELDS = {"codebook_decay": 0.99, "dead_code_threshold": 2.0, "kmeans_iterations": 50}

# ---------------------------------------------------------------------------------------------------------------------
# Names of weights. Upstream numbers the layers of encoder and decoder through, activations included.

WEIGHT_NORM = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}


def weight_names(config: SpeechTokenizerConfig) -> dict[str, str]:
    """Every weight of a model: upstream's name → ours, in upstream's order."""
    names: dict[str, str] = {}

    def convolution(theirs: str, ours: str, kind: str = "conv") -> None:
        names[f"{theirs}.{kind}.{kind}.bias"] = f"{ours}.conv.bias"
        for part, parametrization in WEIGHT_NORM.items():
            names[f"{theirs}.{kind}.{kind}.{part}"] = f"{ours}.conv.{parametrization}"

    def activation(theirs: str, ours: str) -> None:
        if config.hidden_act == "snake":
            names[f"{theirs}.alpha"] = f"{ours}.alpha"

    def units(theirs: str, first: int, ours: str) -> int:
        for index in range(config.num_residual_layers):
            unit, target = f"{theirs}.{first + index}", f"{ours}.units.{index}"
            activation(f"{unit}.block.0", f"{target}.act1")
            convolution(f"{unit}.block.1", f"{target}.conv1")
            activation(f"{unit}.block.2", f"{target}.act2")
            convolution(f"{unit}.block.3", f"{target}.conv2")
            convolution(f"{unit}.shortcut", f"{target}.shortcut")
        return first + config.num_residual_layers

    def lstm(theirs: str, ours: str, directions: tuple[str, ...]) -> None:
        for layer in range(config.num_lstm_layers):
            for direction in directions:
                for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                    name = f"lstm.{part}_l{layer}{direction}"
                    names[f"{theirs}.{name}"] = f"{ours}.{name}"

    stages = len(config.upsampling_ratios)
    convolution("encoder.model.0", "encoder.input_conv")
    index = 1
    for stage in range(stages):
        index = units("encoder.model", index, f"encoder.stages.{stage}")
        activation(f"encoder.model.{index}", f"encoder.stages.{stage}.act")
        convolution(f"encoder.model.{index + 1}", f"encoder.stages.{stage}.downsample")
        index += 2
    if config.num_lstm_layers:
        directions = ("", "_reverse") if config.use_bidirectional_lstm else ("",)
        lstm(f"encoder.model.{index}", "encoder.lstm", directions)
        index += 1
    activation(f"encoder.model.{index}", "encoder.output_act")
    convolution(f"encoder.model.{index + 1}", "encoder.output_conv")

    if config.hidden_size != config.semantic_hidden_size:
        names |= {f"transform.{part}": f"semantic_projection.{part}" for part in ("weight", "bias")}
    for level in range(config.num_quantizers):
        for buffer in ("inited", "cluster_size", "embed", "embed_avg"):
            names[f"quantizer.vq.layers.{level}._codebook.{buffer}"] = f"quantizer.levels.{level}.{buffer}"

    convolution("decoder.model.0", "decoder.input_conv")
    index = 1
    if config.num_lstm_layers:
        lstm("decoder.model.1", "decoder.lstm", ("",))
        index = 2
    for stage in range(stages):
        activation(f"decoder.model.{index}", f"decoder.stages.{stage}.act")
        convolution(f"decoder.model.{index + 1}", f"decoder.stages.{stage}.upsample", kind="convtr")
        index = units("decoder.model", index + 2, f"decoder.stages.{stage}")
    activation(f"decoder.model.{index}", "decoder.output_act")
    convolution(f"decoder.model.{index + 1}", "decoder.output_conv")
    return names


# ---------------------------------------------------------------------------------------------------------------------
# SpeechTokenizer -> transformers


def convert_speechtokenizer_pack(pack: str | Path, out_dir: str | Path) -> dict[str, object]:
    """Converts the folder `pack` to a folder `out_dir` that `AutoModel.from_pretrained` loads.

    Args:
        out_dir: must not exist or be empty; its parent must exist.
    Returns:
        The report, which is also written as `conversion_report.json`: names and SHA-256 of inputs and outputs,
        ignored keys, warnings.
    Raises:
        ConversionError: a key, value, weight or shape that the model does not have, named in the message.
        UnsafeArtifactError: a file that is hostile or damaged.
    """
    config_path, weights_path = find_files(Path(pack))
    config, ignored = read_config(config_path)
    state = read_state_dict(weights_path)
    # What a data-parallel run of upstream's trainer saves.
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    weights = rename(state, config, weights_path)
    model = load(weights, config, weights_path)
    extractor = EncodecFeatureExtractor(feature_size=1, sampling_rate=config.sampling_rate)
    unused = [level for level in range(config.num_quantizers) if not weights[f"quantizer.levels.{level}.inited"].any()]
    report: dict[str, object] = {
        "converter": "speechtokenizer",
        "model_type": config.model_type,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "ignored_keys": ignored,
        "warnings": [f"{weights_path.name}: codebook {level} was never trained" for level in unused],
        "inputs": {path.name: sha256_of_file(path) for path in (config_path, weights_path)},
    }
    with staged_directory(out_dir) as stage:
        # The weights are memory mapped and go from file to file.
        model.save_pretrained(stage, state_dict={})
        write_safetensors(stage / "model.safetensors", weights)
        extractor.save_pretrained(stage)
        write_report(stage, report)
    return report


def find_files(pack: Path) -> tuple[Path, Path]:
    """The configuration and the weights of a pack.

    Raises:
        ConversionError: no folder, no `config.json`, or not exactly one file of weights.
    """
    if not pack.is_dir():
        raise ConversionError("pack is not a directory", file=pack)
    found = [pack / name for name in WEIGHT_NAMES if (pack / name).exists()]
    if len(found) != 1:
        raise ConversionError(
            "no single file of weights",
            file=pack,
            expected=f"one of {', '.join(WEIGHT_NAMES)}",
            actual=[path.name for path in found],
        )
    return pack / CONFIG_NAME, found[0]


def read_config(path: Path) -> tuple[SpeechTokenizerConfig, list[str]]:
    """Our configuration from upstream's `config.json`, and the keys that were ignored.

    Raises:
        ConversionError: a key is missing or unknown, or a value is none that the model can have.
    """
    reader = ConfigReader(read_json_mapping(path), path, {})
    fields: dict[str, object] = dict(FIXED_FIELDS)
    for key, (field, kind) in KEYS.items():
        if key not in reader.configs:
            raise ConversionError("key is missing", file=path, key=key)
        fields[field] = reader.top(key, kind, None)
        if key in LIMITS and fields[field] > LIMITS[key]:
            raise ConversionError(
                "bad value", file=path, key=key, expected=f"at most {LIMITS[key]}", actual=fields[field]
            )
    strides = reader.configs.get("strides")
    reader.used.add("strides")
    if not isinstance(strides, list) or not 1 <= len(strides) <= MAX_STRIDES:
        raise ConversionError(
            "bad value",
            file=path,
            key="strides",
            expected=f"a list of 1..{MAX_STRIDES} integers",
            actual=repr(strides),
        )
    fields["upsampling_ratios"] = [
        reader.value(f"strides[{index}]", value, "count") for index, value in enumerate(strides)
    ]
    if max(fields["upsampling_ratios"]) > MAX_STRIDE or fields["num_filters"] << len(strides) > MAX_CHANNELS:
        raise ConversionError(
            "bad value",
            file=path,
            key="strides",
            expected=f"at most {MAX_STRIDE} each, and n_filters doubled by each at most {MAX_CHANNELS}",
            actual=repr(strides),
        )
    stated = reader.top("sampling_rate", "optional count", None)
    if stated not in (None, fields["sampling_rate"]):
        raise ConversionError(
            "sampling rates disagree", file=path, key="sampling_rate", expected=fields["sampling_rate"], actual=stated
        )
    reader.refuse_unknown(IGNORED_KEYS)
    try:
        return SpeechTokenizerConfig(**fields), sorted(reader.ignored)
    except ValueError as error:
        raise ConversionError("contradictory configuration", file=path, actual=str(error)) from None


def rename(
    state: dict[str, torch.Tensor], config: SpeechTokenizerConfig, path: Path | None = None
) -> dict[str, torch.Tensor]:
    """Tensors under upstream's names under ours.

    Raises:
        ConversionError: a name that such a model does not have.
    """
    names = weight_names(config)
    for name, tensor in state.items():
        if name not in names:
            raise ConversionError("unknown weight", file=path, key=name, actual=tuple(tensor.shape))
    return {names[name]: tensor for name, tensor in state.items()}


def load(weights: dict[str, torch.Tensor], config: SpeechTokenizerConfig, path: Path) -> SpeechTokenizerModel:
    """Builds the model without memory, compares names, shapes and types, then gives it the weights."""
    if dtypes := {tensor.dtype for tensor in weights.values()} - {torch.float32}:
        raise ConversionError("type of weights", file=path, expected="float32", actual=dtypes)
    with torch.device("meta"):
        model = SpeechTokenizerModel(config)
    theirs = {ours: name for name, ours in weight_names(config).items()}
    for name, tensor in model.state_dict().items():
        if name not in weights:
            raise ConversionError("weight is missing", file=path, key=theirs[name], expected=tuple(tensor.shape))
        if weights[name].shape != tensor.shape:
            raise ConversionError(
                "shape", file=path, key=theirs[name], expected=tuple(tensor.shape), actual=tuple(weights[name].shape)
            )
    model.load_state_dict(weights, strict=True, assign=True)
    model.config.dtype = torch.float32
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# transformers -> SpeechTokenizer


def export_speechtokenizer_pack(model_dir: str | Path, pack_dir: str | Path) -> dict[str, object]:
    """Writes the model folder `model_dir` as a pack that upstream loads: the inverse of the conversion.

    Args:
        model_dir: folder with a `speechtokenizer` model that keeps its weight norm.
        pack_dir: must not exist or be empty; its parent must exist.
    Returns:
        A report with SHA-256 of the written files, and warnings.
    Raises:
        ConversionError: the folder is none of such a model, its weight norm was folded, or `pack_dir` is in the way.
    """
    source = Path(model_dir)
    require_model_type(source, [SpeechTokenizerConfig.model_type])
    model = SpeechTokenizerModel.from_pretrained(source, local_files_only=True, dtype=torch.float32)
    config = model.config
    if not config.use_weight_norm:
        raise ConversionError(
            "weight norm was folded", file=source / CONFIG_NAME, key="use_weight_norm", expected=True, actual=False
        )
    tensors = model.state_dict()
    state = {theirs: tensors[ours].detach().clone() for theirs, ours in weight_names(config).items()}
    with staged_directory(pack_dir) as stage:
        torch.save(state, stage / WEIGHT_NAMES[0])
        (stage / CONFIG_NAME).write_text(json.dumps(upstream_config(config), indent=4) + "\n", encoding="utf-8")
        outputs = sha256_of_files(stage)
    warnings = [
        f"{field}: upstream always has {value}, the model {getattr(config, field)}"
        for field, value in FIXED_FIELDS.items()
        if getattr(config, field) != value
    ]
    return {"converter": "speechtokenizer", "direction": "reverse", "warnings": warnings, "outputs": outputs}


def upstream_config(config: SpeechTokenizerConfig) -> dict[str, object]:
    """`config.json` of a pack, as far as the model needs it."""
    content = {key: getattr(config, field) for key, (field, _) in KEYS.items()}
    content["activation"] = _ACTIVATIONS[config.hidden_act]
    return content | {"strides": config.upsampling_ratios, "sampling_rate": config.sampling_rate}


def main(arguments: list[str] | None = None) -> int:
    """Command line, see `print_report`."""
    options = converter_parser(__doc__, "write an upstream pack from a model folder").parse_args(arguments)
    run = export_speechtokenizer_pack if options.reverse else convert_speechtokenizer_pack
    return print_report(lambda: run(options.source, options.destination))


if __name__ == "__main__":
    sys.exit(main())
