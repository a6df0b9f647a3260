"""An hour of speech to units: in batches sorted by length, against the loop of SpeechGPT's script.

That loop takes one recording after the other; its network is here transformers' `HubertModel` in place of fairseq's,
up to the same layer. Two networks with random weights: the small one of `training/recipes/speechgpt_units/digits.yaml`
on clips of a word, and one of HuBERT base's size on sentences. Both sides give the same units, which is checked first;
with products in bfloat16 some differ, and the row says how many do not.
"""

import copy
import random
from functools import partial
from pathlib import Path

import torch
import yaml
from timing import Comparison, compare
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import HubertConfig

from hf_speechllm.cpu_inference import has_bfloat16_products, use_bfloat16_products
from hf_speechllm.models.configuration_speechgpt_units import SpeechGptUnitsConfig
from hf_speechllm.models.modeling_speechgpt_units import SpeechGptUnitsModel


RATE = 16000
RECIPE = Path(__file__).resolve().parents[1] / "training" / "recipes" / "speechgpt_units" / "digits.yaml"
# Of the squared distance: nearer than this, rounding may decide between two clusters.
MARGIN = 1e-3
BATCH_SECONDS = 60.0


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


class OneByOne:
    """`FeatureReader` and `ApplyKmeans` of SpeechGPT's `speech2unit.py`, one recording at a time."""

    def __init__(self, model: SpeechGptUnitsModel) -> None:
        self.network, self.centres = copy.deepcopy(model.hubert), model.codebook.T.clone()
        encoder = self.network.encoder
        encoder.layers = encoder.layers[: model.config.layer]
        if encoder.config.do_stable_layer_norm:
            # A layer's output comes before the norm that follows the last one.
            encoder.layer_norm = nn.Identity()
        self.norms = self.centres.square().sum(dim=0, keepdim=True)

    def __call__(self, waves: list[Tensor]) -> list[Tensor]:
        found = []
        for wave in waves:
            features = self.network(wave[None].to(self.centres.device)).last_hidden_state[0]
            distances = features.pow(2).sum(1, keepdim=True) - 2 * features @ self.centres + self.norms
            found.append(distances.argmin(dim=1).cpu())
        return found


def in_batches(model: SpeechGptUnitsModel, waves: list[Tensor], batch_seconds: float) -> list[Tensor]:
    """Units of every recording in order."""
    found: list[Tensor] = [torch.empty(0)] * len(waves)
    for batch in batches_of(waves, batch_seconds):
        samples = torch.tensor([len(waves[number]) for number in batch])
        values = pad_sequence([waves[number] for number in batch], batch_first=True)
        mask = torch.arange(values.shape[1]) < samples[:, None]
        output = model.encode(values.to(model.device), mask.to(model.device))
        for number, ids, length in zip(batch, output.unit_ids.cpu(), output.lengths.tolist(), strict=True):
            found[number] = ids[:length]
    return found


def check(model: SpeechGptUnitsModel, waves: list[Tensor], ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Equal ids, but for frames that lie between two clusters."""
    for wave, our_ids, their_ids in zip(waves, ours, theirs, strict=True):
        for frame in (our_ids != their_ids).nonzero().flatten().tolist():
            vector = model(wave[None].to(model.device)).last_hidden_state[0, frame]
            distances = (model.codebook - vector).square().sum(dim=1)
            difference = (distances[our_ids[frame]] - distances[their_ids[frame]]).abs()
            assert difference < MARGIN * distances[their_ids[frame]]


def units() -> list[Comparison]:
    """Words with the small network, and sentences with HuBERT base."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    small = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["model"]["config"]
    # Of sentences a part stands for the hour where there is no GPU: the time of both sides is proportional to it.
    words, sentences = 3600.0, 3600.0 if device == "cuda" else 120.0
    results = []
    with torch.inference_mode():
        for name, model, waves in (
            (
                f"units of {words:.0f} s of words, small HuBERT, {device}",
                build_model(HubertConfig(**small), 2, 100, device),
                recordings(words, 0.3, 0.8),
            ),
            (
                f"units of {sentences:.0f} s of sentences, HuBERT base, {device}",
                build_model(HubertConfig(), 11, 1000, device),
                recordings(sentences, 4.0, 16.0),
            ),
        ):
            one_by_one = OneByOne(model)
            part = waves[:50]
            theirs = one_by_one(part)
            check(model, part, in_batches(model, part, BATCH_SECONDS), theirs)
            batched = partial(in_batches, model, waves, BATCH_SECONDS)
            results.append(compare(name, "> 3", partial(one_by_one, waves), batched, runs=3))
            if device == "cpu" and has_bfloat16_products():
                use_bfloat16_products(model)
                ours = in_batches(model, part, BATCH_SECONDS)
                same = torch.cat(ours).eq(torch.cat(theirs)).double().mean()
                name = f"{name}, ours in bfloat16, {100 * same:.1f} % of the units the same"
                results.append(compare(name, "> 3", partial(one_by_one, waves), batched, runs=3))
    return results
