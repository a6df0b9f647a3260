"""Transformer with the relative positions of Transformer-XL and a key-value cache.

Paper: https://arxiv.org/abs/1901.02860. Upstream: `ConformerEncoder` without convolution and `TransformerEncoder` of
`cosyvoice/transformer/encoder.py`, which took the positions from ESPnet.

    score(i, j) = ((q_i + u)·k_j + (q_i + v)·W_p s(i - j)) / sqrt(d)

with the sinusoid `s` of the distance. Only the distance counts, so padding on the left moves nothing.
`relative_position_encoder.py` has the same score for the flows, over the keys of a stream of frames.

While one token is decoded, `W_p^T (q_i + v)` is computed once per head and multiplied with the table itself. Upstream
projects the whole table instead, in every layer at every step; the result is the same.

Shape legend: `b` batch, `t` positions, `s` keys, `h` heads, `d` size of a head, `c` channels. In every mask True =
visible.
"""

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import MultiHeadAttention
from .conformer import ACTIVATIONS, FeedForward, sinusoidal_positions


class RelativeSelfAttention(MultiHeadAttention):
    """Self-attention whose scores have a term for the distance of query and key."""

    def __init__(self, config, hidden_size: int, num_heads: int, dropout: float, key_bias: bool, layer: int) -> None:
        super().__init__(config, hidden_size, num_heads, None, None, dropout, True, key_bias, True)
        self.layer = layer
        self.pos_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.pos_bias_u = nn.Parameter(torch.empty(num_heads, self.head_dim))
        self.pos_bias_v = nn.Parameter(torch.empty(num_heads, self.head_dim))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        positions: Tensor,
        table: Tensor,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """
        Args:
            hidden_states (`(b, t, c)`), attention_mask (`(b, 1, t, s)`, bool).
            positions (`(t,)`, int64): of the queries among the keys.
            table (`(r, c)`): sinusoids of the distances `s - 1, s - 2, …`, at least as far down as is visible.
            past_key_values: keys and values of earlier positions; extended.
        """
        query = self.split_heads(self.q_proj(hidden_states))
        key = self.split_heads(self.k_proj(hidden_states))
        value = self.split_heads(self.v_proj(hidden_states))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer)
        keys = key.shape[2]
        shifted = query + self.pos_bias_v[:, None]
        if query.shape[2] == 1:
            weight = self.pos_proj.weight.unflatten(0, (-1, self.head_dim))  # (h, d, c)
            by_distance = torch.einsum("bhtd,hdc->bhtc", shifted, weight) @ table.T
        else:
            by_distance = shifted @ self.split_heads(self.pos_proj(table)[None]).transpose(-2, -1)
        distance = positions[:, None] - torch.arange(keys, device=positions.device)
        # Row 0 of the table is distance s - 1. What lies beyond its end is to the right of a causal query.
        row = (keys - 1 - distance).clamp(0, table.shape[0] - 1)
        bias = by_distance.gather(-1, row.expand(*by_distance.shape[:2], -1, -1)) * self.scaling
        bias = bias.masked_fill(~attention_mask, torch.finfo(bias.dtype).min)
        context, _ = self.attend(query + self.pos_bias_u[:, None], key, value, bias)
        return self.o_proj(context.flatten(2))


class RelativeTransformerLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each behind a norm."""

    def __init__(
        self,
        config,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        hidden_act: str,
        key_bias: bool,
        dropout: float,
        attention_dropout: float,
        layer: int,
    ) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(hidden_size, eps=1e-12)
        self.self_attn = RelativeSelfAttention(config, hidden_size, num_heads, attention_dropout, key_bias, layer)
        self.post_attention_layernorm = nn.LayerNorm(hidden_size, eps=1e-12)
        self.mlp = FeedForward(hidden_size, intermediate_size, ACTIVATIONS[hidden_act](), dropout, bias=True)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        positions: Tensor,
        table: Tensor,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        hidden = self.self_attn(
            self.input_layernorm(hidden_states), attention_mask, positions, table, past_key_values=past_key_values
        )
        hidden_states = hidden_states + self.dropout(hidden)
        return hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))


class RelativeTransformer(nn.Module):
    """Projection and norm of the input, layers, and a last norm.

    Args:
        input_size, hidden_size, num_layers, num_heads, intermediate_size (`int`), hidden_act (`str`): the shape.
        rectify_input (`bool`): a ReLU behind the norm of the input (upstream's `linear_legacy`).
        key_bias (`bool`): of the projection of keys.
        chunk_size (`int`): a position sees its own chunk of so many and all before; 1 is causal, 0 sees everything.
        dropout, positional_dropout, attention_dropout (`float`).
    """

    def __init__(
        self,
        config,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        intermediate_size: int,
        hidden_act: str,
        rectify_input: bool,
        key_bias: bool,
        chunk_size: int,
        dropout: float,
        positional_dropout: float,
        attention_dropout: float,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.chunk_size = chunk_size
        self.input_proj = nn.Linear(input_size, hidden_size)
        self.input_norm = nn.LayerNorm(hidden_size, eps=1e-5)
        self.input_act = nn.ReLU() if rectify_input else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.positional_dropout = nn.Dropout(positional_dropout)
        self.layers = nn.ModuleList(
            RelativeTransformerLayer(
                config,
                hidden_size,
                num_heads,
                intermediate_size,
                hidden_act,
                key_bias,
                dropout,
                attention_dropout,
                layer,
            )
            for layer in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_size, eps=1e-5)

    def forward(
        self, hidden_states: Tensor, padding_mask: Tensor | None = None, past_key_values: Cache | None = None
    ) -> Tensor:
        """
        Args:
            hidden_states (`(b, t, input_size)`).
            padding_mask (`(b, keys so far)`, bool, *optional*): which keys are real, those in the cache included; or
                `(b, 1, t, s)`, bool: which keys each query sees, as the generation loop makes it for static caches.
            past_key_values (*optional*): of a causal transformer; extended.

        Returns:
            `(b, t, hidden_size)`.
        """
        batch, new = hidden_states.shape[:2]
        device = hidden_states.device
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        positions = torch.arange(new, device=device) + past
        if padding_mask is not None and padding_mask.dim() == 4:
            mask, keys = padding_mask, padding_mask.shape[-1]
        else:
            # The keys of a static cache are there from the beginning; those to come are invisible.
            static = past_key_values is not None and past_key_values.is_compileable
            keys = past_key_values.layers[0].get_max_length() if static else new + past
            mask = self._visible(positions, keys)[None, None]
            if padding_mask is not None:
                real = nn.functional.pad(padding_mask.bool(), (0, keys - padding_mask.shape[1]))
                mask = mask & real[:, None, None]
            mask = mask.expand(batch, 1, new, keys)
        hidden_states = self.dropout(self.input_norm(self.input_proj(hidden_states)))
        hidden_states = self.positional_dropout(self.input_act(hidden_states) * self.hidden_size**0.5)
        lowest = 0 if self.chunk_size == 1 else 1 - new
        distances = torch.arange(keys - 1, lowest - 1, -1, device=device)
        table = sinusoidal_positions(distances, self.hidden_size).to(hidden_states.dtype)
        table = self.positional_dropout(table)
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask, positions, table, past_key_values=past_key_values)
        return self.norm(hidden_states)

    def _visible(self, positions: Tensor, keys: int) -> Tensor:
        """`(t, s)` bool: the keys that a query sees if all are real."""
        if self.chunk_size == 0:
            return torch.ones(len(positions), keys, dtype=torch.bool, device=positions.device)
        end = (positions[:, None] // self.chunk_size + 1) * self.chunk_size
        return torch.arange(keys, device=positions.device) < end
