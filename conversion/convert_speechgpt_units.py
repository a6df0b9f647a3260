"""Conversion of a fairseq HuBERT and its k-means centres to a `speechgpt_units` folder.

`convert_speechgpt.py` is the command line. A pack is a folder with one fairseq checkpoint (`.pt`) and one k-means
model of scikit-learn (`.bin`, `.km`, `.joblib`), as SpeechGPT has them in `utils/speech2unit`. It is untrusted:
neither file is unpickled, see `hf_speechllm.upstream`. The folder that is written appears complete or not at all.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import torch
from transformers import HubertConfig, Wav2Vec2FeatureExtractor

from hf_speechllm.models.configuration_speechgpt_units import SpeechGptUnitsConfig
from hf_speechllm.models.modeling_speechgpt_units import SpeechGptUnitsModel
from hf_speechllm.upstream.errors import ConversionError
from hf_speechllm.upstream.fairseq_checkpoint import FairseqCheckpoint, read_fairseq_checkpoint
from hf_speechllm.upstream.joblib_kmeans import read_kmeans_centres
from hf_speechllm.upstream.staging import sha256_of_file, staged_directory, write_report
from hf_speechllm.upstream.typed_config import ConfigReader


CHECKPOINT_SUFFIXES = (".pt", ".pth")
KMEANS_SUFFIXES = (".bin", ".km", ".joblib")

# ---------------------------------------------------------------------------------------------------------------------
# Keys of the checkpoint's configuration: key -> (field of HubertConfig, kind, default upstream).

MODEL_KEYS = {
    "extractor_mode": ("feat_extract_norm", {"default": "group", "layer_norm": "layer"}, "default"),
    "encoder_layers": ("num_hidden_layers", "count", 12),
    "encoder_embed_dim": ("hidden_size", "count", 768),
    "encoder_ffn_embed_dim": ("intermediate_size", "count", 3072),
    "encoder_attention_heads": ("num_attention_heads", "count", 12),
    "activation_fn": (
        "hidden_act",
        {
            "gelu": "gelu",
            "gelu_accurate": "gelu_new",
            "gelu_fast": "gelu_new",
            "linear": "linear",
            "relu": "relu",
            "relu_squared": "relu2",
            "tanh": "tanh",
        },
        "gelu",
    ),
    "layer_norm_first": ("do_stable_layer_norm", "flag", False),
    "conv_feature_layers": ("conv_layers", "text", "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2"),
    "conv_bias": ("conv_bias", "flag", False),
    "conv_pos": ("num_conv_pos_embeddings", "count", 128),
    "conv_pos_groups": ("num_conv_pos_embedding_groups", "count", 16),
    "conv_pos_batch_norm": ("conv_pos_batch_norm", "flag", False),
}
TASK_KEYS = {"normalize": ("normalize", "flag", False), "sample_rate": ("sampling_rate", "count", 16000)}

# Known keys that change nothing while features are computed: what training hides, drops or predicts.
IGNORED_MODEL_KEYS = {
    *("activation_dropout", "attention_dropout", "dropout", "dropout_features", "dropout_input", "encoder_layerdrop"),
    *("feature_grad_mult", "final_dim", "label_rate", "latent_temp", "logit_temp", "target_glu", "untie_final_proj"),
    *("mask_channel_length", "mask_channel_min_space", "mask_channel_other", "mask_channel_prob"),
    *("mask_channel_selection", "mask_length", "mask_min_space", "mask_other", "mask_prob", "mask_selection"),
    *(
        "no_mask_channel_overlap",
        "no_mask_overlap",
        "require_same_masks",
        "skip_masked",
        "skip_nomask",
        "mask_dropout",
    ),
    *("checkpoint_activations", "crop_seq_to_multiple", "ddp_backend", "depthwise_conv_kernel_size", "fp16"),
    # A sequence is filled up to a multiple of it, and the filling masked.
    "required_seq_len_multiple",
}
IGNORED_TASK_KEYS = {
    *("_name", "data", "enable_padding", "fine_tuning", "label_dir", "label_rate", "labels", "max_keep_size"),
    *("max_sample_size", "min_sample_size", "pad_audio", "random_crop", "single_target"),
}
# Values that must be these when the key is present, because they are all that the model can do.
REQUIRED_VALUES = {
    "model._name": "hubert",
    "model.attn_type": "",
    "model.layer_type": "transformer",
    "model.pos_conv_depth": 1,
    "model.pos_enc_type": "abs",
}

# ---------------------------------------------------------------------------------------------------------------------
# Names of weights, in the order in which they are tried.

WEIGHT_NAMES = [
    (re.compile(rf"{theirs}\.(weight|bias)"), rf"{ours}.{{name}}")
    for theirs, ours in (
        (r"feature_extractor\.conv_layers\.(\d+)\.0", "feature_extractor.conv_layers.{0}.conv"),
        # Group norm stands at place 2; layer norm there between two transpositions.
        (r"feature_extractor\.conv_layers\.(\d+)\.2(?:\.1)?", "feature_extractor.conv_layers.{0}.layer_norm"),
        (r"layer_norm", "feature_projection.layer_norm"),
        (r"post_extract_proj", "feature_projection.projection"),
        (r"encoder\.layer_norm", "encoder.layer_norm"),
        (r"encoder\.layers\.(\d+)\.self_attn\.(k_proj|v_proj|q_proj|out_proj)", "encoder.layers.{0}.attention.{1}"),
        (r"encoder\.layers\.(\d+)\.self_attn_layer_norm", "encoder.layers.{0}.layer_norm"),
        (r"encoder\.layers\.(\d+)\.fc1", "encoder.layers.{0}.feed_forward.intermediate_dense"),
        (r"encoder\.layers\.(\d+)\.fc2", "encoder.layers.{0}.feed_forward.output_dense"),
        (r"encoder\.layers\.(\d+)\.final_layer_norm", "encoder.layers.{0}.final_layer_norm"),
    )
]
POSITION_NAMES = {
    "encoder.pos_conv.0.bias": "encoder.pos_conv_embed.conv.bias",
    "encoder.pos_conv.0.weight_g": "encoder.pos_conv_embed.conv.parametrizations.weight.original0",
    "encoder.pos_conv.0.weight_v": "encoder.pos_conv_embed.conv.parametrizations.weight.original1",
}
BATCH_NORM_POSITION_NAMES = {
    f"encoder.pos_conv.{place}.{name}": f"encoder.pos_conv_embed.{module}.{name}"
    for place, module, names in (
        (0, "batch_norm", ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
        (1, "conv", ("weight", "bias")),
    )
    for name in names
}
# Of the pre-training: what masks frames, and the heads that predict clusters.
IGNORED_WEIGHTS = re.compile(r"mask_emb|label_embs_concat|final_proj\..+|target_glu\..+")
PROJECTION = "feature_projection.projection"

# ---------------------------------------------------------------------------------------------------------------------
# The pack


def find_units_files(pack: Path) -> tuple[Path, Path]:
    """The checkpoint and the k-means file of a folder.

    Raises:
        ConversionError: none of a kind, or several.
    """
    found = []
    for kind, suffixes in (("fairseq checkpoint", CHECKPOINT_SUFFIXES), ("k-means model", KMEANS_SUFFIXES)):
        files = sorted(path for path in pack.iterdir() if path.suffix in suffixes)
        if len(files) != 1:
            raise ConversionError(
                f"no single {kind}",
                file=pack,
                expected=f"one file ending in {' or '.join(suffixes)}",
                actual=[path.name for path in files],
            )
        found.append(files[0])
    return found[0], found[1]


def convert_units_pack(pack: str | Path, out_dir: str | Path, layer: int | None = None) -> dict[str, object]:
    """Converts a folder with a fairseq HuBERT and its k-means centres to a folder that `AutoModel` loads.

    Args:
        pack: the folder. out_dir: must not exist or be empty; its parent must exist.
        layer: the layer whose output the centres divide, from 1; default: the number in the name of the k-means file,
            `..._L11_km1000.bin`.
    Returns:
        The report, which is also written as `conversion_report.json`: names and SHA-256 of inputs and outputs, ignored
        keys and weights, warnings.
    Raises:
        ConversionError: a key, value, weight or shape that the model does not have, named in the message.
        UnsafeArtifactError: a file that is hostile or damaged.
    """
    checkpoint_path, kmeans_path = find_units_files(Path(pack))
    warnings = []
    named = re.search(r"[_-]L(\d{1,4})[_-]km(\d{1,7})(?!\d)", kmeans_path.name)
    if layer is None:
        if named is None:
            raise ConversionError(
                "the layer is not known", file=kmeans_path, expected="a name like …_L11_km1000.bin, or --layer"
            )
        layer = int(named[1])
    centres = read_kmeans_centres(kmeans_path)
    if named is not None and (int(named[1]), int(named[2])) != (layer, len(centres)):
        warnings.append(
            f"{kmeans_path.name}: the name says layer {named[1]} and {named[2]} clusters; taken: layer {layer}, "
            f"{len(centres)} clusters"
        )
    checkpoint = read_fairseq_checkpoint(checkpoint_path)
    hubert_fields, task_fields, ignored = _read_config(checkpoint)
    _check_sizes(checkpoint, hubert_fields, centres, kmeans_path, layer)
    try:
        config = SpeechGptUnitsConfig(
            hubert_config=HubertConfig(**hubert_fields), layer=layer, num_units=len(centres), **task_fields
        )
    except ValueError as error:
        raise ConversionError("contradictory configuration", file=checkpoint_path, actual=str(error)) from None
    weights, dropped = from_upstream_state_dict(checkpoint.weights, hubert_fields, checkpoint_path)
    model = _load(weights, centres, config, checkpoint_path)
    extractor = Wav2Vec2FeatureExtractor(
        sampling_rate=config.sampling_rate, do_normalize=False, return_attention_mask=True
    )
    report: dict[str, object] = {
        "converter": "speechgpt",
        "upstream_model": "hubert + k-means",
        "model_type": config.model_type,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layer": layer,
        "num_units": len(centres),
        "ignored_keys": ignored,
        "ignored_weights": dropped,
        "warnings": warnings,
        "inputs": {path.name: sha256_of_file(path) for path in (checkpoint_path, kmeans_path)},
    }
    with staged_directory(out_dir) as stage:
        model.save_pretrained(stage)
        extractor.save_pretrained(stage)
        write_report(stage, report)
    return report


def _read_config(checkpoint: FairseqCheckpoint) -> tuple[dict[str, object], dict[str, object], list[str]]:
    """Fields of `HubertConfig`, of our configuration, and the keys that were ignored."""
    sections = {"model": dict(checkpoint.model_config), "task": dict(checkpoint.task_config)}
    if sections["model"].get("_name") is None:  # the name of a model is what the toolkit adds
        sections["model"].pop("_name", None)
    if checkpoint.from_arguments:
        # One namespace has the options of the whole toolkit; only those of the network and the task count.
        wanted = {"model": set(MODEL_KEYS), "task": set(TASK_KEYS)}
        wanted["model"] |= {key.partition(".")[2] for key in REQUIRED_VALUES}
        sections = {
            name: {key: value for key, value in section.items() if key in wanted[name]}
            for name, section in sections.items()
        }
    reader = ConfigReader(sections, checkpoint.path, REQUIRED_VALUES)
    fields = reader.read("model", MODEL_KEYS, IGNORED_MODEL_KEYS)
    task = reader.read("task", TASK_KEYS, IGNORED_TASK_KEYS)
    layers = parse_conv_layers(fields.pop("conv_layers"), checkpoint.path)
    fields["conv_dim"], fields["conv_kernel"], fields["conv_stride"] = (
        [*column] for column in zip(*layers, strict=True)
    )
    fields |= {
        "feat_extract_activation": "gelu",
        "feat_proj_layer_norm": True,
        "layer_norm_eps": 1e-5,
        # Nothing of a training happens in this model.
        **dict.fromkeys(("activation_dropout", "attention_dropout", "feat_proj_dropout", "final_dropout"), 0.0),
        **dict.fromkeys(("hidden_dropout", "layerdrop", "mask_feature_prob", "mask_time_prob"), 0.0),
    }
    return fields, task, sorted(reader.ignored)


def parse_conv_layers(text: str, path: Path) -> list[tuple[int, int, int]]:
    """`"[(512,10,5)] + [(512,3,2)] * 4"` to (width, kernel, stride) of each layer. Upstream evaluates it as Python.

    Raises:
        ConversionError: anything but sums of lists of three whole numbers, times whole numbers.
    """

    def layers_of(node: ast.expr) -> list[tuple[int, int, int]]:
        match node:
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return layers_of(left) + layers_of(right)
            case ast.BinOp(left=left, op=ast.Mult(), right=ast.Constant(value=int(times))) if 0 <= times <= 64:
                return layers_of(left) * times
            case ast.List(elts=items):
                return [layer_of(item) for item in items]
        raise ValueError(ast.dump(node))

    def layer_of(node: ast.expr) -> tuple[int, int, int]:
        match node:
            case ast.Tuple(elts=[ast.Constant(int(width)), ast.Constant(int(kernel)), ast.Constant(int(stride))]):
                if min(width, kernel, stride) >= 1 and max(width, kernel, stride) <= 1 << 16:
                    return width, kernel, stride
        raise ValueError(ast.dump(node))

    try:
        if len(text) > 1000:
            raise ValueError("too long")
        layers = layers_of(ast.parse(text.strip(), mode="eval").body)
        if not 1 <= len(layers) <= 64:
            raise ValueError(f"{len(layers)} layers")
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise ConversionError(
            "not supported",
            file=path,
            key="model.conv_feature_layers",
            expected="lists of (width, kernel, stride)",
            actual=f"{text!r}: {type(error).__name__}",
        ) from None
    return layers


def _check_sizes(
    checkpoint: FairseqCheckpoint, fields: dict[str, object], centres: torch.Tensor, kmeans_path: Path, layer: int
) -> None:
    """Compares what decides how much is built with the weights, before building."""

    def count(prefix: str) -> int:
        pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
        return len({match[1] for name in checkpoint.weights if (match := pattern.match(name))})

    for key, expected, actual in (
        ("encoder.layers", fields["num_hidden_layers"], count("encoder.layers")),
        ("feature_extractor.conv_layers", len(fields["conv_dim"]), count("feature_extractor.conv_layers")),
    ):
        if expected != actual:
            raise ConversionError(
                "configuration and weights disagree", file=checkpoint.path, key=key, expected=expected, actual=actual
            )
    size, width = fields["hidden_size"], fields["intermediate_size"]
    for name, shape in (
        ("feature_extractor.conv_layers.0.0.weight", (fields["conv_dim"][0], 1, fields["conv_kernel"][0])),
        ("encoder.layers.0.fc1.weight", (width, size)),
        ("layer_norm.weight", (fields["conv_dim"][-1],)),
    ):
        actual = tuple(checkpoint.weights[name].shape) if name in checkpoint.weights else "missing"
        if actual != shape:
            raise ConversionError(
                "configuration and weights disagree", file=checkpoint.path, key=name, expected=shape, actual=actual
            )
    if centres.shape[1] != size:
        raise ConversionError(
            "the centres are not of this network",
            file=kmeans_path,
            key="cluster_centers_",
            expected=f"(clusters, {size})",
            actual=tuple(centres.shape),
        )
    if not 1 <= layer <= fields["num_hidden_layers"]:
        raise ConversionError(
            "no such layer",
            file=checkpoint.path,
            key="layer",
            expected=f"1..{fields['num_hidden_layers']}",
            actual=layer,
        )


def from_upstream_state_dict(
    state: dict[str, torch.Tensor], fields: dict[str, object], path: Path
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """fairseq's tensors under the names of `HubertModel`, and the names of those that it has no use for.

    Raises:
        ConversionError: a weight that the model does not have.
    """
    position = BATCH_NORM_POSITION_NAMES if fields["conv_pos_batch_norm"] else POSITION_NAMES
    weights: dict[str, torch.Tensor] = {}
    dropped = []
    for name, tensor in state.items():
        if IGNORED_WEIGHTS.fullmatch(name):
            dropped.append(name)
        elif name in position:
            weights[position[name]] = tensor
        else:
            for pattern, ours in WEIGHT_NAMES:
                if match := pattern.fullmatch(name):
                    *numbers, part = match.groups()
                    weights[ours.format(*numbers, name=part)] = tensor
                    break
            else:
                raise ConversionError("unknown weight", file=path, key=name, actual=tuple(tensor.shape))
    if f"{PROJECTION}.weight" not in weights and fields["conv_dim"][-1] == fields["hidden_size"]:
        # Upstream projects only where the widths differ; transformers always does.
        weights[f"{PROJECTION}.weight"] = torch.eye(fields["hidden_size"])
        weights[f"{PROJECTION}.bias"] = torch.zeros(fields["hidden_size"])
    return weights, sorted(dropped)


def _load(
    weights: dict[str, torch.Tensor], centres: torch.Tensor, config: SpeechGptUnitsConfig, path: Path
) -> SpeechGptUnitsModel:
    """Builds the model, compares names and shapes, then gives it the weights, in float32 as upstream computes."""
    try:
        with torch.device("meta"):
            model = SpeechGptUnitsModel(config)
    except ValueError as error:  # of heads or groups that do not divide the width
        raise ConversionError("contradictory configuration", file=path, actual=str(error)) from None
    expected = model.hubert.state_dict()
    for name, tensor in expected.items():
        actual = tuple(weights[name].shape) if name in weights else "missing"
        if actual != tuple(tensor.shape):
            raise ConversionError("shape", file=path, key=name, expected=tuple(tensor.shape), actual=actual)
    for name, tensor in weights.items():
        if name not in expected:
            raise ConversionError("unknown weight", file=path, key=name, actual=tuple(tensor.shape))
    state = {
        f"hubert.{name}": (tensor.float() if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in weights.items()
    }
    model.load_state_dict(state | {"codebook": centres}, strict=True, assign=True)
    model.config.dtype = torch.float32
    return model.eval()
