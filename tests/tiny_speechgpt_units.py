"""Tiny unit models and unit vocoders for the tests: random weights that do something."""

import torch
from torch import Tensor
from transformers import HubertConfig

from hf_speechllm.models.configuration_speechgpt_unit_vocoder import SpeechGptUnitVocoderConfig
from hf_speechllm.models.configuration_speechgpt_units import SpeechGptUnitsConfig
from hf_speechllm.models.modeling_speechgpt_unit_vocoder import SpeechGptUnitVocoderModel
from hf_speechllm.models.modeling_speechgpt_units import SpeechGptUnitsModel


# The two sorts of published networks: HuBERT base (norm over time), and large (norm over channels).
HUBERT = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    **dict.fromkeys(("activation_dropout", "attention_dropout", "feat_proj_dropout", "hidden_dropout"), 0.0),
    **dict.fromkeys(("layerdrop", "mask_time_prob"), 0.0),
    "conv_dim": (10,) * 7,
}
BASE = {**HUBERT, "feat_extract_norm": "group"}
LARGE = {**HUBERT, "feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}

GENERATOR = {
    "upsample_rates": [5, 4, 4, 2, 2],
    "upsample_kernel_sizes": [11, 8, 8, 4, 4],
    "upsample_initial_channel": 32,
    "resblock_kernel_sizes": [3, 5],
    "resblock_dilation_sizes": [[1, 3, 5], [1, 2, 4]],
    "normalize_before": False,
}


def tiny_units(seed: int = 0, hubert: dict | None = None, **changes) -> SpeechGptUnitsModel:
    """A unit model in evaluation mode whose units change from frame to frame."""
    torch.manual_seed(seed)
    fields = {"layer": 2, "num_units": 12, **changes}
    model = SpeechGptUnitsModel(SpeechGptUnitsConfig(hubert_config=HubertConfig(**(hubert or BASE)), **fields)).eval()
    with torch.no_grad():
        features = model(torch.cat(noise(20000, seed=seed))[None]).last_hidden_state[0]
        model.codebook.copy_(features[torch.randperm(len(features))[: model.config.num_units]])
    return model


def tiny_vocoder(seed: int = 0, **changes) -> SpeechGptUnitVocoderModel:
    """A unit vocoder in evaluation mode with audible weights and durations of a few frames."""
    torch.manual_seed(seed)
    fields = {"num_units": 20, "embedding_size": 8, "duration_hidden_size": 8, **changes}
    generator = {**GENERATOR, **fields.pop("hifigan_config", {})}
    generator["model_in_dim"] = SpeechGptUnitVocoderConfig(**fields).input_size
    model = SpeechGptUnitVocoderModel(SpeechGptUnitVocoderConfig(hifigan_config=generator, **fields)).eval()
    with torch.no_grad():
        for parameter in model.generator.parameters():
            parameter.normal_(std=0.2 if parameter.dim() > 1 else 0.05)
        if model.config.duration_hidden_size:
            model.duration_predictor.proj.weight.normal_(std=0.4)
            model.duration_predictor.proj.bias.fill_(1.2)
    return model


def noise(*lengths: int, seed: int = 0) -> list[Tensor]:
    """Recordings of these lengths, float32 `(samples,)`, each of another loudness."""
    generator = torch.Generator().manual_seed(seed)
    return [0.1 * (number + 1) * torch.randn(length, generator=generator) for number, length in enumerate(lengths)]


def padded(waveforms: list[Tensor]) -> tuple[Tensor, Tensor]:
    """A batch `(b, samples)` and its mask, 1 = real sample. What lies after a recording is not zero."""
    longest = max(len(wave) for wave in waveforms)
    batch = torch.full((len(waveforms), longest), 0.5)
    mask = torch.zeros(batch.shape, dtype=torch.long)
    for row, wave in enumerate(waveforms):
        batch[row, : len(wave)] = wave
        mask[row, : len(wave)] = 1
    return batch, mask
