"""An hour of audio through the pipeline and ten minutes through a stream: time, memory, and the same answers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_tiny_model, build_tiny_processor, speech_like


pytestmark = pytest.mark.slow

TESTS = Path(__file__).resolve().parent
HOUR_S = 3600
# Growth of the peak over a process that has recognised two minutes and holds the hour: the hour is 220 MiB in float32,
# the pipeline holds one copy of it and what a window and the results need (measured: 281 MiB).
MEMORY_BOUND_MIB = 340


def long_audio(seconds: int) -> np.ndarray:
    """Pieces of 12 s of tone bursts, each at its own level and in its own noise: float32 `(samples,)` at 16 kHz."""
    rng = np.random.default_rng(1)
    pieces = [speech_like(12, seed=number) for number in range(5)]
    audio = np.empty(seconds * 16000, dtype=np.float32)
    for start in range(0, len(audio), 12 * 16000):
        piece = audio[start : start + 12 * 16000]
        piece[:] = pieces[int(rng.integers(5))][: len(piece)] * rng.uniform(0.2, 1.0)
        piece += rng.standard_normal(len(piece), dtype=np.float32) * np.float32(rng.uniform(0.001, 0.05))
    return audio


def hour_through_the_pipeline(folder: str) -> dict:
    """Runs in a process of its own, so that its peak of memory is its own."""
    import resource
    import time

    from transformers import pipeline

    torch.set_num_threads(1)
    recognise = pipeline("automatic-speech-recognition", model=folder, trust_remote_code=True, device="cpu")
    options = {"decoding": "ctc_greedy", "return_timestamps": "word"}
    recognise(long_audio(130), **options)
    audio = long_audio(HOUR_S)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    result = recognise(audio, **options)
    seconds = time.perf_counter() - start
    return {
        "text": result["text"],
        "times": [chunk["timestamp"] for chunk in result["chunks"]],
        "seconds": seconds,
        "growth_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024,
        "explicit": recognise(audio, chunk_length_s=60, **options)["text"],
        "half_a_minute": recognise(audio, chunk_length_s=30, **options)["text"],
        "rescored": recognise(audio[: 600 * 16000], num_beams=4)["text"],
        "rescored_explicit": recognise(audio[: 600 * 16000], num_beams=4, chunk_length_s=60)["text"],
    }


@pytest.fixture(scope="module")
def hour(tiny_model_dir) -> dict:
    command = [sys.executable, str(Path(__file__).resolve()), str(tiny_model_dir)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_default_windows_are_a_minute(hour):
    assert len(hour["text"].split()) > 500
    assert hour["text"] == hour["explicit"] != hour["half_a_minute"]
    assert hour["rescored"] and hour["rescored"] == hour["rescored_explicit"]


def test_words_stand_in_order_within_the_hour(hour):
    times = np.array(hour["times"])
    assert len(times) == len(hour["text"].split())
    assert (times[:, 0] <= times[:, 1]).all() and (np.diff(times[:, 0]) >= 0).all()
    assert times.min() >= 0 and times.max() <= HOUR_S
    # Every minute has words: no window is lost.
    assert set((times[:, 0] // 60).astype(int)) == set(range(HOUR_S // 60))


def test_time_and_memory_are_bounded(hour):
    assert hour["seconds"] < 180, hour["seconds"]
    assert hour["growth_mib"] < MEMORY_BOUND_MIB, hour["growth_mib"]


def test_features_of_an_hour():
    features = build_tiny_processor().feature_extractor(long_audio(HOUR_S), sampling_rate=16000)
    assert features["input_features"].shape == (1, HOUR_S * 100 - 2, 80)
    assert bool(features["input_features"].isfinite().all()) and int(features["attention_mask"].sum()) == 359998


def test_ten_minutes_of_streaming_keep_the_caches_small():
    processor, model = build_tiny_processor(), build_tiny_model()
    audio = long_audio(600)
    chunk_size, left = 16, 4
    features, state, sizes, words = None, None, [], []
    piece = 16000
    for start in range(0, len(audio), piece):
        is_last = start + piece >= len(audio)
        windows, features = processor.stream(
            audio[start : start + piece], features, sampling_rate=16000, is_last=is_last, chunk_size=chunk_size
        )
        for number, window in enumerate(windows):
            options = (
                {"chunk_size": chunk_size, "num_left_chunks": left, "decoding": "ctc_greedy"} if state is None else {}
            )
            with torch.no_grad():
                output = model.stream_step(
                    **window, state=state, is_last=is_last and number + 1 == len(windows), **options
                )
            state = output.state
            tensors = state.encoder.to_tensors()
            sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in tensors.values()))
            assert all(keys.shape[2] <= chunk_size * left for keys in (*state.encoder.keys, *state.encoder.values))
        words = output.sequences[0]
        # The samples and features that wait for the next window.
        assert len(features.samples) < 400 and len(features.features) < 2 * 4 * chunk_size
    assert output.is_final[0] and int(state.encoder.offsets[0]) == ((600 * 100 - 2 - 1) // 2 - 1) // 2
    assert len(words) > 50
    # Full after five chunks; from then on to the end not a byte more.
    assert len(sizes) > 900 and max(sizes[5:]) <= sizes[5]
    with torch.no_grad():
        whole = model.generate(
            **processor(audio=audio[: 60 * 16000], sampling_rate=16000),
            decoding="ctc_greedy",
            decoding_chunk_size=chunk_size,
            num_left_chunks=left,
        )[0]
    # The first minute of the stream is the first minute of one pass, but for what its end cuts off.
    assert words[: len(whole) - 3] == whole[: len(whole) - 3].tolist()


if __name__ == "__main__":
    print(json.dumps(hour_through_the_pipeline(sys.argv[1])))
