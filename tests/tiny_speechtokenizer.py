"""Tiny SpeechTokenizers for the tests: random weights, and codebooks that look trained."""

import torch
from torch import Tensor

from hf_speechllm.models.configuration_speechtokenizer import SpeechTokenizerConfig
from hf_speechllm.models.modeling_speechtokenizer import SpeechTokenizerModel


TINY = {
    "num_filters": 4,
    "upsampling_ratios": [4, 2],
    "hidden_size": 8,
    "semantic_hidden_size": 6,
    "num_lstm_layers": 1,
    "num_quantizers": 3,
    "codebook_size": 16,
}


def tiny_codec(seed: int = 0, trained: bool = True, **changes) -> SpeechTokenizerModel:
    """A codec in evaluation mode; `trained=False` leaves the codebooks as those of a new model."""
    torch.manual_seed(seed)
    model = SpeechTokenizerModel(SpeechTokenizerConfig(**{**TINY, **changes})).eval()
    if trained:
        with torch.no_grad():
            for level in model.quantizer.levels:
                level.inited.fill_(1)
                level.embed.normal_(std=0.3)
                level.cluster_size.uniform_(3, 9)
                level.embed_avg.copy_(level.embed * level.cluster_size[:, None])
    return model


def waves(*lengths: int, seed: int = 0) -> list[Tensor]:
    """Noise of these lengths, float32 `(samples,)`."""
    generator = torch.Generator().manual_seed(seed)
    return [0.3 * torch.randn(length, generator=generator) for length in lengths]
