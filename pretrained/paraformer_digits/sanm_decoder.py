"""Decoders of Paraformer: one pass over all tokens at once, no causal mask.

SAN-M decoder (https://arxiv.org/abs/2006.01713): each layer is feed-forward, memory, cross-attention, in this order.
Upstream: `funasr/models/paraformer/decoder.py`, `funasr/models/contextual_paraformer/decoder.py`.

Shape legend: `b` batch, `n` tokens, `t` encoder frames, `w` hotwords, `c` channels. In every mask True = real.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import MultiHeadAttention
from .convolution import PointwiseConv1d
from .sanm import FsmnMemory


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of one decoder: a model has one or, with SeACo, two of different shape."""

    layers: int
    fsmn_layers: int
    num_heads: int
    intermediate_size: int
    fsmn_kernel_size: int
    fsmn_shift: int
    dropout: float
    self_attention_dropout: float
    cross_attention_dropout: float

    @classmethod
    def of(cls, config, prefix: str) -> "DecoderShape":
        """The fields of `config` that start with `prefix` (`"decoder"` or `"seaco"`)."""
        return cls(
            *(
                getattr(config, f"{prefix}_{name}")
                for name in (
                    "layers",
                    "fsmn_layers",
                    "attention_heads",
                    "intermediate_size",
                    "fsmn_kernel_size",
                    "fsmn_shift",
                    "dropout",
                    "self_attention_dropout",
                    "cross_attention_dropout",
                )
            )
        )


class CrossAttention(MultiHeadAttention):
    """Attention of the tokens to a memory."""

    def __init__(self, config, num_heads: int, dropout: float) -> None:
        super().__init__(config, config.hidden_size, num_heads, None, None, dropout, True, True, True)

    def project_memory(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `(b, h, t, d)` of a memory `(b, t, c)`."""
        return self.split_heads(self.k_proj(memory)), self.split_heads(self.v_proj(memory))

    def forward(
        self, hidden_states: Tensor, key: Tensor, value: Tensor, memory_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """`(b, n, c)`, keys and values of the memory, mask `(b, 1, 1, t)` → `(b, n, c)` and weights (eager only)."""
        context, weights = self.attend(self.split_heads(self.q_proj(hidden_states)), key, value, memory_mask)
        return self.o_proj(context.flatten(2)), weights


class SanmDecoderFeedForward(nn.Module):
    """`fc2(layer_norm(dropout(relu(fc1(x)))))`; the second projection has no bias."""

    def __init__(self, config, shape: DecoderShape) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, shape.intermediate_size)
        self.layer_norm = nn.LayerNorm(shape.intermediate_size, eps=config.decoder_final_norm_eps)
        self.fc2 = nn.Linear(shape.intermediate_size, config.hidden_size, bias=False)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.layer_norm(self.dropout(nn.functional.relu(self.fc1(hidden_states)))))


class SanmDecoderLayer(GradientCheckpointingLayer):
    """Feed-forward and memory with one residual around both, then cross-attention (if any) with its own."""

    def __init__(self, config, shape: DecoderShape, has_cross_attention: bool) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.decoder_norm_eps
        # Upstream's layers without cross-attention never shift their memory.
        shift = shape.fsmn_shift if has_cross_attention else 0
        self.input_layernorm = nn.LayerNorm(size, eps=eps)
        self.mlp = SanmDecoderFeedForward(config, shape)
        self.memory_layernorm = nn.LayerNorm(size, eps=eps)
        self.fsmn = FsmnMemory(size, shape.fsmn_kernel_size, shift, shape.self_attention_dropout)
        self.encoder_attn = None
        if has_cross_attention:
            self.encoder_attn_layer_norm = nn.LayerNorm(size, eps=eps)
            self.encoder_attn = CrossAttention(config, shape.num_heads, shape.cross_attention_dropout)
        self.dropout = nn.Dropout(shape.dropout)

    def remember(
        self, hidden_states: Tensor, token_mask: Tensor | None, past: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The first half: feed-forward and memory; `(b, n, c)` and the memory's next `past`."""
        hidden = self.memory_layernorm(self.mlp(self.input_layernorm(hidden_states)))
        memory, past = self.fsmn(hidden, token_mask, past)
        return hidden_states + self.dropout(memory), past

    def forward(
        self,
        hidden_states: Tensor,
        token_mask: Tensor | None,
        memory_key: Tensor | None,
        memory_value: Tensor | None,
        memory_mask: Tensor | None,
        past: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """
        Args:
            hidden_states (`(b, n, c)`), token_mask (`(b, n)`, `None` = no padding).
            memory_key, memory_value (`(b, h, t, d)`): of the encoder's frames, see `CrossAttention`; two arguments,
                because reentrant checkpointing sees no tensors inside tuples. memory_mask (`(b, 1, 1, t)`, bool).
            past (`(b, left_context, c)`): inputs of the memory before these tokens, when streaming.

        Returns:
            output `(b, n, c)`, the cross-attention's weights (eager only), and the memory's next `past`.
        """
        hidden_states, past = self.remember(hidden_states, token_mask, past)
        if self.encoder_attn is None:
            return hidden_states, None, past
        normed = self.encoder_attn_layer_norm(hidden_states)
        attended, weights = self.encoder_attn(normed, memory_key, memory_value, memory_mask)
        return hidden_states + self.dropout(attended), weights, past


class SanmDecoderFinalLayer(nn.Module):
    """Feed-forward without a residual (upstream's `decoders3`)."""

    def __init__(self, config, shape: DecoderShape) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.decoder_final_norm_eps)
        self.mlp = SanmDecoderFeedForward(config, shape)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.mlp(self.input_layernorm(hidden_states))


class SanmDecoder(nn.Module):
    """The layers with cross-attention, those without, the final feed-forward, and a norm."""

    def __init__(self, config, shape: DecoderShape, has_embedding: bool, is_contextual: bool = False) -> None:
        super().__init__()
        self.num_cross_layers = shape.layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size) if has_embedding else None
        self.layers = nn.ModuleList(
            SanmDecoderLayer(config, shape, has_cross_attention=index < shape.layers)
            for index in range(shape.layers + shape.fsmn_layers)
        )
        self.hotword_attn = None
        if is_contextual:
            self.hotword_attn_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.decoder_norm_eps)
            self.hotword_attn = CrossAttention(config, shape.num_heads, shape.cross_attention_dropout)
            self.hotword_proj = PointwiseConv1d(2 * config.hidden_size, config.hidden_size, bias=False)
            self.hotword_dropout = nn.Dropout(shape.dropout)
        self.final_layer = SanmDecoderFinalLayer(config, shape)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.decoder_final_norm_eps)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Embeddings of token ids `(b, n)`: those that the sampler shows and the hotword encoder reads."""
        return self.embed_tokens(input_ids)

    def forward(
        self,
        hidden_states: Tensor,
        token_mask: Tensor | None,
        memory: Tensor,
        memory_mask: Tensor | None,
        hotwords: Tensor | None = None,
        hotword_scale: float = 1.0,
    ) -> Tensor:
        """
        Args:
            hidden_states (`(b, n, c)`): embeddings of the tokens. token_mask (`(b, n)`, `None` = no padding).
            memory (`(b, t, c)`), memory_mask (`(b, t)`, `None` = no padding): what the layers attend to.
            hotwords (`(b, w, c)`), hotword_scale: encoded hotwords of a contextual decoder and their weight.

        Returns:
            `(b, n, c)` after the norm.
        """
        visible = None if memory_mask is None else memory_mask[:, None, None, :]
        for index, layer in enumerate(self.layers):
            has_memory = layer.encoder_attn is not None
            projected = layer.encoder_attn.project_memory(memory) if has_memory else (None, None)
            if self.hotword_attn is not None and index == self.num_cross_layers - 1:
                hidden_states = self._attend_both(
                    layer, hidden_states, token_mask, projected, visible, hotwords, hotword_scale
                )
            else:
                hidden_states, _, _ = layer(hidden_states, token_mask, *projected, visible)
        return self.norm(self.final_layer(hidden_states))

    def _attend_both(
        self,
        layer: SanmDecoderLayer,
        hidden_states: Tensor,
        token_mask: Tensor | None,
        projected: tuple[Tensor, Tensor],
        visible: Tensor | None,
        hotwords: Tensor,
        hotword_scale: float,
    ) -> Tensor:
        """The last layer with cross-attention of a contextual decoder: audio and hotwords, mixed by a projection."""
        hidden_states, _ = layer.remember(hidden_states, token_mask)
        audio, _ = layer.encoder_attn(layer.encoder_attn_layer_norm(hidden_states), *projected, visible)
        normed = self.hotword_attn_layer_norm(hidden_states)
        biased, _ = self.hotword_attn(normed, *self.hotword_attn.project_memory(hotwords), None)
        biased = self.hotword_dropout(biased)
        mixed = self.hotword_proj(torch.cat([audio, biased * hotword_scale], dim=-1))
        return hidden_states + self.hotword_dropout(mixed)

    def hotword_scores(
        self, hidden_states: Tensor, token_mask: Tensor | None, hotwords: Tensor, count_padding: bool = False
    ) -> Tensor:
        """How much the tokens of each item look at each hotword `(b, w, c)`: `hotword_attention` summed over heads and
        tokens, `(b, w)`. `count_padding` adds the padded tokens, as upstream does in a batch.
        """
        weights = self.hotword_attention(hidden_states, token_mask, hotwords)
        if token_mask is not None and not count_padding:
            weights = weights.masked_fill(~token_mask[:, None, :, None], 0.0)
        return weights.sum(dim=(1, 2))

    def hotword_attention(self, hidden_states: Tensor, token_mask: Tensor | None, hotwords: Tensor) -> Tensor:
        """Weights `(b, h, n, w)` of the sixth cross-attention (the last, where there are fewer) over hotwords
        `(b, w, c)` (upstream's `forward_asf6`)."""
        chosen = min(6, self.num_cross_layers) - 1
        for layer in self.layers[:chosen]:
            hidden_states, _, _ = layer(hidden_states, token_mask, *layer.encoder_attn.project_memory(hotwords), None)
        layer = self.layers[chosen]
        hidden_states, _ = layer.remember(hidden_states, token_mask)
        attention = layer.encoder_attn
        query = attention.split_heads(attention.q_proj(layer.encoder_attn_layer_norm(hidden_states)))
        key, _ = attention.project_memory(hotwords)
        return torch.softmax(torch.matmul(query * attention.scaling, key.transpose(-2, -1)).float(), dim=-1)
