"""Conversion of a unit HiFi-GAN of fairseq or textlesslib to a `speechgpt_unit_vocoder` folder.

`convert_speechgpt.py` is the command line. A pack is a folder with `config.json` and one checkpoint (`g_00500000`,
`generator.pt`, `vocoder.pt`, ...), and with `speakers.txt` and `styles.txt` where the voices have names. It is
untrusted: see `hf_speechllm.upstream`. The folder that is written appears complete or not at all.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from hf_speechllm.models.configuration_speechgpt_unit_vocoder import SpeechGptUnitVocoderConfig
from hf_speechllm.models.modeling_speechgpt_unit_vocoder import SpeechGptUnitVocoderModel
from hf_speechllm.upstream.checkpoints import read_state_dict
from hf_speechllm.upstream.errors import ConversionError
from hf_speechllm.upstream.files import read_utf8
from hf_speechllm.upstream.json_config import read_json_mapping
from hf_speechllm.upstream.staging import sha256_of_file, staged_directory, write_report
from hf_speechllm.upstream.typed_config import ConfigReader


CONFIG_NAME = "config.json"
CHECKPOINT_NAME = re.compile(r"g_\d+|.+\.pth?")
MAX_NAMES_BYTES = 1 << 20
# Upstream's residual blocks take three dilations, however many the list has.
DILATIONS = 3

# ---------------------------------------------------------------------------------------------------------------------
# Keys of config.json: key -> (our field, kind, default upstream).

KEYS = {
    "num_embeddings": ("num_units", "count", None),
    "embedding_dim": ("embedding_size", "count", None),
    "sampling_rate": ("sampling_rate", "count", 16000),
    "f0_quant_num_bin": ("num_f0_bins", "integer", 0),
    "num_speakers": ("num_speakers", "count", 200),
    "num_styles": ("num_styles", "count", 100),
    "embedder_dim": ("speaker_embedding_size", "count", 256),
}
GENERATOR_KEYS = {
    "model_in_dim": ("model_in_dim", "count", 80),
    "upsample_initial_channel": ("upsample_initial_channel", "count", None),
}
GENERATOR_LISTS = ("upsample_rates", "upsample_kernel_sizes", "resblock_kernel_sizes")
DURATION_KEYS = {
    "encoder_embed_dim": ("embedding_size", "count", None),
    "var_pred_hidden_dim": ("duration_hidden_size", "count", None),
    "var_pred_kernel_size": ("duration_kernel_size", "count", None),
    "var_pred_dropout": ("duration_dropout", "rate", None),
}
# Upstream asks of these only whether they say something.
SWITCHES = ("f0", "multispkr", "multistyle", "embedder_params")

# Known keys that upstream's generator does not read: those of the training and of the features that it was trained on.
IGNORED_KEYS = {
    *("adam_b1", "adam_b2", "batch_size", "dist_config", "dur_prediction_weight", "learning_rate", "lr_decay"),
    *("num_gpus", "num_workers", "resblock", "seed", "segment_size"),
    *("code_hop_size", "fmax", "fmax_for_loss", "fmin", "hop_size", "n_fft", "num_freq", "num_mels", "win_size"),
    *("f0_feats", "f0_hop_size", "f0_interp", "f0_median", "f0_normalize", "f0_stats", "f0_strict"),
    *("input_training_file", "input_validation_file", "lambda_commit", "lambda_commit_code", "pad"),
}

# ---------------------------------------------------------------------------------------------------------------------
# Names of weights.

GENERATOR_NAMES = re.compile(r"(?:(conv_pre|conv_post)|ups\.(\d+)|(resblocks\.\d+\.convs[12]\.\d+))")
OTHER_NAMES = {
    "dict.weight": "unit_embeddings.weight",
    "f0_quant_embed.weight": "f0_embeddings.weight",
    "style.weight": "style_embeddings.weight",
    **{
        f"dur_predictor.{theirs}.{part}": f"duration_predictor.{ours}.{part}"
        for theirs, ours in (
            ("conv1.0", "conv1"),
            ("conv2.0", "conv2"),
            ("ln1", "layer_norm1"),
            ("ln2", "layer_norm2"),
            ("proj", "proj"),
        )
        for part in ("weight", "bias")
    },
}


def find_checkpoint(pack: Path) -> Path:
    """The checkpoint of a folder.

    Raises:
        ConversionError: none, or several.
    """
    files = sorted(path for path in pack.iterdir() if CHECKPOINT_NAME.fullmatch(path.name))
    if len(files) != 1:
        raise ConversionError(
            "no single checkpoint", file=pack, expected="g_00500000 or one .pt", actual=[path.name for path in files]
        )
    return files[0]


def convert_vocoder_pack(pack: str | Path, out_dir: str | Path) -> dict[str, object]:
    """Converts a unit vocoder to a folder that `AutoModelForTextToWaveform` and `AutoModel` load.

    Args:
        pack: the folder. out_dir: must not exist or be empty; its parent must exist.
    Returns:
        The report, which is also written as `conversion_report.json`: names and SHA-256 of inputs and outputs, ignored
        keys and weights.
    Raises:
        ConversionError: a key, value, weight or shape that the model does not have, named in the message.
        UnsafeArtifactError: a file that is hostile or damaged.
    """
    pack = Path(pack)
    config_path, checkpoint_path = pack / CONFIG_NAME, find_checkpoint(pack)
    fields, ignored = _read_config(config_path)
    inputs = [config_path, checkpoint_path]
    for field, name, count in (
        ("speakers", "speakers.txt", fields["num_speakers"]),
        ("styles", "styles.txt", fields["num_styles"]),
    ):
        if (pack / name).is_file() and count:
            fields[field] = _read_names(pack / name, count)
            inputs.append(pack / name)
    try:
        config = SpeechGptUnitVocoderConfig(**fields)
    except ValueError as error:
        raise ConversionError("contradictory configuration", file=config_path, actual=str(error)) from None
    state = read_state_dict(checkpoint_path, wrappers=("generator",))
    _check_sizes(state, config, checkpoint_path)
    weights, dropped = from_upstream_state_dict(state, config, checkpoint_path)
    model = _load(weights, config, checkpoint_path)
    report: dict[str, object] = {
        "converter": "speechgpt",
        "upstream_model": "unit HiFi-GAN",
        "model_type": config.model_type,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "ignored_keys": ignored,
        "ignored_weights": dropped,
        "warnings": [],
        "inputs": {path.name: sha256_of_file(path) for path in inputs},
    }
    with staged_directory(out_dir) as stage:
        model.save_pretrained(stage)
        write_report(stage, report)
    return report


def _read_config(path: Path) -> tuple[dict[str, object], list[str]]:
    """Fields of our configuration, and the keys that were ignored."""
    content = read_json_mapping(path)
    durations = content.pop("dur_predictor_params", None)
    switches = {name: bool(content.pop(name, None)) for name in SWITCHES}
    lists = {name: _whole_numbers(content.pop(name, None), path, name) for name in GENERATOR_LISTS}
    dilations = content.pop("resblock_dilation_sizes", None)
    kernels = lists["resblock_kernel_sizes"]
    if not isinstance(dilations, list) or len(dilations) != len(kernels):
        raise ConversionError(
            "bad value", file=path, key="resblock_dilation_sizes", expected=f"{len(kernels)} lists", actual=dilations
        )
    lists["resblock_dilation_sizes"] = [
        _whole_numbers(row, path, f"resblock_dilation_sizes[{number}]", DILATIONS)[:DILATIONS]
        for number, row in enumerate(dilations)
    ]
    reader = ConfigReader({"config": content, "durations": durations}, path, {})
    fields = reader.read("config", KEYS | GENERATOR_KEYS, IGNORED_KEYS)
    generator = {name: fields.pop(name) for name in ("model_in_dim", "upsample_initial_channel")}
    fields["use_f0"] = switches["f0"]
    fields["num_f0_bins"] = max(0, fields["num_f0_bins"]) if switches["f0"] else 0
    # A table of speakers, or a projection of vectors; either is used only with `multispkr`.
    if not switches["multispkr"] or switches["embedder_params"]:
        fields["num_speakers"] = 0
    if not switches["multispkr"] or not switches["embedder_params"]:
        fields["speaker_embedding_size"] = 0
    if not switches["multistyle"]:
        fields["num_styles"] = 0
    fields["duration_hidden_size"] = 0
    if durations:
        predictor = reader.read("durations", DURATION_KEYS, set())
        if predictor.pop("embedding_size") != fields["embedding_size"]:
            raise ConversionError(
                "sizes disagree",
                file=path,
                key="dur_predictor_params.encoder_embed_dim",
                expected=f"embedding_dim = {fields['embedding_size']}",
                actual=durations["encoder_embed_dim"],
            )
        fields |= predictor
    fields["hifigan_config"] = {
        **generator,
        **lists,
        "sampling_rate": fields["sampling_rate"],
        "leaky_relu_slope": 0.1,
        "normalize_before": False,
    }
    return fields, sorted(key.removeprefix("config.") for key in reader.ignored)


def _whole_numbers(value: object, path: Path, key: str, least: int = 1) -> list[int]:
    if (
        not isinstance(value, list)
        or not least <= len(value) <= 64
        or not all(type(number) is int and 1 <= number <= 1 << 16 for number in value)
    ):
        raise ConversionError(
            "bad value", file=path, key=key, expected=f"at least {least} whole numbers", actual=repr(value)
        )
    return value


def _read_names(path: Path, rows: int) -> list[str]:
    """One name per line, as many as there are rows at most."""
    names = [line.strip() for line in read_utf8(path, MAX_NAMES_BYTES).strip().splitlines()]
    if len(names) > rows or len(set(names)) != len(names):
        raise ConversionError("names", file=path, expected=f"at most {rows}, all different", actual=names)
    return names


def _check_sizes(state: dict[str, torch.Tensor], config: SpeechGptUnitVocoderConfig, path: Path) -> None:
    """Compares what decides how much is built with the checkpoint, before building."""
    generator = config.hifigan_config
    blocks = len({name.split(".")[1] for name in state if name.startswith("resblocks.")})
    stages = len({name.split(".")[1] for name in state if name.startswith("ups.")})
    for key, expected, actual in (
        ("ups", len(generator.upsample_rates), stages),
        ("resblocks", len(generator.upsample_rates) * len(generator.resblock_kernel_sizes), blocks),
    ):
        if expected != actual:
            raise ConversionError(
                "configuration and weights disagree", file=path, key=key, expected=expected, actual=actual
            )
    for names, shape in (
        (("dict.weight",), (config.num_units, config.embedding_size)),
        (
            ("conv_pre.weight_v", "conv_pre.weight"),
            (generator.upsample_initial_channel, generator.model_in_dim, 7),
        ),
    ):
        name = next((name for name in names if name in state), names[0])
        actual = tuple(state[name].shape) if name in state else "missing"
        if actual != shape:
            raise ConversionError(
                "configuration and weights disagree", file=path, key=name, expected=shape, actual=actual
            )


def from_upstream_state_dict(
    state: dict[str, torch.Tensor], config: SpeechGptUnitVocoderConfig, path: Path
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Upstream's tensors under our names, weight norm folded, and the names of those that are never used.

    Raises:
        ConversionError: a weight that the model does not have, or half of a normalised one.
    """
    speaker = "speaker_proj" if config.speaker_embedding_size else "speaker_embeddings"
    used = {
        "spkr": config.has_speakers,
        "f0_quant_embed": bool(config.num_f0_bins),
        "dur_predictor": bool(config.duration_hidden_size),
        "style": bool(config.num_styles),
    }
    weights: dict[str, torch.Tensor] = {}
    dropped = []
    for name, tensor in state.items():
        module, _, part = name.rpartition(".")
        if not used.get(name.split(".")[0], True):
            # Upstream builds an embedding of speakers or of pitch that its forward pass then leaves out.
            if name.split(".")[0] not in ("spkr", "f0_quant_embed"):
                raise ConversionError("unknown weight", file=path, key=name, actual=tuple(tensor.shape))
            dropped.append(name)
        elif name in OTHER_NAMES:
            weights[OTHER_NAMES[name]] = tensor
        elif module == "spkr":
            weights[f"{speaker}.{part}"] = tensor
        elif match := GENERATOR_NAMES.fullmatch(module):
            ours = f"generator.{match[1] or match[3] or f'upsampler.{match[2]}'}"
            if part in ("weight", "bias"):
                weights[f"{ours}.{part}"] = tensor
            elif part == "weight_v" and f"{module}.weight_g" in state:
                weights[f"{ours}.weight"] = _fold(tensor, state[f"{module}.weight_g"], path, name)
            elif part != "weight_g" or f"{module}.weight_v" not in state:
                raise ConversionError("unknown weight", file=path, key=name, actual=tuple(tensor.shape))
        else:
            raise ConversionError("unknown weight", file=path, key=name, actual=tuple(tensor.shape))
    size = config.hifigan_config.model_in_dim
    weights |= {"generator.mean": torch.zeros(size), "generator.scale": torch.ones(size)}
    return weights, sorted(dropped)


def _fold(direction: torch.Tensor, length: torch.Tensor, path: Path, name: str) -> torch.Tensor:
    """Plain weight of torch's old weight norm over dimension 0 (transposed convolutions, too)."""
    expected = (direction.shape[0],) + (1,) * (direction.dim() - 1)
    if direction.dim() < 2 or tuple(length.shape) != expected:
        raise ConversionError(
            "length of a normalised weight", file=path, key=name, expected=expected, actual=tuple(length.shape)
        )
    direction, length = direction.float(), length.float()
    weight = direction * (length / torch.norm_except_dim(direction, 2, 0))
    if not bool(torch.isfinite(weight).all()):
        raise ConversionError("normalised weight has no direction", file=path, key=name, actual="a row of zeros")
    return weight


def _load(
    weights: dict[str, torch.Tensor], config: SpeechGptUnitVocoderConfig, path: Path
) -> SpeechGptUnitVocoderModel:
    """Builds the model, compares names and shapes, then gives it the weights."""
    with torch.device("meta"):
        model = SpeechGptUnitVocoderModel(config)
    expected = model.state_dict()
    for name, tensor in expected.items():
        actual = tuple(weights[name].shape) if name in weights else "missing"
        if actual != tuple(tensor.shape):
            raise ConversionError("shape", file=path, key=name, expected=tuple(tensor.shape), actual=actual)
    for name, tensor in weights.items():
        if name not in expected:
            raise ConversionError("unknown weight", file=path, key=name, actual=tuple(tensor.shape))
    state = {name: tensor.float().contiguous() for name, tensor in weights.items()}
    model.load_state_dict(state, strict=True, assign=True)
    model.config.dtype = torch.float32
    return model.eval()
