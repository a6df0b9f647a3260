"""Export, cards and upload (against a Hub that runs in this process)."""

import base64
import hashlib
import http.server
import json
import threading
from pathlib import Path

import pytest
import torch
from conftest import build_tiny_model, build_tiny_processor
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSpeechSeq2Seq

from hf_speechllm.hub import export as export_module
from hf_speechllm.hub.card import read_facts, render_card
from hf_speechllm.hub.export import export_folder, export_model
from hf_speechllm.hub.push import push_folder
from hf_speechllm.hub.self_check import SelfCheckError


FACTS = Path(__file__).parents[1] / "model_cards" / "u2pp_moe_digits.yaml"
ROW = {
    "model": "u2pp_moe_digits",
    "dataset": "digits",
    "split": "test_unseen",
    "decoding": "ctc_greedy",
    "chunk_size": 16,
    "metric": "wer",
    "value": 12.345,
    "per_seed": [12.0, 12.69],
}


@pytest.fixture
def results(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"rows": [ROW, {**ROW, "model": "dense", "chunk_size": -1}]}), encoding="utf-8")
    return path


def test_card_has_metadata_and_table(results):
    text = render_card(read_facts(FACTS, results))
    card = ModelCard(text)
    assert card.data.license == "cc-by-sa-4.0" and card.data.pipeline_tag == "automatic-speech-recognition"
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_split) == ("wer", 12.345, "test_unseen")
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert table[2].split(" | ")[3:] == ["ctc_greedy", "chunk 16", "WER", "12.35 %", "12.00 12.69 |"]
    assert "| dense |" in table[3] and "| full |" in table[3]
    assert "{{" not in text and "{%" not in text


def test_kinds_of_errors_reach_the_card(tmp_path, monkeypatch):
    """From two evaluations through `collect_results.py` to the table."""
    monkeypatch.syspath_prepend(str(FACTS.parents[1] / "training"))
    import collect_results

    run = {"decoding": "default", "chunk_size": -1, "words": 10, "insertions": 0}
    for name, errors in (("a", {"wer": 30.0, "substitutions": 2, "deletions": 1}), ("b", {"wer": 20.0})):
        result = {**run, "substitutions": 1, "deletions": 1, **errors}
        (tmp_path / name).write_text(json.dumps({"results": [result]}), encoding="utf-8")
    files = [str(tmp_path / name) for name in ("a", "b")]
    collect_results.main([str(tmp_path / "results.json"), "--add", "u2pp_moe_digits", "digits", "test", *files])
    lines = render_card(read_facts(FACTS, tmp_path / "results.json")).splitlines()
    header, rule, row = (line for line in lines if line.startswith("|"))
    assert header.count("|") == rule.count("|") == row.count("|")
    assert header.endswith("| seeds | sub. / del. / ins. |") and row.endswith("| 30.00 20.00 | 1.5 / 1 / 0 |")


def test_card_without_results_says_so():
    assert "None measured." in render_card(read_facts(FACTS))


def test_card_names_missing_keys(tmp_path):
    facts = tmp_path / "facts.yaml"
    facts.write_text("model_name: x\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"facts\.yaml: expected the keys .*; missing: title, summary"):
        read_facts(facts)
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"rows": [{"model": "x"}]}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"results\.json: rows\[0\]: missing: dataset"):
        read_facts(FACTS, results)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "model"
    export_model(build_tiny_model(), build_tiny_processor(), folder, facts=FACTS)
    return folder


def test_export_is_complete_and_leaves_nothing_beside(exported):
    names = {path.name for path in exported.iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "processor_config.json", "tokenizer.json"} <= names
    assert "pipeline_speech_recognition.py" in names
    assert [path.name for path in exported.parent.iterdir()] == ["model"]


def test_export_refuses_and_replaces(exported, tmp_path, monkeypatch):
    with pytest.raises(FileExistsError, match="model: exists"):
        export_folder(exported, exported)
    target = tmp_path / "target"
    target.mkdir()
    (target / "old.txt").write_text("old")

    def fail(folder):
        raise SelfCheckError(f"{folder}: no")

    with monkeypatch.context() as patch:
        patch.setattr(export_module, "self_check", fail)
        with pytest.raises(SelfCheckError):
            export_folder(exported, target, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["target"] and (target / "old.txt").is_file()
    export_folder(exported, target, overwrite=True)
    assert not (target / "old.txt").exists()
    assert (target / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


class Hub(http.server.BaseHTTPRequestHandler):
    """The few answers of the Hub that creating a repository and one commit need."""

    files: dict[str, bytes] = {}

    def log_message(self, *arguments):
        pass

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().strip(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, content: dict, code: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.answer(
            {"name": "someone", "type": "user", "orgs": [], "id": "someone/model", "sha": "0" * 40, "siblings": []}
        )

    def do_POST(self):
        body = self.body()
        if self.path.endswith("/repos/create"):
            self.answer({"url": "http://127.0.0.1/someone/model", "name": "someone/model", "id": "someone/model"})
        elif "/validate-yaml" in self.path:
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {"path": item["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for item in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        else:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            oid = hashlib.sha1(body).hexdigest()
            address = f"http://127.0.0.1/someone/model/commit/{oid}"
            self.answer({"commitUrl": address, "commitOid": oid, "success": True, "hookOutput": ""})


@pytest.fixture
def hub(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    Hub.files = {}
    # The suite is offline; this Hub is on this machine.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()


def test_push_uploads_everything_that_was_exported(exported, hub, tmp_path):
    (exported / "notes.tmp").write_text("not for the Hub")
    try:
        address = push_folder(exported, "someone/model", token="anything", endpoint=hub)
    finally:
        (exported / "notes.tmp").unlink()
    assert "/commit/" in address
    assert Hub.files == {path.name: path.read_bytes() for path in exported.iterdir()}


def test_push_wants_a_complete_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected README.md"):
        push_folder(tmp_path, "someone/model", token="anything")


def test_half_precision_is_of_the_file_alone(tmp_path):
    model = build_tiny_model()
    export_model(model, build_tiny_processor(), tmp_path / "half", half_precision_file=True)
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()} == {torch.float16}
    loaded = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "half").state_dict()
    for name, tensor in model.state_dict().items():
        assert loaded[name].dtype == tensor.dtype
        if tensor.dtype == torch.float32:
            assert torch.equal(loaded[name], tensor.half().float()), name
    save_file({"large": torch.tensor([1e6])}, tmp_path / "large.safetensors")
    with pytest.raises(ValueError, match="large: expected magnitudes up to 65504"):
        export_module.halve(tmp_path / "large.safetensors")


def test_card_of_a_synthesiser(tmp_path):
    facts = {
        **{"model_name": "voice", "title": "Voice", "summary": "It speaks.", "language": "en", "license": "mit"},
        **{"tags": ["tts"], "datasets": ["d"], "pipeline_tag": "text-to-speech", "sampling_rate": 8000},
        **{"example_text": "one two", "example_speaker": "ann", "evaluation": "3 of 4 words."},
    }
    path = tmp_path / "facts.yaml"
    path.write_text(json.dumps(facts), encoding="utf-8")
    text = render_card(read_facts(path))
    assert ModelCard(text).data.pipeline_tag == "text-to-speech"
    assert 'speak("one two", speaker="ann")' in text and "3 of 4 words." in text and "{{" not in text
    with pytest.raises(ValueError, match="pipeline_tag: expected one of"):
        render_card({**read_facts(path), "pipeline_tag": "image-to-text"})
