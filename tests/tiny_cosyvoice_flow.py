"""Tiny flows of the three versions of CosyVoice: random weights, none of them zero, so that everything matters."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_speechllm.models.configuration_cosyvoice2_flow import CosyVoice2FlowConfig
from hf_speechllm.models.configuration_cosyvoice3_flow import CosyVoice3FlowConfig
from hf_speechllm.models.configuration_cosyvoice_flow import CosyVoiceFlowConfig
from hf_speechllm.models.modeling_cosyvoice2_flow import CosyVoice2FlowModel
from hf_speechllm.models.modeling_cosyvoice3_flow import CosyVoice3FlowModel
from hf_speechllm.models.modeling_cosyvoice_flow import CosyVoiceFlowModel
from hf_speechllm.models.token_to_mel import TokenToMelModel


SIZES = {"vocab_size": 30, "num_mel_bins": 8, "speaker_embedding_size": 6}
ENCODER = {
    "embedding_size": 16,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
}
ESTIMATOR = {
    "estimator_layers_per_stage": 1,
    "estimator_num_mid_stages": 1,
    "estimator_num_attention_heads": 2,
    "estimator_head_dim": 4,
}
# Chunks of 4 tokens, 8 frames.
TINY = {
    1: {**SIZES, **ENCODER, **ESTIMATOR, "estimator_channels": [16, 8]},
    2: {
        **SIZES,
        **ENCODER,
        **ESTIMATOR,
        "estimator_channels": [16],
        "num_upsampled_layers": 1,
        "encoder_chunk_size": 4,
        "estimator_chunk_size": 8,
    },
    3: {
        **SIZES,
        "embedding_size": 8,
        "lookahead_channels": 12,
        "estimator_hidden_size": 16,
        "estimator_num_hidden_layers": 2,
        "estimator_intermediate_size": 24,
        "estimator_num_attention_heads": 2,
        "estimator_head_dim": 8,
        "estimator_chunk_size": 8,
    },
}
CLASSES = {
    1: (CosyVoiceFlowConfig, CosyVoiceFlowModel),
    2: (CosyVoice2FlowConfig, CosyVoice2FlowModel),
    3: (CosyVoice3FlowConfig, CosyVoice3FlowModel),
}
NO_DROPOUT = {
    1: {"hidden_dropout": 0.0, "position_dropout": 0.0, "attention_dropout": 0.0},
    2: {"hidden_dropout": 0.0, "position_dropout": 0.0, "attention_dropout": 0.0},
    3: {"estimator_dropout": 0.0},
}


def tiny_flow(version: int, seed: int = 0, **changes) -> TokenToMelModel:
    """A flow in evaluation mode."""
    torch.manual_seed(seed)
    kind, model_class = CLASSES[version]
    model = model_class(kind(**{**TINY[version], **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.7 * parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.2
            parameter.add_(scale * torch.randn_like(parameter))
    return model


@dataclass
class Speech:
    """Inputs of one row: `tokens (1, n)`, `prompt_tokens (1, p)`, `prompt_mel (1, t, m)`, `speaker (1, s)`."""

    tokens: Tensor
    prompt_tokens: Tensor
    prompt_mel: Tensor
    speaker: Tensor

    def prompt(self) -> dict[str, Tensor]:
        return {
            "speaker_embedding": self.speaker,
            "prompt_token_ids": self.prompt_tokens,
            "prompt_mel": self.prompt_mel,
        }


def speech(model: TokenToMelModel, tokens: int, prompt_tokens: int, seed: int) -> Speech:
    """Random tokens, prompt and speaker; the mel of the prompt is as long as its tokens say."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    frames = (
        config.num_frames(prompt_tokens)
        if config.model_type == "cosyvoice_flow"
        else config.token_mel_ratio * prompt_tokens
    )
    return Speech(
        torch.randint(config.vocab_size, (1, tokens), generator=generator),
        torch.randint(config.vocab_size, (1, prompt_tokens), generator=generator),
        torch.randn(1, frames, config.num_mel_bins, generator=generator),
        torch.randn(1, config.speaker_embedding_size, generator=generator),
    )


def pad_rows(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows `(1, n, …)` as one batch padded with 0, and its mask."""
    size = max(row.shape[1] for row in rows)
    batch = rows[0].new_zeros(len(rows), size, *rows[0].shape[2:])
    mask = torch.zeros(len(rows), size, dtype=torch.long)
    for index, row in enumerate(rows):
        batch[index, : row.shape[1]] = row[0]
        mask[index, : row.shape[1]] = 1
    return batch, mask


def batch_inputs(rows: list[Speech]) -> dict[str, Tensor]:
    """Keyword arguments of `generate_mel` for all rows at once."""
    tokens, token_mask = pad_rows([row.tokens for row in rows])
    prompt_tokens, prompt_token_mask = pad_rows([row.prompt_tokens for row in rows])
    prompt_mel, prompt_mel_mask = pad_rows([row.prompt_mel for row in rows])
    return {
        "token_ids": tokens,
        "token_mask": token_mask,
        "prompt_token_ids": prompt_tokens,
        "prompt_token_mask": prompt_token_mask,
        "prompt_mel": prompt_mel,
        "prompt_mel_mask": prompt_mel_mask,
        "speaker_embedding": torch.cat([row.speaker for row in rows]),
    }
