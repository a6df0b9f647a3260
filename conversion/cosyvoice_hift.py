"""Conversion of CosyVoice's HiFT vocoder, versions 1 to 3, and back.

`convert_cosyvoice.py` is the command line. A pack holds the vocoder as `hift.pt` and describes it under `hift` in its
yaml, whose class says the version: `HiFTGenerator` (1 and 2) or `CausalHiFTGenerator` (3). It is untrusted: see
`hf_speechllm.upstream`. The folder that is written appears complete or not at all.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from cosyvoice_pack import YAML_NAMES, find_yaml
from torch import Tensor

from hf_speechllm.models.configuration_cosyvoice3_hift import CosyVoice3HiftConfig
from hf_speechllm.models.configuration_cosyvoice_hift import CosyVoiceHiftConfig
from hf_speechllm.models.feature_extraction_cosyvoice_mel import CosyVoiceMelFeatureExtractor
from hf_speechllm.models.modeling_cosyvoice3_hift import CosyVoice3HiftModel, upstream_noise_state
from hf_speechllm.models.modeling_cosyvoice_hift import CosyVoiceHiftModel
from hf_speechllm.upstream.checkpoint_file import write_state_dict
from hf_speechllm.upstream.checkpoints import read_state_dict
from hf_speechllm.upstream.errors import ConversionError
from hf_speechllm.upstream.hyperpyyaml import Call, read_hyperpyyaml
from hf_speechllm.upstream.model_folder import require_model_type
from hf_speechllm.upstream.safetensors_file import read_safetensors, write_safetensors
from hf_speechllm.upstream.staging import sha256_of_file, sha256_of_files, staged_directory, write_report
from hf_speechllm.upstream.typed_config import ConfigReader


WEIGHTS_NAME = "hift.pt"
MODEL_NAME = "model.safetensors"
# What upstream's trainer adds to the weights.
TRAINING_SCALARS = frozenset({"epoch", "step"})

# ---------------------------------------------------------------------------------------------------------------------
# Keys of the yaml: key -> (our field, kind, default upstream).

KEYS = {
    "in_channels": ("num_mel_bins", "count", 80),
    "base_channels": ("hidden_size", "count", 512),
    "nb_harmonics": ("num_harmonics", "size", 8),
    "sampling_rate": ("sampling_rate", "count", 22050),
    "nsf_alpha": ("sine_amplitude", "number", 0.1),
    "nsf_sigma": ("noise_std", "number", 0.003),
    "nsf_voiced_threshold": ("voiced_threshold", "number", 10.0),
    "lrelu_slope": ("leaky_relu_slope", "number", 0.1),
    "audio_limit": ("audio_limit", "number", 0.99),
}
CAUSAL_KEYS = {"conv_pre_look_right": ("look_ahead_frames", "size", 4)}
# Lists of whole numbers, and of such lists: key -> (our field, default upstream).
LISTS = {
    "upsample_rates": ("upsample_rates", [8, 8]),
    "upsample_kernel_sizes": ("upsample_kernel_sizes", [16, 16]),
    "resblock_kernel_sizes": ("resblock_kernel_sizes", [3, 7, 11]),
    "source_resblock_kernel_sizes": ("source_resblock_kernel_sizes", [7, 11]),
}
NESTED_LISTS = {
    "resblock_dilation_sizes": ("resblock_dilation_sizes", [[1, 3, 5]] * 3),
    "source_resblock_dilation_sizes": ("source_resblock_dilation_sizes", [[1, 3, 5]] * 2),
}
ISTFT_KEYS = {"n_fft": ("istft_n_fft", "count", 16), "hop_len": ("istft_hop_length", "count", 4)}
F0_KEYS = {
    "num_class": ("num_class", "count", 1),
    "in_channels": ("num_mel_bins", "count", 80),
    "cond_channels": ("f0_hidden_size", "count", 512),
}
# Of `feat_extractor`, what the mel spectrograms of the pack are made with.
MEL_KEYS = {
    "n_fft": ("fft_length", "count", 1920),
    "num_mels": ("feature_size", "count", 80),
    "sampling_rate": ("sampling_rate", "count", 24000),
    "hop_size": ("hop_length", "count", 480),
    "fmin": ("low_freq", "number", 0),
    "fmax": ("high_freq", "optional number", None),
}
# Larger sizes are no model: some make modules before the first shape is compared, others overflow a shape.
MAX_LIST, MAX_LIST_ENTRY, MAX_WIDTH = 16, 1 << 12, 1 << 16

# At this sampling rate upstream's sine generator adds the phase up sample by sample.
SAMPLE_PHASE_RATE = 22050
# Frames of overlap in upstream's streaming (`mel_cache_len` of `cosyvoice/cli/model.py`), by the version. The third
# has none.
OVERLAP_FRAMES = dict(zip(YAML_NAMES, (20, 8, 8), strict=True))

# ---------------------------------------------------------------------------------------------------------------------
# Names of weights: patterns on upstream's side, in order, with what they are on ours.

NAMES = (
    (r"m_source\.l_linear\.", "source.proj."),
    (r"f0_predictor\.classifier\.", "f0_predictor.proj."),
    (r"ups\.(\d+)\.", r"upsampler.\1."),
    (r"(conv_pre|conv_post|(?:source_downs|source_resblocks|resblocks)\.\d+)\.", r"\1."),
)
F0_LAYER = re.compile(r"f0_predictor\.condnet\.(\d+)\.")
MAGNITUDE, DIRECTION = ".parametrizations.weight.original0", ".parametrizations.weight.original1"
# The state of our own noise has no place in upstream's file.
OURS_ALONE = {"fixed_noise.state"}


def read_config(settings: dict[str, object], path: Path, pack: Path) -> CosyVoiceHiftConfig:
    """Our configuration from a pack's yaml.

    Args:
        settings: what `read_hyperpyyaml` gives. path: the yaml, for messages. pack: its folder.

    Raises:
        ConversionError: no vocoder, another class, an unknown key, or a value that no vocoder can have.
    """
    call = _call(settings.get("hift"), ("HiFTGenerator", "CausalHiFTGenerator"), path, "hift")
    causal = call.name == "CausalHiFTGenerator"
    arguments = dict(call.arguments)
    lists = {
        field: _whole_numbers(arguments.pop(key, default), path, f"hift.{key}")
        for key, (field, default) in LISTS.items()
    }
    for key, (field, default) in NESTED_LISTS.items():
        rows = arguments.pop(key, default)
        if not isinstance(rows, list) or not 1 <= len(rows) <= MAX_LIST:
            raise ConversionError("bad value", file=path, key=f"hift.{key}", expected="lists", actual=repr(rows))
        lists[field] = [_whole_numbers(row, path, f"hift.{key}[{index}]") for index, row in enumerate(rows)]
    istft = arguments.pop("istft_params", {})
    f0_class = "CausalConvRNNF0Predictor" if causal else "ConvRNNF0Predictor"
    predictor = _call(arguments.pop("f0_predictor", None), (f0_class,), path, "hift.f0_predictor")
    reader = ConfigReader(
        {"hift": arguments, "hift.istft_params": istft, "hift.f0_predictor": predictor.arguments},
        path,
        {"hift.f0_predictor.num_class": 1},
    )
    fields = reader.read("hift", KEYS | (CAUSAL_KEYS if causal else {}), set())
    fields |= reader.read("hift.istft_params", ISTFT_KEYS, set())
    f0_fields = reader.read("hift.f0_predictor", F0_KEYS, set())
    reader.require("hift.f0_predictor.num_class", f0_fields.pop("num_class"))
    if f0_fields["num_mel_bins"] != fields["num_mel_bins"]:
        raise ConversionError(
            "sizes disagree",
            file=path,
            key="hift.f0_predictor.in_channels",
            expected=f"in_channels = {fields['num_mel_bins']}",
            actual=f0_fields["num_mel_bins"],
        )
    for name in ("hidden_size", "num_mel_bins", "num_harmonics"):
        if fields[name] > MAX_WIDTH:
            raise ConversionError(
                "bad value", file=path, key=name, expected=f"at most {MAX_WIDTH}", actual=fields[name]
            )
    fields |= f0_fields | lists
    fields["phase_interpolation"] = _phase(fields["sampling_rate"], causal)
    fields["overlap_frames"] = OVERLAP_FRAMES[path.name]
    if causal:
        fields["layers_before_noise"] = _layers_before_noise(settings.get("flow"), path)
    # Upstream's loop goes over the stages, and leaves out what its lists have beyond them.
    stages, kinds = len(lists["upsample_rates"]), len(lists["resblock_kernel_sizes"])
    for name, count in (
        ("upsample_kernel_sizes", stages),
        ("source_resblock_kernel_sizes", stages),
        ("source_resblock_dilation_sizes", stages),
        ("resblock_dilation_sizes", kinds),
    ):
        fields[name] = fields[name][:count]
    try:
        return CosyVoice3HiftConfig(**fields) if causal else CosyVoiceHiftConfig(**fields)
    except ValueError as error:
        raise ConversionError("contradictory configuration", file=path, key="hift", actual=str(error)) from None


def read_extractor(
    settings: dict[str, object], config: CosyVoiceHiftConfig, path: Path
) -> CosyVoiceMelFeatureExtractor:
    """The extractor of the spectrograms that the vocoder speaks; the published one where the yaml has none.

    Raises:
        ConversionError: another function, an unknown key, or spectrograms that are not the vocoder's.
    """
    call = settings.get("feat_extractor")
    if call is None:
        return CosyVoiceMelFeatureExtractor(
            config.num_mel_bins,
            config.sampling_rate,
            fft_length=4 * config.hop_length,
            hop_length=config.hop_length,
            high_freq=None if config.is_causal else min(8000.0, config.sampling_rate / 2),
        )
    if not isinstance(call, Call) or call.name != "mel_spectrogram" or not isinstance(call.arguments, dict):
        raise ConversionError(
            "not supported", file=path, key="feat_extractor", expected="!name: of mel_spectrogram", actual=repr(call)
        )
    windows = {key: call.arguments.get(key) for key in ("win_size", "n_fft")}
    required = {"feat_extractor.center": False, "feat_extractor.win_size": windows["n_fft"]}
    fields = ConfigReader({"feat_extractor": call.arguments}, path, required).read("feat_extractor", MEL_KEYS, set())
    for field, expected in (
        ("feature_size", config.num_mel_bins),
        ("sampling_rate", config.sampling_rate),
        ("hop_length", config.hop_length),
    ):
        if fields[field] != expected:
            raise ConversionError(
                "not the vocoder's",
                file=path,
                key=f"feat_extractor ({field})",
                expected=expected,
                actual=fields[field],
            )
    return CosyVoiceMelFeatureExtractor(**fields)


def _layers_before_noise(flow: object, path: Path) -> list[list[int]] | None:
    """Sizes of the flow's layers in a complete pack; `None`, the published ones, where the yaml has no flow."""
    if not isinstance(flow, Call) or not isinstance(flow.arguments, dict):
        return None
    reader = ConfigReader({}, path, {})
    vocabulary, width, speaker, output = (
        reader.value(f"flow.{key}", flow.arguments.get(key, default), "count")
        for key, default in (("vocab_size", 4096), ("input_size", 512), ("spk_embed_dim", 192), ("output_size", 80))
    )
    return [[vocabulary, width], [speaker, output]]


def _phase(sampling_rate: int, causal: bool) -> str:
    if sampling_rate == SAMPLE_PHASE_RATE:
        return "sample"
    return "nearest" if causal else "linear"


def _call(value: object, classes: tuple[str, ...], path: Path, key: str) -> Call:
    if not isinstance(value, Call) or value.kind != "new" or value.name not in classes:
        raise ConversionError(
            "not supported",
            file=path,
            key=key,
            expected=f"!new: of {' or '.join(classes)}",
            actual=f"!{value.kind}:{value.target}" if isinstance(value, Call) else repr(value),
        )
    if not isinstance(value.arguments, dict):
        raise ConversionError("arguments are not named", file=path, key=key, actual=repr(value.arguments))
    return value


def _whole_numbers(value: object, path: Path, key: str) -> list[int]:
    if (
        not isinstance(value, list)
        or not 1 <= len(value) <= MAX_LIST
        or not all(type(number) is int and 1 <= number <= MAX_LIST_ENTRY for number in value)
    ):
        raise ConversionError(
            "bad value", file=path, key=key, expected=f"1..{MAX_LIST} whole numbers", actual=repr(value)
        )
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Weights.


def our_name(name: str) -> str | None:
    """Our name of upstream's weight `name`; `None` if it has none."""
    if match := F0_LAYER.match(name):
        number = int(match[1])
        # Convolutions and activations take turns.
        return None if number % 2 else f"f0_predictor.layers.{number // 2}.{name[match.end() :]}"
    for pattern, ours in NAMES:
        if match := re.match(pattern, name):
            return match.expand(ours) + name[match.end() :]
    return None


def build_on_meta(config: CosyVoiceHiftConfig) -> CosyVoiceHiftModel:
    """The model of `config` without memory."""
    model_class = CosyVoice3HiftModel if isinstance(config, CosyVoice3HiftConfig) else CosyVoiceHiftModel
    with torch.device("meta"):
        return model_class(config)


def convert_weights(state: dict[str, Tensor], config: CosyVoiceHiftConfig, path: Path) -> dict[str, Tensor]:
    """Upstream's weights under our names, as many as the model has.

    Those of a GAN training (`generator.`, with `discriminator.` beside) are taken, too. The noise of version 3 is
    added: upstream has it in no file. With `config.weight_norm` false magnitudes and directions become plain weights,
    which are faster and go back as weights of the same function instead of the same numbers.

    Raises:
        ConversionError: a weight too many or too few, of another shape or not float32; named in the message.
    """
    weights: dict[str, Tensor] = {}
    theirs: dict[str, str] = {}
    for name, tensor in state.items():
        if name.startswith("discriminator.") or name in TRAINING_SCALARS:
            continue
        ours = our_name(name.removeprefix("generator."))
        if ours is None or ours in weights:
            raise ConversionError("unknown weight", file=path, key=name, actual=tuple(tensor.shape))
        if tensor.dtype != torch.float32:
            raise ConversionError("type of weights", file=path, key=name, expected="float32", actual=tensor.dtype)
        weights[ours], theirs[ours] = tensor, name
    if not config.weight_norm:
        for name in [name for name in weights if name.endswith(DIRECTION)]:
            module = name.removesuffix(DIRECTION)
            weights[f"{module}.weight"] = _fold(
                weights.pop(name), weights.pop(module + MAGNITUDE, None), path, theirs[name]
            )
            theirs[f"{module}.weight"] = theirs[name]
    expected = build_on_meta(config).state_dict()
    if "fixed_noise.state" in expected:
        weights["fixed_noise.state"] = upstream_noise_state(config)
    for name, tensor in expected.items():
        if name not in weights:
            raise ConversionError("weight is missing", file=path, key=name, expected=tuple(tensor.shape))
        if weights[name].shape != tensor.shape:
            raise ConversionError(
                "shape",
                file=path,
                key=theirs[name],
                expected=tuple(tensor.shape),
                actual=tuple(weights[name].shape),
            )
    for name in weights:
        if name not in expected:
            raise ConversionError("unknown weight", file=path, key=theirs[name], actual=tuple(weights[name].shape))
    return {name: weights[name] for name in expected}


def _fold(direction: Tensor, magnitude: Tensor | None, path: Path, name: str) -> Tensor:
    """The plain weight, multiplied in double precision."""
    expected = (direction.shape[0],) + (1,) * (direction.dim() - 1)
    actual = None if magnitude is None else tuple(magnitude.shape)
    if direction.dim() < 2 or actual != expected:
        raise ConversionError("magnitude of a weight", file=path, key=name, expected=expected, actual=actual)
    weight = torch._weight_norm(direction.double(), magnitude.double(), 0).float()
    if not bool(torch.isfinite(weight).all()):
        raise ConversionError("weight without direction", file=path, key=name, actual="a row of zeros")
    return weight


def restore_weights(weights: dict[str, Tensor], config: CosyVoiceHiftConfig) -> dict[str, Tensor]:
    """Our weights under upstream's names, float32. Folded weights become a direction of their own magnitude."""
    state: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name in OURS_ALONE:
            continue
        theirs = upstream_name(name)
        tensor = tensor.float()
        if not config.weight_norm and is_normalized(theirs):
            module = theirs.removesuffix(".weight")
            magnitude = torch.norm_except_dim(tensor, 2, 0)
            state[module + MAGNITUDE] = magnitude
            # Zeros have no direction, and any will do.
            state[module + DIRECTION] = torch.where(magnitude > 0, tensor, 1.0)
        else:
            state[theirs] = tensor
    return state


def is_normalized(theirs: str) -> bool:
    """Whether upstream keeps the weight of this name as magnitude and direction."""
    plain = theirs.startswith(("source_downs.", "m_source.", "f0_predictor.classifier."))
    return theirs.endswith(".weight") and not plain


def upstream_name(name: str) -> str:
    """Upstream's name of our weight `name`."""
    if match := re.match(r"f0_predictor\.layers\.(\d+)\.", name):
        return f"f0_predictor.condnet.{2 * int(match[1])}.{name[match.end() :]}"
    for ours, theirs in (
        ("source.proj.", "m_source.l_linear."),
        ("f0_predictor.proj.", "f0_predictor.classifier."),
        ("upsampler.", "ups."),
    ):
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    return name


# ---------------------------------------------------------------------------------------------------------------------
# The vocoder alone.


def convert(pack: Path, out: Path, fold_weight_norm: bool = False) -> dict[str, object]:
    """Converts the vocoder of the folder `pack` to a folder that `AutoModel` loads.

    Args:
        out: must not exist or be empty; its parent must exist.
        fold_weight_norm: write plain weights, see [`convert_weights`].
    Returns:
        The report, which is also written as `conversion_report.json`.
    Raises:
        ConversionError: a key, value, weight or shape that the model does not have, named in the message.
        UnsafeArtifactError: a file that is hostile or damaged.
    """
    path, weights_path = find_yaml(pack), pack / WEIGHTS_NAME
    settings = read_hyperpyyaml(path)
    config = read_config(settings, path, pack)
    config.weight_norm = not fold_weight_norm
    extractor = read_extractor(settings, config, path)
    state = read_state_dict(weights_path, allowed_scalars=TRAINING_SCALARS)
    weights = convert_weights(state, config, weights_path)
    config.architectures, config.dtype = [type(build_on_meta(config)).__name__], torch.float32
    report: dict[str, object] = {
        "converter": "cosyvoice_hift",
        "model_type": config.model_type,
        "parameters": sum(tensor.numel() for name, tensor in weights.items() if name not in OURS_ALONE),
        "ignored_weights": sorted(name for name in state if name.startswith("discriminator.")),
        "warnings": [],
        "inputs": {file.name: sha256_of_file(file) for file in (path, weights_path)},
    }
    with staged_directory(out) as stage:
        build_on_meta(config).save_pretrained(stage, state_dict={})
        write_safetensors(stage / MODEL_NAME, weights)
        extractor.save_pretrained(stage)
        write_report(stage, report)
    return report


def restore(model_dir: Path, pack: Path) -> dict[str, object]:
    """Writes the model folder `model_dir` as `hift.pt` in a new folder `pack`: the inverse of [`convert`].

    Raises:
        ConversionError: the folder is none of such a model, or `pack` is in the way.
    """
    config = load_config(model_dir)
    state = restore_weights(read_safetensors(model_dir / MODEL_NAME), config)
    with staged_directory(pack) as stage:
        write_state_dict(stage / WEIGHTS_NAME, state)
        outputs = sha256_of_files(stage)
    return {"converter": "cosyvoice_hift", "direction": "reverse", "warnings": [], "outputs": outputs}


def load_config(model_dir: Path) -> CosyVoiceHiftConfig:
    """The configuration of a folder with such a model.

    Raises:
        ConversionError: it is none.
    """
    kinds = {kind.model_type: kind for kind in (CosyVoiceHiftConfig, CosyVoice3HiftConfig)}
    return kinds[require_model_type(model_dir, kinds)].from_pretrained(model_dir, local_files_only=True)
