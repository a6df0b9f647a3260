"""Train a text-to-unit model: an encoder-decoder that reads text and writes speech units.

    python training/train_text_to_unit.py training/recipes/speechgpt_lm/digits_text_to_unit.yaml --output_dir RUN

Data: parquet files of `training/extract_units.py`. `model.config` holds the fields of one of transformers'
encoder-decoders (`model_type: bart`, ...); the tokenizer is a byte-level BPE of the texts with the unit tokens behind.
`build_speech_instruct.py chain --text_to_unit RUN` has it speak answers.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import fields


def main(argv: Sequence[str]) -> None:
    """Run the recipe; see the module's docstring."""
    if not argv or not {"-h", "--help"}.isdisjoint(argv):
        print(__doc__)
        return
    from datasets import Dataset
    from transformers import (
        CONFIG_MAPPING,
        AutoModelForSeq2SeqLM,
        DataCollatorForSeq2Seq,
        Seq2SeqTrainer,
        Seq2SeqTrainingArguments,
        set_seed,
    )

    from hf_speechllm.models.unit_string import unit_string
    from hf_speechllm.train.run_config import load_run_config
    from hf_speechllm.train.summary import write_summary
    from hf_speechllm.train.text_tokenizer import train_byte_bpe
    from hf_speechllm.train.unit_lm_run import UnitLmRunConfig, read_rows
    from hf_speechllm.train.unit_vocabulary import add_unit_tokens
    from hf_speechllm.train.zero import num_parameters

    recipe, overrides = (None, argv) if argv[0].startswith("--") else (argv[0], argv[1:])
    keys = [entry.name for entry in fields(Seq2SeqTrainingArguments)] + ["resume"]
    run = load_run_config(recipe, overrides, keys, UnitLmRunConfig)
    options = dict(run.training)
    resume = options.pop("resume", False)
    args = Seq2SeqTrainingArguments(**{"report_to": "none"} | options)
    set_seed(args.seed)

    train_rows = list(read_rows(run.data.train, run.data.data_dir))
    tokenizer = train_byte_bpe([row["text"] for row in train_rows], run.model.text_vocab_size)
    tokenizer.padding_side = "right"
    add_unit_tokens(tokenizer, run.model.num_units, extra_tokens=())

    def examples(rows: Sequence[dict]) -> Dataset:
        targets = tokenizer([unit_string(row["units"]) for row in rows], add_special_tokens=False).input_ids
        return Dataset.from_dict(
            {
                "input_ids": tokenizer([row["text"] for row in rows]).input_ids,
                "labels": [ids[: run.data.max_length - 1] + [tokenizer.eos_token_id] for ids in targets],
            }
        )

    fields_of_model = dict(run.model.config)
    config = CONFIG_MAPPING[fields_of_model.pop("model_type")](
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.bos_token_id,
        forced_eos_token_id=None,
        **fields_of_model,
    )
    model = AutoModelForSeq2SeqLM.from_config(config)
    train_set = examples(train_rows)
    validation = list(read_rows(run.data.validation, run.data.data_dir))
    eval_set = examples(validation) if validation else None
    sizes = {"examples": len(train_set), "parameters": num_parameters(model)}
    print(json.dumps(sizes), flush=True)
    trainer = Seq2SeqTrainer(
        model=model,
        args=args,
        train_dataset=train_set,
        eval_dataset=eval_set,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        processing_class=tokenizer,
    )
    summary = {**trainer.train(resume_from_checkpoint=resume).metrics, **sizes}
    if eval_set is not None:
        summary |= trainer.evaluate()
    trainer.save_model(args.output_dir)
    if args.should_save:
        write_summary(args.output_dir, summary)
    # Left to the end of the interpreter, the threads of a process group now and then abort it.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1:])
