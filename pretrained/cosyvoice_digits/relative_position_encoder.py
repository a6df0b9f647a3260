"""Transformer layers with the relative positions of Transformer-XL, on a whole sequence or piece by piece.

Transformer-XL: https://arxiv.org/abs/1901.02860. Upstream: `cosyvoice/transformer` (`ConformerEncoderLayer` without
convolution, `RelPositionMultiHeadedAttention`, `EspnetRelPositionalEncoding`), which took it from ESPnet through
WeNet. The score of query `i` and key `j` is ((q_i + u)·k_j + (q_i + v)·p(i - j)) / sqrt(d); p is a projection of a
sinusoid. In a stream the keys stay as they are and only the distances grow.

Shape legend: `b` batch, `t` frames, `s` keys, `h` heads, `d` size of a head, `c` channels, `r` distances.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .causal_cache import CausalCache
from .conformer import ACTIVATIONS, FeedForward, sinusoidal_positions


# Upstream's layers and its last norm.
_LAYER_NORM_EPS, _FINAL_NORM_EPS = 1e-12, 1e-5


@dataclass
class RelativePositions:
    """Where the keys are, seen from the queries.

    Args:
        embeddings (`(1, r, c)`): sinusoids of all distances that occur, in ascending order.
        rows (`(1 or b, t, s)`, int64): row of `embeddings` for each query and key.
    """

    embeddings: Tensor
    rows: Tensor


def relative_positions(num_frames: int, size: int, device: torch.device) -> RelativePositions:
    """Positions of a whole sequence of `num_frames`, for layers of `size` channels."""
    return _positions([0], num_frames, num_frames, size, device)


def relative_positions_of_step(cache: CausalCache, size: int, device: torch.device) -> RelativePositions:
    """Positions of the frames of the step that `cache` has begun, and of all keys that it has up to its end."""
    starts = cache.starts[:1] if cache.uniform else cache.starts
    return _positions(starts, max(cache.counts), cache.num_keys, size, device)


def _positions(
    starts: list[int], num_frames: int, num_keys: int, size: int, device: torch.device
) -> RelativePositions:
    lowest, highest = 1 - num_frames, max(starts) + num_frames - 1
    table = sinusoidal_positions(torch.arange(lowest, highest + 1, device=device)[None], size)
    query = torch.tensor(starts, device=device)[:, None] + torch.arange(num_frames, device=device)
    distance = query[..., None] - torch.arange(num_keys, device=device)
    # A row that is behind others has no keys where theirs are; what would be out of the table is masked.
    return RelativePositions(table, distance.clamp(lowest, highest) - lowest)


class RelativePositionAttention(nn.Module):
    """Self-attention with relative positions. `config` names: see the configuration of a flow."""

    cache_index = 0

    def __init__(self, config) -> None:
        super().__init__()
        size, heads = config.hidden_size, config.num_attention_heads
        self.head_dim = size // heads
        self.dropout = config.attention_dropout
        self.q_proj = nn.Linear(size, size)
        self.k_proj = nn.Linear(size, size, bias=config.key_bias)
        self.v_proj = nn.Linear(size, size)
        self.o_proj = nn.Linear(size, size)
        self.pos_proj = nn.Linear(size, size, bias=False)
        self.pos_bias_u = nn.Parameter(torch.empty(heads, self.head_dim))
        self.pos_bias_v = nn.Parameter(torch.empty(heads, self.head_dim))

    def forward(
        self, hidden: Tensor, positions: RelativePositions, visible: Tensor | None, cache: CausalCache | None = None
    ) -> Tensor:
        """`(b, t, c)` → `(b, t, c)`; `visible`: bool, broadcasting to `(b, h, t, s)`, `None` = all see all."""
        query, key, value = self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)
        if cache is not None:
            key, value = cache.extend_attention(self.cache_index, key, value)
        query, key, value, position = (
            part.unflatten(2, (-1, self.head_dim)).transpose(1, 2)
            for part in (query, key, value, self.pos_proj(positions.embeddings.to(hidden.dtype)))
        )
        by_distance = torch.matmul(query + self.pos_bias_v[:, None], position.transpose(-2, -1))  # (b, h, t, r)
        rows = positions.rows[:, None].expand(by_distance.shape[0], by_distance.shape[1], -1, -1)
        bias = by_distance.gather(-1, rows) * self.head_dim**-0.5
        if visible is not None:
            bias = bias.masked_fill(~visible, torch.finfo(bias.dtype).min)
        context = nn.functional.scaled_dot_product_attention(
            query + self.pos_bias_u[:, None],
            key,
            value,
            attn_mask=bias,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.o_proj(context.transpose(1, 2).flatten(2))


class RelativePositionLayer(GradientCheckpointingLayer):
    """Attention and feed-forward with residuals; `macaron_style` has half a feed-forward before and half after."""

    def __init__(self, config) -> None:
        super().__init__()
        size = config.hidden_size
        self.normalize_before = config.normalize_before
        self.half = 0.5 if config.macaron_style else 1.0
        self.macaron_mlp = self.macaron_layernorm = None
        if config.macaron_style:
            self.macaron_mlp = _feed_forward(config)
            self.macaron_layernorm = nn.LayerNorm(size, eps=_LAYER_NORM_EPS)
        self.input_layernorm = nn.LayerNorm(size, eps=_LAYER_NORM_EPS)
        self.self_attn = RelativePositionAttention(config)
        self.post_attention_layernorm = nn.LayerNorm(size, eps=_LAYER_NORM_EPS)
        self.mlp = _feed_forward(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self, hidden: Tensor, positions: RelativePositions, visible: Tensor | None, cache: CausalCache | None = None
    ) -> Tensor:
        """See [`RelativePositionAttention`]."""
        if self.macaron_mlp is not None:
            hidden = self._around(self.macaron_layernorm, self.macaron_mlp, hidden, self.half)
        hidden = self._around(
            self.input_layernorm, lambda normed: self.self_attn(normed, positions, visible, cache), hidden, 1.0
        )
        return self._around(self.post_attention_layernorm, self.mlp, hidden, self.half)

    def _around(self, norm: nn.LayerNorm, layer, hidden: Tensor, scale: float) -> Tensor:
        inner = norm(hidden) if self.normalize_before else hidden
        hidden = hidden + scale * self.dropout(layer(inner))
        return hidden if self.normalize_before else norm(hidden)


def _feed_forward(config) -> FeedForward:
    return FeedForward(
        config.hidden_size,
        config.intermediate_size,
        ACTIVATIONS[config.hidden_act](),
        config.hidden_dropout,
        bias=True,
    )


class FrameEmbedding(nn.Module):
    """What enters the layers: projection, norm, times sqrt(c)."""

    def __init__(self, input_size: int, config) -> None:
        super().__init__()
        self.scale = config.hidden_size**0.5
        self.proj = nn.Linear(input_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=_FINAL_NORM_EPS)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.position_dropout = nn.Dropout(config.position_dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        """`(b, t, input_size)` → `(b, t, c)`."""
        return self.position_dropout(self.dropout(self.layer_norm(self.proj(hidden))) * self.scale)

    def drop_positions(self, positions: RelativePositions) -> RelativePositions:
        """In training, upstream drops entries of the sinusoids as well."""
        return RelativePositions(self.position_dropout(positions.embeddings), positions.rows)


class RelativePositionEncoder(nn.Module):
    """Embedding, layers and a last norm over a whole sequence (`ConformerEncoder` of CosyVoice's first flow)."""

    def __init__(self, input_size: int, config) -> None:
        super().__init__()
        self.normalize_before = config.normalize_before
        self.embed = FrameEmbedding(input_size, config)
        self.layers = nn.ModuleList(RelativePositionLayer(config) for _ in range(config.num_hidden_layers))
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=_FINAL_NORM_EPS)

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """`(b, t, input_size)`, mask `(b, t)` bool or `None` → `(b, t, c)`."""
        hidden = self.embed(hidden)
        positions = relative_positions(hidden.shape[1], hidden.shape[2], hidden.device)
        positions = self.embed.drop_positions(positions)
        visible = None if mask is None else mask[:, None, None, :]
        for layer in self.layers:
            hidden = layer(hidden, positions, visible)
        return self.layer_norm(hidden) if self.normalize_before else hidden
