"""An hour of speech to units: in batches sorted by length, against one recording after the other.

Two networks with random weights: the small one of `training/recipes/speechgpt_units/digits.yaml` on clips of a word,
and one of HuBERT base's size on sentences. Both sides give the same ids, which is checked first. On a CPU there is
little to gain: one recording keeps it busy already.
"""

import random
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from timing import Comparison, compare
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import HubertConfig

from hf_speechllm.models.configuration_speechgpt_units import SpeechGptUnitsConfig
from hf_speechllm.models.modeling_speechgpt_units import SpeechGptUnitsModel


RATE = 16000
RECIPE = Path(__file__).resolve().parents[1] / "training" / "recipes" / "speechgpt_units" / "digits.yaml"
# Of the squared distance: nearer than this, rounding may decide between two clusters.
MARGIN = 1e-3


def recordings(total_seconds: float, shortest: float, longest: float) -> list[Tensor]:
    """Noise of lengths drawn between two, in seconds, until they are so long together."""
    chance, generator = random.Random(0), torch.Generator().manual_seed(0)
    waves, seconds = [], 0.0
    while seconds < total_seconds:
        length = chance.uniform(shortest, longest)
        waves.append(0.1 * torch.randn(int(length * RATE), generator=generator))
        seconds += length
    return waves


def batches_of(waves: list[Tensor], batch_seconds: float) -> list[list[int]]:
    """Numbers of the recordings, longest first, in batches of so many seconds with their padding."""
    batches: list[list[int]] = [[]]
    for number in sorted(range(len(waves)), key=lambda number: -len(waves[number])):
        if batches[-1] and (len(batches[-1]) + 1) * len(waves[batches[-1][0]]) > batch_seconds * RATE:
            batches.append([])
        batches[-1].append(number)
    return batches


def build_model(hubert: HubertConfig, layer: int, num_units: int, device: str) -> SpeechGptUnitsModel:
    torch.manual_seed(0)
    model = SpeechGptUnitsModel(SpeechGptUnitsConfig(hubert_config=hubert, layer=layer, num_units=num_units)).eval()
    with torch.no_grad():
        features = model(0.1 * torch.randn(1, 30 * RATE)).last_hidden_state[0]
        model.codebook.copy_(features[torch.randperm(len(features))[:num_units]])
    return model.to(device)


def side_by_side(model: SpeechGptUnitsModel, waves: list[Tensor], batch_seconds: float) -> tuple[Callable, Callable]:
    """One by one, and in batches; each gives the units of every recording in order."""
    batches = batches_of(waves, batch_seconds)

    def one_by_one() -> list[Tensor]:
        return [model.encode(wave[None].to(model.device)).unit_ids[0].cpu() for wave in waves]

    def batched() -> list[Tensor]:
        found: list[Tensor] = [torch.empty(0)] * len(waves)
        for batch in batches:
            samples = torch.tensor([len(waves[number]) for number in batch])
            values = pad_sequence([waves[number] for number in batch], batch_first=True)
            mask = torch.arange(values.shape[1]) < samples[:, None]
            output = model.encode(values.to(model.device), mask.to(model.device))
            for number, ids, length in zip(batch, output.unit_ids.cpu(), output.lengths.tolist(), strict=True):
                found[number] = ids[:length]
        return found

    return one_by_one, batched


def check(model: SpeechGptUnitsModel, waves: list[Tensor], one_by_one: Callable, batched: Callable) -> None:
    """Equal ids, but for frames that lie between two clusters."""
    for wave, ours, theirs in zip(waves, batched(), one_by_one(), strict=True):
        for frame in (ours != theirs).nonzero().flatten().tolist():
            vector = model(wave[None].to(model.device)).last_hidden_state[0, frame]
            distances = (model.codebook - vector).square().sum(dim=1)
            assert (distances[ours[frame]] - distances[theirs[frame]]).abs() < MARGIN * distances[theirs[frame]]


def units() -> list[Comparison]:
    """Words with the small network, and sentences with HuBERT base."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    small = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["model"]["config"]
    # A part stands for the hour where there is no GPU: the time of both sides is proportional to it.
    words, sentences = (3600.0, 3600.0) if device == "cuda" else (300.0, 120.0)
    results = []
    with torch.inference_mode():
        for name, model, waves, batch_seconds, goal in (
            (
                f"units of {words:.0f} s of words, small HuBERT, {device}",
                build_model(HubertConfig(**small), 2, 100, device),
                recordings(words, 0.3, 0.8),
                10.0,
                "> 3",
            ),
            (
                f"units of {sentences:.0f} s of sentences, HuBERT base, {device}",
                build_model(HubertConfig(), 11, 1000, device),
                recordings(sentences, 4.0, 16.0),
                60.0,
                "> 3",
            ),
        ):
            one_by_one, batched = side_by_side(model, waves, batch_seconds)
            part = waves[:50]
            check(model, part, *side_by_side(model, part, batch_seconds))
            results.append(compare(name, goal, one_by_one, batched, runs=2))
    return results
