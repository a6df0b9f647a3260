"""From parts that were trained each by itself to a folder that speaks: extraction of tokens, assembly, export."""

import json
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from datasets import Dataset
from tiny_cosyvoice import MEL_BINS, recording, tiny_cosyvoice, tiny_processor
from transformers import AutoModel, AutoProcessor

from hf_speechllm.data.manifests import read_manifest
from hf_speechllm.data.speech_token_extraction import extract_speech_tokens
from hf_speechllm.hub import self_check as self_check_module
from hf_speechllm.hub.self_check import SelfCheckError, self_check
from hf_speechllm.models.feature_extraction_cosyvoice_mel import CosyVoiceMelFeatureExtractor


sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
import assemble_cosyvoice
import extract_speech_tokens as extraction


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    """Five recordings of two speakers, and one of nobody."""
    folder = tmp_path_factory.mktemp("speech")
    rows = []
    for number, (speaker, seconds) in enumerate((("a", 0.5), ("b", 0.4), ("a", 0.8), ("b", 0.6), (None, 0.3))):
        soundfile.write(folder / f"{number}.wav", recording(seconds, number).numpy(), 24000)
        row = {"audio": f"{number}.wav", "text": "one two", "known": str(speaker is not None)} | (
            {} if speaker is None else {"speaker": speaker}
        )
        rows.append(json.dumps(row) + "\n")
    (folder / "data.jsonl").write_text("".join(rows), encoding="utf-8")
    return folder / "data.jsonl"


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, Path]:
    """Each part of a tiny model as a folder of its own, as the training scripts leave them."""
    folder = tmp_path_factory.mktemp("parts")
    model, processor = tiny_cosyvoice(2), tiny_processor(2)
    folders = {name: folder / name for name in assemble_cosyvoice.PARTS}
    for name, path in folders.items():
        getattr(model, name).save_pretrained(path)
    processor.tokenizer.save_pretrained(folders["lm"])
    hop = model.vocoder.config.hop_length
    mel = CosyVoiceMelFeatureExtractor(MEL_BINS, 24000, fft_length=4 * hop, hop_length=hop)
    mel.save_pretrained(folders["vocoder"])
    model.save_pretrained(folder / "whole")
    processor.save_pretrained(folder / "whole")
    return folders | {"whole": folder / "whole"}


def test_extraction_is_what_the_models_say_of_each_recording(manifest):
    model, utterances = tiny_cosyvoice(2), read_manifest(manifest)
    tokenizer, encoder = model.speech_tokenizer, model.speaker_encoder
    rows = extract_speech_tokens(tokenizer, encoder, utterances, progress=False)
    one_by_one = extract_speech_tokens(tokenizer, encoder, utterances, batch_seconds=0.01, progress=False)
    assert [row["spk"] for row in rows] == ["a", "b", "a", "b", ""]
    for row, alone in zip(rows, one_by_one, strict=True):
        assert row["speech_token"] == alone["speech_token"] and row["speech_token"]
        torch.testing.assert_close(
            torch.tensor(row["utt_embedding"]), torch.tensor(alone["utt_embedding"]), atol=1e-5, rtol=0
        )
        assert abs(torch.tensor(row["utt_embedding"]).norm() - 1) < 1e-5
    mean = torch.nn.functional.normalize(
        torch.tensor([rows[0]["utt_embedding"], rows[2]["utt_embedding"]]).mean(0), dim=0
    )
    for row in (rows[0], rows[2]):
        torch.testing.assert_close(torch.tensor(row["spk_embedding"]), mean)
    assert rows[4]["spk_embedding"] == rows[4]["utt_embedding"]


def test_parts_become_a_folder_that_speaks(manifest, parts, tmp_path, capsys):
    tokens = tmp_path / "tokens.parquet"
    encoders = [
        "--speech_tokenizer",
        str(parts["speech_tokenizer"]),
        "--speaker_encoder",
        str(parts["speaker_encoder"]),
    ]
    extraction.main([*encoders, str(manifest), str(tokens), "--where", "known=True"])
    assert "4 utterances" in capsys.readouterr().out
    extraction.main([str(parts["whole"]), str(manifest), str(tmp_path / "again.parquet"), "--where", "known=True"])
    first, second = (Dataset.from_parquet(str(path)) for path in (tokens, tmp_path / "again.parquet"))
    assert first["speech_token"][:] == second["speech_token"][:]

    folders = [argument for name in assemble_cosyvoice.PARTS for argument in (f"--{name}", str(parts[name]))]
    assemble_cosyvoice.main([str(tmp_path / "model"), *folders, "--voices", str(tokens)])
    assert "'speakers': ['a', 'b']" in capsys.readouterr().out
    model, processor = (
        AutoModel.from_pretrained(tmp_path / "model").eval(),
        AutoProcessor.from_pretrained(tmp_path / "model"),
    )
    # The longest recording of each speaker, cut to whole tokens.
    assert len(processor.speakers["a"].speech_ids) == 20 and len(processor.speakers["a"].mel) == 40
    inputs = processor(["hello", "you"], speaker=["a", "b"])
    output = model.generate(**inputs, max_token_text_ratio=3.0, generator=torch.Generator().manual_seed(0))
    assert output.waveform.shape[1] > 240 and torch.isfinite(output.waveform).all()


@pytest.mark.parametrize("version", (1, 2, 3))
def test_an_added_voice_reads_as_its_recording_given_anew(manifest, version):
    """Version 3 wants its system prompt before what the recording says; without it, it speaks nothing."""
    processor = tiny_processor(version)
    row = {"spk": "a", "text": "one two", "audio": str(manifest.parent / "0.wav")}
    row |= {"speech_token": [1, 2, 3], "spk_embedding": [0.5] * 16}
    ratio = None if version == 1 else 2
    assemble_cosyvoice.add_voices(processor, [row], ratio, with_texts=True)
    known = processor("yes", speaker="a")
    given = processor("yes", prompt_audio=row["audio"], prompt_text=row["text"])
    for name in ("prompt_input_ids", "lm_reads_prompt_speech", "input_ids"):
        assert torch.equal(known[name], given[name]), name
    assert known["prompt_speech_ids"].tolist() == [[1, 2, 3]]
    assemble_cosyvoice.add_voices(processor, [row], ratio, with_texts=False)
    assert not processor("yes", speaker="a")["lm_reads_prompt_speech"].any()


def test_a_part_of_a_whole_is_replaced(parts, tmp_path, capsys):
    changed = AutoModel.from_pretrained(parts["flow"])
    torch.nn.init.zeros_(changed.speaker_proj.weight)
    changed.save_pretrained(tmp_path / "flow")
    arguments = ["--base", str(parts["whole"]), "--flow", str(tmp_path / "flow"), "--half_precision_file"]
    assemble_cosyvoice.main([str(tmp_path / "model"), *arguments])
    model, old = (AutoModel.from_pretrained(folder) for folder in (tmp_path / "model", parts["whole"]))
    assert not model.flow.speaker_proj.weight.any() and old.flow.speaker_proj.weight.any()
    for name, tensor in old.lm.state_dict().items():
        assert torch.equal(model.lm.state_dict()[name], tensor.half().float()), name
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    with pytest.raises(SystemExit):
        assemble_cosyvoice.main([str(tmp_path / "other"), "--flow", str(tmp_path / "flow")])
    assert "expected all of lm, flow, vocoder" in capsys.readouterr().err


def test_self_check_hears_a_difference(parts, monkeypatch):
    assert self_check(parts["whole"])["samples"] > 0
    monkeypatch.setattr(self_check_module, "PROBE_TEXT", "another")
    with pytest.raises(SelfCheckError, match="audio: expected"):
        self_check(parts["whole"])


def test_parts_of_a_whole_are_trained_and_put_back(parts, manifest, tmp_path):
    """No step, so that what comes back is what was there: a whole is enough to fine-tune any of its parts."""
    import train_cosyvoice_lm
    import train_flow
    import train_vocoder

    whole, data = parts["whole"], manifest.parent
    extraction.main([str(whole), str(manifest), str(data / "train.parquet")])
    same = ("--data_dir", str(data), "--learning_rate", "0", "--max_steps", "1", "--use_cpu", "true")
    tokens = (*same, "--data.train", "[train.parquet]", "--data.validation", "[]", "--disable_tqdm", "true")
    tokens += (
        "--save_strategy",
        "no",
        "--eval_strategy",
        "no",
        "--load_best_model_at_end",
        "false",
        "--bf16",
        "false",
    )
    recipes = Path(__file__).parents[1] / "training" / "recipes"
    lm, flow, vocoder = (tmp_path / name for name in ("lm", "flow", "vocoder"))
    train_cosyvoice_lm.main(["--pretrained", str(whole), "--output_dir", str(lm), *tokens])
    speaker = str(recipes / "cosyvoice_flow" / "speaker.yaml")
    # The tiny vocoder makes 100 frames a second, the tiny flow 50.
    frames = ("--data.feature_extractor", '{"hop_length": 480}', "--min_frames", "1")
    train_flow.main([speaker, "--model.pretrained", str(whole), "--output_dir", str(flow), *frames, *tokens])
    train_vocoder.main(
        [
            *(str(recipes / "cosyvoice_hift" / "finetune.yaml"), "--pretrained", str(whole), *same),
            *("--output_dir", str(vocoder), "--data.train", f"[{manifest.name}]", "--data.validation", "[]"),
            *("--crop_frames", "8", "--discriminators", "[]", "--eval_steps", "0", "--save_steps", "0"),
            *("--batch_size", "2", "--fold_weight_norm", "false", "--mixed_precision", "no"),
        ]
    )
    assemble_cosyvoice.main(
        [
            *(str(tmp_path / "new"), "--base", str(whole), "--lm", str(lm), "--flow", str(flow)),
            *("--vocoder", str(vocoder)),
        ]
    )
    before, after = (AutoModel.from_pretrained(folder).state_dict() for folder in (whole, tmp_path / "new"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=1e-6, rtol=1e-5, msg=name)
    found = CosyVoiceMelFeatureExtractor.from_pretrained(vocoder)
    assert found.hop_length == AutoProcessor.from_pretrained(whole).feature_extractor.hop_length
