"""Conversion of a published SpeechGPT language model to a transformers folder, and back.

`convert_speechgpt.py` is the command line. A pack is what `fnlp/SpeechGPT-7B-ma` and `-cm` publish: `config.json` of a
`LlamaForCausalLM`, `pytorch_model.bin` or `model.safetensors` (also in shards with an index), `tokenizer.model`,
`added_tokens.json`, `tokenizer_config.json`, `special_tokens_map.json`. A pack with `adapter_config.json` and
`adapter_model.bin` is a LoRA adapter on top of such a model, as `-com` is. A pack is untrusted: see
`hf_speechllm.upstream`. The weights keep their names and bits and go from file to file, so that the memory needed is
that of the largest tensor. The folder that is written appears complete or not at all.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoProcessor, GenerationConfig, LlamaConfig

from hf_speechllm.models.configuration_speechgpt_lm import SpeechGptConfig
from hf_speechllm.models.modeling_speechgpt_lm import SpeechGptForCausalLM
from hf_speechllm.models.processing_speechgpt_lm import SpeechGptProcessor
from hf_speechllm.upstream.checkpoint_file import compact, write_state_dict
from hf_speechllm.upstream.checkpoints import read_state_dict
from hf_speechllm.upstream.errors import ConversionError, UnsafeArtifactError
from hf_speechllm.upstream.json_config import read_json_mapping
from hf_speechllm.upstream.model_folder import require_model_type
from hf_speechllm.upstream.safetensors_file import read_safetensors, write_safetensors
from hf_speechllm.upstream.speechgpt_tokenizer import (
    ADDED_NAME,
    CONFIG_NAME,
    MAP_NAME,
    MAX_JSON_BYTES,
    MODEL_NAME,
    build_speechgpt_tokenizer,
    read_published_tokenizer,
)
from hf_speechllm.upstream.staging import sha256_of_file, sha256_of_files, staged_directory, write_report
from hf_speechllm.upstream.typed_config import ConfigReader


UPSTREAM_MODEL = "LlamaForCausalLM"
# The pieces travel with the converted folder for the way back, under a name that transformers does not look for.
KEPT_MODEL_NAME = "upstream_tokenizer.model"
# Weights of a shard of the way back.
SHARD_BYTES = 2 << 30

# Key of config.json -> (field of LlamaConfig, kind, default of transformers 4.33).
LLAMA_KEYS = {
    "vocab_size": ("vocab_size", "count", 32000),
    "hidden_size": ("hidden_size", "count", 4096),
    "intermediate_size": ("intermediate_size", "count", 11008),
    "num_hidden_layers": ("num_hidden_layers", "count", 32),
    "num_attention_heads": ("num_attention_heads", "count", 32),
    "num_key_value_heads": ("num_key_value_heads", "optional count", None),
    "head_dim": ("head_dim", "optional count", None),
    "max_position_embeddings": ("max_position_embeddings", "count", 2048),
    "hidden_act": ("hidden_act", "text", "silu"),
    "initializer_range": ("initializer_range", "number", 0.02),
    "rms_norm_eps": ("rms_norm_eps", "number", 1e-6),
    "attention_bias": ("attention_bias", "flag", False),
    "attention_dropout": ("attention_dropout", "rate", 0.0),
    "mlp_bias": ("mlp_bias", "flag", False),
    "tie_word_embeddings": ("tie_word_embeddings", "flag", False),
    "bos_token_id": ("bos_token_id", "size", 1),
    "eos_token_id": ("eos_token_id", "size", 2),
}
# Known keys that change nothing: padding is upstream's own choice (id 0), the type is that of the weights.
IGNORED_KEYS = {
    *("_name_or_path", "dtype", "max_sequence_length", "pad_token_id", "torch_dtype", "transformers_version"),
    "use_cache",
}
REQUIRED_VALUES = {"model_type": "llama", "pretraining_tp": 1, "rope_scaling": None}
# "LLaMAForCausalLM" is what the first converted LLaMA checkpoints say.
ARCHITECTURES = (["LlamaForCausalLM"], ["LLaMAForCausalLM"])

ADAPTER_KEYS = {
    "r": ("r", "count", 8),
    "lora_alpha": ("lora_alpha", "number", 8),
    "lora_dropout": ("lora_dropout", "rate", 0.0),
}
IGNORED_ADAPTER_KEYS = {
    *("base_model_name_or_path", "inference_mode", "init_lora_weights", "revision", "auto_mapping", "enable_lora"),
    "merge_weights",
}
REQUIRED_ADAPTER_VALUES = {
    "bias": "none",
    "fan_in_fan_out": False,
    "layers_pattern": None,
    "layers_to_transform": None,
    "modules_to_save": None,
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
}

# How `speechgpt/src/infer/cli_infer.py` samples.
GENERATION = {
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 50,
    "max_new_tokens": 2048,
    "min_new_tokens": 10,
}

_INVERSE_FREQUENCIES = re.compile(r"model\.layers\.\d{1,4}\.self_attn\.rotary_emb\.inv_freq")
_SHARD = re.compile(r"(?:pytorch_model|model)-\d{5}-of-\d{5}\.(?:bin|safetensors)")
_ADAPTER_WEIGHT = re.compile(r"base_model\.model\.(model\.layers\.\d{1,4}\.\w+\.(\w+))\.lora_([AB])\.weight")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def is_speechgpt_lm_pack(pack: Path) -> bool:
    """Whether a folder looks like a published language model, or an adapter to one."""
    return (pack / "adapter_config.json").is_file() or (
        (pack / MODEL_NAME).is_file() and find_weights(pack) is not None
    )


def convert(pack: str | Path, out: str | Path) -> dict[str, object]:
    """Converts a pack to a folder `out` that `from_pretrained` loads.

    Args:
        pack: the folder, of a language model or of an adapter.
        out: must not exist or be empty; its parent must exist.
    Returns:
        The report, which is also written as `conversion_report.json`: names and SHA-256 of inputs and outputs, ignored
        keys and weights.
    Raises:
        ConversionError: a key, value, weight or shape that the model does not have, named in the message.
        UnsafeArtifactError: a file that is hostile or damaged.
    """
    pack = Path(pack)
    if (pack / "adapter_config.json").is_file():
        return convert_adapter(pack, out)
    config_path = pack / "config.json"
    fields, ignored = _read_llama_config(config_path)
    published = read_published_tokenizer(pack)
    tokenizer = build_speechgpt_tokenizer(published)
    num_units, first_unit = _find_units(published.added, len(published.model.pieces), pack / ADDED_NAME)
    if len(tokenizer) > fields["vocab_size"]:
        raise ConversionError(
            "tokenizer has more tokens than the model has rows",
            file=config_path,
            key="vocab_size",
            expected=f"at least {len(tokenizer)}",
            actual=fields["vocab_size"],
        )
    try:
        config = SpeechGptConfig(
            text_config=LlamaConfig(**fields), num_units=num_units, first_unit_token_id=first_unit
        )
    except ValueError as error:
        raise ConversionError("contradictory configuration", file=config_path, actual=str(error)) from None

    weights_path = find_weights(pack)
    if weights_path is None:
        raise ConversionError("weights are missing", file=pack, expected="pytorch_model.bin or model.safetensors")
    state, files = read_weights(weights_path)
    weights, dropped = _check_weights(state, config, weights_path)
    config.dtype = config.text_config.dtype = next(iter(weights.values())).dtype
    with torch.device("meta"):
        model = SpeechGptForCausalLM(config)
    unused = list(range(len(tokenizer), fields["vocab_size"])) or None
    ids = {name: getattr(config, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    model.generation_config = GenerationConfig(**GENERATION, **ids, suppress_tokens=unused)

    inputs = {config_path, *published.files, *files}
    report: dict[str, object] = {
        "converter": "speechgpt",
        "upstream_model": UPSTREAM_MODEL,
        "model_type": config.model_type,
        "parameters": sum(tensor.numel() for tensor in weights.values()),
        "num_units": num_units,
        "ignored_keys": ignored,
        "ignored_weights": dropped,
        "inputs": {path.name: sha256_of_file(path) for path in sorted(inputs)},
    }
    with staged_directory(out) as stage:
        # The weights are memory mapped and go from file to file.
        model.save_pretrained(stage, state_dict={})
        write_safetensors(stage / "model.safetensors", weights)
        SpeechGptProcessor(tokenizer).save_pretrained(stage)
        shutil.copyfile(pack / MODEL_NAME, stage / KEPT_MODEL_NAME)
        write_report(stage, report)
    return report


def find_weights(pack: Path) -> Path | None:
    """The file with the weights, or with the index of their shards."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        for path in (pack / name, pack / f"{name}.index.json"):
            if path.is_file():
                return path
    return None


def read_weights(path: Path) -> tuple[dict[str, Tensor], list[Path]]:
    """Memory-mapped tensors by their names, and the files that were read.

    Raises:
        ConversionError: an index that disagrees with its shards. UnsafeArtifactError: a damaged or hostile file.
    """
    if path.suffix != ".json":
        return _read_shard(path), [path]
    places = read_json_mapping(path, MAX_JSON_BYTES).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise ConversionError("no mapping of names to files", file=path, key="weight_map", actual=repr(places))
    state: dict[str, Tensor] = {}
    files = [path]
    for shard in sorted(set(places.values())):
        if not _SHARD.fullmatch(shard):
            raise UnsafeArtifactError("not the name of a shard", file=path, key="weight_map", actual=shard)
        files.append(path.parent / shard)
        found = _read_shard(files[-1])
        listed = {name for name, place in places.items() if place == shard}
        if found.keys() != listed:
            name = sorted(found.keys() ^ listed)[0]
            raise ConversionError("index and shard disagree", file=files[-1], key=name)
        state |= found
    return state, files


def _read_shard(path: Path) -> dict[str, Tensor]:
    return read_safetensors(path) if path.suffix == ".safetensors" else read_state_dict(path)


def _read_llama_config(path: Path) -> tuple[dict[str, object], list[str]]:
    """Fields of a `LlamaConfig`, and the keys that were ignored."""
    reader = ConfigReader(read_json_mapping(path, MAX_JSON_BYTES), path, REQUIRED_VALUES)
    architectures = reader.configs.get("architectures")
    if architectures not in ARCHITECTURES:
        raise ConversionError(
            "not supported", file=path, key="architectures", expected=[UPSTREAM_MODEL], actual=architectures
        )
    reader.used |= {"architectures", "rope_theta"}
    for key in REQUIRED_VALUES:
        reader.used.add(key)
        if key in reader.configs:
            reader.require(key, reader.configs[key])
    fields = {field: reader.top(key, kind, default) for key, (field, kind, default) in LLAMA_KEYS.items()}
    theta = reader.value("rope_theta", reader.configs.get("rope_theta", 10000.0), "number")
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    fields["pad_token_id"] = 0
    reader.refuse_unknown(IGNORED_KEYS)
    for name in ("num_key_value_heads", "head_dim"):
        if fields[name] is None:
            del fields[name]
    heads = fields["num_attention_heads"]
    if fields["hidden_size"] % heads or heads % fields.get("num_key_value_heads", heads):
        raise ConversionError("sizes disagree", file=path, key="num_attention_heads", actual=heads)
    return fields, sorted(reader.ignored)


def _find_units(added: tuple[str, ...], first_added: int, path: Path) -> tuple[int, int]:
    """How many tokens `<0>`, `<1>`, … there are, and the id of the first."""
    places = {token: first_added + number for number, token in enumerate(added)}
    if "<0>" not in places:
        raise ConversionError("no units among the tokens", file=path, key="<0>", expected="added", actual="absent")
    first, count = places["<0>"], 0
    while f"<{count}>" in places:
        if places[f"<{count}>"] != first + count:
            raise ConversionError(
                "units are not in a row",
                file=path,
                key=f"<{count}>",
                expected=first + count,
                actual=places[f"<{count}>"],
            )
        count += 1
    for token in ("<sosp>", "<eosp>"):
        if token not in places:
            raise ConversionError("token is missing", file=path, key=token)
    return count, first


def _check_weights(
    state: Mapping[str, Tensor], config: SpeechGptConfig, path: Path
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights that the model has, and the names of those that it computes itself."""
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in SpeechGptForCausalLM(config).state_dict().items()}
    weights, dropped = {}, []
    for name, tensor in state.items():
        if _INVERSE_FREQUENCIES.fullmatch(name):
            _check_inverse_frequencies(tensor, config, path, name)
            dropped.append(name)
        elif name not in expected:
            raise ConversionError("unknown weight", file=path, key=name, actual=tuple(tensor.shape))
        elif tuple(tensor.shape) != expected[name]:
            raise ConversionError("shape", file=path, key=name, expected=expected[name], actual=tuple(tensor.shape))
        elif tensor.dtype not in _FLOATS:
            raise ConversionError("type", file=path, key=name, expected=_FLOATS, actual=tensor.dtype)
        else:
            weights[name] = tensor
    if config.tie_word_embeddings:
        head = weights.pop("lm_head.weight", None)
        if head is not None and not torch.equal(head, weights["model.embed_tokens.weight"]):
            raise ConversionError("tied head differs from the embedding", file=path, key="lm_head.weight")
        del expected["lm_head.weight"]
    for name in expected.keys() - weights.keys():
        raise ConversionError("weight is missing", file=path, key=name, expected=expected[name])
    types = {tensor.dtype for tensor in weights.values()}
    if len(types) > 1:
        raise ConversionError("types of weights", file=path, expected="one for all", actual=types)
    return weights, sorted(dropped)


def _check_inverse_frequencies(tensor: Tensor, config: SpeechGptConfig, path: Path, name: str) -> None:
    """Releases before 4.32 store what rotary embeddings are computed from; here it is computed."""
    text = config.text_config
    exponents = torch.arange(0, text.head_dim, 2, dtype=torch.float32) / text.head_dim
    computed = text.rope_parameters["rope_theta"] ** -exponents
    if tensor.shape != computed.shape or not torch.allclose(tensor.float(), computed, rtol=1e-2, atol=1e-7):
        raise ConversionError(
            "rotary embedding",
            file=path,
            key=name,
            expected=f"theta {text.rope_parameters['rope_theta']}",
            actual="other",
        )


# ---------------------------------------------------------------------------------------------------------------------
# LoRA adapters


def convert_adapter(pack: str | Path, out: str | Path) -> dict[str, object]:
    """Converts `adapter_config.json` and `adapter_model.bin` to a folder that `PeftModel.from_pretrained` loads.

    The modules of a language model have the same names before and after its conversion, so the adapter fits both.

    Raises:
        ConversionError, UnsafeArtifactError: see [`convert`].
    """
    pack = Path(pack)
    config_path = pack / "adapter_config.json"
    reader = ConfigReader(read_json_mapping(config_path), config_path, REQUIRED_ADAPTER_VALUES)
    for key, value in REQUIRED_ADAPTER_VALUES.items():
        reader.used.add(key)
        if key in reader.configs or value in ("LORA",):
            reader.require(key, reader.configs.get(key))
    fields = {field: reader.top(key, kind, default) for key, (field, kind, default) in ADAPTER_KEYS.items()}
    targets = reader.configs.get("target_modules")
    reader.used.add("target_modules")
    if not isinstance(targets, list) or not targets or not all(isinstance(name, str) for name in targets):
        raise ConversionError("not a list of names", file=config_path, key="target_modules", actual=repr(targets))
    reader.refuse_unknown(IGNORED_ADAPTER_KEYS)

    names = ("adapter_model.safetensors", "adapter_model.bin")
    weights_path = next((pack / name for name in names if (pack / name).is_file()), None)
    if weights_path is None:
        raise ConversionError("weights are missing", file=pack, expected=" or ".join(names))
    state = _read_shard(weights_path)
    _check_adapter(state, fields["r"], targets, weights_path)
    alpha = fields["lora_alpha"]
    config = {
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": fields["lora_dropout"],
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": fields["r"],
        "target_modules": sorted(targets),
        "task_type": "CAUSAL_LM",
    }
    report: dict[str, object] = {
        "converter": "speechgpt",
        "upstream_model": "LoRA adapter",
        "model_type": "peft",
        "parameters": sum(tensor.numel() for tensor in state.values()),
        "ignored_keys": sorted(reader.ignored),
        "inputs": {path.name: sha256_of_file(path) for path in (config_path, weights_path)},
    }
    with staged_directory(out) as stage:
        (stage / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_safetensors(stage / "adapter_model.safetensors", state)
        write_report(stage, report)
    return report


def _check_adapter(state: Mapping[str, Tensor], rank: int, targets: list[str], path: Path) -> None:
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        match = _ADAPTER_WEIGHT.fullmatch(name)
        if not match or match[2] not in targets:
            raise ConversionError("unknown weight", file=path, key=name, actual=tuple(tensor.shape))
        if tensor.dtype not in _FLOATS or tensor.dim() != 2 or tensor.shape[0 if match[3] == "A" else 1] != rank:
            raise ConversionError("shape", file=path, key=name, expected=f"rank {rank}", actual=tuple(tensor.shape))
        pairs.setdefault(match[1], {})[match[3]] = tensor
    for module, pair in pairs.items():
        if len(pair) != 2:
            raise ConversionError("half of a pair is missing", file=path, key=module, actual=sorted(pair))


# ---------------------------------------------------------------------------------------------------------------------
# transformers -> upstream


def convert_back(folder: str | Path, out: str | Path, shard_bytes: int = SHARD_BYTES) -> dict[str, object]:
    """Writes the published layout from a converted or fine-tuned folder, or from an adapter's.

    Args:
        folder: as [`convert`] or `save_pretrained` writes it, its base a LLaMA and its tokenizer an upstream one.
        out: must not exist or be empty.
        shard_bytes: weights of more bytes become several files with an index, which transformers 4.33 reads as well;
            the memory needed is that of one of them.
    Raises:
        ConversionError: a model or tokenizer that the published layout cannot say.
    """
    folder = Path(folder)
    if (folder / "adapter_config.json").is_file():
        return _adapter_back(folder, out)
    require_model_type(folder, [SpeechGptConfig.model_type])
    config = SpeechGptConfig.from_pretrained(folder)
    text = config.text_config
    if text.model_type != "llama":
        raise ConversionError(
            "base model",
            file=folder / "config.json",
            key="text_config.model_type",
            expected="llama",
            actual=text.model_type,
        )
    if text.rope_parameters["rope_type"] != "default":
        raise ConversionError(
            "not supported", file=folder / "config.json", key="rope_parameters", actual=text.rope_parameters
        )
    if not (folder / KEPT_MODEL_NAME).is_file():
        raise ConversionError("pieces of the tokenizer are missing", file=folder / KEPT_MODEL_NAME)
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    weights_path = find_weights(folder)
    if weights_path is None:
        raise ConversionError("weights are missing", file=folder, expected="model.safetensors")
    state, _ = read_weights(weights_path)
    state, _ = _check_weights(state, config, weights_path)
    with staged_directory(out) as stage:
        (stage / "config.json").write_text(
            json.dumps(_published_config(text, state), indent=2) + "\n", encoding="utf-8"
        )
        _write_shards(stage, state, shard_bytes)
        shutil.copyfile(folder / KEPT_MODEL_NAME, stage / MODEL_NAME)
        _write_tokenizer(stage, tokenizer)
        # What was written is read as a stranger's pack, and must give the tokenizer that it came from.
        again = build_speechgpt_tokenizer(read_published_tokenizer(stage))
        if again.get_vocab() != tokenizer.get_vocab():
            raise ConversionError("tokenizer is not upstream's", file=folder / "tokenizer.json")
        outputs = sha256_of_files(stage)
    return {"converter": "speechgpt", "direction": "reverse", "outputs": outputs}


def _published_config(text: LlamaConfig, state: Mapping[str, Tensor]) -> dict[str, object]:
    fields = {key: getattr(text, field) for key, (field, _, _) in LLAMA_KEYS.items()}
    return {
        "architectures": [UPSTREAM_MODEL],
        **fields,
        "model_type": "llama",
        "pad_token_id": 0,
        "rope_scaling": None,
        "rope_theta": text.rope_parameters["rope_theta"],
        "torch_dtype": str(next(iter(state.values())).dtype).removeprefix("torch."),
        "use_cache": True,
    }


def _write_shards(stage: Path, state: Mapping[str, Tensor], shard_bytes: int) -> None:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in state.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    places = {}
    for number, names in enumerate(shards, start=1):
        single = len(shards) == 1
        file = "pytorch_model.bin" if single else f"pytorch_model-{number:05d}-of-{len(shards):05d}.bin"
        places |= dict.fromkeys(names, file)
        write_state_dict(stage / file, compact({name: state[name] for name in names}))
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in state.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (stage / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_tokenizer(stage: Path, tokenizer) -> None:
    pieces = set(range(tokenizer.vocab_size))
    added = {token: index for token, index in tokenizer.get_added_vocab().items() if index not in pieces}
    special = {
        role: {"content": token, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        for role, token in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))
    }
    empty = tokenizer("").input_ids
    config = {
        "add_bos_token": tokenizer.bos_token_id in empty,
        "add_eos_token": tokenizer.eos_token_id in empty,
        "clean_up_tokenization_spaces": False,
        "legacy": None,
        "pad_token": None,
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        **{role: {"__type": "AddedToken", **token} for role, token in special.items()},
    }
    for name, content in (
        (ADDED_NAME, added),
        (MAP_NAME, {**special, "pad_token": "<unk>"}),
        (CONFIG_NAME, config),
    ):
        (stage / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _adapter_back(folder: Path, out: str | Path) -> dict[str, object]:
    with staged_directory(out) as stage:
        shutil.copyfile(folder / "adapter_config.json", stage / "adapter_config.json")
        state = read_safetensors(folder / "adapter_model.safetensors")
        write_state_dict(stage / "adapter_model.bin", compact(state))
        outputs = sha256_of_files(stage)
    return {"converter": "speechgpt", "direction": "reverse", "outputs": outputs}
