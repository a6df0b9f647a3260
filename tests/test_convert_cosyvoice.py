"""Conversion of complete CosyVoice packs, which the tests write themselves around the golden graphs, and back."""

import base64
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_cosyvoice import recording, tiny_cosyvoice
from tiny_cosyvoice_pack import YAML, write_pack, write_tokenizer
from transformers import AutoModelForTextToWaveform, AutoProcessor

from hf_speechllm.models.modeling_cosyvoice import CosyVoiceForTextToWaveform
from hf_speechllm.upstream.checkpoints import read_state_dict
from hf_speechllm.upstream.cosyvoice_tokenizers import build_qwen_tokenizer, qwen_special_id
from hf_speechllm.upstream.errors import ConversionError, UnsafeArtifactError
from hf_speechllm.upstream.hyperpyyaml import Call, read_hyperpyyaml
from hf_speechllm.upstream.speaker_info import read_speaker_info


sys.path.insert(0, str(Path(__file__).parents[1] / "conversion"))
import convert_cosyvoice as conversion
import cosyvoice_lm
import cosyvoice_tokenizer


ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden" / "cosyvoice"


@pytest.fixture(scope="module")
def pack(tmp_path_factory) -> Path:
    """A complete version 2 pack of tiny networks, with one speaker of each kind."""
    folder = tmp_path_factory.mktemp("packs") / "pack"
    write_pack(folder)
    return folder


@pytest.fixture(scope="module")
def converted(pack) -> Path:
    """The model folder of the pack."""
    conversion.convert_cosyvoice_pack(pack, pack.parent / "model")
    return pack.parent / "model"


def copy_of(pack: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pack, tmp_path / "changed"))


def test_pack_becomes_a_folder_that_speaks(converted, tmp_path):
    report = json.loads((converted / "conversion_report.json").read_text(encoding="utf-8"))
    assert report["version"] == 2 and report["speakers"] == ["mine", "中文女"]
    assert {"llm.pt", "cosyvoice2.yaml", "CosyVoice-BlankEN/vocab.json", "spk2info.pt"} <= report["inputs"].keys()
    model, loading = AutoModelForTextToWaveform.from_pretrained(converted, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert isinstance(model, CosyVoiceForTextToWaveform)
    processor = AutoProcessor.from_pretrained(converted)
    assert processor.tokenizer("<|endofprompt|>")["input_ids"] == [261]
    assert processor.speakers["mine"].text_ids.tolist() == [5, 6]
    inputs = processor(["hello", "you"], speaker=["mine", "中文女"])
    options = {"max_token_text_ratio": 3.0, "generator": torch.Generator().manual_seed(0)}
    assert model.generate(**inputs, **options).waveform.shape[1] > 480
    inputs = processor("a", prompt_audio=recording(0.6), prompt_text="b", sampling_rate=24000)
    assert torch.isfinite(model.generate(**inputs, **options).waveform).all()
    model.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (converted / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_there_and_back_is_identical(pack, converted, tmp_path):
    conversion.export_cosyvoice_pack(converted, tmp_path / "back")
    for name in ("llm.pt", "flow.pt", "hift.pt"):
        before, after = read_state_dict(pack / name), read_state_dict(tmp_path / "back" / name)
        assert before.keys() == after.keys(), name
        for key, tensor in before.items():
            assert torch.equal(tensor, after[key]), key
    before, after = (read_speaker_info(folder / "spk2info.pt") for folder in (pack, tmp_path / "back"))
    assert before.keys() == after.keys()
    for name, parts in before.items():
        assert parts.keys() == after[name].keys()
        for key, value in parts.items():
            assert torch.equal(value.long() if "len" in key else value, after[name][key].to(value.dtype)), (name, key)
    for name in ("speech_tokenizer_v2.onnx", "campplus.onnx", "cosyvoice2.yaml"):
        shutil.copy(pack / name, tmp_path / "back")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(pack / "CosyVoice-BlankEN" / name, tmp_path / "back" / "CosyVoice-BlankEN")
    conversion.convert_cosyvoice_pack(tmp_path / "back", tmp_path / "second")
    one, two = (load_file(name / "model.safetensors") for name in (converted, tmp_path / "second"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("part", ["llm", "flow", "hift", "speech_tokenizer", "campplus"])
def test_parts_can_be_had_alone(pack, converted, tmp_path, part):
    conversion.convert_part(pack, tmp_path / "part", part)
    prefix = {"llm": "lm", "flow": "flow", "hift": "vocoder", "campplus": "speaker_encoder"}.get(part, part)
    alone, whole = (load_file(folder / "model.safetensors") for folder in (tmp_path / "part", converted))
    mine = {name.removeprefix(f"{prefix}."): tensor for name, tensor in whole.items() if name.startswith(f"{prefix}.")}
    assert alone.keys() == mine.keys() and all(torch.equal(alone[name], mine[name]) for name in alone)


@pytest.mark.parametrize("missing", ["llm.pt", "flow.pt", "hift.pt", "campplus.onnx", "speech_tokenizer_v2.onnx",
                                     "cosyvoice2.yaml", "CosyVoice-BlankEN/vocab.json"])  # fmt: skip
def test_what_is_missing_is_named(pack, tmp_path, missing):
    changed = copy_of(pack, tmp_path)
    (changed / missing).unlink()
    with pytest.raises(ConversionError, match=Path(missing).stem):
        conversion.convert_cosyvoice_pack(changed, tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["changed"]


def test_hostile_speakers_are_refused(pack, tmp_path):
    changed = copy_of(pack, tmp_path)
    path = changed / "spk2info.pt"
    cases = [
        ({"a": {"embedding": torch.full((1, 192), float("nan"))}}, UnsafeArtifactError, "not finite"),
        ({"a": {"voice": torch.zeros(1, 192)}}, ConversionError, "unknown part"),
        ({"a": {"embedding": torch.zeros(192)}}, ConversionError, "shape"),
        ({"a": {"prompt_text": torch.zeros(1, 3)}}, ConversionError, "without an embedding"),
        ({"a": {"embedding": 3}}, ConversionError, "not a tensor"),
        ([1], ConversionError, "not a mapping"),
        ({"a": {"llm_embedding": torch.zeros(1, 192), "embedding": torch.ones(1, 192)}}, ConversionError, "differ"),
    ]
    for content, error, message in cases:
        torch.save(content, path)
        with pytest.raises(error, match=message):
            conversion.convert_cosyvoice_pack(changed, tmp_path / "model")
    path.write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(UnsafeArtifactError):
        conversion.convert_cosyvoice_pack(changed, tmp_path / "model")


def test_parts_that_do_not_fit_are_named(pack, tmp_path):
    changed = copy_of(pack, tmp_path)
    (changed / "speech_tokenizer_v2.onnx").unlink()
    shutil.copy(GOLDEN / "s3_v1" / "speech_tokenizer_v1.onnx", changed / "speech_tokenizer_v1.onnx")
    with pytest.raises(ConversionError, match="speech tokenizer's codebook"):
        conversion.convert_cosyvoice_pack(changed, tmp_path / "model")


def test_the_graph_of_the_version_is_taken(tmp_path):
    names = [f"speech_tokenizer_{name}.onnx" for name in ("v1", "v2", "v2.batch", "v3.batch", "v3")]
    for name in names:
        (tmp_path / name).touch()
    assert [conversion.find_speech_tokenizer(tmp_path, version).name for version in (1, 2, 3)] == [
        f"speech_tokenizer_v{version}.onnx" for version in (1, 2, 3)
    ]
    (tmp_path / "speech_tokenizer_v3.onnx").unlink()
    assert conversion.find_speech_tokenizer(tmp_path, 3).name == "speech_tokenizer_v3.batch.onnx"


def test_files_that_are_no_part_of_the_model_do_not_matter(pack, converted, tmp_path):
    """What published packs hold besides: exports, caches, cards."""
    changed = copy_of(pack, tmp_path)
    others = ("flow.decoder.estimator.fp32.onnx", "flow.encoder.fp16.zip", "flow.cache.pt", "llm.rl.pt", "README.md")
    for name in (*others, "configuration.json", "config.json", "CosyVoice-BlankEN/LICENSE"):
        (changed / name).write_bytes(b"not read")
    (changed / "asset").mkdir()
    shutil.copy(GOLDEN / "s3_v1" / "speech_tokenizer_v1.onnx", changed)
    conversion.convert_cosyvoice_pack(changed, tmp_path / "model")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "model" / name).read_bytes() == (converted / name).read_bytes()


def test_version_3_finds_the_end_of_its_prompt_in_the_vocabulary(tmp_path):
    write_tokenizer(tmp_path)
    built = build_qwen_tokenizer(tmp_path, 3)
    assert cosyvoice_tokenizer.end_of_prompt_id(tmp_path) == built.convert_tokens_to_ids("<|endofprompt|>") == 261
    for token in ("<|endoftext|>", "<|im_start|>", "[ǜ]"):
        assert qwen_special_id(tmp_path, 3, token) == built.convert_tokens_to_ids(token)
    pack = Path(shutil.copytree(GOLDEN / "v3_lm", tmp_path / "pack"))
    settings, path = read_hyperpyyaml(pack / "cosyvoice3.yaml"), pack / "cosyvoice3.yaml"
    assert cosyvoice_lm.read_config(settings, path, pack).end_of_prompt_id == 151646
    write_tokenizer(pack / "CosyVoice-BlankEN")
    assert cosyvoice_lm.read_config(settings, path, pack).end_of_prompt_id == 261


def single_bytes(path: Path) -> Path:
    """A file of text tokens with no token but the bytes."""
    lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_version_1_asks_for_its_text_tokens(tmp_path):
    """Its tokens come from Whisper's file, which no published pack has."""
    config, yaml_path = tiny_cosyvoice(1).config, tmp_path / "cosyvoice.yaml"
    found = Call("name", "whisper.tokenizer.get_tokenizer", {"multilingual": True, "num_languages": 100})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cosyvoice_tokenizer, "find_spec", lambda name: None)
        for settings in ({}, {"get_tokenizer": replace(found, target="cosyvoice.tokenizer.tokenizer.get_tokenizer")}):
            with pytest.raises(ConversionError, match=r"multilingual_zh_ja_yue_char_del\.tiktoken \(upstream's\)"):
                conversion.build_tokenizer(tmp_path, settings, yaml_path, config, None)
        with pytest.raises(ConversionError, match=r" multilingual\.tiktoken \(Whisper's\)"):
            conversion.build_tokenizer(tmp_path, {"get_tokenizer": found}, yaml_path, config, None)
    path = single_bytes(tmp_path / "multilingual.tiktoken")
    with pytest.raises(ConversionError, match="at most 64, the rows of llm.pt"):
        conversion.build_tokenizer(tmp_path, {}, yaml_path, config, path)
    for call, message in (
        (replace(found, target="os.system"), "unknown class"),
        (replace(found, arguments={"multilingual": False}), r"get_tokenizer\.multilingual"),
        (replace(found, arguments=found.arguments | {"num_languages": "many"}), r"get_tokenizer\.num_languages"),
    ):
        with pytest.raises(ConversionError, match=message):
            conversion.build_tokenizer(tmp_path, {"get_tokenizer": call}, yaml_path, config, path)


def test_text_tokens_of_version_1_are_found(tmp_path, monkeypatch):
    """In the pack before an installed package; the yaml says which and how many languages there are."""
    name = "multilingual.tiktoken"
    assert cosyvoice_tokenizer.find_text_tokens(tmp_path, "other.tiktoken") is None
    package = tmp_path / "packages" / "whisper"
    (package / "assets").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('nothing is run')", encoding="utf-8")
    monkeypatch.syspath_prepend(str(package.parent))
    installed = single_bytes(package / "assets" / name)
    pack = tmp_path / "pack"
    (pack / "asset").mkdir(parents=True)
    assert cosyvoice_tokenizer.find_text_tokens(pack, name) == installed
    only = single_bytes(pack / "asset" / "tokens.tiktoken")
    assert cosyvoice_tokenizer.find_text_tokens(pack, name) == only
    named = single_bytes(pack / name)
    assert cosyvoice_tokenizer.find_text_tokens(pack, name) == named
    config = tiny_cosyvoice(1).config
    config.lm_config.text_vocab_size = 4000
    sizes = []
    for count in (99, 100):
        arguments = {"multilingual": True, "num_languages": count, "language": "en", "task": "transcribe"}
        settings = {"get_tokenizer": Call("name", "whisper.tokenizer.get_tokenizer", arguments)}
        sizes.append(len(conversion.build_tokenizer(pack, settings, pack / "cosyvoice.yaml", config, None)))
    assert sizes == [256 + 1608, 256 + 1609]


def test_command_line(pack, converted, tmp_path, capsys):
    assert conversion.main(["--reverse", str(converted), str(tmp_path / "back")]) == 0
    assert json.loads(capsys.readouterr().out)["direction"] == "reverse"
    assert conversion.main([str(GOLDEN / "v2_lm"), str(tmp_path / "lm")]) == 0
    assert json.loads(capsys.readouterr().out)["converter"] == "cosyvoice_lm"
    assert conversion.main([str(pack), str(tmp_path / "flow"), "--part", "flow"]) == 0
    capsys.readouterr()
    assert conversion.main([str(pack), str(tmp_path / "flow")]) == 2
    refused = capsys.readouterr().err
    assert refused.count("\n") == 1 and "not empty" in refused


def test_script_runs_by_itself(tmp_path):
    script = ROOT / "conversion" / "convert_cosyvoice.py"
    command = [sys.executable, str(script), str(tmp_path / "no pack"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "pack is not a directory" in done.stderr


def test_yaml_of_the_tests_is_hyperpyyaml():
    """No loader of plain yaml would read it: the tags are real."""
    with pytest.raises(yaml.constructor.ConstructorError):
        yaml.safe_load(YAML.format(llm=""))
