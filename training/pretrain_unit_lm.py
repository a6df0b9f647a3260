"""Stage 1 of a unit language model: next-unit prediction on packed lines of units, by TRL's `SFTTrainer`.

    python training/pretrain_unit_lm.py training/recipes/speechgpt_lm/digits_stage1.yaml --data_dir D --output_dir RUN
    python training/pretrain_unit_lm.py RECIPE.yaml --pretrained BASE_MODEL --num_units 1000 --output_dir RUN

Data: parquet files of `training/extract_units.py` (column `units`), or text files with one `<sosp><12><7>...<eosp>` a
line. A base model without units gets them; without `pretrained` a new model of `model.config` begins. One YAML file
describes one run, `--key value` overrides it, `--resume true` goes on from the newest checkpoint.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import fields


def main(argv: Sequence[str]) -> None:
    """Run the recipe; see the module's docstring."""
    if not argv or not {"-h", "--help"}.isdisjoint(argv):
        print(__doc__)
        return
    from datasets import Dataset
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    import hf_speechllm  # noqa: F401  registers the model families
    from hf_speechllm.data.unit_lm_examples import pretraining_blocks
    from hf_speechllm.models.unit_string import unit_string
    from hf_speechllm.train.run_config import load_run_config
    from hf_speechllm.train.summary import write_summary
    from hf_speechllm.train.unit_lm_run import SFT_DEFAULTS, UnitLmRunConfig, load_unit_lm, read_rows
    from hf_speechllm.train.zero import num_parameters

    recipe, overrides = (None, argv) if argv[0].startswith("--") else (argv[0], argv[1:])
    keys = [entry.name for entry in fields(SFTConfig)] + ["resume"]
    run = load_run_config(recipe, overrides, keys, UnitLmRunConfig)
    options = dict(run.training)
    resume = options.pop("resume", False)
    args = SFTConfig(**SFT_DEFAULTS | options)
    set_seed(args.seed)
    model, tokenizer = load_unit_lm(run.model, run.data, args.seed)

    def blocks(paths: Sequence[str]) -> Dataset:
        rows = read_rows(paths, run.data.data_dir)
        lines = [unit_string(row["units"]) if "units" in row else row["text"] for row in rows]
        return Dataset.from_list(pretraining_blocks(tokenizer, lines, run.data.block_size))

    train_set = blocks(run.data.train)
    eval_set = blocks(run.data.validation) if run.data.validation else None
    sizes = {"blocks": len(train_set), "parameters": num_parameters(model), "vocabulary": len(tokenizer)}
    print(json.dumps(sizes), flush=True)
    trainer = SFTTrainer(
        model=model, args=args, train_dataset=train_set, eval_dataset=eval_set, processing_class=tokenizer
    )
    summary = {**trainer.train(resume_from_checkpoint=resume).metrics, **sizes}
    if eval_set is not None:
        summary |= trainer.evaluate()
        summary["eval_perplexity"] = math.exp(summary["eval_loss"])
    trainer.save_model(args.output_dir)
    if args.should_save:
        write_summary(args.output_dir, summary)
    # Left to the end of the interpreter, the threads of a process group now and then abort it.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1:])
