"""What the training scripts of unit language models share: the groups of a run file, the model, and the rows."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_speechllm.data.task_descriptions import RECOGNITION_DESCRIPTIONS, SYNTHESIS_DESCRIPTIONS
from hf_speechllm.models.modeling_speechgpt_lm import SpeechGptForCausalLM
from hf_speechllm.models.prompts_speechgpt_lm import META_INSTRUCTION
from hf_speechllm.train.lora import ATTENTION_TARGETS, freeze
from hf_speechllm.train.run_config import RunConfigError
from hf_speechllm.train.text_tokenizer import train_byte_bpe
from hf_speechllm.train.unit_vocabulary import extend_with_units
from hf_speechllm.train.zero import whole_models, whole_parameters


if TYPE_CHECKING:
    from peft import PeftModel

QUANTIZATIONS = ("none", "int8", "nf4")
# Examples are cut and packed before the trainer sees them. TRL switches gradient checkpointing and bfloat16 on by
# itself; here it is the recipe that does.
SFT_DEFAULTS = {
    "max_length": None,
    "packing": False,
    "report_to": "none",
    "gradient_checkpointing": None,
    "bf16": False,
}


@dataclass
class UnitLmModelArguments:
    """The language model.

    Args:
        pretrained (`str`, *optional*): folder or Hub id of a unit LM, or of any causal LM, which then gets the units.
        config (`dict`): without `pretrained`: the fields of a new causal LM, `model_type` among them.
        num_units (`int`): size of the codebook; for a model that has no units yet.
        init (`str`): `"mean"` or `"normal"`, how the rows of new tokens begin; see `extend_with_units`.
        text (`list[str]`): without `pretrained`: parquet or jsonl files whose `text` trains the tokenizer, beside the
            task descriptions.
        text_vocab_size (`int`): tokens of that tokenizer, before the units.
        dtype (`str`, *optional*): `"bfloat16"`, ...; default: that of the checkpoint.
        quantization (`str`): `"none"`, or with LoRA `"int8"` or `"nf4"` (QLoRA) by bitsandbytes.
        attn_implementation (`str`, *optional*): transformers' switch.
        freeze (`list[str]`): regular expressions of parameters that are not trained.
        trust_remote_code (`bool`): allow `pretrained` to bring code for a model type that is not installed.
    """

    pretrained: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    num_units: int = 0
    init: str = "mean"
    text: list[str] = field(default_factory=list)
    text_vocab_size: int = 512
    dtype: str | None = None
    quantization: str = "none"
    attn_implementation: str | None = None
    freeze: list[str] = field(default_factory=list)
    trust_remote_code: bool = False


@dataclass
class UnitLmDataArguments:
    """The data.

    Args:
        data_dir (`str`, *optional*): folder that relative paths start from.
        train, validation (`list[str]`): parquet or jsonl files (stage 1: `units`, or text files with one string of
            units a line; stages 2 and 3: `prefix` and `plain_text`).
        block_size (`int`): stage 1: tokens of a packed block.
        max_length (`int`): stages 2 and 3: longest example, in tokens.
        assistant_only (`bool`): stages 2 and 3: learn the answers alone. Upstream learns the requests as well.
    """

    data_dir: str | None = None
    train: list[str] = field(default_factory=list)
    validation: list[str] = field(default_factory=list)
    block_size: int = 1024
    max_length: int = 512
    assistant_only: bool = False


@dataclass
class UnitLmLoraArguments:
    """LoRA as in upstream's stage 3, see `unit_lm_lora_config`; `rows` is `"frozen"` or `"all"`.

    `rank: 0` trains the whole model; `merge` also saves the model with the adapter merged in.
    """

    rank: int = 0
    alpha: int = 16
    dropout: float = 0.05
    target_modules: list[str] = field(default_factory=lambda: list(ATTENTION_TARGETS))
    rows: str = "frozen"
    merge: bool = True


@dataclass
class UnitLmRunConfig:
    """The groups of a run file. `training` holds the fields of TRL's `SFTConfig`."""

    model: UnitLmModelArguments = field(default_factory=UnitLmModelArguments)
    data: UnitLmDataArguments = field(default_factory=UnitLmDataArguments)
    lora: UnitLmLoraArguments = field(default_factory=UnitLmLoraArguments)
    training: dict[str, Any] = field(default_factory=dict)


def read_rows(paths: Sequence[str], data_dir: str | None) -> Iterator[dict[str, Any]]:
    """Rows of parquet and jsonl files one after another; a line of any other file is `{"text": line}`.

    Raises:
        RunConfigError: a file that does not exist.
    """
    for name in paths:
        path = Path(data_dir or ".") / name
        if not path.is_file():
            raise RunConfigError(f"data: expected a file, found none at {path}")
        if path.suffix == ".parquet":
            from datasets import Dataset

            yield from Dataset.from_parquet(str(path))
            continue
        with path.open(encoding="utf-8") as file:
            for line in file:
                if line.strip():
                    yield json.loads(line) if path.suffix == ".jsonl" else {"text": line.rstrip("\n")}


def load_unit_lm(
    model: UnitLmModelArguments, data: UnitLmDataArguments, seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model to train, with units in its vocabulary, and its tokenizer.

    Raises:
        RunConfigError: a value that contradicts another one.
    """
    if model.quantization not in QUANTIZATIONS:
        raise RunConfigError(f"model.quantization: expected one of {QUANTIZATIONS}, found {model.quantization!r}")
    trust = {"trust_remote_code": model.trust_remote_code}
    options: dict[str, Any] = {}
    if model.attn_implementation is not None:
        options["attn_implementation"] = model.attn_implementation
    if model.dtype is not None:
        options["dtype"] = model.dtype
    if model.pretrained is not None:
        config = AutoConfig.from_pretrained(model.pretrained, **trust)
        tokenizer = AutoTokenizer.from_pretrained(model.pretrained, **trust)
        if config.model_type == "speechgpt_lm":
            if model.quantization != "none":
                options["quantization_config"] = quantization(model.quantization)
                options["device_map"] = {"": torch.accelerator.current_accelerator() or "cpu"}
            network = AutoModelForCausalLM.from_pretrained(model.pretrained, **trust, **options)
            freeze(network, model.freeze)
            return network, tokenizer
        if model.quantization != "none":
            raise RunConfigError("model.quantization: expected a unit LM in `pretrained`; extend the base first")
    if model.num_units < 1:
        raise RunConfigError(f"model.num_units: expected the size of the codebook, found {model.num_units}")
    # An embedding can only grow, and new rows can only be drawn like the old ones, where it is whole.
    with whole_models():
        if model.pretrained is None:
            network, tokenizer = new_causal_lm(model, data, options)
        else:
            network = AutoModelForCausalLM.from_pretrained(model.pretrained, **trust, **options)
        generator = torch.Generator().manual_seed(seed)
        vocabulary = extend_with_units(network, tokenizer, model.num_units, init=model.init, generator=generator)
        network = SpeechGptForCausalLM.from_plain(network, vocabulary.first_unit_id, vocabulary.num_units)
    freeze(network, model.freeze)
    return network, tokenizer


def new_causal_lm(
    model: UnitLmModelArguments, data: UnitLmDataArguments, options: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM of `model.config` with random weights, and a tokenizer trained on `model.text`.

    Raises:
        RunConfigError: an architecture that transformers does not know.
    """
    fields = dict(model.config)
    model_type = fields.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        raise RunConfigError(f"model.config.model_type: expected one that transformers knows, found {model_type!r}")
    texts = [str(row["text"]) for row in read_rows(model.text, data.data_dir)]
    texts += [META_INSTRUCTION, *RECOGNITION_DESCRIPTIONS, *SYNTHESIS_DESCRIPTIONS]
    tokenizer = train_byte_bpe(texts, model.text_vocab_size)
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = CONFIG_MAPPING[model_type](vocab_size=len(tokenizer), **ids, **fields)
    return AutoModelForCausalLM.from_config(config, **options), tokenizer


def quantization(name: str) -> BitsAndBytesConfig:
    """`"int8"`, or `"nf4"` with double quantisation and bfloat16 products (QLoRA, https://arxiv.org/abs/2305.14314)."""
    if name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def load_dequantised(model: UnitLmModelArguments, data: UnitLmDataArguments, seed: int, adapter: Path) -> "PeftModel":
    """A quantised model again, in the numbers that its weights stand for, with an adapter trained on it.

    To merge: into quantised weights an adapter is rounded a second time, and what comes out needs bitsandbytes.
    """
    from peft import PeftModel

    network, _ = load_unit_lm(model, data, seed)
    return PeftModel.from_pretrained(network.dequantize(), adapter)


def save_merged(model: "PeftModel", tokenizer: PreTrainedTokenizerBase, folder: Path, should_save: bool) -> None:
    """The model with its adapter merged in, as a complete folder. Every process has to call it, one of them writes."""
    with whole_parameters(model):
        merged = model.merge_and_unload()
        if should_save:
            merged.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
