"""Training: schedule, checkpoints, resume, averaging, LoRA, metrics, recipes and the two scripts."""

import dataclasses
import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig


pytest.importorskip("datasets", reason="needs the extra [train]")
pytest.importorskip("evaluate", reason="needs the extra [train]")
pytest.importorskip("peft", reason="needs the extra [train]")

from hf_speechllm.data.augmentation import AugmentationConfig  # noqa: E402
from hf_speechllm.data.collator import SpeechRecognitionCollator  # noqa: E402
from hf_speechllm.data.dataset import SpeechRecognitionDataset  # noqa: E402
from hf_speechllm.data.manifests import read_manifest  # noqa: E402
from hf_speechllm.models.configuration_wenet_u2pp import WenetU2ppConfig  # noqa: E402
from hf_speechllm.models.feature_extraction_kaldi_fbank import KaldiFbankFeatureExtractor  # noqa: E402
from hf_speechllm.models.mixture_of_experts import ExpertRouter  # noqa: E402
from hf_speechllm.models.modeling_wenet_u2pp import WenetU2ppForSpeechRecognition  # noqa: E402
from hf_speechllm.models.processing_wenet_u2pp import WenetU2ppProcessor  # noqa: E402
from hf_speechllm.train.averaging import average_checkpoints, select_checkpoints  # noqa: E402
from hf_speechllm.train.checkpoints import complete_checkpoints, is_complete, publish, write_manifest  # noqa: E402
from hf_speechllm.train.lora import freeze, lora_config  # noqa: E402
from hf_speechllm.train.metrics import metric_path, recognition_metrics  # noqa: E402
from hf_speechllm.train.run_config import RunConfig, RunConfigError, load_run_config  # noqa: E402
from hf_speechllm.train.schedules import wenet_warmup_factor  # noqa: E402
from hf_speechllm.train.trainer import SpeechRecognitionTrainer, SpeechTrainingArguments  # noqa: E402
from hf_speechllm.upstream.tokens import build_word_tokenizer  # noqa: E402


ROOT = Path(__file__).resolve().parent.parent
# Those of train_asr.py; the other scripts' recipes are tested with them.
FAMILIES = ("wenet_u2pp", "funasr_paraformer", "funasr_sensevoice")
RECIPES = [path for family in FAMILIES for path in sorted((ROOT / "training" / "recipes" / family).glob("*.yaml"))]
WORDS = ("one", "two", "three")
TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "conv_kernel_size": 3,
    "conv_causal": True,
    "conv_norm_type": "layer_norm",
    "use_dynamic_chunk": True,
    "mlp_type": "moe",
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "decoder_layers": 1,
    "right_decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_intermediate_size": 8,
    "reverse_weight": 0.3,
    "label_smoothing": 0.1,
}
AUGMENTED = AugmentationConfig(
    speeds=[0.9, 1.0, 1.1],
    join_weights=[0.6, 0.4],
    edge_silence_seconds=(0.05, 0.1),
    noise_probability=0.5,
    dither=1.0,
    warp_probability=0.5,
    tempo_probability=0.5,
    spec_aug=True,
    max_time_mask=5,
    spec_sub=True,
    max_substitution=5,
)


def write_clips(folder: Path, count: int = 18, rate: int = 16000) -> Path:
    """An audiofolder of one speaker; the word is the pitch of a tone of 0.2 to 0.4 s."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = ["file_name,transcription,speaker,duration"]
    for number in range(count):
        samples = int(rate * rng.uniform(0.2, 0.4))
        tone = 0.3 * np.sin(2 * np.pi * (400 + 900 * (number % 3)) * np.arange(samples) / rate)
        soundfile.write(folder / f"{number}.flac", tone + 0.01 * rng.standard_normal(samples), rate)
        lines.append(f"{number}.flac,{WORDS[number % 3]},a,{samples / rate:.4f}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return write_clips(tmp_path_factory.mktemp("data") / "clips")


@pytest.fixture(scope="module")
def processor() -> WenetU2ppProcessor:
    units = {name: number for number, name in enumerate(("<blank>", "<unk>", *WORDS, "<sos/eos>"))}
    return WenetU2ppProcessor(KaldiFbankFeatureExtractor(), build_word_tokenizer(units))


def tiny_model(**changes) -> WenetU2ppForSpeechRecognition:
    torch.manual_seed(0)
    config = WenetU2ppConfig(vocab_size=6, pad_token_id=0, bos_token_id=5, eos_token_id=5, **{**TINY, **changes})
    model = WenetU2ppForSpeechRecognition(config)
    with torch.no_grad():
        model.model.encoder.cmvn.mean.fill_(8.0)
        model.model.encoder.cmvn.inverse_std.fill_(0.25)
    return model


def make_dataset(clips: Path, processor: WenetU2ppProcessor, augmentation=AUGMENTED) -> SpeechRecognitionDataset:
    return SpeechRecognitionDataset(
        read_manifest(clips), processor.feature_extractor, processor.tokenizer, augmentation, seed=7
    )


def make_trainer(output: Path, clips: Path, processor, model=None, augmentation=AUGMENTED, **options):
    settings = {
        "max_frames_per_batch": 300,
        "max_items_per_batch": 6,
        "learning_rate": 2e-3,
        "warmup_steps": 2,
        "max_steps": 9,
        "logging_steps": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        "report_to": "none",
        "use_cpu": True,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "seed": 3,
    }
    return SpeechRecognitionTrainer(
        model=model or tiny_model(),
        args=SpeechTrainingArguments(output_dir=str(output), **{**settings, **options}),
        train_dataset=make_dataset(clips, processor, augmentation),
        eval_dataset=make_dataset(clips, processor, None),
        data_collator=SpeechRecognitionCollator(),
        compute_metrics=recognition_metrics(processor.tokenizer),
        processing_class=processor,
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def bit_equal(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, clips, processor) -> Path:
    """A run of 9 steps with checkpoints at 3, 6 and 9."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    make_trainer(output, clips, processor).train()
    return output


class TestSchedule:
    @pytest.mark.parametrize(
        ("step", "factor"), [(0, 0.01), (1, 0.01), (50, 0.5), (100, 1.0), (400, 0.5), (10000, 0.1)]
    )
    def test_warmuplr(self, step, factor):
        assert wenet_warmup_factor(step, 100) == pytest.approx(factor)

    def test_without_warm_up(self):
        assert wenet_warmup_factor(4, 0) == 0.5

    def test_it_is_what_the_trainer_uses(self, uninterrupted):
        log = json.loads((uninterrupted / "checkpoint-9" / "trainer_state.json").read_text())["log_history"]
        rates = {entry["step"]: entry["learning_rate"] for entry in log if "learning_rate" in entry}
        # The rate at a step is the one its update used, one schedule step earlier.
        assert rates == pytest.approx({step: 2e-3 * wenet_warmup_factor(step - 1, 2) for step in (2, 4, 6, 8)})


class TestTraining:
    def test_loss_falls_and_every_parameter_moves(self, tmp_path, clips, processor):
        model = tiny_model(
            hidden_dropout=0.0, positional_dropout=0.0, decoder_dropout=0.0, decoder_positional_dropout=0.0
        )
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        trainer = make_trainer(
            tmp_path,
            clips,
            processor,
            model,
            augmentation=None,
            max_steps=150,
            learning_rate=1e-2,
            warmup_steps=20,
            logging_steps=10,
            save_strategy="no",
        )
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert log[-1]["loss"] < 0.3 * log[0]["loss"]
        assert {"loss_ctc", "loss_att", "accuracy"} <= log[0].keys()
        assert log[-1]["accuracy"] > log[0]["accuracy"]
        stuck = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
        assert not stuck
        assert trainer.evaluate()["eval_wer"] < 20

    def test_logged_loss_is_the_joint_loss(self, uninterrupted):
        log = json.loads((uninterrupted / "checkpoint-9" / "trainer_state.json").read_text())["log_history"]
        for entry in log:
            if "loss_ctc" in entry:
                assert entry["loss"] == pytest.approx(0.5 * entry["loss_ctc"] + 0.5 * entry["loss_att"], rel=1e-4)

    def test_gradient_checkpointing_and_bfloat16_run(self, tmp_path, clips, processor):
        plain = make_trainer(tmp_path / "a", clips, processor, max_steps=2, save_strategy="no")
        plain.train()
        # transformers renamed the switch during version 5.
        names = {entry.name for entry in dataclasses.fields(SpeechTrainingArguments)}
        switch = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
        checkpointed = make_trainer(
            tmp_path / "b", clips, processor, max_steps=2, save_strategy="no", **{switch: True}
        )
        checkpointed.train()
        for left, right in zip(plain.model.parameters(), checkpointed.model.parameters(), strict=True):
            assert torch.allclose(left, right, atol=1e-5)
        half = make_trainer(tmp_path / "c", clips, processor, max_steps=2, save_strategy="no", bf16=True)
        assert np.isfinite(half.train().training_loss)

    def test_load_of_the_experts_is_logged(self, tmp_path, clips, processor):
        """Against the routers' inputs, caught by hooks; padded frames do not count."""
        model = tiny_model(decoder_mlp_type="moe", decoder_num_experts=4, decoder_num_experts_per_tok=1)
        counts = {}
        for name, module in model.named_modules():
            if isinstance(module, ExpertRouter):
                counts[name] = torch.zeros(module.out_features)
        batch = {}

        def note(module, args, kwargs):
            batch.update(kwargs)

        def count(name, module, args, output):
            features, labels = batch["attention_mask"], batch["labels"]
            lengths = ((features.sum(1) - 1) // 2 - 1) // 2 if "encoder" in name else (labels != -100).sum(1) + 1
            for row, length in zip(output.unflatten(0, (len(lengths), -1)), lengths.tolist(), strict=True):
                chosen = row[:length].topk(2 if "encoder" in name else 1, dim=-1).indices.flatten().tolist()
                for expert in chosen:
                    counts[name][expert] += 1

        model.register_forward_pre_hook(note, with_kwargs=True)
        for name, module in model.named_modules():
            if isinstance(module, ExpertRouter):
                module.register_forward_hook(partial(count, name))
        trainer = make_trainer(
            tmp_path,
            clips,
            processor,
            model,
            max_steps=3,
            logging_steps=3,
            gradient_accumulation_steps=2,
            save_strategy="no",
            log_expert_load=True,
        )
        trainer.train()
        entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
        for prefix, part in (("", "encoder"), ("decoder_", "decoder")):
            shares = torch.stack([c / c.sum() for name, c in counts.items() if part in name])
            assert entry[f"{prefix}expert_share_min"] == pytest.approx(shares.min().item())
            assert entry[f"{prefix}expert_share_max"] == pytest.approx(shares.max().item())
            assert shares.max() > shares.min()

    def test_load_of_the_experts_changes_nothing_and_needs_experts(self, tmp_path, clips, processor, uninterrupted):
        make_trainer(tmp_path / "moe", clips, processor, log_expert_load=True).train()
        assert bit_equal(weights(tmp_path / "moe" / "checkpoint-9"), weights(uninterrupted / "checkpoint-9"))
        dense = make_trainer(tmp_path, clips, processor, tiny_model(mlp_type="dense"), log_expert_load=True)
        with pytest.raises(ValueError, match="mixture of experts"):
            dense.train()

    def test_tensorboard(self, tmp_path, clips, processor):
        event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        options = {"save_strategy": "no", "report_to": "tensorboard", "eval_strategy": "steps", "eval_steps": 4}
        trainer = make_trainer(tmp_path / "run", clips, processor, max_steps=4, **options)
        trainer.train()
        (folder,) = {file.parent for file in (tmp_path / "run").rglob("events.out.tfevents.*")}
        events = event_accumulator.EventAccumulator(str(folder)).Reload()
        assert {"train/loss", "train/loss_ctc", "eval/loss", "eval/wer"} <= set(events.Tags()["scalars"])
        losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
        logged = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
        assert [step for step, _ in losses] == [step for step, _ in logged] == [2, 4]
        assert [value for _, value in losses] == pytest.approx([value for _, value in logged])


class TestResume:
    @pytest.mark.parametrize("step", [3, 6])
    def test_bit_exact(self, tmp_path, clips, processor, uninterrupted, step):
        # Three batches an epoch: step 3 and 6 are ends of epochs; see the next test for the middle of one.
        shutil.copytree(uninterrupted / f"checkpoint-{step}", tmp_path / "run" / f"checkpoint-{step}")
        make_trainer(tmp_path / "run", clips, processor).train(resume_from_checkpoint=True)
        assert bit_equal(weights(tmp_path / "run" / "checkpoint-9"), weights(uninterrupted / "checkpoint-9"))

    def test_bit_exact_in_the_middle_of_an_epoch_with_accumulation_and_workers(self, tmp_path, clips, processor):
        options = {"max_frames_per_batch": 150, "gradient_accumulation_steps": 2, "max_steps": 8, "save_steps": 1}
        trainer = make_trainer(tmp_path / "whole", clips, processor, **options)
        per_epoch = -(-len(trainer.get_train_dataloader()) // 2)
        assert per_epoch >= 3
        trainer.train()
        for step in (1, per_epoch + 1):
            run = tmp_path / f"run{step}"
            shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", run / f"checkpoint-{step}")
            resumed = make_trainer(run, clips, processor, **options, dataloader_num_workers=2)
            resumed.train(resume_from_checkpoint=True)
            assert bit_equal(weights(run / "checkpoint-8"), weights(tmp_path / "whole" / "checkpoint-8"))

    def test_the_draws_matter(self, tmp_path, clips, processor, uninterrupted):
        other = make_trainer(tmp_path / "other", clips, processor)
        other.train_dataset.seed += 1
        other.train()
        assert not bit_equal(weights(tmp_path / "other" / "checkpoint-9"), weights(uninterrupted / "checkpoint-9"))

    @pytest.mark.parametrize("damage", ["truncate", "remove", "no manifest"])
    def test_incomplete_checkpoint_is_skipped(self, tmp_path, clips, processor, uninterrupted, damage):
        run = tmp_path / "run"
        for step in (3, 6):
            shutil.copytree(uninterrupted / f"checkpoint-{step}", run / f"checkpoint-{step}")
        broken = run / "checkpoint-6"
        if damage == "truncate":
            os.truncate(broken / "model.safetensors", 100)
        elif damage == "remove":
            (broken / "optimizer.pt").unlink()
        else:
            (broken / "checkpoint_manifest.json").unlink()
        assert complete_checkpoints(run) == [run / "checkpoint-3"]
        make_trainer(run, clips, processor).train(resume_from_checkpoint=True)
        assert bit_equal(weights(run / "checkpoint-9"), weights(uninterrupted / "checkpoint-9"))
        assert is_complete(run / "checkpoint-6")

    def test_death_while_saving_leaves_no_checkpoint(self, tmp_path, clips, processor, uninterrupted, monkeypatch):
        run = tmp_path / "run"
        trainer = make_trainer(run, clips, processor)
        save, calls = trainer._save_rng_state, []

        def dies_at_the_second(folder):
            calls.append(folder)
            if len(calls) == 2:
                raise OSError("no space left on device")
            save(folder)

        monkeypatch.setattr(trainer, "_save_rng_state", dies_at_the_second)
        with pytest.raises(OSError, match="no space"):
            trainer.train()
        assert [folder.name for folder in run.glob("checkpoint-*")] == ["checkpoint-3"]
        make_trainer(run, clips, processor).train(resume_from_checkpoint=True)
        assert sorted(path.name for path in run.iterdir()) == ["checkpoint-3", "checkpoint-6", "checkpoint-9"]
        assert bit_equal(weights(run / "checkpoint-9"), weights(uninterrupted / "checkpoint-9"))

    def test_nothing_to_resume_starts_afresh(self, tmp_path, clips, processor, uninterrupted):
        make_trainer(tmp_path, clips, processor).train(resume_from_checkpoint=True)
        assert bit_equal(weights(tmp_path / "checkpoint-9"), weights(uninterrupted / "checkpoint-9"))

    def test_limit_keeps_the_best_and_the_newest(self, tmp_path, clips, processor):
        options = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 5, "save_total_limit": 2}
        trainer = make_trainer(tmp_path, clips, processor, **options, metric_for_best_model="loss", logging_steps=1)
        trainer.train()
        losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
        best = min(losses, key=losses.get)
        kept = {folder.name for folder in complete_checkpoints(tmp_path)}
        assert {f"checkpoint-{best}", "checkpoint-5"} <= kept and len(kept) == 2
        state = json.loads((tmp_path / "checkpoint-5" / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{best}")

    def test_a_complete_checkpoint_is_never_replaced(self, tmp_path):
        for name in ("staged", "checkpoint-1"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "file").write_text(name)
        write_manifest(tmp_path / "checkpoint-1")
        with pytest.raises(FileExistsError):
            publish(tmp_path / "staged", tmp_path / "checkpoint-1")
        assert (tmp_path / "checkpoint-1" / "file").read_text() == "checkpoint-1"


class TestAveraging:
    def test_mean_in_float64_and_counters(self, tmp_path):
        states = []
        for number in range(3):
            generator = torch.Generator().manual_seed(number)
            states.append(
                {
                    "weight": torch.randn(4, 4, generator=generator),
                    "half": torch.randn(5, generator=generator).bfloat16(),
                    "num_batches_tracked": torch.tensor(10 * number),
                }
            )
            (tmp_path / str(number)).mkdir()
            save_file(states[-1], tmp_path / str(number) / "model.safetensors")
        averaged = average_checkpoints([tmp_path / str(number) for number in range(3)])
        assert torch.equal(averaged["weight"], torch.stack([s["weight"].double() for s in states]).mean(0).float())
        assert torch.equal(averaged["half"], torch.stack([s["half"].double() for s in states]).mean(0).bfloat16())
        assert averaged["num_batches_tracked"].item() == 20 and averaged["num_batches_tracked"].dtype == torch.int64

    @pytest.mark.parametrize(
        "other", [{"a": torch.zeros(3)}, {"b": torch.zeros(2)}, {}, {"a": torch.zeros(2), "b": torch.ones(1)}]
    )
    def test_different_tensors_are_refused(self, tmp_path, other):
        for name, state in (("0", {"a": torch.zeros(2)}), ("1", other)):
            (tmp_path / name).mkdir()
            save_file(state, tmp_path / name / "model.safetensors")
        with pytest.raises(ValueError, match="expected"):
            average_checkpoints([tmp_path / "0", tmp_path / "1"])

    def test_selection(self, tmp_path):
        scores = {1: 5.0, 2: 3.0, 3: 3.0, 4: 9.0}
        for step in scores:
            folder = tmp_path / f"checkpoint-{step}"
            folder.mkdir()
            history = [{"step": number, "eval_wer": scores[number]} for number in range(1, step + 1)]
            (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
            if step != 4:
                write_manifest(folder)
        names = lambda folders: [folder.name for folder in folders]  # noqa: E731
        assert names(select_checkpoints(tmp_path, 2)) == ["checkpoint-2", "checkpoint-3"]
        assert names(select_checkpoints(tmp_path, 1, "eval_wer")) == ["checkpoint-3"]
        assert names(select_checkpoints(tmp_path, 2, "eval_wer")) == ["checkpoint-2", "checkpoint-3"]
        assert names(select_checkpoints(tmp_path, 1, "eval_wer", greater_is_better=True)) == ["checkpoint-1"]
        with pytest.raises(ValueError, match="eval_cer"):
            select_checkpoints(tmp_path, 1, "eval_cer")


# peft reads a property that transformers has renamed.
PEFT_READS_OLD_NAME = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


class TestLora:
    @PEFT_READS_OLD_NAME
    def test_merged_equals_unmerged_and_reload(self, tmp_path, clips, processor):
        from peft import PeftModel, get_peft_model

        dense = {"mlp_type": "dense", "decoder_mlp_type": "dense"}
        base = tiny_model(**dense)
        untouched = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        model = get_peft_model(base, lora_config(rank=2, modules_to_save=["ctc_head"]))
        adapted = {
            name.rpartition(".lora_A")[0].rpartition(".")[2] for name in model.state_dict() if ".lora_A" in name
        }
        assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"}
        trainer = make_trainer(tmp_path, clips, processor, model, max_steps=4, learning_rate=1e-2, save_steps=4)
        trainer.train()

        batch = SpeechRecognitionCollator()([make_dataset(clips, processor, None)[number] for number in range(4)])
        model.eval()
        with torch.no_grad():
            unmerged = model(**batch)
            with model.disable_adapter():
                assert (model(**batch).logits - unmerged.logits).abs().max() > 1e-3
            fresh = tiny_model(**dense)
            fresh.load_state_dict(untouched)
            reloaded = PeftModel.from_pretrained(fresh, tmp_path / "checkpoint-4").eval()
            assert torch.equal(reloaded(**batch).logits, unmerged.logits)
            merged = reloaded.merge_and_unload()
            assert torch.allclose(merged(**batch).logits, unmerged.logits, atol=1e-5)
            assert torch.allclose(merged(**batch).loss, unmerged.loss, atol=1e-5)
            merged.save_pretrained(tmp_path / "merged")
            again = WenetU2ppForSpeechRecognition.from_pretrained(tmp_path / "merged").eval()
            assert torch.equal(again(**batch).logits, merged(**batch).logits)

    def test_freeze(self):
        model = tiny_model()
        frozen = freeze(model, [r"^model\.encoder\.subsampling\."])
        assert frozen and all(name.startswith("model.encoder.subsampling.") for name in frozen)
        assert {name for name, p in model.named_parameters() if not p.requires_grad} == set(frozen)
        with pytest.raises(ValueError, match="nothing_like_it"):
            freeze(model, ["nothing_like_it"])


class TestMetrics:
    def test_wer_loads_offline(self):
        import evaluate

        metric = evaluate.load(metric_path("wer"))
        result = metric.compute(
            predictions=["one two", "Don't, stop!", "", "extra"],
            references=["one too three", "don't stop", "four", ""],
        )
        assert (result["substitutions"], result["deletions"], result["insertions"], result["words"]) == (1, 2, 1, 6)
        assert result["wer"] == pytest.approx(4 / 6) and result["wrong_sentences"] == 3
        exact = metric.compute(predictions=["One"], references=["one"], normalize=False)
        assert exact["wer"] == 1.0

    def test_cer_normalises_chinese(self):
        import evaluate

        metric = evaluate.load(metric_path("cer"))
        result = metric.compute(
            predictions=["今天 天气，很好！", "ＡＢＣ１２３", "你们"], references=["今天天气很好。", "abc123", "你好"]
        )
        assert (result["substitutions"], result["characters"], result["wrong_sentences"]) == (1, 14, 1)
        assert metric.compute(predictions=["你"], references=["你。"], normalize=False)["cer"] == 0.5

    def test_unknown_metric(self):
        with pytest.raises(ValueError, match="bleu"):
            metric_path("bleu")


class TestRunConfig:
    @pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
    def test_every_recipe_is_valid(self, recipe, monkeypatch, tmp_path):
        monkeypatch.setenv("SYNTHETIC_DIGITS", str(tmp_path))
        monkeypatch.syspath_prepend(str(ROOT / "training"))
        import train_asr

        run = load_run_config(recipe)
        known = {entry.name for entry in dataclasses.fields(SpeechTrainingArguments)}
        assert run.training.keys() <= known
        SpeechTrainingArguments(**run.training | {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False})
        marks = {"pad_token_id": 0, "bos_token_id": 12, "eos_token_id": 12, "vocab_size": 13}
        if run.model.model_type == "funasr_sensevoice":
            tokenizer = train_asr.build_sensevoice_tokenizer(WORDS, "word")
            marks |= train_asr.sensevoice_ids(tokenizer) | {"vocab_size": len(tokenizer)}
        config = AutoConfig.for_model(run.model.model_type, **marks, **run.model.config)
        assert run.model.config.keys() <= config.to_dict().keys()

    def test_recipes_exist(self):
        assert {path.stem for path in RECIPES} >= {"digits_moe", "digits_dense", "lora"}

    def test_overrides(self, tmp_path):
        file = tmp_path / "run.yaml"
        file.write_text("model: {config: {hidden_size: 16}}\ntraining: {learning_rate: 1e-3, save_strategy: no}\n")
        arguments = [
            "--learning_rate",
            "2e-3",
            "--model.config.hidden_size=32",
            "--rank",
            "4",
            "--data.train",
            "[a, {path: b}]",
            "--separator",
            " ",
        ]
        run = load_run_config(file, arguments, ["learning_rate"])
        assert run.training == {"learning_rate": 0.002, "save_strategy": "no"} and run.data.separator == " "
        assert (
            run.model.config == {"hidden_size": 32} and run.lora.rank == 4 and run.data.train == ["a", {"path": "b"}]
        )

    @pytest.mark.parametrize(
        ("content", "arguments", "message"),
        [
            ("modle: {}", [], "modle"),
            ("model: {pretrainde: x}", [], "pretrainde"),
            ("model: []", [], "expected a mapping"),
            ("data: {data_dir: '${NOT_SET_ANYWHERE}'}", [], "NOT_SET_ANYWHERE"),
            ("", ["--what", "1"], "--what"),
            ("", ["stray"], "stray"),
            ("a: [", [], "expected a YAML file"),
        ],
    )
    def test_mistakes_are_named(self, tmp_path, content, arguments, message):
        (tmp_path / "run.yaml").write_text(content)
        with pytest.raises(RunConfigError, match=message):
            load_run_config(tmp_path / "run.yaml", arguments)

    def test_groups_are_documented(self):
        assert all(
            entry.type.__doc__ for entry in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(entry.type)
        )


class TestScripts:
    @pytest.fixture(autouse=True)
    def scripts(self, monkeypatch):
        monkeypatch.syspath_prepend(str(ROOT / "training"))
        yield
        for name in ("train_asr", "evaluate_asr"):
            sys.modules.pop(name, None)

    @PEFT_READS_OLD_NAME
    def test_train_evaluate_and_lora_from_the_command_line(self, tmp_path, clips):
        import evaluate_asr
        import train_asr

        recipe = {
            "model": {"config": TINY},
            "data": {"train": ["."], "validation": ["."]},
            "training": {"max_steps": 4, "save_steps": 2, "max_frames_per_batch": 400, "warmup_steps": 2},
        }
        recipe["training"] |= {"learning_rate": 1e-3, "use_cpu": True, "average_checkpoints": 2, "disable_tqdm": True}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(recipe))
        common = [str(tmp_path / "run.yaml"), "--data_dir", str(clips)]
        run = tmp_path / "run"
        train_asr.main([*common, "--output_dir", str(run)])
        summary = json.loads((run / "training_summary.json").read_text())
        assert summary["averaged"] == ["checkpoint-2", "checkpoint-4"] and summary["eval_wer"] >= 0
        assert summary["parameters"] > summary["active_parameters"]
        assert bit_equal(weights(run), average_checkpoints([run / "checkpoint-2", run / "checkpoint-4"]))
        for name in ("modeling_wenet_u2pp.py", "processing_wenet_u2pp.py", "tokenizer.json"):
            assert (run / name).is_file()

        evaluate_asr.main(
            [
                str(run),
                str(clips),
                "--chunk_size",
                "-1",
                "4",
                "--num_beams",
                "2",
                "--output",
                str(tmp_path / "wer.json"),
            ]
        )
        results = json.loads((tmp_path / "wer.json").read_text())["results"]
        assert {(r["decoding"], r["chunk_size"]) for r in results} == {
            (decoding, chunk) for decoding in evaluate_asr.DECODINGS for chunk in (-1, 4)
        }
        assert all(r["words"] == 18 and r["sentences"] == 18 for r in results)

        tuned = tmp_path / "tuned"
        train_asr.main(
            [*common, "--output_dir", str(tuned), "--pretrained", str(run), "--model.config", "{}", "--rank", "2"]
            + ["--modules_to_save", "[ctc_head]", "--target_modules", "[q_proj, v_proj]"]
        )
        assert (tuned / "adapter_model.safetensors").is_file()
        merged = weights(tuned / "merged")
        assert merged.keys() == weights(run).keys()
        changed = {name for name in merged if not torch.equal(merged[name], weights(run)[name])}
        assert changed and all(("q_proj.weight" in n or "v_proj.weight" in n or "ctc_head" in n) for n in changed)


@pytest.mark.skipif("HF_SPEECHLLM_DATA" not in os.environ, reason="HF_SPEECHLLM_DATA (folder with digits/) is not set")
def test_digit_recordings_load():
    folder = Path(os.environ["HF_SPEECHLLM_DATA"]) / "digits"
    assert len(read_manifest(folder / "train")) == 2100
    unseen = read_manifest(folder, {"split": "test_unseen"})
    assert len(unseen) == 500 and {utterance.speaker for utterance in unseen} == {"theo"}
