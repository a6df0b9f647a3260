"""Train or fine-tune a speech recogniser.

    python training/train_asr.py training/recipes/wenet_u2pp/digits_moe.yaml --data_dir DATA/digits --output_dir RUN
    python training/train_asr.py RECIPE.yaml --learning_rate 1e-3 --model.config.hidden_size 128 --resume true

One YAML file describes one run (groups: model, data, augmentation, lora, training); `--key value` overrides it. The
folder `output_dir` receives the checkpoints and, at its top level, the final model with its processor and code files.
`--resume true` goes on from the newest complete checkpoint and gives the same weights as a run that was never stopped.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hf_speechllm.data.manifests import Utterance
    from hf_speechllm.train.run_config import RunConfig


# Families that a recipe can train from scratch; of the others it starts from a converted model.
NEW_MODEL_TYPES = ("wenet_u2pp", "funasr_paraformer", "funasr_sensevoice")
# A new SenseVoice model has tags for the published languages, and for German.
SENSEVOICE_LANGUAGES = ("zh", "en", "yue", "ja", "ko", "de", "nospeech")


def build_processor(run: "RunConfig", utterances: "Sequence[Utterance]"):
    """Processor of a new model: feature extractor by its arguments, tokenizer from a folder or the training text.

    Raises:
        ValueError: a `model_type` that has no recipe from scratch, or an unknown `unit`.
    """
    from transformers import AutoTokenizer

    from hf_speechllm.models.feature_extraction_kaldi_fbank import KaldiFbankFeatureExtractor
    from hf_speechllm.models.processing_funasr_paraformer import FunasrParaformerProcessor
    from hf_speechllm.models.processing_funasr_sensevoice import FunasrSenseVoiceProcessor
    from hf_speechllm.models.processing_wenet_u2pp import WenetU2ppProcessor

    processors = dict(
        zip(NEW_MODEL_TYPES, (WenetU2ppProcessor, FunasrParaformerProcessor, FunasrSenseVoiceProcessor), strict=True)
    )
    if run.model.model_type not in NEW_MODEL_TYPES:
        raise ValueError(f"model_type: expected one of {NEW_MODEL_TYPES}, found {run.model.model_type!r}")
    if run.data.tokenizer is not None:
        tokenizer = AutoTokenizer.from_pretrained(run.data.tokenizer)
    else:
        if run.data.unit not in ("word", "char"):
            raise ValueError(
                f"unit: expected 'word' or 'char', found {run.data.unit!r}; give a BPE tokenizer as a folder"
            )
        builders = (build_tokenizer, build_paraformer_tokenizer, build_sensevoice_tokenizer)
        build = dict(zip(NEW_MODEL_TYPES, builders, strict=True))[run.model.model_type]
        tokenizer = build([utterance.text for utterance in utterances], run.data.unit)
    return processors[run.model.model_type](KaldiFbankFeatureExtractor(**run.data.feature_extractor), tokenizer)


def build_paraformer_tokenizer(texts: Sequence[str], unit: str) -> "PreTrainedTokenizerBase":
    """Tokenizer over the sorted units of a text, in FunASR's layout: <blank> 0, <s> 1, </s> 2, units, <unk> last.

    Args:
        texts (`Sequence[str]`): the training transcripts.
        unit (`str`): `"word"`, lower-cased, or `"char"`, where spaces vanish.
    """
    from hf_speechllm.upstream.funasr_tokens import build_paraformer_char_tokenizer

    found = {part for text in texts for part in (text.lower().split() if unit == "word" else "".join(text.split()))}
    marks = ("<blank>", "<s>", "</s>")
    names = [*marks, *sorted(found - {*marks, "<unk>"}), "<unk>"]
    words = {name: (name,) for name in names[len(marks) : -1]} if unit == "word" else None
    return build_paraformer_char_tokenizer({name: number for number, name in enumerate(names)}, seg_dict=words)


def build_sensevoice_tokenizer(texts: Sequence[str], unit: str) -> "PreTrainedTokenizerBase":
    """Unigram tokenizer over the sorted units of a text: <unk> 0, which is the blank, <s> 1, </s> 2, tags, units.

    Args:
        texts (`Sequence[str]`): the training transcripts.
        unit (`str`): `"word"` (a unit is a word with its boundary) or `"char"` (the boundary is a unit of its own).
    """
    from hf_speechllm.models.processing_funasr_sensevoice import EMOTIONS, EVENTS, TEXT_NORMS
    from hf_speechllm.upstream.sentencepiece_model import (
        CONTROL,
        NORMAL,
        UNKNOWN,
        USER_DEFINED,
        SentencePiece,
        SentencePieceModel,
    )
    from hf_speechllm.upstream.sentencepiece_tokenizer import build_sentencepiece_tokenizer

    boundary = "\u2581"
    if unit == "word":
        units = {boundary + word for text in texts for word in text.split()}
    else:
        units = {boundary} | {character for text in texts for character in text if not character.isspace()}
    tags = (*SENSEVOICE_LANGUAGES, *EMOTIONS, *EVENTS, *TEXT_NORMS)
    pieces = (
        SentencePiece("<unk>", 0.0, UNKNOWN),
        *(SentencePiece(name, 0.0, CONTROL) for name in ("<s>", "</s>")),
        *(SentencePiece(f"<|{tag}|>", 0.0, USER_DEFINED) for tag in tags),
        *(SentencePiece(name, -1.0, NORMAL) for name in sorted(units)),
    )
    model = SentencePieceModel(pieces, "unigram", b"", add_dummy_prefix=True, remove_extra_whitespaces=True)
    return build_sentencepiece_tokenizer(model)


def sensevoice_ids(tokenizer: "PreTrainedTokenizerBase") -> dict[str, dict[str, int]]:
    """Which unit each tag is, by kind, as `FunasrSenseVoiceConfig` wants it."""
    from hf_speechllm.models.processing_funasr_sensevoice import tag_kind

    kinds: dict[str, dict[str, int]] = {"language": {}, "emotion": {}, "event": {}, "textnorm": {}}
    for name in tokenizer.tag_names():
        kinds[tag_kind(name)][name] = tokenizer.tag_id(name)
    return {f"{kind}_token_ids": ids for kind, ids in kinds.items()}


def build_tokenizer(texts: Sequence[str], unit: str) -> "PreTrainedTokenizerBase":
    """Tokenizer over the sorted units of a text, in WeNet's layout: <blank> 0, <unk> 1, units, <sos/eos> last.

    Args:
        texts (`Sequence[str]`): the training transcripts.
        unit (`str`): `"word"` or `"char"` (a space becomes the unit `\u2581`).
    """
    from hf_speechllm.upstream.tokens import build_char_tokenizer, build_word_tokenizer

    found = {
        part for text in texts for part in (text.split() if unit == "word" else text.strip().replace(" ", "\u2581"))
    }
    names = ["<blank>", "<unk>", *sorted(found - {"<blank>", "<unk>", "<sos/eos>"}), "<sos/eos>"]
    units = {name: number for number, name in enumerate(names)}
    return build_word_tokenizer(units) if unit == "word" else build_char_tokenizer(units)


def build_model(run: "RunConfig", tokenizer: "PreTrainedTokenizerBase", dataset):
    """A pretrained model, or a new one whose CMVN is measured on `dataset` without its augmentation."""
    from transformers import AutoConfig, AutoModelForSpeechSeq2Seq

    switches = {"attn_implementation": run.model.attn_implementation} if run.model.attn_implementation else {}
    if run.model.pretrained is not None:
        trust = {"trust_remote_code": run.model.trust_remote_code}
        config = AutoConfig.from_pretrained(run.model.pretrained, **trust)
        for key, value in run.model.config.items():
            setattr(config, key, value)
        model = AutoModelForSpeechSeq2Seq.from_pretrained(run.model.pretrained, config=config, **trust, **switches)
    else:
        extractor, shape = dataset.feature_extractor, {}
        if run.model.model_type == "funasr_paraformer":
            shape = {"input_size": extractor.lfr_m * extractor.feature_size, "stacked_frames": extractor.lfr_n}
        elif run.model.model_type == "funasr_sensevoice":
            shape = {"input_size": extractor.lfr_m * extractor.feature_size, "subsampling_rate": extractor.lfr_n}
            shape |= sensevoice_ids(tokenizer)
        config = AutoConfig.for_model(
            run.model.model_type,
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **shape | run.model.config,
        )
        model = AutoModelForSpeechSeq2Seq.from_config(config, **switches)
        if run.model.compute_cmvn:
            measure_cmvn(model, dataset)
    if run.model.experts_implementation is not None:
        model.set_experts_implementation(run.model.experts_implementation)
    return model


def measure_cmvn(model, dataset) -> None:
    """Mean and variance of the features without augmentation, where the family keeps them.

    WeNet: in the encoder, unless the configuration has none. FunASR: in the feature extractor, that of `dataset`.
    """
    import torch

    from hf_speechllm.data.dataset import SpeechRecognitionDataset, cmvn_statistics

    is_wenet = model.config.model_type == "wenet_u2pp"
    if is_wenet and not model.config.has_cmvn:
        return
    extractor = dataset.feature_extractor
    mean, inverse_std = cmvn_statistics(SpeechRecognitionDataset(dataset.utterances, extractor, dataset.tokenizer))
    if is_wenet:
        with torch.no_grad():
            model.model.encoder.cmvn.mean.copy_(mean)
            model.model.encoder.cmvn.inverse_std.copy_(inverse_std)
    else:
        extractor.cmvn_mean, extractor.cmvn_inverse_std = mean.tolist(), inverse_std.tolist()


def count_parameters(model) -> dict[str, int]:
    """All parameters, and those that one frame or token uses (of stacked experts, the k chosen of E)."""
    total = active = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        share = 1.0
        if ".experts." in name:
            per_token = (
                model.config.num_experts_per_tok if ".encoder." in name else model.config.decoder_num_experts_per_tok
            )
            share = per_token / parameter.shape[0]
        active += int(parameter.numel() * share)
    return {"parameters": total, "active_parameters": active}


def load_weights(model, state: dict) -> None:
    """Put the tensors of a checkpoint (of a model, or of an adapter on it) into a model.

    Raises:
        ValueError: a tensor that the model does not have.
    """
    from peft import PeftModel, set_peft_model_state_dict

    from hf_speechllm.train.zero import whole_parameters

    with whole_parameters(model, modified=True):
        if isinstance(model, PeftModel):
            unexpected = set_peft_model_state_dict(model, state).unexpected_keys
        else:
            unexpected = model.load_state_dict(state, strict=False).unexpected_keys
    if unexpected:
        raise ValueError(f"averaged checkpoints: expected tensors of the model, found {', '.join(unexpected)}")


def main(argv: Sequence[str]) -> None:
    """Run the recipe; see the module's docstring."""
    if not argv or not {"-h", "--help"}.isdisjoint(argv):
        print(__doc__)
        return
    import torch
    from transformers import AutoConfig, AutoProcessor, set_seed

    import hf_speechllm  # noqa: F401  registers the model families
    from hf_speechllm.data.collator import SpeechRecognitionCollator
    from hf_speechllm.data.dataset import SpeechRecognitionDataset
    from hf_speechllm.data.sources import read_sources
    from hf_speechllm.train.averaging import average_checkpoints, select_checkpoints
    from hf_speechllm.train.lora import freeze, lora_config
    from hf_speechllm.train.metrics import recognition_metrics
    from hf_speechllm.train.run_config import load_run_config
    from hf_speechllm.train.summary import write_summary
    from hf_speechllm.train.trainer import SpeechRecognitionTrainer, SpeechTrainingArguments
    from hf_speechllm.train.zero import whole_parameters

    recipe, overrides = (None, argv) if argv[0].startswith("--") else (argv[0], argv[1:])
    keys = [entry.name for entry in fields(SpeechTrainingArguments)] + ["resume"]
    run = load_run_config(recipe, overrides, keys)
    options = dict(run.training)
    resume = options.pop("resume", False)
    args = SpeechTrainingArguments(**{"remove_unused_columns": False, "report_to": "none"} | options)
    set_seed(args.seed)

    train_utterances = read_sources(run.data.train, run.data.data_dir)
    label_maker, model_type = None, run.model.model_type
    if run.model.pretrained is not None:
        trust = {"trust_remote_code": run.model.trust_remote_code}
        processor = AutoProcessor.from_pretrained(run.model.pretrained, **trust)
        model_type = AutoConfig.from_pretrained(run.model.pretrained, **trust).model_type
    else:
        processor = build_processor(run, train_utterances)
    if model_type == "funasr_sensevoice":
        # Labels are language, emotion, event and text normalisation, from columns of the manifest, then the text.
        label_maker = processor.label_ids_of_row
    parts = (processor.feature_extractor, processor.tokenizer)
    train_set = SpeechRecognitionDataset(
        train_utterances,
        *parts,
        augmentation=run.augmentation,
        seed=args.data_seed if args.data_seed is not None else args.seed,
        separator=run.data.separator,
        min_seconds=run.data.min_seconds,
        max_seconds=run.data.max_seconds,
        min_tokens=run.data.min_tokens,
        max_tokens=run.data.max_tokens,
        label_maker=label_maker,
    )
    validation = read_sources(run.data.validation, run.data.data_dir)
    eval_set = SpeechRecognitionDataset(validation, *parts, label_maker=label_maker) if validation else None

    model = build_model(run, processor.tokenizer, train_set)
    if run.model.pretrained is None and run.model.model_type == "wenet_u2pp":
        processor.subsampling_rate, processor.right_context = model.config.subsampling_rate, model.config.right_context
    freeze(model, run.model.freeze)
    with whole_parameters(model):
        sizes = count_parameters(model)
    if run.lora.rank > 0:
        from peft import get_peft_model

        adapter = lora_config(
            run.lora.rank, run.lora.alpha, run.lora.dropout, run.lora.target_modules, run.lora.modules_to_save
        )
        model = get_peft_model(model, adapter)
    print(json.dumps({"utterances": len(train_set), **sizes}), flush=True)

    trainer = SpeechRecognitionTrainer(
        model=model,
        args=args,
        train_dataset=train_set,
        eval_dataset=eval_set,
        data_collator=SpeechRecognitionCollator(),
        compute_metrics=recognition_metrics(processor.tokenizer, run.data.metric),
        processing_class=processor,
    )
    wall, cpu = time.perf_counter(), time.process_time()
    result = trainer.train(resume_from_checkpoint=resume)
    summary = {
        **result.metrics,
        **sizes,
        "wall_seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "threads": torch.get_num_threads(),
        "seed": args.seed,
    }

    if args.average_checkpoints > 1:
        folders = select_checkpoints(args.output_dir, args.average_checkpoints, args.average_by)
        load_weights(trainer.accelerator.unwrap_model(trainer.model), average_checkpoints(folders))
        summary["averaged"] = [folder.name for folder in folders]
    if eval_set is not None:
        summary |= trainer.evaluate()
    trainer.save_model(args.output_dir)
    if run.lora.rank > 0 and run.lora.merge:
        tuned = trainer.accelerator.unwrap_model(trainer.model)
        with whole_parameters(tuned):
            merged = tuned.merge_and_unload()
            if args.should_save:
                merged.save_pretrained(Path(args.output_dir) / "merged")
                processor.save_pretrained(Path(args.output_dir) / "merged")
    if args.should_save:
        trainer.state.save_to_json(str(Path(args.output_dir) / "trainer_state.json"))
        write_summary(args.output_dir, summary)
    # Left to the end of the interpreter, the threads of a process group now and then abort it.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1:])
