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
from tiny_cosyvoice_flow import tiny_flow
from tiny_cosyvoice_hift import tiny_hift
from tiny_cosyvoice_lm import build
from transformers import AutoModelForTextToWaveform, AutoProcessor

from hf_speechllm.models.modeling_cosyvoice import CosyVoiceForTextToWaveform
from hf_speechllm.upstream.checkpoints import read_state_dict
from hf_speechllm.upstream.cosyvoice_tokenizers import build_qwen_tokenizer, qwen_special_id
from hf_speechllm.upstream.errors import ConversionError, UnsafeArtifactError
from hf_speechllm.upstream.hyperpyyaml import Call, read_hyperpyyaml
from hf_speechllm.upstream.speaker_info import read_speaker_info


sys.path.insert(0, str(Path(__file__).parents[1] / "conversion"))
import convert_cosyvoice as conversion
import cosyvoice_flow
import cosyvoice_hift
import cosyvoice_lm
import cosyvoice_tokenizer


ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden" / "cosyvoice"
CODES = 6561
YAML = """sample_rate: 24000
chunk_size: 4
token_mel_ratio: 2
{llm}
flow: !new:cosyvoice.flow.flow.CausalMaskedDiffWithXvec
    input_size: 16
    output_size: 80
    spk_embed_dim: 192
    output_type: 'mel'
    vocab_size: 6561
    input_frame_rate: 25
    only_mask_loss: True
    token_mel_ratio: !ref <token_mel_ratio>
    pre_lookahead_len: 3
    encoder: !new:cosyvoice.transformer.upsample_encoder.UpsampleConformerEncoder
        output_size: 16
        attention_heads: 2
        linear_units: 20
        num_blocks: 2
        dropout_rate: 0.1
        positional_dropout_rate: 0.1
        attention_dropout_rate: 0.1
        normalize_before: True
        input_layer: 'linear'
        pos_enc_layer_type: 'rel_pos_espnet'
        selfattention_layer_type: 'rel_selfattn'
        input_size: 16
        use_cnn_module: False
        macaron_style: False
        static_chunk_size: !ref <chunk_size>
    decoder: !new:cosyvoice.flow.flow_matching.CausalConditionalCFM
        in_channels: 240
        n_spks: 1
        spk_emb_dim: 80
        cfm_params: !new:omegaconf.DictConfig
            content:
                sigma_min: 1e-06
                solver: 'euler'
                t_scheduler: 'cosine'
                training_cfg_rate: 0.2
                inference_cfg_rate: 0.7
                reg_loss_type: 'l1'
        estimator: !new:cosyvoice.flow.decoder.CausalConditionalDecoder
            in_channels: 320
            out_channels: 80
            channels: [16]
            dropout: 0.0
            attention_head_dim: 4
            n_blocks: 1
            num_mid_blocks: 1
            num_heads: 2
            act_fn: 'gelu'
            static_chunk_size: !ref <chunk_size> * <token_mel_ratio>
            num_decoding_left_chunks: -1
hift: !new:cosyvoice.hifigan.generator.HiFTGenerator
    in_channels: 80
    base_channels: 16
    nb_harmonics: 8
    sampling_rate: !ref <sample_rate>
    nsf_alpha: 0.1
    nsf_sigma: 0.003
    nsf_voiced_threshold: 10
    upsample_rates: [8, 5, 3]
    upsample_kernel_sizes: [16, 11, 7]
    istft_params: {{n_fft: 16, hop_len: 4}}
    resblock_kernel_sizes: [3]
    resblock_dilation_sizes: [[1, 3]]
    source_resblock_kernel_sizes: [7, 7, 11]
    source_resblock_dilation_sizes: [[1], [1], [1]]
    lrelu_slope: 0.1
    audio_limit: 0.99
    f0_predictor: !new:cosyvoice.hifigan.f0_predictor.ConvRNNF0Predictor
        num_class: 1
        in_channels: 80
        cond_channels: 8
feat_extractor: !name:matcha.utils.audio.mel_spectrogram
    n_fft: 1920
    num_mels: 80
    sampling_rate: !ref <sample_rate>
    hop_size: 480
    win_size: 1920
    fmin: 0
    fmax: 8000
    center: False
get_tokenizer: !name:cosyvoice.tokenizer.tokenizer.get_qwen_tokenizer
    token_path: !ref <sample_rate>
allowed_special: 'all'
"""


@pytest.fixture(scope="module")
def pack(tmp_path_factory) -> Path:
    """A complete version 2 pack of tiny networks, with one speaker of each kind."""
    folder = tmp_path_factory.mktemp("packs") / "pack"
    folder.mkdir()
    lm = build(2, speech_vocab_size=CODES, text_vocab_size=300, end_of_prompt_id=261)
    sizes = {"vocab_size": CODES, "num_mel_bins": 80, "speaker_embedding_size": 192, "num_upsampled_layers": 4}
    flow = tiny_flow(2, **sizes)
    vocoder = tiny_hift(
        2,
        **{"num_mel_bins": 80, "upsample_rates": [8, 5, 3], "upsample_kernel_sizes": [16, 11, 7]},
        **{"resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3]]},
        **{"source_resblock_kernel_sizes": [7, 7, 11], "source_resblock_dilation_sizes": [[1], [1], [1]]},
    )
    state = cosyvoice_lm.restore_weights(lm.state_dict(), lm.config)
    torch.save(cosyvoice_lm.compact(state), folder / "llm.pt")
    torch.save(cosyvoice_flow.restore_weights(flow.state_dict(), flow.config), folder / "flow.pt")
    torch.save(cosyvoice_hift.restore_weights(vocoder.state_dict(), vocoder.config), folder / "hift.pt")
    text = YAML.format(llm=cosyvoice_lm.upstream_yaml(lm.config))
    (folder / "cosyvoice2.yaml").write_text(text, encoding="utf-8")
    shutil.copy(GOLDEN / "s3_v2" / "speech_tokenizer_v2.onnx", folder)
    shutil.copy(GOLDEN / "campplus" / "campplus.onnx", folder)
    cosyvoice_lm.write_qwen_folder(folder / "CosyVoice-BlankEN", state, lm.config)
    write_tokenizer(folder / "CosyVoice-BlankEN")
    generator = torch.Generator().manual_seed(0)
    plain = {"embedding": torch.randn(1, 192, generator=generator)}
    prompt = {
        "prompt_text": torch.tensor([[5, 6]], dtype=torch.int32),
        "llm_prompt_speech_token": torch.tensor([[7, 8, 9]], dtype=torch.int32),
        "flow_prompt_speech_token": torch.tensor([[7, 8, 9]], dtype=torch.int32),
        "prompt_speech_feat": torch.randn(1, 6, 80, generator=generator),
        "llm_embedding": torch.randn(1, 192, generator=generator),
    }
    prompt["flow_embedding"] = prompt["llm_embedding"]
    prompt |= {f"{name}_len": torch.tensor([value.shape[1]]) for name, value in prompt.items() if "embed" not in name}
    torch.save({"中文女": plain, "mine": prompt}, folder / "spk2info.pt")
    return folder


@pytest.fixture(scope="module")
def converted(pack) -> Path:
    """The model folder of the pack."""
    conversion.convert_cosyvoice_pack(pack, pack.parent / "model")
    return pack.parent / "model"


def write_tokenizer(folder: Path) -> None:
    """A byte-level vocabulary with two merges."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(0x100, 0x200))
    names = [chr(byte) if byte in visible else chr(next(hidden)) for byte in range(256)]
    vocabulary = {name: number for number, name in enumerate([*names, "he", "ll"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\nh e\nl l\n", encoding="utf-8")
    added = {"258": {"content": "<|endoftext|>", "special": True}}
    settings = {"added_tokens_decoder": added, "tokenizer_class": "Qwen2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


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
    assert conversion.main([str(pack), str(tmp_path / "flow")]) == 1
    refused = capsys.readouterr().err
    assert refused.count("\n") == 1 and "not empty" in refused


def test_script_runs_by_itself(tmp_path):
    script = ROOT / "conversion" / "convert_cosyvoice.py"
    command = [sys.executable, str(script), str(tmp_path / "no pack"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "pack is not a directory" in done.stderr


def test_yaml_of_the_tests_is_hyperpyyaml():
    """No loader of plain yaml would read it: the tags are real."""
    with pytest.raises(yaml.constructor.ConstructorError):
        yaml.safe_load(YAML.format(llm=""))
