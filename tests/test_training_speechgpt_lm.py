"""Training of unit language models: LoRA with rows of the vocabulary, TRL's trainers, the model's own loss."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_speechgpt_lm import FIRST_UNIT, NUM_UNITS, SIZES, build_model, build_tokenizer
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from hf_speechllm.data.unit_lm_examples import instruction_example, preference_row, pretraining_blocks
from hf_speechllm.models.modeling_speechgpt_lm import SpeechGptForCausalLM
from hf_speechllm.train.lora import unit_lm_lora_config
from hf_speechllm.train.unit_vocabulary import extend_with_units


# TRL 1.16 uses the old names of activation checkpointing.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*` is deprecated:FutureWarning")

PREFIX = "You are a tiny model.\n"
TEXTS = [
    "[Human]: Speak. This is input: a sunny day<eoh> [SpeechGPT]: <sosp><3><141><59><eosp><eoa> ",
    "[Human]: Write. This is input: <sosp><3><141><59><eosp><eoh> [SpeechGPT]: a sunny day<eoa> ",
    "[Human]: <sosp><26><5><eosp><eoh>. [SpeechGPT]: what is it?; [ta] a day.; [ua] <sosp><35><8><eosp><eoa>.",
]
NEW = list(range(FIRST_UNIT, SIZES["vocab_size"]))
OPTIONS = {"use_cpu": True, "report_to": [], "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}
tied_or_not = pytest.mark.parametrize("tied", (False, True), ids=("untied", "tied"))


def rows() -> Dataset:
    tokenizer = build_tokenizer()
    return Dataset.from_list([dict(instruction_example(tokenizer, PREFIX, text, 128)) for text in TEXTS])


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def sft(model, folder, peft_config=None, **options) -> SFTTrainer:
    arguments = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=3,
        max_steps=2,
        learning_rate=1e-2,
        max_length=None,
        bf16=False,
        **OPTIONS,
        **options,
    )
    trainer = SFTTrainer(
        model, arguments, train_dataset=rows(), processing_class=build_tokenizer(), peft_config=peft_config
    )
    trainer.train()
    return trainer


@tied_or_not
def test_sft_trains_the_extended_model(tmp_path, tied):
    """TRL's fused head and our own loss see the same number, and two steps make it smaller."""
    model = build_model(tie_word_embeddings=tied)
    collator = DataCollatorForSeq2Seq(build_tokenizer())
    batch = collator([{key: row[key] for key in ("input_ids", "attention_mask", "labels")} for row in rows()])
    with torch.no_grad():
        ours = model(**batch).loss.item()
    trainer = sft(model, tmp_path)
    assert losses(trainer)[0] == pytest.approx(ours, rel=1e-4)
    assert losses(trainer)[1] < losses(trainer)[0]


def test_sft_of_packed_units_with_gradient_checkpointing(tmp_path):
    """Stage 1, with and without checkpointing: the same losses."""
    tokenizer = build_tokenizer()
    blocks = pretraining_blocks(tokenizer, ["<sosp><1><2><3><eosp>"] * 12, 16)
    found = []
    for number, checkpointing in enumerate((False, True)):
        arguments = SFTConfig(
            output_dir=str(tmp_path / str(number)),
            max_steps=2,
            max_length=None,
            bf16=False,
            gradient_checkpointing=checkpointing,
            **OPTIONS,
        )
        trainer = SFTTrainer(
            build_model(), arguments, train_dataset=Dataset.from_list(blocks), processing_class=tokenizer
        )
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@tied_or_not
@pytest.mark.parametrize("choice", ("frozen", "all", "new"))
def test_lora_saves_and_reloads(tmp_path, tied, choice):
    """After a few steps of `Trainer`: reloaded = trained = merged, and old rows are untouched where they are to be."""
    base = build_model(tie_word_embeddings=tied)
    before = base.get_input_embeddings().weight.detach().clone()
    config = unit_lm_lora_config(base, rank=4, dropout=0.0, rows=choice, new_token_ids=NEW)
    model = get_peft_model(copy.deepcopy(base), config)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=3, per_device_train_batch_size=3, learning_rate=1e-2, **OPTIONS
    )
    trainer = Trainer(model, arguments, train_dataset=rows(), data_collator=DataCollatorForSeq2Seq(build_tokenizer()))
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    model.eval().save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([rows()[0]["input_ids"]])
    with torch.no_grad():
        trained = model(input_ids=ids).logits
        reloaded = PeftModel.from_pretrained(build_model(tie_word_embeddings=tied), tmp_path / "adapter").eval()
        assert torch.equal(reloaded(input_ids=ids).logits, trained)
        untrained = base(input_ids=ids).logits
        assert (trained - untrained).abs().max() > 1e-3
        merged = reloaded.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, trained, rtol=1e-4, atol=1e-4)
    assert isinstance(merged, SpeechGptForCausalLM)
    assert (merged.lm_head.weight is merged.get_input_embeddings().weight) == tied or choice != "frozen"
    changed = (merged.get_input_embeddings().weight != before).any(dim=1)
    if choice == "frozen":
        assert not changed.any()
    else:
        assert changed[FIRST_UNIT:].any()
    if choice == "new":
        assert not changed[:FIRST_UNIT].any()
        stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        assert [len(tensor) for name, tensor in stored.items() if "token_adapter" in name] == [len(NEW)]


@tied_or_not
@pytest.mark.parametrize("choice", ("frozen", "all", "new"))
def test_lora_in_sft(tmp_path, tied, choice):
    model = build_model(tie_word_embeddings=tied)
    config = unit_lm_lora_config(model, rank=4, dropout=0.0, rows=choice, new_token_ids=NEW)
    if tied and choice == "new":
        # What the preset's documentation says of TRL 1.16: if this passes one day, the text is to be changed.
        with pytest.raises(AttributeError, match="bias"):
            sft(model, tmp_path, config)
        return
    trainer = sft(model, tmp_path, config)
    assert losses(trainer)[1] < losses(trainer)[0]


def test_unknown_rows_are_refused():
    model = build_model()
    with pytest.raises(ValueError, match="rows"):
        unit_lm_lora_config(model, rows="some")
    with pytest.raises(ValueError, match="new_token_ids"):
        unit_lm_lora_config(model, rows="new")


def test_dpo_prefers_real_units(tmp_path):
    """SpeechAlign: units of a recording against units that the model sampled for the same prompt."""
    tokenizer, model = build_tokenizer(), build_model()
    prompt = "[Human]: Speak. This is input: a sunny day<eoh> [SpeechGPT]:"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    torch.manual_seed(0)
    allowed = torch.arange(FIRST_UNIT, FIRST_UNIT + NUM_UNITS)
    others = [i for i in range(SIZES["vocab_size"]) if i not in set(allowed.tolist())]
    sampled = model.generate(ids, max_new_tokens=6, do_sample=True, suppress_tokens=others)[0, ids.shape[1] :]
    row = preference_row(prompt + " ", [3, 141, 59, 26], (sampled - FIRST_UNIT).tolist(), end="<eoa>")
    assert row["prompt"] == prompt and row["chosen"] == "<sosp><3><141><59><26><eosp><eoa>"
    # The ids of the prompt begin those of the whole, which TRL relies on.
    whole = tokenizer(row["prompt"] + row["chosen"]).input_ids
    assert whole[: ids.shape[1]] == ids[0].tolist()
    arguments = DPOConfig(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=5e-3,
        max_length=None,
        bf16=False,
        **OPTIONS,
    )
    trainer = DPOTrainer(
        model,
        ref_model=copy.deepcopy(model),
        args=arguments,
        train_dataset=Dataset.from_list([row, row]),
        processing_class=tokenizer,
    )
    trainer.train()
    history = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert losses(trainer)[0] == pytest.approx(0.6931, abs=1e-3)
    assert history[-1] > history[0]


def test_resumed_is_uninterrupted(tmp_path):
    """Two steps, a checkpoint and two more = four steps."""

    def trainer(folder: str, steps: int) -> Trainer:
        arguments = TrainingArguments(
            output_dir=str(tmp_path / folder),
            max_steps=steps,
            per_device_train_batch_size=1,
            lr_scheduler_type="constant",
            learning_rate=1e-2,
            save_steps=2,
            **{**OPTIONS, "save_strategy": "steps"},
        )
        collator = DataCollatorForSeq2Seq(build_tokenizer())
        return Trainer(build_model("qwen2"), arguments, train_dataset=rows(), data_collator=collator)

    whole = trainer("whole", 4)
    whole.train()
    trainer("parts", 2).train()
    resumed = trainer("parts", 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_evaluation_gives_logits_only_when_asked(tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), per_device_eval_batch_size=1, **OPTIONS)
    collator = DataCollatorForSeq2Seq(build_tokenizer())
    seen = []

    def metrics(prediction) -> dict[str, float]:
        seen.append(prediction.predictions.shape)
        return {}

    for asked in (False, True):
        model = build_model()
        model.config.logits_with_labels = asked
        data = rows().select([0])
        trainer = Trainer(
            model, arguments, eval_dataset=data, data_collator=collator, compute_metrics=metrics if asked else None
        )
        assert trainer.evaluate()["eval_loss"] > 0
    assert seen == [(1, len(rows()[0]["input_ids"]), SIZES["vocab_size"])]


def test_extended_model_learns_its_units(tmp_path):
    """From a text model: extended, trained on units, its loss on them falls below that of guessing."""
    tokenizer = build_tokenizer()
    model = build_model(vocab_size=SIZES["vocab_size"])
    vocabulary = extend_with_units(model, tokenizer, NUM_UNITS, pad_to_multiple_of=64)
    assert vocabulary.added_tokens == () and vocabulary.rows == 1472
    trainer = sft(model, tmp_path)
    assert losses(trainer)[1] < losses(trainer)[0]
