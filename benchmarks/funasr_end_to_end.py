"""Waveform to text with the published shapes: our pipeline against FunASR's `AutoModel.generate`."""

from collections.abc import Iterator
from pathlib import Path

from funasr_peer import build_pair, voices
from timing import Comparison, compare

from hf_speechllm.cpu_inference import pack_linear_weights


# Seconds of the utterances of a batch: 57 of speech, and 39 more if all are padded to the longest.
MIXED = [3.0, 12.0, 5.0, 9.0, 4.0, 10.0, 6.0, 8.0]


def paraformer(checkout: Path) -> Iterator[Comparison]:
    return end_to_end(checkout, "Paraformer-large")


def sensevoice(checkout: Path) -> Iterator[Comparison]:
    return end_to_end(checkout, "SenseVoice-Small")


def end_to_end(checkout: Path, name: str) -> Iterator[Comparison]:
    """Batch 1 with plain and with packed weights, batch 8 with packed ones. Every text must be upstream's text of that
    utterance alone: in a batch of mixed lengths upstream's padding may change a text, ours does not."""
    pair = build_pair(checkout, name)

    def peer(waveforms: list, batch_size: int) -> list[str]:
        return ["".join(r["text"].split()) for r in pair.peer.generate(input=waveforms, batch_size=batch_size)]

    def ours(waveforms: list, batch_size: int) -> list[str]:
        # SenseVoice: with the tags, if random weights answer any.
        found = pair.ours(list(waveforms), batch_size=batch_size)
        return ["".join(r.get("tagged_text", r["text"]).split()) for r in found]

    for seconds, goal, packed in (([10.0], ">= 1.3", False), ([10.0], ">= 1.3", True), (MIXED, ">= 2", True)):
        if packed:
            pack_linear_weights(pair.model)
        waveforms, size = voices(seconds), len(seconds)
        texts = peer(waveforms, 1)
        assert any(texts) and texts == ours(waveforms, size), texts
        label = "10 s, batch 1" if size == 1 else f"3 to 12 s, batch {size}"
        run_peer = lambda w=waveforms, n=size: peer(w, n)  # noqa: E731
        run_ours = lambda w=waveforms, n=size: ours(w, n)  # noqa: E731
        name_of_row = f"{name}, wav to text, {label}{', ours packed' if packed else ''}"
        yield compare(name_of_row, goal, run_peer, run_ours, runs=5 if size == 1 else 2)
