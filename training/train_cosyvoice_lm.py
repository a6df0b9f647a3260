"""Train or fine-tune the language model of CosyVoice 1, 2 or 3: text to speech tokens, full or LoRA.

    python training/train_cosyvoice_lm.py training/recipes/cosyvoice_lm/digits.yaml --data_dir DATA --output_dir RUN
    python training/train_cosyvoice_lm.py training/recipes/cosyvoice_lm/speaker_lora.yaml --pretrained CONVERTED/llm \
        --tokenizer CONVERTED --data_dir DATA --output_dir RUN

Data: parquet or jsonl files with `text` and `speech_token`, optionally `instruct`, `utt_embedding`, `spk_embedding`:
the columns of upstream's recipes. With LoRA, RUN holds the adapter and RUN/merged the model with it merged in.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path


def main(argv: Sequence[str]) -> None:
    """Run the recipe; see the module's docstring."""
    if not argv or not {"-h", "--help"}.isdisjoint(argv):
        print(__doc__)
        return
    from transformers import Trainer, TrainingArguments, set_seed

    import hf_speechllm  # noqa: F401  registers the model families
    from hf_speechllm.train.cosyvoice_lm_run import (
        NewLayoutEachEpoch,
        SpeechLmRunConfig,
        load_speech_lm,
        make_collator,
        make_dataset,
        most_probable,
        read_pairs,
        seconds_of_speech,
        speech_accuracy,
    )
    from hf_speechllm.train.lora import lora_config
    from hf_speechllm.train.run_config import RunConfigError, load_run_config
    from hf_speechllm.train.summary import write_summary
    from hf_speechllm.train.unit_lm_run import read_rows, save_merged
    from hf_speechllm.train.zero import num_parameters

    recipe, overrides = (None, argv) if argv[0].startswith("--") else (argv[0], argv[1:])
    keys = [entry.name for entry in fields(TrainingArguments)] + ["resume"]
    run = load_run_config(recipe, overrides, keys, SpeechLmRunConfig)
    options = dict(run.training)
    resume = options.pop("resume", False)
    args = TrainingArguments(**{"report_to": "none", "remove_unused_columns": False} | options)
    set_seed(args.seed)

    model, tokenizer = load_speech_lm(
        run.model, lambda: [row["text"] + run.data.text_suffix for row in read_rows(run.data.train, run.data.data_dir)]
    )
    pairs, dropped = read_pairs(run.data.train, run.data, tokenizer)
    if not pairs:
        raise RunConfigError(f"data.train: expected rows of the lengths that are kept, found {dropped} others")
    train_set = make_dataset(pairs, model, run.data, args.seed)
    eval_pairs, _ = read_pairs(run.data.validation, run.data, tokenizer)
    eval_set = make_dataset(eval_pairs, model, run.data, args.seed) if eval_pairs else None
    sizes = {
        "examples": len(pairs),
        "left_out": dropped,
        "hours": round(seconds_of_speech(pairs) / 3600, 3),
        "parameters": num_parameters(model),
    }
    print(json.dumps(sizes), flush=True)
    config = model.config
    collator = make_collator(model)
    if run.lora.rank > 0:
        from peft import get_peft_model

        lora = run.lora
        adapter = lora_config(lora.rank, lora.alpha, lora.dropout, lora.target_modules, lora.modules_to_save)
        model = get_peft_model(model, adapter)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=train_set,
        eval_dataset=eval_set,
        data_collator=collator,
        processing_class=tokenizer,
        compute_metrics=speech_accuracy(config),
        preprocess_logits_for_metrics=most_probable,
        callbacks=[NewLayoutEachEpoch(train_set)],
    )
    before = trainer.evaluate() if eval_set is not None and not resume else {}
    summary = {**trainer.train(resume_from_checkpoint=resume).metrics, **sizes}
    summary |= {f"before_{name}": value for name, value in before.items() if name in ("eval_loss", "eval_accuracy")}
    if eval_set is not None:
        summary |= trainer.evaluate()
    trainer.save_model(args.output_dir)
    if run.lora.rank > 0 and run.lora.merge:
        adapted = trainer.accelerator.unwrap_model(trainer.model)
        save_merged(adapted, tokenizer, Path(args.output_dir) / "merged", args.should_save)
    if args.should_save:
        write_summary(args.output_dir, summary)
    # Left to the end of the interpreter, the threads of a process group now and then abort it.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1:])
