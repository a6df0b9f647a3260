"""Readers of FunASR packs: what they accept, and that hostile or damaged files are named and refused."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_speechllm.models.kaldi_fbank import kaldi_fbank, low_frame_rate
from hf_speechllm.upstream.checkpoints import read_state_dict
from hf_speechllm.upstream.errors import ConversionError, UnsafeArtifactError
from hf_speechllm.upstream.funasr_pack import (
    open_funasr_pack,
    read_seg_dict,
    read_token_list,
    write_seg_dict,
    write_token_list,
)
from hf_speechllm.upstream.memory_pages import release_pages
from hf_speechllm.upstream.nnet_mvn import read_nnet_mvn, write_nnet_mvn


GOLDEN = Path(__file__).parent / "golden" / "funasr"
MVN = "<Nnet>\n<Splice> 3 3\n[ 0 ]\n<AddShift> 3 3\n<LearnRateCoef> 0 [ -1 2.5 3e-1 ]\n<Rescale> 3 3\n"
MVN += "<LearnRateCoef> 0 [ 0.5 .25 4 ]\n</Nnet>\n"


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


# -- am.mvn -----------------------------------------------------------------------------------------------------------
def test_mvn_takes_shift_and_scale_not_the_splice(tmp_path):
    shift, scale = read_nnet_mvn(write(tmp_path / "am.mvn", MVN), input_size=3)
    assert torch.equal(shift, torch.tensor([-1.0, 2.5, 0.3])) and torch.equal(scale, torch.tensor([0.5, 0.25, 4.0]))


@pytest.mark.parametrize("case", ["paraformer_sanm_tiny", "bicif_timestamps_tiny"])
def test_mvn_normalises_like_upstream(case):
    shift, scale = read_nnet_mvn(GOLDEN / case / "am.mvn", input_size=560)
    tensors = load_file(GOLDEN / case / "io.safetensors")
    bands = kaldi_fbank(
        tensors["wav.0"][None] * 32768.0,
        sampling_rate=16000,
        num_mel_bins=80,
        frame_length_ms=25.0,
        frame_shift_ms=10.0,
        window_type="hamming",
    )
    stacked = low_frame_rate(bands, torch.tensor([bands.shape[1]]), 7, 6)
    length = int(tensors["feats_lens"][0])
    torch.testing.assert_close(((stacked + shift) * scale)[0], tensors["feats"][0, :length], atol=2e-3, rtol=1e-3)


def test_mvn_is_written_exactly(tmp_path):
    torch.manual_seed(0)
    shift, scale = torch.randn(560) * 10, torch.rand(560) * 1e-6
    path = write(tmp_path / "am.mvn", write_nnet_mvn(shift, scale))
    read = read_nnet_mvn(path)
    assert torch.equal(read[0], shift) and torch.equal(read[1], scale)
    # The toolkit reads line by line: the numbers are on the line after the component's name.
    lines = path.read_text().splitlines()
    for name, vector in (("<AddShift>", shift), ("<Rescale>", scale)):
        (index,) = [i for i, line in enumerate(lines) if line.startswith(name)]
        fields = lines[index + 1].split()
        assert fields[:3] == ["<LearnRateCoef>", "0", "["] and fields[-1] == "]" and len(fields) == 4 + len(vector)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["empty"]),
        ("[ 1 2 3 ]", ["not a Kaldi network"]),
        (MVN.replace("</Nnet>", ""), ["not a Kaldi network"]),
        (MVN.replace("[ 0 ]", "[ -1 0 1 ]"), ["splicing"]),
        (MVN.replace("2.5", "nan"), ["not a finite number", "<AddShift>", "nan"]),
        (MVN.replace("2.5", "1e99"), ["not finite in float32", "<AddShift>"]),
        (MVN.replace("2.5", "__import__('os')"), ["not a finite number"]),
        (MVN.replace("2.5", ""), ["wrong number of values", "<AddShift>", "expected: 3", "actual: 2"]),
        (MVN.replace("<Rescale>", "<Sigmoid>"), ["unknown component", "<Sigmoid>"]),
        (MVN.replace("<Rescale>", "<AddShift>"), ["component occurs twice"]),
        (MVN.replace("]\n</Nnet>", "</Nnet>"), ["component has no [", "<Rescale>"]),
        (MVN.replace("<Rescale> 3 3", "<Rescale> 3 4"), ["malformed component", "<Rescale>"]),
        (MVN.replace("<Rescale> 3 3", "<Rescale> " + "9" * 5000 + " " + "9" * 5000), ["wrong number of values"]),
        (MVN[: MVN.index("<Rescale>")] + "</Nnet>", ["component is missing", "<Rescale>"]),
        (b"<Nnet>\xff</Nnet>", ["not UTF-8"]),
        (MVN + "\0", ["NUL"]),
    ],
)
def test_mvn_refuses(tmp_path, content, words):
    with pytest.raises(ConversionError) as refusal:
        read_nnet_mvn(write(tmp_path / "am.mvn", content))
    for word in ["am.mvn", *words]:
        assert word in str(refusal.value)


def test_mvn_of_another_model_is_refused(tmp_path):
    with pytest.raises(ConversionError, match="expected: 560; actual: 3"):
        read_nnet_mvn(write(tmp_path / "am.mvn", MVN), input_size=560)


# -- tokens and segmentation dictionary -------------------------------------------------------------------------------
def test_token_lists(tmp_path):
    # Words that an untyped yaml reader takes for booleans and numbers.
    tokens = {token: index for index, token in enumerate(["<blank>", "no", "1", "''''", "he@@", "的", "<unk>"])}
    assert read_token_list(write(tmp_path / "tokens.json", write_token_list(tokens))) == tokens
    assert read_token_list(write(tmp_path / "tokens.txt", "".join(f"{token}\r\n" for token in tokens))) == tokens


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"a": 0}', ["not a list", "dict"]),
        ('["a", 1]', ["not a string", "key: 1"]),
        ('["a", "a"]', ["occurs twice", "key: a", "0, 1"]),
        ('["a", ""]', ["empty"]),
        ('["a", "\\u0000"]', ["not printable"]),
        ('["a", "\\ud800"]', ["not printable"]),
        ("[]", ["number of tokens"]),
        ('["a"', ["not valid JSON"]),
        ("[" * 100_000, ["not valid JSON"]),
        ("[NaN]", ["not a finite number"]),
    ],
)
def test_token_lists_refuse(tmp_path, content, words):
    with pytest.raises(ConversionError) as refusal:
        read_token_list(write(tmp_path / "tokens.json", content))
    for word in ["tokens.json", *words]:
        assert word in str(refusal.value)


def test_segmentation_dictionary(tmp_path):
    words = {"hello": ("he@@", "llo"), "的": ("的",), "lost": ()}
    assert read_seg_dict(write(tmp_path / "seg_dict", write_seg_dict(words))) == words
    # The other toolkit separates with a tabulator; a later line wins.
    assert read_seg_dict(write(tmp_path / "seg_dict", "a\tb c\na d\n")) == {"a": ("d",)}
    with pytest.raises(UnsafeArtifactError, match="line 2"):
        read_seg_dict(write(tmp_path / "seg_dict", "a b\n\nc d\n"))


# -- the folder -------------------------------------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path):
    pack = tmp_path / "pack"
    pack.mkdir()
    write(pack / "config.yaml", "model: Paraformer\n")
    write(pack / "weights.pt", "x")
    describe(pack, {"init_param": "weights.pt", "config": "config.yaml"})
    return pack


def describe(pack: Path, metas: object) -> None:
    write(pack / "configuration.json", json.dumps({"file_path_metas": metas}))


def test_description_says_which_file_is_which(folder):
    write(folder / "am.mvn", "x")
    write(folder / "other.mvn", "x")
    write(folder / "seg_dict", "x")
    metas = {
        "init_param": "weights.pt",
        "config": "config.yaml",
        "frontend_conf": {"cmvn_file": "other.mvn"},
        "tokenizer_conf": {"token_list": "absent.json", "seg_dict": "seg_dict"},
    }
    describe(folder, metas)
    pack = open_funasr_pack(folder)
    assert {key: path.name for key, path in pack.files.items()} == {
        "init_param": "weights.pt",
        "config": "config.yaml",
        "frontend_conf.cmvn_file": "other.mvn",
        "tokenizer_conf.seg_dict_file": "seg_dict",
    }
    assert pack.model_name == "Paraformer"
    with pytest.raises(ConversionError, match=r"tokenizer_conf\.token_list.*tokens\.json or tokens\.txt"):
        pack.file("tokenizer_conf.token_list")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "a\\b", "", "a\0b"])
def test_names_that_lead_out_are_refused(folder, name):
    write(folder.parent / "secret", "x")
    describe(folder, {"init_param": name, "config": "config.yaml"})
    with pytest.raises(UnsafeArtifactError, match="leads out of the pack"):
        open_funasr_pack(folder)


def test_links_that_lead_out_are_refused(folder):
    write(folder.parent / "secret", "x")
    (folder / "weights.pt").unlink()
    (folder / "weights.pt").symlink_to(folder.parent / "secret")
    with pytest.raises(UnsafeArtifactError, match="link leads out of the pack"):
        open_funasr_pack(folder)
    (folder / "weights.pt").unlink()
    (folder / "weights.pt").symlink_to("gone")
    with pytest.raises(UnsafeArtifactError, match="dangling"):
        open_funasr_pack(folder)


def test_links_of_the_download_cache_are_followed(tmp_path, folder):
    snapshot = tmp_path / "models--x--y" / "snapshots" / "abc"
    blobs = tmp_path / "models--x--y" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert open_funasr_pack(snapshot).file("init_param").read_bytes() == b"x"


def test_only_regular_files(folder):
    (folder / "weights.pt").unlink()
    os.mkfifo(folder / "weights.pt")
    with pytest.raises(UnsafeArtifactError, match="not a regular file"):
        open_funasr_pack(folder)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("[]", "file_path_metas"),
        ('{"file_path_metas": []}', "file_path_metas"),
        ('{"file_path_metas": {"init_param": 3}}', "not a file name"),
        ('{"file_path_metas": {"init_param": ["a"]}}', "not a file name"),
        ('{"file_path_metas": {"a": {"a": {"a": {"a": {"a": {"a": "x"}}}}}}}', "nested too deeply"),
        ('{"file_path_metas": {}, "file_path_metas": {}}', "occurs twice"),
        ("{", "not valid JSON"),
    ],
)
def test_malformed_descriptions_are_refused(folder, content, word):
    write(folder / "configuration.json", content)
    with pytest.raises(UnsafeArtifactError, match=word):
        open_funasr_pack(folder)


def test_incomplete_folders_are_named(tmp_path, folder):
    with pytest.raises(ConversionError, match="not a directory"):
        open_funasr_pack(tmp_path / "absent")
    (folder / "weights.pt").unlink()
    with pytest.raises(ConversionError, match=r"init_param.*model\.pt or model\.pb"):
        open_funasr_pack(folder)
    write(folder / "model.pb", "x")
    write(folder / "config.yaml", "model: !!python/name:os.system\n")
    with pytest.raises(UnsafeArtifactError, match="tag"):
        open_funasr_pack(folder)
    write(folder / "config.yaml", "encoder: SANMEncoder\n")
    with pytest.raises(ConversionError, match="no model is named"):
        _ = open_funasr_pack(folder).model_name


# -- trainer checkpoints and mapped memory ----------------------------------------------------------------------------
def test_wrapped_state_dicts(tmp_path):
    weights = {"a": torch.arange(3.0)}
    path = tmp_path / "model.pt"
    torch.save({"epoch": 3, "state_dict": weights, "optimizer": {"state": {}, "lr": [0.1]}}, path)
    wrappers = ("state_dict", "model_state_dict", "model")
    assert torch.equal(read_state_dict(path, wrappers=wrappers)["a"], weights["a"])
    torch.save({"state_dict": {"model": weights}}, path)
    assert torch.equal(read_state_dict(path, wrappers=wrappers)["a"], weights["a"])
    with pytest.raises(ConversionError, match="not a tensor"):
        read_state_dict(path)
    torch.save({"state_dict": {"a": print}}, path)
    with pytest.raises(UnsafeArtifactError, match="callable"):
        read_state_dict(path, wrappers=wrappers)


def test_released_pages_keep_their_values(tmp_path):
    torch.manual_seed(0)
    values = torch.randn(300_000)
    torch.save({"a": values, "b": values[:7].clone()}, tmp_path / "model.pt")
    state = read_state_dict(tmp_path / "model.pt")
    for tensor in (state["a"], state["a"][1000:], state["b"], values[5:], values.view(3, -1).t()):
        expected = tensor.clone()
        release_pages(tensor)
        assert torch.equal(tensor, expected)
