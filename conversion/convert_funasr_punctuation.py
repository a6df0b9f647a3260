"""Conversion of a CT-Transformer pack of FunASR (punctuation) to a transformers folder, and back.

`convert_funasr.py` is the command line; it calls these functions for a pack whose `config.yaml` says
`model: CTTransformer`, and for a folder whose `config.json` says `funasr_ct_transformer`. A pack holds `model.pt`,
`config.yaml`, `configuration.json` and `tokens.json`. It is untrusted: see `hf_speechllm.upstream`. The folder that is
written appears complete or not at all.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
import yaml
from convert_sensevoice import LAYER_NAMES
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_speechllm.models.configuration_funasr_ct_transformer import FunasrCtTransformerConfig
from hf_speechllm.models.modeling_funasr_ct_transformer import FunasrCtTransformerForTokenClassification
from hf_speechllm.upstream.checkpoints import read_state_dict
from hf_speechllm.upstream.errors import ConversionError
from hf_speechllm.upstream.funasr_pack import FunasrPack, open_funasr_pack, read_token_list, write_token_list
from hf_speechllm.upstream.safetensors_file import write_safetensors
from hf_speechllm.upstream.staging import sha256_of_file, sha256_of_files, staged_directory, write_report
from hf_speechllm.upstream.typed_config import ConfigReader


UPSTREAM_MODEL = "CTTransformer"
MAX_LABELS = 1000

# ---------------------------------------------------------------------------------------------------------------------
# Keys of config.yaml: key -> (our field, kind, default upstream).

MODEL_KEYS = {
    "embed_unit": ("input_size", "count", 128),
    "att_unit": ("hidden_size", "count", 256),
    "sentence_end_id": ("sentence_end_id", "size", 3),
}
ENCODER_KEYS = {
    "attention_heads": ("num_attention_heads", "count", 4),
    "linear_units": ("intermediate_size", "count", 2048),
    "num_blocks": ("num_hidden_layers", "count", 6),
    "dropout_rate": ("hidden_dropout", "rate", 0.1),
    "attention_dropout_rate": ("attention_dropout", "rate", 0.0),
    "kernel_size": ("fsmn_kernel_size", "count", 11),
    "sanm_shfit": ("fsmn_shift", "size", 0),
}
# Sizes that are written twice.
ENCODER_SIZES = {"input_size": ("input_size", "count", 256), "output_size": ("hidden_size", "count", 256)}

# Known keys that change nothing in the converted model; the two lists are read apart.
IGNORED_MODEL_KEYS = {"dropout_rate", "eos", "ignore_id", "punc_list", "punc_weight", "sos"}
IGNORED_ENCODER_KEYS = {"padding_idx", "pos_enc_class", "positional_dropout_rate"}
IGNORED_TOKENIZER_KEYS = {"split_with_space", "token_list", "unk_symbol"}
IGNORED_KEYS = {
    *("dataset", "dataset_conf", "frontend", "frontend_conf", "optim", "optim_conf", "scheduler", "scheduler_conf"),
    *("specaug", "specaug_conf", "train_conf"),
    # What the toolkit adds when it writes the configuration of a run.
    *("batch_size", "debug", "device", "disable_log", "disable_update", "enable_tf32", "excludes", "hub"),
    *("hub_revision", "init_param", "is_training", "model_path", "model_revision", "ncpu", "ngpu", "output_dir"),
    *("seed", "tokenizer_path", "trust_remote_code"),
}
# Values that must be these when the key is present, because they are all that the model can do.
REQUIRED_VALUES = {
    "encoder": "SANMEncoder",
    "encoder_conf.concat_after": False,
    "encoder_conf.input_layer": "pe",
    "encoder_conf.normalize_before": True,
    "encoder_conf.selfattention_layer_type": "sanm",
    "model": UPSTREAM_MODEL,
    "tokenizer": "CharTokenizer",
}

# ---------------------------------------------------------------------------------------------------------------------
# Names of weights. `linear_q_k_v` is three projections in one; the names inside of a layer are those of SenseVoice.

OTHER_NAMES = {
    "embed.weight": "embed_tokens.weight",
    "decoder.weight": "classifier.weight",
    "decoder.bias": "classifier.bias",
}
_LAYER = re.compile(r"encoder\.(encoders0|encoders)\.(\d{1,4})\.(.+)")
_FUSED = re.compile(r"self_attn\.linear_q_k_v\.(weight|bias)")
_NORM = re.compile(r"encoder\.after_norm\.(weight|bias)")

# ---------------------------------------------------------------------------------------------------------------------
# FunASR -> transformers


def convert_punctuation_pack(pack: str | Path | FunasrPack, out_dir: str | Path) -> dict[str, object]:
    """Converts a CT-Transformer pack to a folder `out_dir` that `AutoModel` and `AutoTokenizer` load.

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
    for key, path in pack.files.items():
        if key.endswith("jieba_usr_dict"):
            raise ConversionError("words of a jieba dictionary are not supported", file=path, key=key)
    weights_path, tokens_path = pack.file("init_param"), pack.file("tokenizer_conf.token_list")
    tokens = read_token_list(tokens_path)
    fields, unk_token, ignored = _read_architecture(pack)
    if unk_token not in tokens:
        raise ConversionError("unknown token is not in the token list", file=tokens_path, key=unk_token)
    try:
        config = FunasrCtTransformerConfig(vocab_size=len(tokens), **fields)
    except ValueError as error:
        raise ConversionError("contradictory configuration", file=pack.config_path, actual=str(error)) from None
    state = read_state_dict(weights_path, wrappers=("state_dict", "model_state_dict", "model"))
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    weights = from_upstream_state_dict(state, config, weights_path)
    with torch.device("meta"):
        model = FunasrCtTransformerForTokenClassification(config)
    _check_weights(weights, model.state_dict(), weights_path)
    model.config.dtype = next(iter(weights.values())).dtype
    report: dict[str, object] = {
        "converter": "funasr",
        "model": UPSTREAM_MODEL,
        "model_type": config.model_type,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "ignored_keys": ignored,
        "inputs": {path.name: sha256_of_file(path) for path in sorted({pack.config_path, weights_path, tokens_path})},
    }
    with staged_directory(out_dir) as stage:
        # The weights are memory mapped and go from file to file.
        model.save_pretrained(stage, state_dict={})
        write_safetensors(stage / "model.safetensors", weights)
        build_word_tokenizer(tokens, unk_token).save_pretrained(stage)
        write_report(stage, report)
    return report


def build_word_tokenizer(tokens: dict[str, int], unk_token: str) -> PreTrainedTokenizerFast:
    """A tokenizer of words between spaces, in which every character beyond ASCII is a word of its own."""
    tokenizer = Tokenizer(models.WordLevel(dict(tokens), unk_token=unk_token))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[^\\x00-\\x7f]"), "isolated")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unk_token)


def _read_architecture(pack: FunasrPack) -> tuple[dict[str, object], str, list[str]]:
    """Fields of the configuration, the unknown token, and the keys that were ignored."""
    reader = ConfigReader(pack.config, pack.config_path, REQUIRED_VALUES)
    for key in ("encoder", "model", "tokenizer"):
        reader.used.add(key)
        if key in reader.configs or key != "tokenizer":
            reader.require(key, reader.configs.get(key))
    fields = reader.read("model_conf", MODEL_KEYS, IGNORED_MODEL_KEYS)
    encoder = reader.read("encoder_conf", ENCODER_KEYS | ENCODER_SIZES, IGNORED_ENCODER_KEYS)
    for key, (field, _, _) in ENCODER_SIZES.items():
        if encoder[field] != fields[field]:
            raise ConversionError(
                "sizes disagree",
                file=reader.path,
                key=f"encoder_conf.{key}",
                expected=fields[field],
                actual=encoder[field],
            )
    reader.read("tokenizer_conf", {}, IGNORED_TOKENIZER_KEYS)
    unk_token = reader.section("tokenizer_conf").get("unk_symbol", "<unk>")
    reader.value("tokenizer_conf.unk_symbol", unk_token, "text")
    content = reader.section("model_conf")
    marks, weights = content.get("punc_list"), content.get("punc_weight")
    if (
        not isinstance(marks, list)
        or not 0 < len(marks) <= MAX_LABELS
        or not all(isinstance(mark, str) and mark for mark in marks)
        or len(set(marks)) != len(marks)
    ):
        raise ConversionError(
            "bad value", file=reader.path, key="model_conf.punc_list", expected="list of marks", actual=repr(marks)
        )
    if weights is not None:
        if not isinstance(weights, list):
            raise ConversionError(
                "bad value", file=reader.path, key="model_conf.punc_weight", expected="list", actual=repr(weights)
            )
        weights = [reader.value("model_conf.punc_weight", weight, "number") for weight in weights]
    reader.ignored -= {"model_conf.punc_list", "model_conf.punc_weight", "tokenizer_conf.unk_symbol"}
    fields |= encoder | {"id2label": dict(enumerate(marks)), "label_weights": weights}
    reader.top("vocab_size", "optional integer", None)
    reader.refuse_unknown(IGNORED_KEYS)
    return fields, unk_token, sorted(reader.ignored)


def from_upstream_state_dict(
    state: dict[str, torch.Tensor], config: FunasrCtTransformerConfig, path: Path | None = None
) -> dict[str, torch.Tensor]:
    """Tensors under upstream's names under ours, projections split.

    Raises:
        ConversionError: a name that the model does not have, or projections that cannot be split.
    """
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        match = _LAYER.fullmatch(name)
        if name in OTHER_NAMES:
            weights[OTHER_NAMES[name]] = tensor
        elif norm := _NORM.fullmatch(name):
            weights[f"encoder.layers.{config.num_hidden_layers - 1}.final_layernorm.{norm[1]}"] = tensor
        elif match and (fused := _FUSED.fullmatch(match[3])) and tensor.shape[0] == 3 * config.hidden_size:
            prefix = _layer_prefix(match)
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                weights[f"{prefix}.self_attn.{letter}_proj.{fused[1]}"] = part
        elif match and match[3] in LAYER_NAMES:
            weights[f"{_layer_prefix(match)}.{LAYER_NAMES[match[3]]}"] = tensor
        else:
            raise ConversionError("unknown weight", file=path, key=name, actual=tuple(tensor.shape))
    return weights


def _layer_prefix(match: re.Match[str]) -> str:
    return f"encoder.layers.{int(match[2]) + (match[1] == 'encoders')}"


def _check_weights(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], path: Path) -> None:
    dtypes = {tensor.dtype for tensor in weights.values()}
    if len(dtypes) != 1 or dtypes.isdisjoint({torch.float32, torch.float16, torch.bfloat16}):
        raise ConversionError(
            "types of weights", file=path, expected="one of float32, float16, bfloat16", actual=dtypes
        )
    for name, tensor in expected.items():
        actual = tuple(weights[name].shape) if name in weights else "missing"
        if actual != tuple(tensor.shape):
            raise ConversionError("shape", file=path, key=name, expected=tuple(tensor.shape), actual=actual)
    for name in weights:
        if name not in expected:
            raise ConversionError("unknown weight", file=path, key=name, actual=tuple(weights[name].shape))


# ---------------------------------------------------------------------------------------------------------------------
# transformers -> FunASR


def export_punctuation_pack(model_dir: str | Path, pack_dir: str | Path) -> dict[str, object]:
    """Writes the model folder `model_dir` as a pack that FunASR loads: the inverse of `convert_punctuation_pack`.

    Args:
        model_dir: folder with a `funasr_ct_transformer` model and its tokenizer.
        pack_dir: must not exist or be empty; its parent must exist.
    Returns:
        A report with SHA-256 of the written files.
    Raises:
        ConversionError: the folder lacks something, its parts disagree, or `pack_dir` is in the way.
    """
    source = Path(model_dir)
    for name in ("config.json", "tokenizer.json"):
        if not (source / name).is_file():
            raise ConversionError("file of the model folder is missing", file=source, key=name)
    model = FunasrCtTransformerForTokenClassification.from_pretrained(source, local_files_only=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source, local_files_only=True)
    tokens = tokenizer.get_vocab()
    if len(tokens) != model.config.vocab_size:
        raise ConversionError(
            "tokenizer and model disagree",
            file=source,
            key="vocab_size",
            expected=model.config.vocab_size,
            actual=len(tokens),
        )
    with staged_directory(pack_dir) as stage:
        torch.save(to_upstream_state_dict(model.state_dict(), model.config), stage / "model.pt")
        text = yaml.safe_dump(_upstream_yaml(model.config, tokenizer.unk_token), sort_keys=False, allow_unicode=True)
        (stage / "config.yaml").write_text(text, encoding="utf-8")
        (stage / "tokens.json").write_text(write_token_list(tokens), encoding="utf-8")
        description = {
            "framework": "pytorch",
            "task": "punctuation",
            "model": {"type": "funasr"},
            "pipeline": {"type": "funasr-pipeline"},
            "file_path_metas": {
                "init_param": "model.pt",
                "config": "config.yaml",
                "tokenizer_conf": {"token_list": "tokens.json"},
            },
        }
        (stage / "configuration.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
        outputs = sha256_of_files(stage)
    return {"converter": "funasr", "direction": "reverse", "model": UPSTREAM_MODEL, "outputs": outputs}


def to_upstream_state_dict(
    tensors: dict[str, torch.Tensor], config: FunasrCtTransformerConfig
) -> dict[str, torch.Tensor]:
    """Tensors under our names under upstream's, projections fused."""
    state = {theirs: tensors[ours].detach() for theirs, ours in OTHER_NAMES.items()}
    for index in range(config.num_hidden_layers):
        prefix = "encoder.encoders0.0" if index == 0 else f"encoder.encoders.{index - 1}"
        layer = f"encoder.layers.{index}"
        for part in ("weight", "bias"):
            projections = [tensors[f"{layer}.self_attn.{letter}_proj.{part}"] for letter in "qkv"]
            state[f"{prefix}.self_attn.linear_q_k_v.{part}"] = torch.cat(projections).detach()
        for theirs, ours in LAYER_NAMES.items():
            state[f"{prefix}.{theirs}"] = tensors[f"{layer}.{ours}"].detach()
    for part in ("weight", "bias"):
        name = f"encoder.layers.{config.num_hidden_layers - 1}.final_layernorm.{part}"
        state[f"encoder.after_norm.{part}"] = tensors[name].detach()
    return state


def _upstream_yaml(config: FunasrCtTransformerConfig, unk_token: str) -> dict[str, object]:
    def section(table: dict[str, tuple]) -> dict[str, object]:
        return {key: getattr(config, field) for key, (field, _, _) in table.items()}

    marks = [config.id2label[label] for label in range(config.num_labels)]
    model_conf = section(MODEL_KEYS) | {"ignore_id": 0, "dropout_rate": config.hidden_dropout, "punc_list": marks}
    if config.label_weights is not None:
        model_conf["punc_weight"] = list(config.label_weights)
    fixed = {"input_layer": "pe", "normalize_before": True, "selfattention_layer_type": "sanm"}
    return {
        "model": UPSTREAM_MODEL,
        "model_conf": model_conf,
        "encoder": "SANMEncoder",
        "encoder_conf": section(ENCODER_SIZES | ENCODER_KEYS) | fixed,
        "tokenizer": "CharTokenizer",
        "tokenizer_conf": {"unk_symbol": unk_token},
    }
