"""One YAML file per run, overridden from the command line.

A run file has the groups below as top-level keys; each is a dataclass and an unknown key is an error that names it.
Overrides follow the file's name: `--group.key value`, or `--key value` where only one group has that key. Values are
YAML. `${NAME}` in a string of the file stands for the environment variable NAME.
"""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from hf_speechllm.data.augmentation import AugmentationConfig


class _Loader(yaml.SafeLoader):
    """SafeLoader with two rules of YAML 1.2: `1e-3` is a number, and `no`, `yes`, `on`, `off` are strings."""


_BOOLEAN, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOLEAN]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOLEAN, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(_FLOAT, re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


class RunConfigError(ValueError):
    """A run file or override that cannot be used; the message names file, key, what was expected and found."""


@dataclass
class ModelArguments:
    """The network.

    Args:
        pretrained (`str`, *optional*): folder or Hub id to start from; without it a new model of `config` is made.
        model_type (`str`): family of a new model: `"wenet_u2pp"`, `"funasr_paraformer"`, `"funasr_sensevoice"`.
        config (`dict`): fields of the model's configuration. With `pretrained` they override its own.
        compute_cmvn (`bool`): measure mean and variance of the training features for a new model.
        attn_implementation (`str`, *optional*), experts_implementation (`str`, *optional*): transformers' switches.
        freeze (`list[str]`): regular expressions of parameters that are not trained.
        trust_remote_code (`bool`): allow `pretrained` to bring code for a model type that is not installed.
    """

    pretrained: str | None = None
    model_type: str = "wenet_u2pp"
    config: dict[str, Any] = field(default_factory=dict)
    compute_cmvn: bool = True
    attn_implementation: str | None = None
    experts_implementation: str | None = None
    freeze: list[str] = field(default_factory=list)
    trust_remote_code: bool = False


@dataclass
class DataArguments:
    """The data sets.

    Args:
        data_dir (`str`, *optional*): folder that relative paths in `train` and `validation` start from.
        train (`list`): sources that are trained on together; each a path, or a mapping with `path`, `where` (column
            filter), `repeat` (how often an epoch has it), `columns` (values of columns that its rows lack) and `text`
            (in place of every transcript), or with `hub`, `split`, `audio_column`, `text_column`.
        validation (`list`): the same, for the evaluation while training.
        tokenizer (`str`, *optional*): folder of a tokenizer, for a new model. Default: units from the training text.
        unit (`str`): `"word"` or `"char"`: what the units of a new tokenizer are.
        feature_extractor (`dict`): arguments of `KaldiFbankFeatureExtractor` for a new model.
        separator (`str`): between the texts of joined clips.
        min_seconds, max_seconds, min_tokens, max_tokens: clips outside are left out of training.
        metric (`str`): `"wer"` or `"cer"`.
    """

    data_dir: str | None = None
    train: list[Any] = field(default_factory=list)
    validation: list[Any] = field(default_factory=list)
    tokenizer: str | None = None
    unit: str = "word"
    feature_extractor: dict[str, Any] = field(default_factory=dict)
    separator: str = " "
    min_seconds: float = 0.0
    max_seconds: float = 102.4
    min_tokens: int = 1
    max_tokens: int = 200
    metric: str = "wer"


@dataclass
class LoraArguments:
    """LoRA; see `lora_config`. `rank: 0` trains the whole model; `merge` also saves the merged model."""

    rank: int = 0
    alpha: int = 16
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"])
    modules_to_save: list[str] = field(default_factory=list)
    merge: bool = True


@dataclass
class RunConfig:
    """The groups of a run file. `training` holds the fields of `SpeechTrainingArguments`."""

    model: ModelArguments = field(default_factory=ModelArguments)
    data: DataArguments = field(default_factory=DataArguments)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    lora: LoraArguments = field(default_factory=LoraArguments)
    training: dict[str, Any] = field(default_factory=dict)


_RunConfig = TypeVar("_RunConfig")


def expand_environment(value: Any, where: str) -> Any:
    """Replace `${NAME}` in every string of a nested structure.

    Raises:
        RunConfigError: an unset variable.
    """
    if isinstance(value, dict):
        return {key: expand_environment(item, f"{where}: {key}") for key, item in value.items()}
    if isinstance(value, list):
        return [expand_environment(item, where) for item in value]
    if not isinstance(value, str):
        return value

    def lookup(match: re.Match) -> str:
        if match.group(1) not in os.environ:
            raise RunConfigError(f"{where}: expected the environment variable {match.group(1)}, found it unset")
        return os.environ[match.group(1)]

    return re.sub(r"\$\{(\w+)\}", lookup, value)


def parse_overrides(arguments: Sequence[str], training_keys: Sequence[str], kind: type = RunConfig) -> dict[str, Any]:
    """`--group.key value`, `--key value`, `--key=value` (a flag without value is true) to dotted keys and values.

    Raises:
        RunConfigError: an argument that is no option, or a key that no or several groups have.
    """
    groups: dict[str, set[str]] = {
        entry.name: {inner.name for inner in dataclasses.fields(entry.type)}
        for entry in dataclasses.fields(kind)
        if dataclasses.is_dataclass(entry.type)
    }
    groups["training"] = set(training_keys)
    overrides: dict[str, Any] = {}
    position = 0
    while position < len(arguments):
        option = arguments[position]
        if not option.startswith("--"):
            raise RunConfigError(f"command line: expected --key value, found {option!r}")
        key, equals, text = option[2:].partition("=")
        position += 1
        if not equals:
            if position < len(arguments) and not arguments[position].startswith("--"):
                text = arguments[position]
                position += 1
            else:
                text = "true"
        if "." not in key:
            owners = [group for group, keys in groups.items() if key in keys]
            if len(owners) != 1:
                raise RunConfigError(f"--{key}: expected a key of one group, found it in {owners or 'none'}")
            key = f"{owners[0]}.{key}"
        try:
            # To YAML, a value of nothing or blanks is null; here it is a string (`--data.separator " "`).
            overrides[key] = yaml.load(text, Loader=_Loader) if text.strip() else text
        except yaml.YAMLError as error:
            raise RunConfigError(
                f"--{key}: expected a YAML value, found {text!r} ({error.__class__.__name__})"
            ) from None
    return overrides


def _build(kind: type, values: Any, where: str) -> Any:
    if not isinstance(values, Mapping):
        raise RunConfigError(f"{where}: expected a mapping, found {type(values).__name__}")
    known = {entry.name for entry in dataclasses.fields(kind)}
    if unknown := values.keys() - known:
        raise RunConfigError(f"{where}: expected keys among {sorted(known)}, found {sorted(unknown)}")
    return kind(**values)


def load_run_config(
    path: str | Path | None,
    overrides: Sequence[str] = (),
    training_keys: Sequence[str] = (),
    kind: type[_RunConfig] = RunConfig,
) -> _RunConfig:
    """Read a run file and apply command-line overrides.

    Args:
        path (`str` or `Path`, *optional*): YAML file; `None` starts from the defaults.
        overrides (`Sequence[str]`): command-line arguments after the file.
        training_keys (`Sequence[str]`): fields of the training arguments, for `--key` without its group.
        kind (`type`): the dataclass of the groups.

    Raises:
        RunConfigError: an unreadable file, unknown group or key, or an unset environment variable.
    """
    content: Any = {}
    if path is not None:
        try:
            content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader) or {}
        except (OSError, yaml.YAMLError) as error:
            raise RunConfigError(f"{path}: expected a YAML file, found {error}") from None
    if not isinstance(content, dict):
        raise RunConfigError(f"{path}: expected a mapping of groups, found {type(content).__name__}")
    for key, value in parse_overrides(overrides, training_keys, kind).items():
        *parents, last = key.split(".")
        target = content
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise RunConfigError(f"--{key}: expected {parent} to be a mapping, found {type(target).__name__}")
        target[last] = value
    content = expand_environment(content, str(path))
    groups = {entry.name: entry.type for entry in dataclasses.fields(kind)}
    if unknown := content.keys() - groups.keys():
        raise RunConfigError(f"{path}: expected the groups {sorted(groups)}, found {sorted(unknown)}")
    built = {}
    for name, values in content.items():
        values = {} if values is None else values
        if name != "training":
            built[name] = _build(groups[name], values, f"{path}: {name}")
        elif isinstance(values, dict):
            built[name] = values
        else:
            raise RunConfigError(f"{path}: training: expected a mapping, found {type(values).__name__}")
    return kind(**built)
