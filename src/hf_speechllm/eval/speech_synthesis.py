"""Waveforms of many requests to a CosyVoice, in batches, and how long they took; or its speech tokens alone."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hf_speechllm.models.modeling_cosyvoice import CosyVoiceForTextToWaveform
from hf_speechllm.models.processing_cosyvoice import CosyVoiceProcessor
from hf_speechllm.models.row_noise import split_generators


# Inputs of `generate`, by what reads them: `speak`, and `read_prompt`.
_TEXT = ("input_ids", "attention_mask", "prompt_input_ids", "prompt_attention_mask")
_READS = ("lm_reads_prompt_speech", "lm_reads_speaker")
_FEATURES = ("prompt_features", "prompt_fbank", "prompt_mel")
_PROMPT = (
    *(name for feature in _FEATURES for name in (feature, f"{feature}_mask")),
    *("prompt_speech_ids", "prompt_speech_mask", "speaker_embedding"),
)


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

    def waveforms(inputs: dict[str, Tensor], generators: list[torch.Generator]) -> list[Tensor]:
        output = model.generate(**inputs, generator=generators, **options)
        return [
            row[mask].float().cpu() for row, mask in zip(output.waveform, output.waveform_mask.bool(), strict=True)
        ]

    pieces = _in_sentences(model, processor, requests, waveforms, seed, batch_size, progress)
    joined = [torch.cat([torch.zeros(0), *parts]) for parts in pieces]
    return Synthesis(joined, time.perf_counter() - started)


@torch.no_grad()
def speak_tokens(
    model: CosyVoiceForTextToWaveform,
    processor: CosyVoiceProcessor,
    requests: Sequence[Mapping[str, Any]],
    seed: int = 0,
    batch_size: int = 8,
    progress: str | None = None,
    **options: Any,
) -> list[Tensor]:
    """Speech tokens `(n,)`, int64, of each request: what [`synthesize`] with the same seed makes sound of, without
    the time of the flow and the vocoder.

    Args:
        requests: as there, but none for voice conversion. options: of the language model's `generate_speech_tokens`.

    Raises:
        ValueError, KeyError, AudioError: as the processor.
    """

    def tokens(inputs: dict[str, Tensor], generators: list[torch.Generator]) -> list[Tensor]:
        text = {name: inputs.pop(name) for name in _TEXT if name in inputs}
        reads = {name: inputs.pop(name) for name in _READS if name in inputs}
        absent = {name: None for name in _PROMPT if name not in inputs}
        prompt = model.read_prompt(len(text["input_ids"]), **inputs, **absent)
        # The one of three by which `generate` draws tokens.
        for_lm = split_generators(generators, 3)[0]
        output = model.speak(**text, prompt=prompt, **reads, generator=for_lm, **options)
        return [row[mask].cpu() for row, mask in zip(output.token_ids, output.token_mask.bool(), strict=True)]

    pieces = _in_sentences(model, processor, requests, tokens, seed, batch_size, progress)
    return [torch.cat([torch.zeros(0, dtype=torch.long), *parts]) for parts in pieces]


def _in_sentences(
    model: CosyVoiceForTextToWaveform,
    processor: CosyVoiceProcessor,
    requests: Sequence[Mapping[str, Any]],
    compute: Callable[[dict[str, Tensor], list[torch.Generator]], list[Tensor]],
    seed: int,
    batch_size: int,
    progress: str | None,
) -> list[list[Tensor]]:
    """What `compute` makes of each sentence of each request, out of a batch's inputs and a generator for each row."""
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
    spoken: dict[int, Tensor] = {}
    with tqdm(total=len(rows), unit="sentence", desc=progress, disable=progress is None) as bar:
        for start in range(0, len(rows), batch_size):
            batch = order[start : start + batch_size]
            # Texts have been normalised where they were split.
            inputs = processor(**{name: [rows[row].get(name) for row in batch] for name in names}, normalize=False)
            generators = [torch.Generator().manual_seed(seed + row) for row in batch]
            found = compute({name: value.to(model.device) for name, value in inputs.items()}, generators)
            spoken.update(zip(batch, found, strict=True))
            bar.update(len(batch))
    pieces: list[list[Tensor]] = [[] for _ in requests]
    for row, owner in enumerate(owners):
        pieces[owner].append(spoken[row])
    return pieces
