"""What the training scripts of CosyVoice's language models share: the groups of a run file, the model, the rows.

Rows have the columns of upstream's parquet files: `text`, `speech_token`, optionally `instruct`, `utt_embedding` and
`spk_embedding` (version 1), `reject_speech_token` (DPO). They are read from parquet or jsonl files.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tokenizers import AddedToken, processors
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Qwen2ForCausalLM,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_speechllm.data.cosyvoice_lm_examples import (
    SpeakerLmCollator,
    SpeakerLmDataset,
    SpeechLmCollator,
    SpeechLmDataset,
    SpeechPair,
)
from hf_speechllm.models.configuration_cosyvoice_lm import CosyVoiceLmConfig
from hf_speechllm.models.configuration_cosyvoice_transformer_lm import CosyVoiceTransformerLmConfig
from hf_speechllm.models.modeling_cosyvoice_lm import CosyVoiceLmForCausalLM
from hf_speechllm.models.modeling_cosyvoice_transformer_lm import CosyVoiceTransformerLm
from hf_speechllm.models.processing_cosyvoice import END_OF_PROMPT
from hf_speechllm.train.cosyvoice_parts import is_complete_cosyvoice, load_cosyvoice_part
from hf_speechllm.train.lora import freeze
from hf_speechllm.train.run_config import RunConfigError
from hf_speechllm.train.text_tokenizer import train_byte_bpe
from hf_speechllm.train.unit_lm_run import read_rows


SpeechLm = CosyVoiceLmForCausalLM | CosyVoiceTransformerLm
MODEL_TYPES = ("cosyvoice_lm", "cosyvoice_transformer_lm")


@dataclass
class SpeechLmModelArguments:
    """The language model.

    Args:
        pretrained (`str`, *optional*): folder or Hub id of a converted or trained language model with its tokenizer,
            or of a complete CosyVoice.
        tokenizer (`str`, *optional*): folder of the text tokenizer; by default that in `pretrained` or `backbone`.
        backbone (`str`, *optional*): without `pretrained`: a Qwen2 that text and layers are taken from.
        model_type (`str`): of a new model: `"cosyvoice_lm"` (versions 2 and 3) or `"cosyvoice_transformer_lm"` (1).
        config (`dict`): fields of the new model's configuration. With `pretrained` they override its own.
        text_vocab_size (`int`): without tokenizer: tokens of one that is trained on the texts of the run.
        dtype, attn_implementation (`str`, *optional*): transformers' switches.
        freeze (`list[str]`): regular expressions of parameters that are not trained.
        trust_remote_code (`bool`): allow `pretrained` to bring code for a model type that is not installed.
    """

    pretrained: str | None = None
    tokenizer: str | None = None
    backbone: str | None = None
    model_type: str = "cosyvoice_lm"
    config: dict[str, Any] = field(default_factory=dict)
    text_vocab_size: int = 512
    dtype: str | None = None
    attn_implementation: str | None = None
    freeze: list[str] = field(default_factory=list)
    trust_remote_code: bool = False


@dataclass
class SpeechLmDataArguments:
    """The data.

    Args:
        data_dir (`str`, *optional*): folder that relative paths start from.
        train, validation (`list[str]`): parquet or jsonl files, see the head of this file.
        instruct (`str`): put before a text whose row has no `instruct`; both end with `<|endofprompt|>`. Version 3
            wants one before every text, the others none before plain ones.
        text_suffix (`str`): put behind every text: `.` where the texts have no punctuation, because the processor ends
            what it is to say in a full stop.
        speaker_column (`str`): `"utt_embedding"`, or `"spk_embedding"` for fine-tuning on known speakers.
        speaker_dropout (`float`): version 1: share of the examples whose speaker is withheld.
        two_stream_probability (`float`): versions 2 and 3: share of the examples in blocks of text and speech.
        min_text_tokens, max_text_tokens, min_speech_tokens, max_speech_tokens (`int`): rows outside are left out.
    """

    data_dir: str | None = None
    train: list[str] = field(default_factory=list)
    validation: list[str] = field(default_factory=list)
    instruct: str = ""
    text_suffix: str = ""
    speaker_column: str = "utt_embedding"
    speaker_dropout: float = 0.0
    two_stream_probability: float = 0.5
    min_text_tokens: int = 1
    max_text_tokens: int = 200
    min_speech_tokens: int = 1
    max_speech_tokens: int = 1500


@dataclass
class SpeechLmLoraArguments:
    """LoRA, see `lora_config`; `rank: 0` trains the whole model, `merge` also saves the merged model."""

    rank: int = 0
    alpha: int = 16
    dropout: float = 0.05
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])
    modules_to_save: list[str] = field(default_factory=list)
    merge: bool = True


@dataclass
class SpeechLmRunConfig:
    """The groups of a run file. `training` holds the fields of `TrainingArguments`, or of TRL's `DPOConfig`."""

    model: SpeechLmModelArguments = field(default_factory=SpeechLmModelArguments)
    data: SpeechLmDataArguments = field(default_factory=SpeechLmDataArguments)
    lora: SpeechLmLoraArguments = field(default_factory=SpeechLmLoraArguments)
    training: dict[str, Any] = field(default_factory=dict)


def load_speech_lm(
    arguments: SpeechLmModelArguments, texts: Callable[[], Sequence[str]]
) -> tuple[SpeechLm, PreTrainedTokenizerBase]:
    """The model to train and its text tokenizer.

    Args:
        texts: gives the texts that a new tokenizer is trained on.
    Raises:
        RunConfigError: an unknown model type, or a tokenizer that does not fit the model.
    """
    trust = {"trust_remote_code": arguments.trust_remote_code}
    options = {name: getattr(arguments, name) for name in ("dtype", "attn_implementation")}
    options = {name: value for name, value in options.items() if value is not None}
    folder = arguments.tokenizer or arguments.pretrained or arguments.backbone
    tokenizer = new_tokenizer(texts(), arguments.text_vocab_size) if folder is None else None
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
    if arguments.pretrained is not None:
        if is_complete_cosyvoice(arguments.pretrained, **trust):
            model = load_cosyvoice_part(arguments.pretrained, "lm", arguments.config, **trust, **options)
        else:
            config = AutoConfig.from_pretrained(arguments.pretrained, **trust, **arguments.config)
            if config.model_type not in MODEL_TYPES:
                expected = (*MODEL_TYPES, "cosyvoice")
                raise RunConfigError(f"model.pretrained: expected one of {expected}, found {config.model_type!r}")
            auto = AutoModelForCausalLM if config.model_type == "cosyvoice_lm" else AutoModel
            model = auto.from_pretrained(arguments.pretrained, config=config, **trust, **options)
    else:
        model = new_speech_lm(arguments, tokenizer, options)
    if len(tokenizer) > model.config.text_vocab_size:
        raise RunConfigError(
            f"model.tokenizer: expected at most {model.config.text_vocab_size} tokens, found {len(tokenizer)}"
        )
    freeze(model, arguments.freeze)
    return model, tokenizer


def new_speech_lm(
    arguments: SpeechLmModelArguments, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]
) -> SpeechLm:
    """A model with random weights, or on a Qwen2, for the text of `tokenizer`.

    Raises:
        RunConfigError: an unknown model type.
    """
    fields = dict(arguments.config)
    if arguments.model_type == "cosyvoice_transformer_lm":
        config = CosyVoiceTransformerLmConfig(**{"text_vocab_size": len(tokenizer), **fields})
        return AutoModel.from_config(config, **options)
    if arguments.model_type != "cosyvoice_lm":
        raise RunConfigError(f"model.model_type: expected one of {MODEL_TYPES}, found {arguments.model_type!r}")
    if tokenizer.convert_tokens_to_ids(END_OF_PROMPT) is not None:
        fields.setdefault("end_of_prompt_id", tokenizer.convert_tokens_to_ids(END_OF_PROMPT))
    fields.setdefault("pad_token_id", tokenizer.pad_token_id)
    if arguments.backbone is not None:
        qwen = Qwen2ForCausalLM.from_pretrained(arguments.backbone, **options)
        return CosyVoiceLmForCausalLM.from_qwen2(qwen, **fields)
    fields.setdefault("text_vocab_size", len(tokenizer))
    return AutoModelForCausalLM.from_config(CosyVoiceLmConfig(**fields), **options)


def new_tokenizer(texts: Sequence[str], size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE of the texts, with `<|endofprompt|>`; nothing is put around a text."""
    tokenizer = train_byte_bpe(texts, size)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_tokens([AddedToken(END_OF_PROMPT, normalized=False, special=True)], special_tokens=True)
    return tokenizer


def read_pairs(
    paths: Sequence[str], data: SpeechLmDataArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[SpeechPair], int]:
    """The rows as pairs, and how many were left out for their length.

    Raises:
        RunConfigError: a row without text or speech, or with an instruction that does not say where it ends.
    """

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False).input_ids) if text else ()

    pairs, dropped = [], 0
    for number, row in enumerate(read_rows(paths, data.data_dir)):
        if row.get("text") is None or row.get("speech_token") is None:
            raise RunConfigError(f"data: row {number}: expected `text` and `speech_token`, found {sorted(row)}")
        instruct = row.get("instruct") or data.instruct
        if instruct and END_OF_PROMPT not in instruct:
            # The processor ends every instruction so: without it, the model would be taught what it is never asked.
            raise RunConfigError(f"data: row {number}: expected {END_OF_PROMPT} in `instruct`, found {instruct!r}")
        text, speech = ids(row["text"] + data.text_suffix), tuple(row["speech_token"])
        fits = data.min_text_tokens <= len(text) <= data.max_text_tokens
        if not fits or not data.min_speech_tokens <= len(speech) <= data.max_speech_tokens:
            dropped += 1
            continue
        pairs.append(
            SpeechPair(
                text_ids=text,
                speech_ids=speech,
                instruct_ids=ids(instruct),
                speaker_embedding=tuple(row.get(data.speaker_column) or ()),
                rejected_speech_ids=tuple(row.get("reject_speech_token") or ()),
            )
        )
    return pairs, dropped


def make_dataset(pairs: Sequence[SpeechPair], model: SpeechLm, data: SpeechLmDataArguments, seed: int) -> Dataset:
    """The examples of the model's version."""
    if isinstance(model.config, CosyVoiceTransformerLmConfig):
        return SpeakerLmDataset(pairs, model.config, data.speaker_dropout, seed)
    return SpeechLmDataset(pairs, model.config, data.two_stream_probability, seed)


def make_collator(model: SpeechLm) -> SpeakerLmCollator | SpeechLmCollator:
    """The collator of the model's version."""
    if isinstance(model.config, CosyVoiceTransformerLmConfig):
        return SpeakerLmCollator()
    return SpeechLmCollator(model.config.pad_token_id)


def most_probable(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """`preprocess_logits_for_metrics` of `Trainer`: the most probable row of the head, `(batch, positions)`."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)


def speech_accuracy(config: CosyVoiceLmConfig | CosyVoiceTransformerLmConfig) -> Callable[[EvalPrediction], dict]:
    """`compute_metrics` of `Trainer`: the share of speech tokens that were the most probable one."""

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        found, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
        if isinstance(config, CosyVoiceLmConfig):
            # A label is what the position before it is to say.
            found, labels = found[:, :-1], labels[:, 1:]
            labels = np.where(labels == -100, -100, labels - config.first_speech_token_id)
        counted = labels != -100
        return {"accuracy": float((found == labels)[counted].mean()) if counted.any() else 0.0}

    return compute


class NewLayoutEachEpoch(TrainerCallback):
    """Tells the data set the epoch, from which it draws layouts and withheld speakers."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.dataset.set_epoch(int(state.epoch or 0))


def seconds_of_speech(pairs: Sequence[SpeechPair], token_rate: float = 25.0) -> float:
    """How long the speech of the pairs is, at `token_rate` tokens a second."""
    return sum(len(pair.speech_ids) for pair in pairs) / token_rate
