"""CT-Transformer: words and marks, what upstream gives for a converted pack, conversion, training."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForTokenClassification, AutoTokenizer

import hf_speechllm  # noqa: F401
from hf_speechllm.models.configuration_funasr_ct_transformer import FunasrCtTransformerConfig
from hf_speechllm.models.punctuation_text import end_of_finished, end_text, join_words, split_words
from hf_speechllm.upstream.errors import ConversionError


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "conversion"))
try:
    from convert_funasr import convert_funasr_pack, export_funasr_pack
finally:
    sys.path.remove(str(ROOT / "conversion"))

CASE = ROOT / "tests" / "golden" / "funasr_helpers" / "ct_transformer_tiny"
GOLDEN = json.loads((CASE / "case.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("punctuation") / "model"
    convert_funasr_pack(CASE, folder)
    return folder


@pytest.fixture(scope="module")
def model(converted):
    return AutoModelForTokenClassification.from_pretrained(converted).eval()


@pytest.fixture(scope="module")
def tokenizer(converted):
    return AutoTokenizer.from_pretrained(converted)


def test_words_of_mixed_text():
    assert split_words("我用iPhone 13 pro打字 don't　é") == "我 用 iPhone 13 pro 打 字 don't é".split()
    assert split_words("  \n ") == []


def test_where_a_text_is_cut():
    marks = ["_"] * 10
    assert end_of_finished(marks, longest=200) == (0, False)
    marks[4] = marks[6] = "。"
    assert end_of_finished(marks, longest=200) == (7, False)
    assert end_of_finished(["_", "。", "_", "_"], longest=200) == (0, False), "two words come before"
    assert end_of_finished(["_", "_", "_", "。"], longest=200) == (0, False), "a word stays behind"
    marks = ["_", "_", "，", "_", "，", "_", "_"]
    assert end_of_finished(marks, longest=6) == (5, True)
    assert end_of_finished(marks, longest=7) == (0, False)


def test_words_and_marks_to_text():
    words, marks = ["hello", "wORLD", "你", "好", "ok", "x"], ["，", "。", "_", "？", "_", "、"]
    assert join_words(words, marks) == " Hello, wORLD.你好？Ok x、"
    assert join_words(["a", "b"], ["<unk>", "_"]) == " A b"
    ends = {
        "好，": "好。",
        "好、": "好。",
        "ok,": "ok.",
        "好": "好。",
        "ok": "ok.",
        "好？": "好？",
        "ok?": "ok?",
        "": "",
    }
    assert {text: end_text(text) for text in ends} == ends


@pytest.mark.parametrize("case", GOLDEN["texts"], ids=lambda case: f"{len(case['text'])} characters")
def test_text_is_upstreams(model, tokenizer, case):
    assert model.punctuate(case["text"], tokenizer) == case["punctuated"].lstrip(" ")


def test_golden_texts_reach_every_branch():
    lengths = [len(split_words(case["text"])) for case in GOLDEN["texts"]]
    assert min(lengths) <= 1 and any(length > 60 for length in lengths)
    written = "".join(case["punctuated"] for case in GOLDEN["texts"])
    assert all(mark in written for mark in "，。、.?")


def test_logits_are_upstreams(model):
    tensors = load_file(CASE / "io.safetensors")
    with torch.no_grad():
        logits = model(input_ids=tensors["input_ids"][None]).logits[0]
    torch.testing.assert_close(logits, tensors["logits"], atol=2e-5, rtol=1e-4)


def test_item_of_a_batch_equals_the_item_alone(model):
    ids = load_file(CASE / "io.safetensors")["input_ids"]
    lengths = (len(ids), 7, 1)
    batch = torch.full((3, len(ids)), 2)
    mask = torch.zeros_like(batch)
    for row, length in enumerate(lengths):
        batch[row, :length], mask[row, :length] = ids[:length], 1
    with torch.no_grad():
        together = model(input_ids=batch, attention_mask=mask).logits
        for row, length in enumerate(lengths):
            alone = model(input_ids=ids[None, :length]).logits[0]
            torch.testing.assert_close(together[row, :length], alone, atol=1e-5, rtol=1e-4)


def test_a_sentence_without_an_end_is_cut_at_a_comma(model, tokenizer):
    """A model that knows only commas: the cut makes one of them a full stop."""
    only_commas = AutoModel.from_pretrained(model.name_or_path).eval()
    with torch.no_grad():
        only_commas.classifier.bias[[0, 3, 4, 5]] = -1e3
    text = "今天天气很好" * 45
    result = only_commas.punctuate(text, tokenizer)
    assert 0 < result[:-1].count("。") < 10 and result.count("，") > 10 and "？" not in result
    assert result.replace("，", "").replace("。", "") == text
    assert only_commas.punctuate(text, tokenizer, longest_sentence=1000)[:-1].count("。") == 0


def test_empty_text(model, tokenizer):
    assert model.punctuate("", tokenizer) == model.punctuate("  ", tokenizer) == ""


def test_it_trains(converted):
    model = AutoModel.from_pretrained(converted).train()
    ids = load_file(CASE / "io.safetensors")["input_ids"][None]
    labels = torch.randint(1, 6, ids.shape, generator=torch.Generator().manual_seed(0))
    labels[0, 3] = -100
    output = model(input_ids=ids, labels=labels)
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    # All weights of the golden configuration are 1.
    expected = torch.nn.functional.cross_entropy(output.logits[0], labels[0])
    torch.testing.assert_close(output.loss, expected)


def test_there_and_back_again(converted, tmp_path):
    """Model folder → pack → model folder is identical, and the pack's weights are the golden ones."""
    export_funasr_pack(converted, tmp_path / "pack")
    ours, theirs = (torch.load(folder / "model.pt", weights_only=True) for folder in (tmp_path / "pack", CASE))
    assert sorted(ours) == sorted(theirs) and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    tokens = [json.loads((folder / "tokens.json").read_text(encoding="utf-8")) for folder in (tmp_path / "pack", CASE)]
    assert tokens[0] == tokens[1]
    convert_funasr_pack(tmp_path / "pack", tmp_path / "again")
    for path in converted.iterdir():
        if path.name != "conversion_report.json":
            assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model_conf"].update(unheard_of=1), "model_conf.unheard_of"),
        (lambda c: c["model_conf"].update(punc_list=["_", "_"]), "model_conf.punc_list"),
        (lambda c: c["model_conf"].update(punc_list=["_", "，", "。", "？"]), "label_weights"),
        (lambda c: c["model_conf"].update(embed_unit=18), "encoder_conf.input_size"),
        (lambda c: c["encoder_conf"].update(num_blocks=5), "encoder.layers"),
        (lambda c: c["encoder_conf"].update(input_layer="linear"), "encoder_conf.input_layer"),
        (lambda c: c["tokenizer_conf"].update(unk_symbol="nothing"), "nothing"),
    ],
)
def test_what_the_model_cannot_do_is_refused(tmp_path, change, message):
    shutil.copytree(CASE, tmp_path / "pack")
    path = tmp_path / "pack" / "config.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    with pytest.raises(ConversionError, match=message):
        convert_funasr_pack(tmp_path / "pack", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_jieba_words_are_refused(tmp_path):
    shutil.copytree(CASE, tmp_path / "pack")
    (tmp_path / "pack" / "words").write_text("今天 3\n", encoding="utf-8")
    path = tmp_path / "pack" / "configuration.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["file_path_metas"]["jieba_usr_dict"] = "words"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ConversionError, match="jieba"):
        convert_funasr_pack(tmp_path / "pack", tmp_path / "out")


def test_published_shape():
    config = FunasrCtTransformerConfig()
    assert config.id2label[3] == "。" and config.num_labels == 6
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    assert 70e6 < sum(parameter.numel() for parameter in model.parameters()) < 75e6
