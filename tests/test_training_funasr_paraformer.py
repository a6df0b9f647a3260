"""The training script on Paraformer: from scratch, resumed, fine-tuned in full and with LoRA, and evaluated."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch


pytest.importorskip("datasets", reason="needs the extra [train]")
pytest.importorskip("evaluate", reason="needs the extra [train]")
pytest.importorskip("peft", reason="needs the extra [train]")

from peft import PeftModel  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor  # noqa: E402

import hf_speechllm  # noqa: E402, F401  registers the model families
from hf_speechllm.audio import load_audio  # noqa: E402


ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "training" / "recipes" / "funasr_paraformer"
sys.path.insert(0, str(ROOT / "training"))
try:
    import evaluate_asr
    import train_asr
finally:
    sys.path.remove(str(ROOT / "training"))

WORDS = ("one", "two", "three")
TINY = {
    "encoder_type": "conformer",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_kernel_size": 5,
    "conv_norm_type": "layer_norm",
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_intermediate_size": 16,
    "decoder_fsmn_kernel_size": 3,
    "append_eos": False,
    "layer_norm_eps": 1e-5,
    "decoder_norm_eps": 1e-5,
    "decoder_final_norm_eps": 1e-5,
}
# SAN-M on stacked frames, as the published models have it; 3 frames every 2.
SANM = {**TINY, "encoder_type": "sanm", "append_eos": True, "num_hidden_layers": 2, "fsmn_kernel_size": 5}
NO_DROPOUT = dict.fromkeys(
    (
        "hidden_dropout",
        "attention_dropout",
        "positional_dropout",
        "cif_dropout",
        "decoder_dropout",
        "decoder_positional_dropout",
        "decoder_self_attention_dropout",
        "decoder_cross_attention_dropout",
    ),
    0.0,
)


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """An audiofolder of one speaker; the word is the pitch of a tone of 0.2 to 0.4 s."""
    folder = tmp_path_factory.mktemp("paraformer_training")
    rng = np.random.default_rng(0)
    lines = ["file_name,transcription,speaker,duration"]
    for number in range(12):
        samples = int(16000 * rng.uniform(0.2, 0.4))
        tone = 0.3 * np.sin(2 * np.pi * (400 + 900 * (number % 3)) * np.arange(samples) / 16000)
        soundfile.write(folder / f"{number}.flac", tone + 0.01 * rng.standard_normal(samples), 16000)
        lines.append(f"{number}.flac,{WORDS[number % 3]},a,{samples / 16000:.4f}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def train(recipe: str, clips: Path, run: Path, *options: str) -> list[dict]:
    """Runs a recipe on the clips; the log."""
    train_asr.main(
        [
            str(RECIPES / recipe),
            *("--data.train", f"[{clips}]", "--data.validation", f"[{clips}]", "--output_dir", str(run)),
            *("--speeds", "[1.0]", "--spec_aug", "false", "--bf16", "false", "--use_cpu", "true"),
            *("--max_items_per_batch", "4", "--schedule", "transformers", "--lr_scheduler_type", "constant"),
            *("--warmup_steps", "0", "--average_checkpoints", "0", "--metric", "wer", "--separator", " "),
            *("--disable_tqdm", "true", "--eval_strategy", "no", "--save_strategy", "no", *options),
        ]
    )
    return json.loads((run / "trainer_state.json").read_text())["log_history"]


# The recipe's other augmentation, off.
PLAIN = ("--join_weights", "[1.0]", "--edge_silence_probability", "0", "--gain_db", "[0.0, 0.0]")
PLAIN += ("--noise_probability", "0", "--warp_probability", "0", "--tempo_probability", "0")
PLAIN += ("--equalizer_probability", "0")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, clips, monkeypatch_module) -> tuple[Path, list[dict]]:
    """A SAN-M model from scratch, and its log."""
    run = tmp_path_factory.mktemp("runs") / "scratch"
    options = ("--model.config", json.dumps(SANM | NO_DROPOUT), "--max_steps", "90", "--learning_rate", "0.01")
    extractor = ("--data.feature_extractor", "{window_type: hamming, lfr_m: 3, lfr_n: 2}")
    return run, train("digits.yaml", clips, run, *options, *extractor, *PLAIN, "--logging_steps", "10")


@pytest.fixture(scope="module")
def monkeypatch_module(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SYNTHETIC_DIGITS", str(tmp_path_factory.getbasetemp()))
        yield patch


def inputs_of(folder: Path, clips: Path) -> dict[str, torch.Tensor]:
    audio = [load_audio(clips / f"{number}.flac", 16000) for number in range(3)]
    return AutoProcessor.from_pretrained(folder)(audio=audio, sampling_rate=16000, text=list(WORDS))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_from_scratch_learns_and_loads(trained, clips):
    run, log = trained
    losses = [entry for entry in log if "loss" in entry]
    assert losses[-1]["loss"] < 0.3 * losses[0]["loss"] and losses[-1]["accuracy"] > 0.9
    for entry in losses:
        assert entry["loss"] == pytest.approx(entry["loss_att"] + entry["loss_length"], rel=1e-4)
    assert json.loads((run / "training_summary.json").read_text())["eval_wer"] < 10
    assert (run / "modeling_funasr_paraformer.py").is_file()

    processor = AutoProcessor.from_pretrained(run)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(run).eval()
    assert (model.config.input_size, model.config.stacked_frames) == (240, 2)
    inputs = inputs_of(run, clips)
    assert processor.batch_decode(model.generate(inputs["input_features"], inputs["attention_mask"])) == list(WORDS)
    # The measured CMVN is in the saved extractor: its features are normal over the clips.
    audio = [load_audio(clips / f"{number}.flac", 16000) for number in range(12)]
    batch = processor(audio=audio, sampling_rate=16000)
    features = batch["input_features"][batch["attention_mask"].bool()]
    assert features.mean(0).abs().max() < 1e-2 and (features.std(0, correction=0) - 1).abs().max() < 1e-2


def test_evaluation_without_decodings(trained, clips, tmp_path):
    options = ["--decoding", "default", "--chunk_size", "-1", "--output", str(tmp_path / "wer.json")]
    evaluate_asr.main([str(trained[0]), str(clips), *options])
    (result,) = json.loads((tmp_path / "wer.json").read_text())["results"]
    errors = result["substitutions"] + result["insertions"] + result["deletions"]
    assert (result["decoding"], result["words"]) == ("default", 12) and result["wer"] == round(100 * errors / 12, 3)


def test_resume_is_exact(clips, tmp_path, monkeypatch_module):
    """With dropout, the sampler's and the MWER loss' draws, augmentation, and evaluations in between."""
    options = ("--model.config", json.dumps(TINY | {"mwer_weight": 0.5}), "--max_steps", "6", "--save_steps", "4")
    options += ("--save_strategy", "steps", "--eval_strategy", "steps", "--eval_steps", "2", "--logging_steps", "2")
    options += ("--resume", "true", "--average_checkpoints", "1")
    log = train("digits.yaml", clips, tmp_path / "whole", *options)
    assert {"loss_att", "loss_length", "loss_mwer", "expected_errors", "accuracy"} <= log[0].keys()
    assert len([entry for entry in log if "eval_wer" in entry]) >= 3
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    train("digits.yaml", clips, tmp_path / "resumed", *options)
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "resumed")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    early = weights(tmp_path / "whole" / "checkpoint-4")
    assert any(not torch.equal(whole[name], early[name]) for name in whole)


def test_full_fine_tune_with_mwer(trained, clips, tmp_path):
    options = ("--pretrained", str(trained[0]), "--model.config", "{mwer_weight: 1.0}", "--max_steps", "5")
    log = train("finetune.yaml", clips, tmp_path, *options, "--logging_steps", "1", "--learning_rate", "0.001")
    for entry in log[:5]:
        parts = entry["loss_att"] + entry["loss_length"] + entry["loss_mwer"]
        assert entry["loss"] == pytest.approx(parts, rel=1e-4, abs=1e-4) and entry["expected_errors"] >= 0
    before, after = weights(trained[0]), weights(tmp_path)
    # The second row of the sampler's table and the like may rest; every matrix of the network moves.
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in before if name.endswith("proj.weight")} <= moved
    saved = AutoProcessor.from_pretrained(tmp_path).feature_extractor
    assert saved.cmvn_mean == AutoProcessor.from_pretrained(trained[0]).feature_extractor.cmvn_mean


def test_lora_merged_is_unmerged(trained, clips, tmp_path):
    options = ("--pretrained", str(trained[0]), "--max_steps", "5", "--learning_rate", "0.01", "--rank", "2")
    train("lora.yaml", clips, tmp_path, *options)
    before, merged = weights(trained[0]), weights(tmp_path / "merged")
    assert before.keys() == merged.keys()
    targets = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "fc1.weight", "fc2.weight")
    changed = {name for name in before if not torch.equal(before[name], merged[name])}
    assert changed and all(name.endswith(targets) for name in changed)
    assert any("encoder" in name for name in changed) and any("decoder" in name for name in changed)

    inputs = inputs_of(tmp_path / "merged", clips)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "merged").eval()
    adapted = PeftModel.from_pretrained(AutoModelForSpeechSeq2Seq.from_pretrained(trained[0]), tmp_path).eval()
    with torch.no_grad():
        for name in ("encoder_last_hidden_state", "logits"):
            expected = adapted(**inputs, sampler_permutations=[torch.arange(1)] * 3)[name]
            actual = model(**inputs, sampler_permutations=[torch.arange(1)] * 3)[name]
            assert torch.allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("texts", "unit", "text", "ids", "decoded"),
    [
        (["Three one", "two"], "word", "one  Two four", [3, 5, 6, 6, 6, 6], "one two"),
        (["今天 好"], "char", "好 天", [5, 4], "好天"),
    ],
)
def test_tokenizer_of_a_new_model(tmp_path, texts, unit, text, ids, decoded):
    tokenizer = train_asr.build_paraformer_tokenizer(texts, unit)
    tokenizer.save_pretrained(tmp_path)
    for made in (tokenizer, type(tokenizer).from_pretrained(tmp_path)):
        assert made(text, add_special_tokens=False).input_ids == ids
        assert made.decode(ids, skip_special_tokens=True) == decoded
        assert (made.pad_token_id, made.bos_token_id, made.eos_token_id) == (0, 1, 2)
        assert made.unk_token_id == len(made) - 1


def test_family_without_a_recipe_is_refused(clips, tmp_path, monkeypatch_module):
    with pytest.raises(ValueError, match="model_type: .*funasr_fsmn_vad"):
        train("digits.yaml", clips, tmp_path, "--model.model_type", "funasr_fsmn_vad")
