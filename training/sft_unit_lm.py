"""Stages 2 and 3 of a unit language model: instructions, by TRL's `SFTTrainer`; full, LoRA or QLoRA.

    python training/sft_unit_lm.py training/recipes/speechgpt_lm/digits_stage2.yaml --pretrained RUN1 --output_dir RUN2
    python training/sft_unit_lm.py training/recipes/speechgpt_lm/digits_stage3.yaml --pretrained RUN2 --output_dir RUN3

Data: parquet or jsonl files with `prefix` and `plain_text`, as `training/build_speech_instruct.py` writes them and as
SpeechInstruct is published. The prefix is not learned; the requests are, as upstream does, unless
`--assistant_only true`. With LoRA, RUN holds the adapter and RUN/merged the model with the adapter merged in; after
QLoRA that model is not quantised any more.
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
    from datasets import Dataset
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    import hf_speechllm  # noqa: F401  registers the model families
    from hf_speechllm.data.unit_lm_examples import instruction_example
    from hf_speechllm.train.lora import unit_lm_lora_config
    from hf_speechllm.train.run_config import RunConfigError, load_run_config
    from hf_speechllm.train.summary import write_summary
    from hf_speechllm.train.unit_lm_run import (
        SFT_DEFAULTS,
        UnitLmRunConfig,
        load_dequantised,
        load_unit_lm,
        read_rows,
        save_merged,
    )
    from hf_speechllm.train.zero import num_parameters

    recipe, overrides = (None, argv) if argv[0].startswith("--") else (argv[0], argv[1:])
    keys = [entry.name for entry in fields(SFTConfig)] + ["resume"]
    run = load_run_config(recipe, overrides, keys, UnitLmRunConfig)
    options = dict(run.training)
    resume = options.pop("resume", False)
    if run.model.pretrained is None:
        raise RunConfigError("model.pretrained: expected the model of the stage before, found none")
    if run.model.quantization != "none" and run.lora.rank < 1:
        raise RunConfigError("lora.rank: expected at least 1 for a quantised model, found 0")
    args = SFTConfig(**SFT_DEFAULTS | options)
    set_seed(args.seed)
    model, tokenizer = load_unit_lm(run.model, run.data, args.seed)

    def examples(paths: Sequence[str]) -> Dataset:
        rows = read_rows(paths, run.data.data_dir)
        length, alone = run.data.max_length, run.data.assistant_only
        return Dataset.from_list(
            [instruction_example(tokenizer, row["prefix"], row["plain_text"], length, alone) for row in rows]
        )

    train_set = examples(run.data.train)
    eval_set = examples(run.data.validation) if run.data.validation else None
    adapter = None
    if run.lora.rank > 0:
        lora = run.lora
        adapter = unit_lm_lora_config(model, lora.rank, lora.alpha, lora.dropout, lora.target_modules, lora.rows)
    sizes = {"examples": len(train_set), "parameters": num_parameters(model)}
    print(json.dumps(sizes), flush=True)
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=train_set,
        eval_dataset=eval_set,
        processing_class=tokenizer,
        peft_config=adapter,
    )
    summary = {**trainer.train(resume_from_checkpoint=resume).metrics, **sizes}
    if eval_set is not None:
        summary |= trainer.evaluate()
    trainer.save_model(args.output_dir)
    if adapter is not None and run.lora.merge:
        folder = Path(args.output_dir) / "merged"
        if run.model.quantization == "none":
            save_merged(trainer.accelerator.unwrap_model(trainer.model), tokenizer, folder, args.should_save)
        elif args.should_save:  # ZeRO-3 shares no quantised weights out: one process is enough
            dequantised = load_dequantised(run.model, run.data, args.seed, Path(args.output_dir))
            save_merged(dequantised, tokenizer, folder, True)
    if args.should_save:
        write_summary(args.output_dir, summary)
    # Left to the end of the interpreter, the threads of a process group now and then abort it.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1:])
