"""The training script on a SenseVoice model: labels from the columns of a manifest, in full and with LoRA."""

import json
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from tiny_funasr_sensevoice import ID, tiny_model, tiny_processor, tones
from transformers import AutoModelForCTC, AutoProcessor


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "training"))
try:
    import train_asr
finally:
    sys.path.remove(str(ROOT / "training"))

ROWS = [
    ("the", {"language": "en", "emotion": "HAPPY"}),
    ("你好", {"language": "zh", "event": "BGM", "textnorm": "withitn"}),
    ("<|ja|><|SAD|>です", {}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model and a manifest of three utterances."""
    root = tmp_path_factory.mktemp("sensevoice_training")
    tiny_model(hidden_dropout=0.0, attention_dropout=0.0).save_pretrained(root / "model")
    tiny_processor().save_pretrained(root / "model")
    lines = []
    for index, (text, columns) in enumerate(ROWS):
        soundfile.write(root / f"{index}.wav", tones(0.5 + 0.1 * index, index), 16000)
        lines.append(json.dumps({"audio": f"{index}.wav", "text": text, **columns}, ensure_ascii=False))
    (root / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def train(folder: Path, recipe: str, *options: str) -> Path:
    run = folder / recipe.removesuffix(".yaml")
    train_asr.main(
        [
            str(ROOT / "training" / "recipes" / "funasr_sensevoice" / recipe),
            *("--pretrained", str(folder / "model"), "--output_dir", str(run)),
            *("--data.train", f"[{{path: {folder}/train.jsonl, columns: {{event: Laughter, textnorm: woitn}}}}]"),
            *("--bf16", "false", "--use_cpu", "true", "--eval_strategy", "no", "--save_strategy", "no"),
            *("--average_checkpoints", "0", "--speeds", "[1.0]", "--spec_aug", "false", "--schedule", "transformers"),
            *("--disable_tqdm", "true", *options),
        ]
    )
    return run


def test_full_fine_tune_learns_texts_and_answers(folder):
    run = train(folder, "finetune.yaml", "--max_steps", "100", "--learning_rate", "0.01", "--warmup_steps", "0")
    model = AutoModelForCTC.from_pretrained(run).eval()
    processor = AutoProcessor.from_pretrained(run)
    audio = [tones(0.5 + 0.1 * index, index) for index in range(3)]
    output = model.generate(**processor(audio=audio, sampling_rate=16000), use_itn=[False, True, False])
    results = processor.post_process_transcription(output)
    assert [row["tagged_text"] for row in results] == [
        "<|en|><|HAPPY|><|Laughter|><|woitn|>the",
        "<|zh|><|NEUTRAL|><|BGM|><|withitn|>你好",
        "<|ja|><|SAD|><|Laughter|><|woitn|>です",
    ]


def test_lora_changes_only_its_targets(folder):
    run = train(folder, "lora.yaml", "--max_steps", "3", "--learning_rate", "0.01", "--warmup_steps", "0")
    before = AutoModelForCTC.from_pretrained(folder / "model").state_dict()
    after = AutoModelForCTC.from_pretrained(run / "merged").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    targets = {
        name for name in before if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")
    }
    assert changed == {name for name in targets if name.endswith("weight")}
    assert AutoProcessor.from_pretrained(run / "merged").tokenizer.tag_id("ja") == ID["ja"]


def test_from_scratch_with_a_language_of_which_only_the_tag_is_learned(folder, tmp_path):
    config = {"hidden_size": 16, "num_hidden_layers": 3, "num_timestamp_prediction_layers": 1}
    config |= {"num_attention_heads": 2, "intermediate_size": 16, "fsmn_kernel_size": 3, "hidden_dropout": 0.0}
    config |= {"language_prompt_ids": {"auto": 0, "en": 4, "de": 5}, "attention_dropout": 0.0, "language_dropout": 1.0}
    for name, index, text in (("en", 0, "the cat"), ("de", 1, "der Hund")):
        line = json.dumps({"audio": str(folder / f"{index}.wav"), "text": text})
        (tmp_path / f"{name}.jsonl").write_text(line + "\n", encoding="utf-8")
    train_asr.main(
        [
            *("--model.model_type", "funasr_sensevoice", "--model.config", json.dumps(config)),
            *(
                "--data.train",
                '[{path: en.jsonl, columns: {language: en}}, {path: de.jsonl, text: "", '
                "columns: {language: de, event: BGM}}]",
            ),
            *("--data_dir", str(tmp_path), "--feature_extractor", "{feature_size: 20, lfr_m: 3, lfr_n: 2}"),
            *("--use_cpu", "true", "--save_strategy", "no", "--disable_tqdm", "true", "--schedule", "transformers"),
            *("--max_steps", "150", "--learning_rate", "0.01", "--output_dir", str(tmp_path / "run")),
        ]
    )
    model = AutoModelForCTC.from_pretrained(tmp_path / "run").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "run")
    audio = [tones(0.5 + 0.1 * index, index) for index in range(2)]
    results = processor.post_process_transcription(model.generate(**processor(audio=audio, sampling_rate=16000)))
    found = [(row["text"], row["language"], row["events"]) for row in results]
    assert found == [("the cat", "en", ["Speech"]), ("", "de", ["BGM"])]
    assert "der" not in processor.tokenizer.get_vocab() and "\u2581cat" in processor.tokenizer.get_vocab()
