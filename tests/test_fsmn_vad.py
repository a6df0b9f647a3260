"""FSMN-VAD: the state machine on hand-made tracks, the network, streaming, conversion, and a clean process."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import speech_like
from safetensors.torch import load_file, save_file
from tiny_funasr_fsmn_vad import bursts, golden_waveform, tiny_detector
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForAudioFrameClassification

import hf_speechllm  # noqa: F401
from hf_speechllm.hub import clean_process
from hf_speechllm.models.configuration_funasr_fsmn_vad import FunasrFsmnVadConfig
from hf_speechllm.models.feature_extraction_kaldi_fbank import AudioError
from hf_speechllm.models.speech_detector import SILENCE_SCHEDULE, SpeechDetector, SpeechDetectorOptions
from hf_speechllm.upstream.errors import ConversionError


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "conversion"))
try:
    from convert_funasr import convert_funasr_pack, export_funasr_pack
finally:
    sys.path.remove(str(ROOT / "conversion"))

CASE = ROOT / "tests" / "golden" / "funasr_helpers" / "fsmn_vad_tiny"
N, S = 0.95, 0.02  # probability of silence in noise, and in speech


def detector(**options) -> SpeechDetector:
    config = FunasrFsmnVadConfig(**options)
    names = SpeechDetectorOptions.__dataclass_fields__
    return SpeechDetector.new(SpeechDetectorOptions(**{name: getattr(config, name) for name in names}))


def frames(*runs: tuple[float, int]) -> list[float]:
    return [probability for probability, count in runs for _ in range(count)]


# Track, options, and the segments in milliseconds that upstream's `FsmnVADStreaming` gives for it.
TRACKS = {
    "a pause ends it": ([(N, 100), (S, 200), (N, 200)], {}, [[740, 3160]]),
    "silence around two": ([(N, 50), (S, 100), (N, 150), (S, 80), (N, 30)], {}, [[240, 1660], [2740, 4100]]),
    "a short pause": ([(S, 100), (N, 60), (S, 100), (N, 100)], {}, [[0, 1160], [1440, 2760]]),
    "too short to notice": ([(N, 100), (S, 10), (N, 100)], {}, []),
    "too long": ([(S, 700)], {"max_segment_ms": 2000}, [[0, 2010], [2010, 4020], [4020, 6030], [6030, 7000]]),
    "the end of the recording": ([(N, 60), (S, 40)], {}, [[340, 1000]]),
    "noticed in the last frame": ([(N, 20), (S, 15)], {}, [[0, 350]]),
    "only silence": ([(N, 300)], {}, []),
    "no extension": ([(N, 100), (S, 200), (N, 200)], {"extend": False}, [[940, 3050]]),
    "one utterance": ([(N, 50), (S, 60), (N, 120), (S, 60), (N, 120)], {"single_utterance": True}, [[240, 1260]]),
    "gives up": ([(N, 400), (S, 100), (N, 100)], {"single_utterance": True}, []),
    "the margin": ([(0.19, 60), (0.21, 60), (N, 100)], {}, [[0, 760]]),
    "less patience": (
        [(N, 50), (S, 60), (N, 50), (S, 60), (N, 50)],
        {"max_end_silence_ms": 300},
        [[240, 1260], [1340, 2360]],
    ),
}


@pytest.mark.parametrize("name", TRACKS)
def test_hand_made_tracks(name):
    runs, options, expected = TRACKS[name]
    track = frames(*runs)
    segments = detector(**options).advance(track, [0.0] * len(track), is_last=True)
    assert [[10 * start, 10 * end] for start, end in segments] == expected


def test_detector_does_not_depend_on_blocks():
    rng = random.Random(0)
    found = 0
    for _ in range(40):
        runs = [(rng.choice([N, S, rng.random()]), rng.choice([1, 5, 14, 16, 40, 66, 90, 200])) for _ in range(20)]
        track = frames(*runs)
        levels = [rng.choice([-50.0, -5.0, 10.0]) for _ in track]
        options = {"decibel_threshold": rng.choice([-100.0, -20.0]), "max_segment_ms": rng.choice([1000, 60000])}
        whole = detector(**options).advance(track, levels, is_last=True)
        pieces, position = detector(**options), 0
        segments = []
        while position < len(track):
            size = rng.choice([1, 3, 50])
            end = min(position + size, len(track))
            segments += pieces.advance(track[position:end], levels[position:end], is_last=end == len(track))
            position = end
        assert segments == whole
        assert all(start < end for start, end in whole)
        assert all(before[1] <= after[0] for before, after in zip(whole, whole[1:], strict=False))
        found += len(whole)
    assert found > 60


def test_quiet_frames_are_silence_where_a_level_is_asked_for():
    track, levels = frames((N, 30), (S, 100), (N, 100)), [-30.0] * 230
    assert detector().advance(track, levels, is_last=True)
    assert not detector(decibel_threshold=-20.0).advance(track, levels, is_last=True)


def test_certain_probabilities_are_no_error():
    track = frames((1.0, 100), (0.0, 100), (1.0, 100))
    assert len(detector().advance(track, [0.0] * 300, is_last=True)) == 1


def test_pauses_cut_a_recording():
    model, audio = tiny_detector(), bursts((0, 1, 1, 0, 0, 1, 0, 1, 1, 1, 0))
    segments = model.speech_segments(audio, 16000)
    assert len(segments) == 3
    for (start, end), (first, last) in zip(segments, ((1, 3), (5, 6), (7, 10)), strict=True):
        assert first - 0.5 < start < first + 0.4 and last - 0.4 < end < last + 0.5
    assert model.speech_segments(audio * 1e-3) == []


@pytest.mark.parametrize("samples", [0, 1, 399, 400, 401, 559, 560, 1200])
def test_hardly_any_audio(samples):
    assert tiny_detector().speech_segments(np.zeros(samples, dtype=np.float32)) == []


def test_wrong_rate_and_ended_streams_are_refused():
    model = tiny_detector()
    with pytest.raises(AudioError, match="expects 16000 Hz, got 8000 Hz"):
        model.speech_segments(np.zeros(800, dtype=np.float32), 8000)
    output = model.stream_step(np.zeros(800, dtype=np.float32), model.open_stream(), is_last=True)
    with pytest.raises(ValueError, match="has ended"):
        model.stream_step(np.zeros(800, dtype=np.float32), output.state)


def test_any_cut_of_the_audio_gives_the_same():
    model, audio = tiny_detector(), bursts((0, 1, 1, 0, 0, 1, 0, 1, 1, 1, 1, 1, 1))
    expected = model.speech_segments(audio)
    with torch.no_grad():
        features = model.new_feature_extractor()(audio, sampling_rate=16000)
        whole = model(**features).silence_probabilities[0]
    assert len(expected) == 4, "the last is longer than a segment may be"
    rng = random.Random(1)
    for sizes in ([160], [399], [1, 7, 5000], [48000], [400, 161]):
        state, position, segments, probabilities, since = model.open_stream(), 0, [], [], []
        while position < len(audio):
            size = rng.choice(sizes)
            is_last = position + size >= len(audio)
            output = model.stream_step(audio[position : position + size], state, 16000, is_last=is_last)
            segments += output.segments
            probabilities.append(output.silence_probabilities)
            since.append(output.speech_since)
            state, position = output.state, position + size
        assert segments == expected
        torch.testing.assert_close(torch.cat(probabilities), whole, atol=1e-5, rtol=1e-4)
        assert since[-1] is None and {start for start, _ in segments[:-1]} <= set(since) | {segments[0][0]}


def test_state_is_a_value():
    model, audio = tiny_detector(), bursts((0, 1, 1, 0))
    state = model.stream_step(audio[:24000], model.open_stream()).state
    first = model.stream_step(audio[24000:], state, is_last=True)
    again = model.stream_step(audio[24000:], state, is_last=True)
    assert first.segments == again.segments and len(first.segments) == 1
    assert torch.equal(first.silence_probabilities, again.silence_probabilities)


def test_item_of_a_batch_equals_the_item_alone():
    model = tiny_detector()
    pieces = [bursts((1, 0, 1)), bursts((1,)), np.zeros(100, dtype=np.float32)]
    batch = model.new_feature_extractor()(pieces, sampling_rate=16000)
    with torch.no_grad():
        together = model(**batch).silence_probabilities
        for row, piece in enumerate(pieces[:2]):
            alone = model(**model.new_feature_extractor()(piece, sampling_rate=16000)).silence_probabilities[0]
            torch.testing.assert_close(together[row, : len(alone)], alone, atol=1e-6, rtol=1e-5)
            assert (together[row, len(alone) :] == 1).all()
    assert (together[2] == 1).all()


def test_it_trains():
    model = tiny_detector().train()
    features = model.new_feature_extractor()(bursts((0, 1)), sampling_rate=16000)
    labels = torch.full(features["attention_mask"].shape, -100)
    labels[0, :50], labels[0, 120:] = 0, 3
    loss = model(**features, labels=labels).loss
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    expected = torch.nn.functional.cross_entropy(model(**features).logits[0], labels[0])
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"input_size": 80}, "input_size"), ({"silence_ids": [6]}, "silence_ids"), ({"window_ms": 5}, "window_ms")],
)
def test_contradictory_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_detector(**changes)


# ---------------------------------------------------------------------------------------------------------------------
# What upstream gives


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vad") / "model"
    convert_funasr_pack(CASE, folder)
    return folder


@pytest.fixture(scope="module")
def golden() -> dict:
    return json.loads((CASE / "case.json").read_text(encoding="utf-8"))


def milliseconds(segments: list[tuple[float, float]]) -> list[list[int]]:
    return [[round(1000 * start), round(1000 * end)] for start, end in segments]


def test_features_and_probabilities_are_upstreams(converted):
    tensors = load_file(CASE / "io.safetensors")
    model = AutoModel.from_pretrained(converted)
    features = AutoFeatureExtractor.from_pretrained(converted)(golden_waveform(), sampling_rate=16000)
    normalised = (features["input_features"][0] - model.cmvn_mean) * model.cmvn_inverse_std
    torch.testing.assert_close(normalised[: len(tensors["features"])], tensors["features"], atol=2e-3, rtol=1e-4)
    with torch.no_grad():
        probabilities = model(**features).silence_probabilities[0]
    torch.testing.assert_close(probabilities, tensors["silence_probabilities"], atol=2e-5, rtol=1e-4)


def test_segments_are_upstreams(converted, golden):
    model, audio = AutoModelForAudioFrameClassification.from_pretrained(converted), golden_waveform()
    assert len(golden["segments_ms"]) >= 4 and golden["segments_ms"] != golden["scheduled_segments_ms"]
    assert milliseconds(model.speech_segments(audio)) == golden["segments_ms"]
    scheduled = model.speech_segments(audio, silence_schedule=SILENCE_SCHEDULE)
    assert milliseconds(scheduled) == golden["scheduled_segments_ms"]


def test_streamed_events_are_upstreams(converted, golden):
    """Upstream reports `[start, -1]` where speech begins and `[-1, end]` where it ends, in pieces of 200 ms."""
    model, audio = AutoModel.from_pretrained(converted), golden_waveform()
    state, events, known = model.open_stream(), [], None
    for position in range(0, len(audio), 3200):
        piece = audio[position : position + 3200]
        output = model.stream_step(piece, state, is_last=position + 3200 >= len(audio))
        state = output.state
        for start, end in milliseconds(output.segments):
            events.append([-1 if known == start else start, end])
            known = None
        if output.speech_since is not None and known is None:
            known = round(1000 * output.speech_since)
            events.append([known, -1])
    assert events == golden["streaming_events_ms"]


# ---------------------------------------------------------------------------------------------------------------------
# Conversion and remote code


def test_there_and_back_again(converted, tmp_path):
    """Model folder → pack → model folder is identical, and the pack's weights are the golden ones."""
    report = export_funasr_pack(converted, tmp_path / "pack")
    assert set(report["outputs"]) == {"am.mvn", "config.yaml", "configuration.json", "model.pt"}
    ours, theirs = (torch.load(folder / "model.pt", weights_only=True) for folder in (tmp_path / "pack", CASE))
    assert sorted(ours) == sorted(theirs) and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    convert_funasr_pack(tmp_path / "pack", tmp_path / "again")
    for path in converted.iterdir():
        if path.name != "conversion_report.json":
            assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def edit_yaml(pack: Path, change) -> None:
    path = pack / "config.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(yaml.safe_dump(content), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model_conf"].update(unheard_of=1), "model_conf.unheard_of"),
        (lambda c: c["encoder_conf"].update(rorder=2), "encoder_conf.rorder"),
        (lambda c: c["encoder_conf"].update(fsmn_layers=3), "encoder.fsmn"),
        (lambda c: c["encoder_conf"].update(linear_dim=17), "in_linear2"),
        (lambda c: c["encoder_conf"].update(input_dim=80), "input_size"),
        (lambda c: c["frontend_conf"].update(lfr_n=2), "frontend_conf.lfr_n"),
        (lambda c: c["model_conf"].update(detect_mode=2), "model_conf.detect_mode"),
        (lambda c: c["model_conf"].update(sil_pdf_ids="0"), "model_conf.sil_pdf_ids"),
        (lambda c: c["model_conf"].update(sil_pdf_ids=[0, 1]), "model_conf.silence_pdf_num"),
        (lambda c: c["model_conf"].update(decibel_thres="low"), "model_conf.decibel_thres"),
        (lambda c: c["model_conf"].update(frame_in_ms=20), "model_conf.frame_in_ms"),
    ],
)
def test_what_the_model_cannot_do_is_refused(tmp_path, change, message):
    shutil.copytree(CASE, tmp_path / "pack")
    edit_yaml(tmp_path / "pack", change)
    with pytest.raises(ConversionError, match=message):
        convert_funasr_pack(tmp_path / "pack", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_saving_again_changes_nothing(converted, tmp_path):
    model = AutoModel.from_pretrained(converted)
    model.save_pretrained(tmp_path)
    for name in ("model.safetensors", "config.json", "modeling_funasr_fsmn_vad.py", "speech_detector.py"):
        assert (tmp_path / name).read_bytes() == (converted / name).read_bytes(), name
    assert not list(converted.glob("pipeline_*")), "a detector needs no recogniser's files"


IN_A_CLEAN_PROCESS = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("clean_process", sys.argv[1])
clean_process = importlib.util.module_from_spec(spec)
spec.loader.exec_module(clean_process)
sys.meta_path.insert(0, clean_process.PackageBlocker())
import torch
from safetensors.torch import load_file
from transformers import AutoFeatureExtractor, AutoModel
torch.set_num_threads(1)
audio = load_file(sys.argv[3])["audio"]
model = AutoModel.from_pretrained(sys.argv[2], trust_remote_code=True).eval()
extractor = AutoFeatureExtractor.from_pretrained(sys.argv[2], trust_remote_code=True)
with torch.no_grad():
    probabilities = model(**extractor(audio, sampling_rate=16000)).silence_probabilities
print(json.dumps({
    "module": type(model).__module__,
    "segments": model.speech_segments(audio, 16000),
    "sum": probabilities.double().sum().item(),
}))
"""


def test_remote_code_gives_the_same(converted, tmp_path):
    audio = torch.from_numpy(bursts((0, 1, 0, 1, 1)) + 0.1 * speech_like(5))
    save_file({"audio": audio}, tmp_path / "audio.safetensors")
    (tmp_path / "script.py").write_text(IN_A_CLEAN_PROCESS, encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
    done = subprocess.run(
        [
            sys.executable,
            "-I",
            tmp_path / "script.py",
            clean_process.__file__,
            converted,
            tmp_path / "audio.safetensors",
        ],
        env={**environment, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.strip().splitlines()[-1])
    model = AutoModel.from_pretrained(converted)
    features = model.new_feature_extractor()(audio, sampling_rate=16000)
    with torch.no_grad():
        expected = model(**features).silence_probabilities.double().sum().item()
    assert report["module"].startswith("transformers_modules.")
    assert report["sum"] == pytest.approx(expected, rel=1e-9)
    assert [tuple(segment) for segment in report["segments"]] == model.speech_segments(audio, 16000) != []
