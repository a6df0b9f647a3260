"""Tiny HiFT vocoders with random weights, and what they read."""

import torch
from torch import Tensor

from hf_speechllm.models.configuration_cosyvoice3_hift import CosyVoice3HiftConfig
from hf_speechllm.models.configuration_cosyvoice_hift import CosyVoiceHiftConfig
from hf_speechllm.models.modeling_cosyvoice3_hift import CosyVoice3HiftModel
from hf_speechllm.models.modeling_cosyvoice_hift import CosyVoiceHiftModel


SIZES = {
    "num_mel_bins": 20,
    "hidden_size": 16,
    "f0_hidden_size": 8,
    "resblock_kernel_sizes": [3, 7],
    "resblock_dilation_sizes": [[1, 3], [1, 3]],
}
VERSIONS = {
    1: {
        "sampling_rate": 22050,
        "phase_interpolation": "sample",
        "upsample_rates": [4, 4],
        "upsample_kernel_sizes": [8, 8],
        "source_resblock_kernel_sizes": [7, 11],
        "source_resblock_dilation_sizes": [[1, 3], [1, 3]],
        "overlap_frames": 20,
        "voiced_threshold": 216.0,
    },
    2: {
        "voiced_threshold": 150.0,
        "upsample_rates": [4, 5, 3],
        "upsample_kernel_sizes": [8, 11, 7],
        "source_resblock_kernel_sizes": [7, 3, 5],
        "source_resblock_dilation_sizes": [[1, 3], [1, 2], [1]],
    },
    3: {
        "voiced_threshold": 30.0,
        "upsample_rates": [4, 5, 3],
        "upsample_kernel_sizes": [8, 11, 7],
        "source_resblock_kernel_sizes": [7, 3, 5],
        "source_resblock_dilation_sizes": [[1, 3], [1, 2], [1]],
        "layers_before_noise": [[7, 3], [5, 2]],
    },
}


def tiny_config(version: int, **changes) -> CosyVoiceHiftConfig:
    """Version 1, 2 or 3."""
    kind = CosyVoice3HiftConfig if version == 3 else CosyVoiceHiftConfig
    return kind(**{**SIZES, **VERSIONS[version], **changes})


def tiny_hift(version: int, seed: int = 0, **changes) -> CosyVoiceHiftModel:
    """A vocoder in evaluation mode, whose fundamental frequency is on both sides of its threshold."""
    torch.manual_seed(seed)
    config = tiny_config(version, **changes)
    model = (CosyVoice3HiftModel if version == 3 else CosyVoiceHiftModel)(config).eval()
    with torch.no_grad():
        model.f0_predictor.proj.weight.mul_(1800)
        model.f0_predictor.proj.bias.fill_(180.0)
        for module in model.modules():
            if hasattr(module, "alpha"):
                module.alpha.uniform_(0.5, 2.0)
    return model


def mel_of(frames: int, seed: int = 0, rows: int = 1) -> Tensor:
    """Noise in the place of a spectrogram, `(rows, frames, 20)`."""
    return torch.randn(rows, frames, SIZES["num_mel_bins"], generator=torch.Generator().manual_seed(seed))


def noise_for(model: CosyVoiceHiftModel, frames: int, seed: int = 0, rows: int = 1) -> dict[str, Tensor]:
    """`noise` and `phase` for so many frames."""
    generator = torch.Generator().manual_seed(seed)
    sines = model.config.num_harmonics + 1
    noise = torch.randn(rows, frames * model.config.hop_length, sines, generator=generator)
    return {"noise": noise, "phase": (torch.rand(rows, sines, generator=generator) * 2 - 1) * torch.pi}
