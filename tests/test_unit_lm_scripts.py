"""The scripts of the three stages, run one after another on a tiny model, as a user runs them."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from tiny_speechgpt_units import tiny_units
from transformers import AutoModelForCausalLM, AutoTokenizer


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "training"))

import build_speech_instruct  # noqa: E402
import evaluate_unit_lm  # noqa: E402
import pretrain_unit_lm  # noqa: E402
import sft_unit_lm  # noqa: E402
import train_text_to_unit  # noqa: E402

from hf_speechllm.audio import resample  # noqa: E402
from hf_speechllm.cosyvoice_units import CosyVoiceUnits  # noqa: E402
from hf_speechllm.data.text_to_unit import speak_texts  # noqa: E402
from hf_speechllm.eval.speech_synthesis import synthesize  # noqa: E402
from hf_speechllm.models.answers_speechgpt_lm import parse_answer  # noqa: E402
from hf_speechllm.models.modeling_speechgpt_lm import SpeechGptForCausalLM  # noqa: E402
from hf_speechllm.train import unit_lm_run  # noqa: E402
from hf_speechllm.train.run_config import RunConfigError, load_run_config  # noqa: E402
from hf_speechllm.train.unit_lm_run import UnitLmRunConfig  # noqa: E402


RECIPES = sorted((ROOT / "training" / "recipes" / "speechgpt_lm").glob("*.yaml"))
COSYVOICE = ROOT / "pretrained" / "cosyvoice_digits"
WORDS = ("one", "two", "three")
NUM_UNITS = 12
MODEL = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
TRAINING = ["--use_cpu", "true", "--disable_tqdm", "true", "--learning_rate", "0.01"]
# Every word has its own four units.
UNITS = {word: list(range(4 * index, 4 * index + 4)) for index, word in enumerate(WORDS)}


def write_units(path: Path, count: int, seed: int, answers: bool = False) -> Path:
    rng, rows = random.Random(seed), []
    for index in range(count):
        words = [rng.choice(WORDS) for _ in range(rng.randint(1, 3))]
        row = {"key": f"k{index}", "text": " ".join(words), "speaker": "anna"}
        row["units"] = [unit for word in words for unit in UNITS[word]]
        if answers:
            row["answer_text"] = " ".join(reversed(words))
        rows.append(row)
    Dataset.from_list(rows).to_parquet(str(path))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("units")
    write_units(folder / "speech.parquet", 60, seed=0)
    write_units(folder / "test.parquet", 6, seed=1)
    write_units(folder / "questions.parquet", 24, seed=2, answers=True)
    write_units(folder / "answers.parquet", 24, seed=2)
    return folder


@pytest.fixture(scope="module")
def stage1(data, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("stage1")
    options = ["--model.config", json.dumps(MODEL), "--num_units", str(NUM_UNITS), "--text_vocab_size", "300"]
    options += ["--text", "[speech.parquet]", "--data_dir", str(data), "--data.train", "[speech.parquet]"]
    options += ["--data.validation", "[test.parquet]", "--block_size", "32", "--max_steps", "60"]
    pretrain_unit_lm.main([*options, *TRAINING, "--output_dir", str(run)])
    return run


@pytest.fixture(scope="module")
def cross_modal(data, stage1, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cross_modal")
    options = ["--units", str(data / "speech.parquet"), "--tokenizer", str(stage1), "--max_tokens", "400"]
    build_speech_instruct.main(["cross-modal", *options, str(folder)])
    return folder


@pytest.fixture(scope="module")
def stage2(stage1, cross_modal, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("stage2")
    options = ["--pretrained", str(stage1), "--data_dir", str(cross_modal), "--data.train", "[data/train.parquet]"]
    sft_unit_lm.main([*options, "--data.max_length", "400", "--max_steps", "4", *TRAINING, "--output_dir", str(run)])
    return run


class TestStages:
    def test_pretraining_lowers_the_perplexity(self, stage1):
        summary = json.loads((stage1 / "training_summary.json").read_text())
        model = AutoModelForCausalLM.from_pretrained(stage1)
        assert isinstance(model, SpeechGptForCausalLM)
        assert model.config.num_units == NUM_UNITS and model.config.vocab_size % 64 == 0
        # Fifteen tokens can follow each other; after 60 steps it knows which do.
        assert summary["eval_perplexity"] < 10
        tokenizer = AutoTokenizer.from_pretrained(stage1)
        assert tokenizer.convert_tokens_to_ids("<0>") == model.config.first_unit_token_id

    def test_a_resumed_run_ends_as_one_that_was_not_stopped(self, data, stage1, tmp_path):
        options = ["--pretrained", str(stage1), "--data_dir", str(data), "--data.train", "[speech.parquet]"]
        options += ["--block_size", "32", *TRAINING, "--save_steps", "2", "--save_strategy", "steps"]
        pretrain_unit_lm.main([*options, "--max_steps", "4", "--output_dir", str(tmp_path / "whole")])
        (tmp_path / "parts").mkdir()
        (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "parts" / "checkpoint-2")
        resumed = ["--max_steps", "4", "--resume", "true", "--output_dir", str(tmp_path / "parts")]
        pretrain_unit_lm.main([*options, *resumed])
        whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[name], parts[name]) for name in whole)

    def test_instructions_change_the_model(self, stage1, stage2):
        before, after = (load_file(run / "model.safetensors") for run in (stage1, stage2))
        assert before.keys() == after.keys()
        assert any(not torch.equal(before[name], after[name]) for name in before)

    def test_lora_saves_an_adapter_and_the_merged_model(self, data, stage2, tmp_path):
        folder, run = tmp_path / "chain", tmp_path / "run"
        options = ["--questions", str(data / "questions.parquet"), "--answers", str(data / "answers.parquet")]
        build_speech_instruct.main(
            ["chain", *options, "--formats", "speech_to_speech", "--style", "released", str(folder)]
        )
        options = ["--pretrained", str(stage2), "--data_dir", str(folder), "--data.train", "[data/train.parquet]"]
        options += ["--rank", "4", "--data.max_length", "300", "--max_steps", "2", "--assistant_only", "true"]
        sft_unit_lm.main([*options, *TRAINING, "--output_dir", str(run)])
        merged = AutoModelForCausalLM.from_pretrained(run / "merged")
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(stage2), run).eval()
        ids = torch.arange(5, 25)[None]
        with torch.no_grad():
            expected, found = adapted(input_ids=ids).logits, merged(input_ids=ids).logits
            base = AutoModelForCausalLM.from_pretrained(stage2)(input_ids=ids).logits
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert (found - base).abs().max() > 1e-3

    @pytest.mark.slow
    @pytest.mark.parametrize("quantization", ("nf4", "int8"))
    def test_qlora_trains_and_its_result_needs_no_bitsandbytes(self, data, tmp_path, quantization):
        """The loss falls; the merged model is the quantised one with its adapter, in plain weights."""
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        before, folder, run = tmp_path / "before", tmp_path / "chain", tmp_path / "run"
        # 4 bits come in blocks of 64, of which the CPU kernels want whole ones in every row.
        wide = json.dumps({**MODEL, "hidden_size": 64, "intermediate_size": 64})
        options = ["--model.config", wide, "--num_units", str(NUM_UNITS), "--text", "[speech.parquet]"]
        options += ["--text_vocab_size", "300", "--data_dir", str(data), "--data.train", "[speech.parquet]"]
        pretrain_unit_lm.main(
            [*options, "--block_size", "32", "--max_steps", "5", *TRAINING, "--output_dir", str(before)]
        )
        options = ["--questions", str(data / "questions.parquet"), "--answers", str(data / "answers.parquet")]
        build_speech_instruct.main(["chain", str(folder), *options, "--formats", "speech_to_speech"])
        recipe = str(ROOT / "training" / "recipes" / "speechgpt_lm" / "stage3_qlora.yaml")
        options = ["--pretrained", str(before), "--data_dir", str(folder), "--data.train", "[data/train.parquet]"]
        options += ["--quantization", quantization, "--data.max_length", "400", "--max_steps", "20"]
        options += ["--gradient_accumulation_steps", "1", "--logging_steps", "5", "--rank", "16"]
        sft_unit_lm.main([recipe, *options, *TRAINING, "--output_dir", str(run)])
        log = json.loads((run / "checkpoint-20" / "trainer_state.json").read_text())["log_history"]
        losses = [entry["loss"] for entry in log if "loss" in entry]
        assert losses[-1] < losses[0] - 0.2

        config = json.loads((run / "merged" / "config.json").read_text())
        assert "quantization_config" not in config
        merged = AutoModelForCausalLM.from_pretrained(run / "merged").eval()
        base = AutoModelForCausalLM.from_pretrained(
            before, dtype=torch.bfloat16, quantization_config=unit_lm_run.quantization(quantization), device_map="cpu"
        )
        ids = torch.arange(5, 25)[None]
        with torch.no_grad():
            without = base(input_ids=ids).logits.float()
            expected = PeftModel.from_pretrained(base, run).eval()(input_ids=ids).logits.float()
            found = merged(input_ids=ids).logits.float()
        # All in bfloat16; int8 also rounds what goes into a layer.
        assert (found - expected).abs().max() < 0.1 * (without - expected).abs().max()

    def test_evaluation_counts_what_the_model_says(self, data, stage1, stage2, tmp_path):
        results = []
        sampling = ["--temperature", "0.7", "--greedy_text", "--ras_threshold", "0.3"]
        for run, decoding in ((stage1, []), (stage2, sampling)):
            output = tmp_path / f"{run.name}.json"
            options = ["--speech", str(data / "test.parquet"), "--dialogues", str(data / "questions.parquet")]
            options += ["--limit", "4", "--max_new_tokens", "12", *decoding]
            evaluate_unit_lm.main([str(run), *options, "--output", str(output)])
            results.append(json.loads(output.read_text()))
        assert {"unit_perplexity", "recognition_wer", "transcript_wer", "answer_wer"} <= results[0].keys()
        assert 1.0 < results[0]["unit_perplexity"] < 15.0
        # Stage 2 teaches what stage 1 has never seen: units as an answer.
        assert 1.0 < results[1]["spoken_text_perplexity"] < 0.01 * results[0]["spoken_text_perplexity"]
        with pytest.raises(SystemExit):
            evaluate_unit_lm.main([str(stage1), *options[:2], "--ras_threshold", "0.3"])
        with pytest.raises(SystemExit):
            evaluate_unit_lm.main([str(stage1), *options[:2], "--where", "speaker=nobody"])

    def test_a_stage_without_its_model_is_refused(self, tmp_path):
        with pytest.raises(RunConfigError, match="model.pretrained: expected the model of the stage before"):
            sft_unit_lm.main(["--output_dir", str(tmp_path)])

    def test_a_quantised_model_needs_an_adapter(self, tmp_path):
        with pytest.raises(RunConfigError, match="lora.rank: expected at least 1 for a quantised model, found 0"):
            sft_unit_lm.main(["--pretrained", "x", "--quantization", "nf4", "--output_dir", str(tmp_path)])

    def test_a_missing_file_is_named(self, tmp_path):
        options = ["--model.config", json.dumps(MODEL), "--num_units", "4", "--data.train", "[nothing.parquet]"]
        with pytest.raises(RunConfigError, match="expected a file, found none at .*nothing.parquet"):
            pretrain_unit_lm.main([*options, *TRAINING, "--data_dir", str(tmp_path), "--output_dir", str(tmp_path)])


class TestTextToUnit:
    def test_it_learns_the_units_of_the_words_and_speaks_the_answers(self, data, tmp_path):
        config = {"model_type": "bart", "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "dropout": 0.0}
        config |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64}
        config |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "attention_dropout": 0.0, "activation_dropout": 0.0}
        options = ["--model.config", json.dumps(config), "--num_units", str(NUM_UNITS), "--text_vocab_size", "290"]
        options += ["--data_dir", str(data), "--data.train", "[speech.parquet]", "--max_length", "60"]
        options += ["--max_steps", "200", "--use_cpu", "true", "--disable_tqdm", "true", "--learning_rate", "0.01"]
        run = tmp_path / "run"
        train_text_to_unit.main([*options, "--output_dir", str(run), "--save_strategy", "no"])
        texts = ["two", "three one"]
        assert speak_texts(str(run), texts, max_new_tokens=30) == [
            [unit for word in text.split() for unit in UNITS[word]] for text in texts
        ]
        folder = tmp_path / "chain"
        build_speech_instruct.main(
            ["chain", "--questions", str(data / "questions.parquet"), "--text_to_unit", str(run), str(folder)]
        )
        assert len(Dataset.from_parquet(str(folder / "data" / "train.parquet"))) == 24


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """Two different answers, one of them twice, one without words, and one that is too long."""
    answers = ("two", "three one", "two", "...", " ".join(["one"] * 35))
    rows = [
        {"key": f"k{index}", "text": "one", "units": [1, 2], "answer_text": answer}
        for index, answer in enumerate(answers)
    ]
    path = tmp_path_factory.mktemp("questions") / "questions.parquet"
    Dataset.from_list(rows).to_parquet(str(path))
    return path


class TestSynthesiser:
    """Answers that a CosyVoice speaks."""

    def build(self, questions: Path, folder: Path, *options: str) -> dict[str, list[int]]:
        """Units of the answer to each key."""
        required = ["--questions", str(questions), "--synthesiser", str(COSYVOICE), "--speaker", "jackson"]
        build_speech_instruct.main(
            ["chain", *required, "--formats", "text_to_speech", "--style", "released", *options, str(folder)]
        )
        rows = Dataset.from_parquet(str(folder / "data" / "train.parquet"))
        return {row["key"]: list(parse_answer(row["plain_text"]).units) for row in rows}

    def test_units_are_the_speech_tokens_of_the_language_model(self, questions, tmp_path):
        found = self.build(questions, tmp_path / "first")
        # An answer without words and one that is too long are left out.
        assert sorted(found) == ["k0", "k1", "k2"]
        voice = CosyVoiceUnits.from_pretrained(COSYVOICE)
        codebook = voice.config.speech_tokenizer_config.codebook_size
        assert all(units and 0 <= min(units) and max(units) < codebook for units in found.values())
        assert found["k0"] == found["k2"] != found["k1"]
        inputs = voice.processor("two", speaker="jackson")
        output = voice.model.generate(**inputs, generator=[torch.Generator().manual_seed(0)])
        assert found["k0"] == output.speech_ids[0].tolist()
        again, other = (self.build(questions, tmp_path / seed, "--seed", seed) for seed in ("0", "1"))
        written = [(tmp_path / name / "data" / "train.parquet").read_bytes() for name in ("first", "0")]
        assert again == found != other and written[0] == written[1]

    def test_units_of_the_sound(self, questions, tmp_path):
        model = tiny_units()
        model.save_pretrained(tmp_path / "units")
        found = self.build(questions, tmp_path / "chain", "--units_model", str(tmp_path / "units"))
        assert sorted(found) == ["k0", "k1", "k2"]
        voice = CosyVoiceUnits.from_pretrained(COSYVOICE)
        requests = [{"text": text, "speaker": "jackson"} for text in ("two", "three one")]
        spoken = synthesize(voice.model, voice.processor, requests).waveforms
        for key, waveform in zip(("k0", "k1"), spoken, strict=True):
            heard = resample(waveform, voice.config.sampling_rate, model.config.sampling_rate)
            output = model.encode(heard[None])
            assert found[key] == output.reduced_ids[0, : output.reduced_lengths[0]].tolist()
        assert found["k2"] == found["k0"]
        assert self.build(questions, tmp_path / "again", "--units_model", str(tmp_path / "units")) == found

    @pytest.mark.parametrize(
        "options, message",
        [
            ([], "one of the arguments --answers --text_to_unit --synthesiser is required"),
            (["--synthesiser", "x", "--text_to_unit", "y"], "--text_to_unit: not allowed with argument --synthesiser"),
            (["--answers", "a", "--synthesiser", "x"], "argument --synthesiser: not allowed with argument --answers"),
            (["--synthesiser", "x"], "--synthesiser: expected --speaker as well"),
            (["--answers", "a", "--speaker", "x"], "--speaker: expected --synthesiser as well"),
            (["--text_to_unit", "a", "--units_model", "x"], "--units_model: expected --synthesiser as well"),
            (["--synthesiser", str(COSYVOICE), "--speaker", "x"], "--speaker: expected one of ['george', 'jackson', "),
            (
                ["--synthesiser", str(COSYVOICE), "--speaker", "lucas", "--units_model", str(COSYVOICE)],
                "--units_model: expected a speechgpt_units model, got one of the type 'cosyvoice'",
            ),
        ],
    )
    def test_wrong_combinations_are_refused(self, questions, tmp_path, capsys, options, message):
        with pytest.raises(SystemExit):
            build_speech_instruct.main(["chain", str(tmp_path), "--questions", str(questions), *options])
        assert message in capsys.readouterr().err
        assert not list(tmp_path.iterdir())


class TestRecipes:
    @pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
    def test_every_key_is_known(self, path):
        run = load_run_config(path, kind=UnitLmRunConfig)
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert run.data.train == content["data"]["train"]
        if "text_to_unit" in path.stem:
            from transformers import Seq2SeqTrainingArguments as Arguments
        else:
            from trl import SFTConfig as Arguments
        known = Arguments.__dataclass_fields__
        assert not set(run.training) - set(known), path
