"""Waveforms of many requests to a CosyVoice, in batches, and how long they took."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hf_speechllm.models.modeling_cosyvoice import CosyVoiceForTextToWaveform
from hf_speechllm.models.processing_cosyvoice import CosyVoiceProcessor


@dataclass
class Voice:
    """Who speaks.

    Args:
        name: of the speaker.
        arguments: of the processor: a known `speaker`, or `prompt_audio` and perhaps `prompt_text`.
    """

    name: str
    arguments: Mapping[str, Any]


@dataclass
class Synthesis:
    """
    Args:
        waveforms: `(samples,)` float32 each; a request that makes no speech has no samples.
        seconds: of computation, from texts and recordings to waveforms.
    """

    waveforms: list[Tensor]
    seconds: float


def synthesize(
    model: CosyVoiceForTextToWaveform,
    processor: CosyVoiceProcessor,
    requests: Sequence[Mapping[str, Any]],
    seed: int = 0,
    batch_size: int = 8,
    progress: str | None = None,
    **options: Any,
) -> Synthesis:
    """A waveform for each request; the same in batches of any size.

    Args:
        model: in evaluation mode. processor: its own.
        requests: arguments of the processor; a `text` is split into sentences, which are computed as rows of their
            own and put one after the other. Either all requests are for voice conversion, or none.
        seed: row `r` draws from a generator with `seed + r`.
        progress (*optional*): name of a progress bar. options: of the model's `generate`.

    Raises:
        ValueError, KeyError, AudioError: as the processor.
    """
    started = time.perf_counter()
    rows: list[dict[str, Any]] = []
    owners: list[int] = []
    for number, request in enumerate(requests):
        request = dict(request)
        if request.get("prompt_text"):
            request["prompt_text"] = processor.normalize_text(request["prompt_text"])
        texts = [None] if request.get("text") is None else processor.split_text(request["text"])
        rows += [{**request, "text": text} for text in texts]
        owners += [number] * len(texts)
    names = list(dict.fromkeys(name for row in rows for name in row))
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]["text"] or ""))
    spoken = [torch.zeros(0)] * len(rows)
    with tqdm(total=len(rows), unit="sentence", desc=progress, disable=progress is None) as bar:
        for start in range(0, len(rows), batch_size):
            batch = order[start : start + batch_size]
            # Texts have been normalised where they were split.
            inputs = processor(**{name: [rows[row].get(name) for row in batch] for name in names}, normalize=False)
            generators = [torch.Generator().manual_seed(seed + row) for row in batch]
            inputs = {name: value.to(model.device) for name, value in inputs.items()}
            output = model.generate(**inputs, generator=generators, **options)
            for row, waveform, mask in zip(batch, output.waveform, output.waveform_mask.bool(), strict=True):
                spoken[row] = waveform[mask].float().cpu()
            bar.update(len(batch))
    pieces: list[list[Tensor]] = [[torch.zeros(0)] for _ in requests]
    for owner, waveform in zip(owners, spoken, strict=True):
        pieces[owner].append(waveform)
    return Synthesis([torch.cat(parts) for parts in pieces], time.perf_counter() - started)
