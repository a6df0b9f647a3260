"""Ordinary transformer decoder over all tokens at once, without a causal mask.

Upstream: `ParaformerSANDecoder` in `funasr/models/paraformer/decoder.py`, the decoder of its AISHELL recipe.

Shape legend: `b` batch, `n` tokens, `t` encoder frames, `c` channels. In every mask True = real.
"""

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .conformer import sinusoidal_positions
from .sanm_decoder import CrossAttention, DecoderShape


class TransformerDecoderLayer(GradientCheckpointingLayer):
    """Self-attention, cross-attention, feed-forward, each after a norm and with a residual."""

    def __init__(self, config, shape: DecoderShape) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.decoder_norm_eps
        self.input_layernorm = nn.LayerNorm(size, eps=eps)
        self.self_attn = CrossAttention(config, shape.num_heads, shape.self_attention_dropout)
        self.encoder_attn_layer_norm = nn.LayerNorm(size, eps=eps)
        self.encoder_attn = CrossAttention(config, shape.num_heads, shape.cross_attention_dropout)
        self.final_layernorm = nn.LayerNorm(size, eps=eps)
        self.fc1 = nn.Linear(size, shape.intermediate_size)
        self.fc2 = nn.Linear(shape.intermediate_size, size)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(
        self,
        hidden_states: Tensor,
        token_mask: Tensor | None,
        memory_key: Tensor,
        memory_value: Tensor,
        memory_mask: Tensor | None,
    ) -> Tensor:
        """Tokens `(b, n, c)`, masks `(b, 1, 1, n)` and `(b, 1, 1, t)`, keys and values of the memory → `(b, n, c)`."""
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(normed, *self.self_attn.project_memory(normed), token_mask)
        hidden_states = hidden_states + self.dropout(attended)
        attended, _ = self.encoder_attn(
            self.encoder_attn_layer_norm(hidden_states), memory_key, memory_value, memory_mask
        )
        hidden_states = hidden_states + self.dropout(attended)
        inner = self.dropout(nn.functional.relu(self.fc1(self.final_layernorm(hidden_states))))
        return hidden_states + self.dropout(self.fc2(inner))


class TransformerDecoder(nn.Module):
    """Layers and a norm; called like `SanmDecoder`."""

    def __init__(self, config, shape: DecoderShape, has_embedding: bool) -> None:
        super().__init__()
        self.scale = config.hidden_size**0.5
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size) if has_embedding else None
        self.embed_dropout = nn.Dropout(config.decoder_positional_dropout)
        self.layers = nn.ModuleList(TransformerDecoderLayer(config, shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.decoder_final_norm_eps)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Embeddings of ids `(b, n)` that the sampler shows: scaled and with positions, unlike the SAN-M decoder's."""
        steps = torch.arange(input_ids.shape[1], device=input_ids.device)
        embedded = self.embed_tokens(input_ids) * self.scale
        table = sinusoidal_positions(steps, embedded.shape[2]).to(embedded.dtype)
        return self.embed_dropout(embedded + table)

    def forward(
        self, hidden_states: Tensor, token_mask: Tensor | None, memory: Tensor, memory_mask: Tensor | None
    ) -> Tensor:
        """Tokens `(b, n, c)` and their mask `(b, n)`, memory `(b, t, c)` and its mask `(b, t)` → `(b, n, c)`."""
        tokens = None if token_mask is None else token_mask[:, None, None, :]
        visible = None if memory_mask is None else memory_mask[:, None, None, :]
        for layer in self.layers:
            hidden_states = layer(hidden_states, tokens, *layer.encoder_attn.project_memory(memory), visible)
        return self.norm(hidden_states)
