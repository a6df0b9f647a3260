"""The training scripts of CosyVoice's language models, on pairs small enough to learn by heart."""

import copy
import importlib.util
import json
from pathlib import Path

import pytest
import torch
import yaml
from tiny_cosyvoice import recording, tiny_processor
from tiny_cosyvoice_lm import END_OF_PROMPT, QWEN, SPEECH_SIZE, build_qwen
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from hf_speechllm.data.cosyvoice_lm_examples import SpeechPair, preference_rows
from hf_speechllm.models.configuration_cosyvoice_lm import CosyVoiceLmConfig
from hf_speechllm.train.cosyvoice_lm_run import (
    SpeechLmDataArguments,
    SpeechLmModelArguments,
    SpeechLmRunConfig,
    load_speech_lm,
    new_tokenizer,
    read_pairs,
    speech_accuracy,
)
from hf_speechllm.train.preference_log_probs import answer_log_probs, dpo_loss
from hf_speechllm.train.run_config import RunConfigError, load_run_config


ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "training" / "recipes" / "cosyvoice_lm").glob("*.yaml"))
ROWS = [
    {"text": text, "speech_token": [(seed + 3 * step) % SPEECH_SIZE for step in range(count)]}
    for seed, (text, count) in enumerate((("one two", 24), ("three", 16), ("four five", 30)))
]
SIZES = {name: QWEN[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "speech_vocab_size")}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
FAST = [
    "--learning_rate",
    "0.01",
    "--save_strategy",
    "no",
    "--use_cpu",
    "true",
    "--seed",
    "1",
    "--disable_tqdm",
    "true",
]


def run(script: str, *arguments: object) -> None:
    path = ROOT / "training" / f"{script}.py"
    spec = importlib.util.spec_from_file_location(script, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([str(argument) for argument in arguments])


def write_rows(folder: Path, rows: list[dict], name: str = "train") -> Path:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def summary(folder: Path) -> dict:
    return json.loads((folder / "training_summary.json").read_text())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_read(path):
    from transformers import TrainingArguments
    from trl import DPOConfig

    recipe = load_run_config(path, [], [], SpeechLmRunConfig)
    kind = DPOConfig if path.stem == "dpo" else TrainingArguments
    # Its name before transformers 5.23 is deprecated there.
    known = {"report_to": "none", "output_dir": "x", "use_cpu": True, "bf16": False, "gradient_checkpointing": None}
    kind(**{**recipe.training, **known})
    assert recipe.data.train
    if recipe.model.config:
        config = CosyVoiceLmConfig(**{"text_vocab_size": 320, **recipe.model.config})
        assert config.hidden_size % config.num_attention_heads == 0


def test_version_2_learns_by_heart_and_says_it(tmp_path):
    """Random weights, both layouts; the folder that is written generates what was learnt."""
    data = write_rows(tmp_path, ROWS)
    out = tmp_path / "run"
    run(
        "train_cosyvoice_lm",
        *("--data.train", f"[{data}]", "--data.validation", f"[{data}]", "--output_dir", out),
        *("--model.config", yaml.safe_dump({"version": 2, **SIZES}, default_flow_style=True).strip()),
        *("--model.text_vocab_size", 280, "--num_train_epochs", 60, "--per_device_train_batch_size", 3, *FAST),
    )
    result = summary(out)
    assert result["examples"] == 3 and result["eval_accuracy"] > 0.97 > result["before_eval_accuracy"]
    assert result["eval_loss"] < 0.1 * result["before_eval_loss"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    ids = torch.tensor([tokenizer(ROWS[0]["text"], add_special_tokens=False).input_ids])
    spoken = model.generate_speech_tokens(ids, min_token_text_ratio=0, do_sample=False).token_ids[0].tolist()
    assert spoken == ROWS[0]["speech_token"]


def test_version_1_learns_with_a_withheld_speaker(tmp_path):
    rows = [{**row, "spk_embedding": [float(number)] * 192} for number, row in enumerate(ROWS)]
    data, out = write_rows(tmp_path, rows), tmp_path / "run"
    config = {
        **{"speech_vocab_size": SPEECH_SIZE, "text_embedding_size": 16, "input_size": 16, "hidden_size": 32},
        **{"text_encoder_hidden_size": 16, "text_encoder_num_layers": 1, "text_encoder_num_heads": 2},
        **{"text_encoder_intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"intermediate_size": 64, "dropout": 0.0, "positional_dropout": 0.0},
    }
    run(
        "train_cosyvoice_lm",
        *("--data.train", f"[{data}]", "--data.validation", f"[{data}]", "--output_dir", out),
        *("--model.model_type", "cosyvoice_transformer_lm", "--model.config", json.dumps(config)),
        *("--data.speaker_column", "spk_embedding", "--data.speaker_dropout", 0.3),
        *("--model.text_vocab_size", 280, "--num_train_epochs", 30, "--per_device_train_batch_size", 3, *FAST),
    )
    result = summary(out)
    assert result["eval_loss"] < 0.6 * result["before_eval_loss"]
    assert type(AutoModel.from_pretrained(out)).__name__ == "CosyVoiceTransformerLm"


def test_lora_of_a_trained_model(tmp_path):
    """The adapter alone is trained; the merged folder holds the same function."""
    peft = pytest.importorskip("peft")
    base = build_qwen(2, text_vocab_size=320)
    base.save_pretrained(tmp_path / "base")
    new_tokenizer([row["text"] for row in ROWS], 280).save_pretrained(tmp_path / "base")
    data, out = write_rows(tmp_path, ROWS), tmp_path / "run"
    run(
        "train_cosyvoice_lm",
        *("--pretrained", tmp_path / "base", "--data.train", f"[{data}]", "--output_dir", out),
        *("--lora.rank", 4, "--num_train_epochs", 4, "--per_device_train_batch_size", 3, *FAST),
    )
    merged = AutoModelForCausalLM.from_pretrained(out / "merged").eval()
    adapted = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), out).eval()
    ids = torch.tensor([[5, 9, 330]])
    with torch.no_grad():
        logits = [model(ids, speech_logits_only=True).logits for model in (merged, adapted, base)]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    assert (logits[0] - logits[2]).abs().max() > 1e-3
    assert torch.equal(merged.get_input_embeddings().weight, base.get_input_embeddings().weight)


def preference_pairs() -> list[SpeechPair]:
    return [
        SpeechPair((3, 4, END_OF_PROMPT, 5), (1, 2, 3, 4), rejected_speech_ids=(9, 9)),
        SpeechPair((END_OF_PROMPT, 6), (7, 8), rejected_speech_ids=(1, 2, 3)),
    ]


@pytest.mark.parametrize("version", (2, 3))
def test_trl_computes_the_log_probabilities_of_speech(version, tmp_path):
    """TRL's loss on our head is the DPO loss on sums of log-probabilities, at a policy that left its reference."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import DPOConfig

    from hf_speechllm.train.speech_preferences import SpeechDpoTrainer

    reference = build_qwen(version)
    policy = copy.deepcopy(reference)
    with torch.no_grad():
        policy.lm_head.weight.add_(0.3 * torch.randn(policy.lm_head.weight.shape))
    rows = preference_rows(preference_pairs(), policy.config)
    expected = []
    with torch.no_grad():
        for model in (policy, reference):
            for side in ("chosen_ids", "rejected_ids"):
                sums = []
                for row in rows:
                    ids = torch.tensor([row["prompt_ids"] + row[side]])
                    targets = ids[:, 1:].clone()
                    targets[:, : len(row["prompt_ids"]) - 1] = -100
                    logits = model(ids, speech_logits_only=True).logits[:, :-1]
                    first = model.config.first_speech_token_id
                    targets = torch.where(targets == -100, targets, targets - first)
                    sums.append(answer_log_probs(logits, targets))
                expected.append(torch.cat(sums))
    wanted = dpo_loss(*expected, beta=0.1).loss
    arguments = {"report_to": "none", "max_length": None, "use_cpu": True, "bf16": False, "beta": 0.1}
    arguments |= {"per_device_train_batch_size": 2, "gradient_checkpointing": None}
    trainer = SpeechDpoTrainer(
        model=policy,
        ref_model=reference,
        args=DPOConfig(output_dir=str(tmp_path), **arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=new_tokenizer(["a"], 270),
    )
    batch = trainer.data_collator([dict(row) for row in rows])
    loss = trainer.compute_loss(policy.eval(), batch)
    torch.testing.assert_close(loss.detach(), wanted, rtol=1e-4, atol=1e-4)
    loss.backward()
    assert policy.lm_head.weight.grad.abs().sum() > 0


def test_dpo_script_prefers_the_chosen(tmp_path):
    pytest.importorskip("trl")
    build_qwen(2, text_vocab_size=320, initializer_range=0.1).save_pretrained(tmp_path / "base")
    new_tokenizer([row["text"] for row in ROWS], 280).save_pretrained(tmp_path / "base")
    rows = [{**row, "reject_speech_token": row["speech_token"][::-1][:9]} for row in ROWS]
    data, out = write_rows(tmp_path, rows), tmp_path / "run"
    run(
        "dpo_cosyvoice_lm",
        *("--pretrained", tmp_path / "base", "--data.train", f"[{data}]", "--data.validation", f"[{data}]"),
        *("--output_dir", out, "--beta", 0.1, "--num_train_epochs", 8, "--per_device_train_batch_size", 3, *FAST),
    )
    result = summary(out)
    assert result["pairs"] == 3 and result["eval_rewards/accuracies"] == 1.0 and result["eval_rewards/margins"] > 0
    with pytest.raises(RunConfigError, match="reject_speech_token"):
        run(
            "dpo_cosyvoice_lm",
            *("--pretrained", tmp_path / "base", "--output_dir", tmp_path / "no"),
            *("--data.train", f"[{write_rows(tmp_path, ROWS, 'plain')}]", *FAST),
        )


def test_rows_are_filtered_by_length(tmp_path):
    tokenizer = new_tokenizer(["one two"], 270)
    rows = [
        *ROWS,
        {"text": "", "speech_token": [1]},
        {"text": "x", "speech_token": []},
        {"text": "x " * 300, "speech_token": [1]},
    ]
    path = write_rows(tmp_path, rows)
    pairs, dropped = read_pairs([str(path)], SpeechLmDataArguments(instruct="calm<|endofprompt|>"), tokenizer)
    assert len(pairs) == 3 and dropped == 3
    end = tokenizer.convert_tokens_to_ids("<|endofprompt|>")
    assert pairs[0].instruct_ids[-1] == end and end not in pairs[0].text_ids
    with pytest.raises(RunConfigError, match="speech_token"):
        read_pairs([str(write_rows(tmp_path, [{"text": "a"}], "bad"))], SpeechLmDataArguments(), tokenizer)


def test_instructions_of_rows_are_what_the_processor_asks_with(tmp_path):
    """Their own goes before that of the run; one without its end is refused, because the processor writes the end."""
    tokenizer = new_tokenizer(["one two"], 270)
    path = write_rows(tmp_path, [{**ROWS[0], "instruct": "Softly.<|endofprompt|>"}, {**ROWS[1], "instruct": ""}])
    pairs, _ = read_pairs([str(path)], SpeechLmDataArguments(), tokenizer)
    processor = tiny_processor(2)
    processor.tokenizer = tokenizer
    asked = processor("one", instruct="Softly.", prompt_audio=recording(0.5, 0), sampling_rate=24000)
    assert list(pairs[0].instruct_ids) == asked["prompt_input_ids"][0].tolist()
    assert pairs[1].instruct_ids == ()
    rows = [{**ROWS[0], "instruct": "Softly."}]
    with pytest.raises(RunConfigError, match=r"row 0: expected <\|endofprompt\|> in `instruct`, found 'Softly\.'"):
        read_pairs([str(write_rows(tmp_path, rows, "bad"))], SpeechLmDataArguments(), tokenizer)


def test_models_that_do_not_fit_are_refused(tmp_path):
    new_tokenizer(["one"], 270).save_pretrained(tmp_path)
    for arguments, message in (
        ({"model_type": "llama"}, "model.model_type"),
        ({"config": {**SIZES, "text_vocab_size": 20}}, "model.tokenizer"),
    ):
        with pytest.raises(RunConfigError, match=message):
            load_speech_lm(SpeechLmModelArguments(tokenizer=str(tmp_path), **arguments), list)


def test_a_new_model_on_a_qwen(tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {name: value for name, value in SIZES.items() if name != "speech_vocab_size"}
    qwen = Qwen2ForCausalLM(Qwen2Config(vocab_size=300, **sizes))
    qwen.save_pretrained(tmp_path)
    new_tokenizer(["one two three"], 280).save_pretrained(tmp_path)
    fields = {"version": 3, "speech_vocab_size": SPEECH_SIZE}
    model, tokenizer = load_speech_lm(SpeechLmModelArguments(backbone=str(tmp_path), config=fields), list)
    assert model.config.end_of_prompt_id == tokenizer.convert_tokens_to_ids("<|endofprompt|>")
    assert torch.equal(model.get_input_embeddings().weight[:300], qwen.get_input_embeddings().weight)


def test_accuracy_counts_speech_only():
    from transformers import EvalPrediction

    config = CosyVoiceLmConfig(version=2, **QWEN)
    labels = torch.tensor([[-100, -100, 64 + 3, 64 + 5, config.end_token_id]]).numpy()
    found = torch.tensor([[9, 3, 4, SPEECH_SIZE, 0]]).numpy()
    assert speech_accuracy(config)(EvalPrediction(found, labels)) == {"accuracy": pytest.approx(2 / 3)}
