"""Conformer as the encoder of a Paraformer: WeNet's, and the one with Transformer-XL's relative shift of ESPnet.

Conformer: https://arxiv.org/abs/2005.08100. Upstream: `funasr/models/conformer/encoder.py`, which took it from ESPnet.

With a shift, the position term of a score depends on the pair (query, key) and is built as a `(t, t)` bias:

* "shifted": `bias[i, j] = (q_i + v)·p(i - j)`, positions negative for keys to the right;
* "legacy" (ESPnet before its pull request 2816, and what FunASR's `rel_pos` means by default): the table has `t` rows
  `p_r` for the positions `4999 - r`, `D[i, r] = (q_i + v)·p_r`, and the shift of a `t x t` matrix gives
  `D[i, j - i + t - 1]` up to the diagonal, 0 right of it, and then entries of the next row, `D[i + 1, j - i - 2]`.

Shape legend: `b` batch, `f` input frames, `t` encoder frames, `h` heads, `d` size of a head, `c` channels.
"""

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .conformer import (
    ConvolutionModule,
    EncoderSelfAttention,
    Subsampling,
    make_feed_forward,
    make_norm,
    sinusoidal_positions,
)


# Rows of upstream's table, which the legacy positions are counted down from.
_LEGACY_TABLE = 5000


class ShiftedSelfAttention(EncoderSelfAttention):
    """Self-attention with ESPnet's relative positions, new (`"shifted_rel_selfattn"`) or legacy."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.legacy = config.attention_type == "legacy_rel_selfattn"
        self.pos_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.pos_bias_u = nn.Parameter(torch.empty(self.num_heads, self.head_dim))
        self.pos_bias_v = nn.Parameter(torch.empty(self.num_heads, self.head_dim))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        position_embeddings: Tensor,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, None]:
        """
        Args:
            hidden_states (`(b, t, c)`), attention_mask: bool `(b, 1, 1, t)` or `None`.
            position_embeddings: `(1, 2t - 1, c)` for the positions `t - 1 … 1 - t`, legacy `(1 or b, t, c)`.
            lengths (`(b,)`): frames of each item, which the legacy shift depends on; `None` = all are full.
        """
        query = self.split_heads(self.q_proj(hidden_states))
        key = self.split_heads(self.k_proj(hidden_states))
        value = self.split_heads(self.v_proj(hidden_states))
        position = self.split_heads(self.pos_proj(position_embeddings.to(key.dtype)))
        by_position = torch.matmul(query + self.pos_bias_v[:, None], position.transpose(-2, -1))
        shift = legacy_shift if self.legacy else relative_shift
        bias = shift(by_position, lengths) * self.scaling
        if attention_mask is not None:
            bias = bias.masked_fill(~attention_mask, torch.finfo(bias.dtype).min)
        context, weights = self.attend(query + self.pos_bias_u[:, None], key, value, bias)
        return self.o_proj(context.flatten(2)), weights, None


def relative_shift(scores: Tensor, lengths: Tensor | None = None) -> Tensor:
    """`(b, h, t, 2t - 1)` scores by position, from `t - 1` down, to `(b, h, t, t)` by key."""
    frames = scores.shape[2]
    steps = torch.arange(frames, device=scores.device)
    index = frames - 1 - steps[:, None] + steps[None, :]
    return scores.gather(-1, index.expand(*scores.shape[:2], -1, -1))


def legacy_shift(scores: Tensor, lengths: Tensor | None = None) -> Tensor:
    """`(b, h, t, t)` scores by table row to `(b, h, t, t)` by key; see the head of this file.

    Args:
        lengths (`(b,)`): frames of each item, so that it is shifted as if it were alone; `None` = `t`.
    """
    frames = scores.shape[2]
    if lengths is None:
        lengths = torch.full((scores.shape[0],), frames, device=scores.device)
    steps = torch.arange(frames, device=scores.device)
    query, key = steps[:, None], steps[None, :]
    left = (key - query)[None] + lengths[:, None, None] - 1  # (b, t, t)
    shape = scores.shape
    past = scores.gather(-1, left.clamp(0, frames - 1)[:, None].expand(shape))
    wrapped = scores.roll(-1, dims=2).gather(-1, (key - query - 2).clamp_min(0).expand(shape))
    return torch.where(key <= query, past, torch.where(key == query + 1, torch.zeros_like(past), wrapped))


class ConformerLayer(GradientCheckpointingLayer):
    """Conformer block: half feed-forward, attention, convolution, half feed-forward."""

    def __init__(self, config) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.norm_eps
        self.normalize_before = config.normalize_before
        self.half = 0.5 if config.macaron_style else 1.0
        self.shifted = config.attention_type.endswith("_rel_selfattn")
        self.self_attn = ShiftedSelfAttention(config) if self.shifted else EncoderSelfAttention(config)
        self.feed_forward = make_feed_forward(config)
        self.norm_self_attn = make_norm(config.norm_type, size, eps)
        self.norm_feed_forward = make_norm(config.norm_type, size, eps)
        self.feed_forward_macaron = None
        if config.macaron_style:
            self.feed_forward_macaron = make_feed_forward(config)
            self.norm_feed_forward_macaron = make_norm(config.norm_type, size, eps)
        self.conv = None
        if config.use_conv_module:
            self.conv = ConvolutionModule(config)
            self.norm_conv = make_norm(config.norm_type, size, eps)
            self.norm_out = make_norm(config.norm_type, size, eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        position_embeddings: Tensor | None,
        frame_mask: Tensor | None,
        lengths: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            hidden_states (`(b, t, c)`), attention_mask (`(b, 1, 1, t)`, bool), position_embeddings: see the attention.
            frame_mask (`(b, t)`, bool): for the convolution; `None` where nothing is padding or upstream ignores it.
            lengths (`(b,)`): for the legacy shift.

        Returns:
            `(b, t, c)` and the attention's weights (eager only).
        """
        if self.feed_forward_macaron is not None:
            norm, residual = self.norm_feed_forward_macaron, hidden_states
            hidden = self.feed_forward_macaron(self._before(norm, residual))
            hidden_states = self._after(norm, residual + self.half * self.dropout(hidden))
        hidden = self._before(self.norm_self_attn, hidden_states)
        extra = (lengths,) if self.shifted else ()
        hidden, weights, _ = self.self_attn(hidden, attention_mask, position_embeddings, *extra)
        hidden_states = self._after(self.norm_self_attn, hidden_states + self.dropout(hidden))
        if self.conv is not None:
            hidden, _ = self.conv(self._before(self.norm_conv, hidden_states), frame_mask)
            hidden_states = self._after(self.norm_conv, hidden_states + self.dropout(hidden))
        hidden = self.feed_forward(self._before(self.norm_feed_forward, hidden_states))
        hidden_states = self._after(self.norm_feed_forward, hidden_states + self.half * self.dropout(hidden))
        return (hidden_states if self.conv is None else self.norm_out(hidden_states)), weights

    def _before(self, norm: nn.Module, hidden_states: Tensor) -> Tensor:
        return norm(hidden_states) if self.normalize_before else hidden_states

    def _after(self, norm: nn.Module, hidden_states: Tensor) -> Tensor:
        return hidden_states if self.normalize_before else norm(hidden_states)


class ConformerEncoder(nn.Module):
    """Subsampling, positions, conformer blocks and a norm, over whole utterances."""

    def __init__(self, config) -> None:
        super().__init__()
        self.config = config
        self.subsampling = Subsampling(config)
        self.embed_dropout = nn.Dropout(config.positional_dropout)
        self.layers = nn.ModuleList(ConformerLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = make_norm(config.norm_type, config.hidden_size, config.norm_eps)

    @property
    def like_espnet(self) -> bool:
        """FunASR's conformer, whose convolutions and lengths ignore padding in a batch (`padding="upstream"`)."""
        return self.config.conformer_style == "funasr" and self.config.padding == "upstream"

    def output_mask(self, frame_mask: Tensor) -> Tensor:
        """`(b, f)` → `(b, t)` bool."""
        if self.like_espnet:
            # Upstream drops the mask's last columns, not each item's last frames: short items get a frame more.
            for kernel, stride in self.subsampling.layers:
                frame_mask = frame_mask[:, : 1 - kernel : stride] if kernel > 1 else frame_mask[:, ::stride]
            return frame_mask
        lengths = self.subsampling.output_lengths(frame_mask.sum(dim=-1))
        width = int(self.subsampling.output_lengths(torch.tensor(frame_mask.shape[1])))
        return torch.arange(width, device=frame_mask.device) < lengths[:, None]

    def forward(self, features: Tensor, frame_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            features (`(b, f, input_size)`), frame_mask (`(b, f)`, bool, `None` = no padding).

        Returns:
            `(b, t, c)` and its mask `(b, t)` or `None`. Audio shorter than one window gives `t = 0`.
        """
        shortest = 1
        for kernel, stride in reversed(self.subsampling.layers):
            shortest = (shortest - 1) * stride + kernel
        if features.shape[1] < shortest:
            return features.new_zeros(features.shape[0], 0, self.config.hidden_size), None
        hidden_states = self.subsampling(features)
        hidden_states, positions = self._add_positions(hidden_states)
        mask = None if frame_mask is None else self.output_mask(frame_mask)
        visible = None if mask is None else mask[:, None, None, :]
        upstream = self.like_espnet
        lengths = None if mask is None or upstream else mask.sum(dim=-1)
        conv_mask = None if upstream else mask
        for layer in self.layers:
            hidden_states, _ = layer(hidden_states, visible, positions, conv_mask, lengths)
        if self.config.normalize_before:
            hidden_states = self.norm(hidden_states)
        return hidden_states, mask

    def _add_positions(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        config, frames = self.config, hidden_states.shape[1]
        kind = config.position_embedding_type
        if kind == "no_pos":
            return self.embed_dropout(hidden_states), torch.zeros_like(hidden_states[:1])
        steps = torch.arange(frames, device=hidden_states.device)
        if config.attention_type == "shifted_rel_selfattn":
            steps = torch.arange(frames - 1, -frames, -1, device=hidden_states.device)
        elif config.attention_type == "legacy_rel_selfattn":
            steps = max(_LEGACY_TABLE, frames) - 1 - steps
        table = sinusoidal_positions(steps[None], config.hidden_size).to(hidden_states.dtype)
        hidden_states = hidden_states * config.hidden_size**0.5
        if kind == "abs_pos":
            hidden_states = hidden_states + table
        return self.embed_dropout(hidden_states), self.embed_dropout(table)
