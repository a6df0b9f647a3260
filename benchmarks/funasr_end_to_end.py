"""Waveform to text with the published shapes: our pipeline against FunASR's `AutoModel.generate`."""

from collections.abc import Iterator
from difflib import SequenceMatcher
from pathlib import Path

import torch
from funasr_peer import build_pair, voices
from timing import Comparison, compare

from hf_speechllm.cpu_inference import has_bfloat16_products, pack_linear_weights, use_bfloat16_products


# Seconds of the utterances of a batch: 57 of speech, and 39 more if all are padded to the longest.
MIXED = [3.0, 12.0, 5.0, 9.0, 4.0, 10.0, 6.0, 8.0]


def paraformer(checkout: Path) -> Iterator[Comparison]:
    return end_to_end(checkout, "Paraformer-large")


def sensevoice(checkout: Path) -> Iterator[Comparison]:
    return end_to_end(checkout, "SenseVoice-Small")


def end_to_end(checkout: Path, name: str) -> Iterator[Comparison]:
    """Batch 1 with plain and with packed weights, batch 8 with packed ones, and both with bfloat16 products where the
    processor has them.

    Every text must be upstream's text of that utterance alone: in a batch of mixed lengths upstream's padding may
    change a text, ours does not. Bfloat16 products may change a token where random weights leave two of them close:
    how much of the texts stays is in the name of the row.
    """
    pair = build_pair(checkout, name)

    def peer(waveforms: list, batch_size: int) -> list[str]:
        return ["".join(r["text"].split()) for r in pair.peer.generate(input=waveforms, batch_size=batch_size)]

    def ours(waveforms: list, batch_size: int) -> list[str]:
        # SenseVoice: with the tags, if random weights answer any.
        found = pair.ours(list(waveforms), batch_size=batch_size)
        return ["".join(r.get("tagged_text", r["text"]).split()) for r in found]

    rows: list[tuple[list[float], str, torch.dtype | None]] = [
        ([10.0], ">= 1.3", None),
        ([10.0], ">= 1.3", torch.float32),
        (MIXED, ">= 2", torch.float32),
    ]
    if has_bfloat16_products():
        rows += [([10.0], "", torch.bfloat16), (MIXED, "", torch.bfloat16)]
    for seconds, goal, packed in rows:
        kind = ""
        if packed == torch.bfloat16:
            use_bfloat16_products(pair.model)
        elif packed is not None:
            pack_linear_weights(pair.model)
        if packed is not None:
            kind = ", ours packed"
        waveforms, size = voices(seconds), len(seconds)
        texts, found = peer(waveforms, 1), ours(waveforms, size)
        assert any(texts)
        if packed == torch.bfloat16:
            same = SequenceMatcher(None, "\n".join(texts), "\n".join(found), autojunk=False).ratio()
            kind += f" in bfloat16 ({100 * same:.1f} % of the text the same)"
        else:
            assert texts == found, (texts, found)
        label = "10 s, batch 1" if size == 1 else f"3 to 12 s, batch {size}"
        run_peer = lambda w=waveforms, n=size: peer(w, n)  # noqa: E731
        run_ours = lambda w=waveforms, n=size: ours(w, n)  # noqa: E731
        name_of_row = f"{name}, wav to text, {label}{kind}"
        yield compare(name_of_row, goal, run_peer, run_ours, runs=5 if size == 1 else 2)
