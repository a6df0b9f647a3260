"""Align the language model of CosyVoice 2 or 3 with preferred renderings of a text, by TRL's DPO; full or LoRA.

    python training/dpo_cosyvoice_lm.py training/recipes/cosyvoice_lm/dpo.yaml --pretrained RUN --data_dir DATA \
        --output_dir RUN2

Data: parquet or jsonl files with `text`, `speech_token` (preferred), `reject_speech_token`, optionally `instruct`.
With LoRA, RUN2 holds the adapter and RUN2/merged the model with it merged in.
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
    import copy

    from datasets import Dataset
    from transformers import set_seed
    from trl import DPOConfig

    import hf_speechllm  # noqa: F401  registers the model families
    from hf_speechllm.data.cosyvoice_lm_examples import preference_rows
    from hf_speechllm.train.cosyvoice_lm_run import SpeechLmRunConfig, load_speech_lm, read_pairs
    from hf_speechllm.train.lora import lora_config
    from hf_speechllm.train.run_config import RunConfigError, load_run_config
    from hf_speechllm.train.speech_preferences import SpeechDpoTrainer
    from hf_speechllm.train.summary import write_summary
    from hf_speechllm.train.unit_lm_run import save_merged
    from hf_speechllm.train.zero import num_parameters

    recipe, overrides = (None, argv) if argv[0].startswith("--") else (argv[0], argv[1:])
    keys = [entry.name for entry in fields(DPOConfig)] + ["resume"]
    run = load_run_config(recipe, overrides, keys, SpeechLmRunConfig)
    options = dict(run.training)
    resume = options.pop("resume", False)
    # TRL cuts sequences and switches checkpointing and bfloat16 on by itself; here it is the recipe that does.
    defaults = {"report_to": "none", "max_length": None, "gradient_checkpointing": None, "bf16": False}
    args = DPOConfig(**defaults | options)
    set_seed(args.seed)
    if run.model.pretrained is None:
        raise RunConfigError("model.pretrained: expected a trained language model, found none")
    model, tokenizer = load_speech_lm(run.model, list)
    if model.config.model_type != "cosyvoice_lm":
        raise RunConfigError(f"model.pretrained: expected version 2 or 3, found {model.config.model_type!r}")

    def examples(paths: Sequence[str]) -> Dataset | None:
        rows = preference_rows(read_pairs(paths, run.data, tokenizer)[0], model.config)
        return Dataset.from_list(rows) if rows else None

    train_set = examples(run.data.train)
    if train_set is None:
        raise RunConfigError("data.train: expected rows with `reject_speech_token`, found none")
    adapter = None
    if run.lora.rank > 0:
        lora = run.lora
        adapter = lora_config(lora.rank, lora.alpha, lora.dropout, lora.target_modules, lora.modules_to_save)
    sizes = {"pairs": len(train_set), "parameters": num_parameters(model)}
    print(json.dumps(sizes), flush=True)
    trainer = SpeechDpoTrainer(
        model=model,
        # With an adapter the model without it is the reference.
        ref_model=None if adapter is not None else copy.deepcopy(model),
        args=args,
        train_dataset=train_set,
        eval_dataset=examples(run.data.validation),
        processing_class=tokenizer,
        peft_config=adapter,
    )
    summary = {**trainer.train(resume_from_checkpoint=resume).metrics, **sizes}
    if trainer.eval_dataset is not None:
        summary |= trainer.evaluate()
    trainer.save_model(args.output_dir)
    if adapter is not None and run.lora.merge:
        adapted = trainer.accelerator.unwrap_model(trainer.model)
        save_merged(adapted, tokenizer, Path(args.output_dir) / "merged", args.should_save)
    if args.should_save:
        write_summary(args.output_dir, summary)
    # Left to the end of the interpreter, the threads of a process group now and then abort it.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1:])
