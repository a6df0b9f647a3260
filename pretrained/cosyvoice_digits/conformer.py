"""Building blocks of WeNet's conformer and transformer: positions, attention, convolution, feed-forward, subsampling.

Conformer: https://arxiv.org/abs/2005.08100; dynamic chunks and caches: https://arxiv.org/abs/2012.05481.

WeNet dropped the relative shift of Transformer-XL, so the positional term of its "relative" attention depends on the
key's own position only, and folds into the keys without approximation:

    ((q + u)·k_j + (q + v)·p_j) / sqrt(d)  =  (q·(k_j + p_j) + b_j) / sqrt(d),      b_j = u·k_j + v·p_j

No (queries x keys) bias is ever built, any attention kernel applies, and a streaming cache can keep `k_j + p_j` and
`b_j`.

Shape legend: `b` batch, `t` frames, `s` keys, `h` heads, `d` size of a head, `c` channels. In every mask True = real.
"""

import math

import torch
from torch import Tensor, nn

from .attention import MultiHeadAttention
from .convolution import DepthwiseConv1d, PointwiseConv1d
from .mixture_of_experts import MixtureOfExperts


ACTIVATIONS = {
    "silu": nn.SiLU,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "hardtanh": nn.Hardtanh,
    "selu": nn.SELU,
}


class UnitOffsetRmsNorm(nn.Module):
    """Root-mean-square norm scaled by `1 + weight` (WeNet's `RMSNorm`), computed in float32."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed.to(hidden_states.dtype) * (1 + self.weight)


def make_norm(norm_type: str, hidden_size: int, eps: float) -> nn.Module:
    """`"layer_norm"` or `"rms_norm"` over the last axis."""
    return nn.LayerNorm(hidden_size, eps=eps) if norm_type == "layer_norm" else UnitOffsetRmsNorm(hidden_size, eps)


def sinusoidal_positions(positions: Tensor, hidden_size: int) -> Tensor:
    """Interleaved sine and cosine table rows, `(..., hidden_size)` float32, for integer `positions` `(...)`.

    Computed where it is needed: no length limit (upstream's table ends at 5000 frames) and no buffer to restore.
    """
    frequencies = torch.exp(
        torch.arange(0, hidden_size, 2, dtype=torch.float32, device=positions.device)
        * -(math.log(10000.0) / hidden_size)
    )
    phase = positions[..., None].float() * frequencies
    return torch.stack([phase.sin(), phase.cos()], dim=-1).flatten(-2)[..., :hidden_size]


def chunk_attention_mask(num_frames: int, chunk_size: int, num_left_chunks: int, device: torch.device) -> Tensor:
    """`(t, t)` bool: query `i` sees its own chunk and `num_left_chunks` before it (all of them if negative)."""
    position = torch.arange(num_frames, device=device)
    chunk = position // chunk_size
    visible = position[None, :] < (chunk[:, None] + 1) * chunk_size
    if num_left_chunks >= 0:
        visible &= position[None, :] >= (chunk[:, None] - num_left_chunks) * chunk_size
    return visible


class EncoderSelfAttention(MultiHeadAttention):
    """Self-attention of the encoder, with or without WeNet's relative positions, optionally on cached keys."""

    def __init__(self, config) -> None:
        super().__init__(
            config,
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.attention_dropout,
            config.query_bias,
            config.key_bias,
            config.value_bias,
        )
        self.relative = config.attention_type == "rel_selfattn"
        if self.relative:
            # Each query head folds its own position into the keys, so grouped keys are expanded there, not in the
            # kernel.
            self.position_groups, self.num_key_value_groups = self.num_key_value_groups, 1
            self.pos_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
            self.pos_bias_u = nn.Parameter(torch.empty(self.num_heads, self.head_dim))
            self.pos_bias_v = nn.Parameter(torch.empty(self.num_heads, self.head_dim))

    def fold_positions(self, key: Tensor, position_embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Keys with their position folded in, `(b, h, s, d)`, and the bias of each key `(b, h, s)`."""
        position = self.split_heads(self.pos_proj(position_embeddings.to(key.dtype)))  # (1 or b, h, s, d)
        content_bias = torch.einsum("bhsd,hd->bhs", key, self.pos_bias_u)
        position_bias = torch.einsum("bhsd,hd->bhs", position, self.pos_bias_v)
        return key + position, content_bias + position_bias

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        position_embeddings: Tensor | None,
        past: tuple[Tensor, Tensor | None, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor | None, Tensor]]:
        """Attend within the input and, when streaming, to the past.

        Args:
            hidden_states (`(b, t, hidden_size)`)
            attention_mask: bool, `(b or 1, 1, t or 1, s)`, or `None` when every key is visible to every query.
            position_embeddings (`(1 or b, t, hidden_size)`): rows of the sinusoid table for the `t` new frames.
            past: keys `(b, h, s - t, d)` with positions folded in, their bias `(b, h, s - t)`, and values
                `(b, h, s - t, d)`.

        Returns:
            output `(b, t, hidden_size)`, the attention weights (eager only), and the extended past.
        """
        query = self.split_heads(self.q_proj(hidden_states))
        key = self.split_heads(self.k_proj(hidden_states))
        value = self.split_heads(self.v_proj(hidden_states))
        bias = None
        if self.relative:
            if self.position_groups > 1:
                key = key.repeat_interleave(self.position_groups, dim=1)
                value = value.repeat_interleave(self.position_groups, dim=1)
            key, bias = self.fold_positions(key, position_embeddings)
        if past is not None:
            key = torch.cat([past[0], key], dim=2)
            bias = torch.cat([past[1], bias], dim=2) if self.relative else None
            value = torch.cat([past[2], value], dim=2)
        attend = self.attend_with_key_bias if self.relative else self.attend_with_mask
        context, weights = attend(query, key, value, bias, attention_mask)
        return self.o_proj(context.flatten(2)), weights, (key, bias, value)

    def attend_with_mask(
        self, query: Tensor, key: Tensor, value: Tensor, bias: None, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Plain attention."""
        return self.attend(query, key, value, attention_mask)

    def attend_with_key_bias(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Attention whose score of key `j` has `bias[j]` added before scaling."""
        if attention_mask is None or attention_mask.shape[-2] == 1:
            # One row per head, broadcast over the queries by the kernel; padded keys ride on it.
            row = (bias * self.scaling)[:, :, None, :]
            if attention_mask is not None:
                row = row.masked_fill(~attention_mask, torch.finfo(row.dtype).min)
            return self.attend(query, key, value, row)
        # A (t, s) chunk mask is shared by all heads and stays boolean: the bias becomes one more coordinate of the
        # heads, 1 for a query and b_j for a key. Kernels of GPUs want head sizes in multiples of 8.
        extra = 1 if query.device.type == "cpu" else 8
        one = nn.functional.pad(query.new_ones(1), (0, extra - 1)).expand(*query.shape[:-1], extra)
        query = torch.cat([query, one], dim=-1)
        key = torch.cat([key, nn.functional.pad(bias[..., None], (0, extra - 1))], dim=-1)
        context, weights = self.attend(query, key, nn.functional.pad(value, (0, extra)), attention_mask)
        return context[..., : self.head_dim], weights


class ConvolutionModule(nn.Module):
    """Convolution module of the conformer: pointwise, GLU, depthwise, norm, activation, pointwise."""

    def __init__(self, config) -> None:
        super().__init__()
        channels, inner = config.hidden_size, config.conv_inner_factor * config.hidden_size // 2
        self.causal = config.conv_causal
        self.left_context = config.conv_kernel_size - 1 if config.conv_causal else 0
        self.invariant = config.padding == "invariant"
        self.pointwise_conv1 = PointwiseConv1d(channels, 2 * inner, config.conv_bias)
        padding = 0 if config.conv_causal else (config.conv_kernel_size - 1) // 2
        self.depthwise_conv = DepthwiseConv1d(inner, config.conv_kernel_size, padding, config.conv_bias)
        self.batch_norm = config.conv_norm_type == "batch_norm"
        self.norm = (
            nn.BatchNorm1d(inner, eps=config.conv_norm_eps)
            if self.batch_norm
            else make_norm(config.conv_norm_type, inner, config.conv_norm_eps)
        )
        self.act_fn = ACTIVATIONS[config.hidden_act]()
        self.pointwise_conv2 = PointwiseConv1d(inner, channels, config.conv_bias)

    def forward(
        self, hidden_states: Tensor, frame_mask: Tensor | None, past: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            hidden_states (`(b, t, c)`), frame_mask (`(b, t)`, bool, `None` = no padding).
            past (`(b, kernel - 1, c)`): inputs that precede a streamed chunk; `None` starts from zeros.

        Returns:
            output `(b, t, c)` and, of a causal module, its padded input `(b, kernel - 1 + t, c)`, whose end is the
            next past.
        """
        inputs = hidden_states
        padded = None if frame_mask is None else ~frame_mask[..., None]
        if padded is not None:
            inputs = inputs.masked_fill(padded, 0.0)
        if self.causal and past is None:
            # Upstream pads before the first pointwise convolution: the left context is glu(bias), not zero.
            inputs = nn.functional.pad(inputs, (0, 0, self.left_context, 0))
        elif self.causal:
            inputs = torch.cat([past, inputs], dim=1)
        hidden = nn.functional.glu(self.pointwise_conv1(inputs), dim=-1)
        if padded is not None and not self.causal and self.invariant:
            # Padded frames are glu(bias) here and would leak into the last frames of the item. Upstream lets them.
            hidden = hidden.masked_fill(padded, 0.0)
        hidden = self.depthwise_conv(hidden)
        hidden = self.pointwise_conv2(self.act_fn(self._normalise(hidden, frame_mask)))
        if padded is not None:
            hidden = hidden.masked_fill(padded, 0.0)
        return hidden, inputs if self.causal else None

    def _normalise(self, hidden: Tensor, frame_mask: Tensor | None) -> Tensor:
        if not self.batch_norm:
            return self.norm(hidden)
        if self.training and self.invariant and frame_mask is not None:
            # Batch statistics over real frames only; upstream counts the padded ones.
            return hidden.masked_scatter(frame_mask[..., None], self.norm(hidden[frame_mask]))
        return self.norm(hidden.flatten(0, 1)).view_as(hidden)


class FeedForward(nn.Module):
    """Two-layer feed-forward: `fc2(dropout(act(fc1(x))))`."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, act_fn: nn.Module, dropout: float, bias: bool
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.act_fn = act_fn
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.dropout(self.act_fn(self.fc1(hidden_states))))


class GatedFeedForward(FeedForward):
    """Gated variant (https://arxiv.org/abs/2002.05202): `fc2(dropout(act(gate_proj(x)) * fc1(x)))`."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, act_fn: nn.Module, dropout: float, bias: bool
    ) -> None:
        super().__init__(hidden_size, intermediate_size, act_fn, dropout, bias)
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.dropout(self.act_fn(self.gate_proj(hidden_states)) * self.fc1(hidden_states)))


def make_feed_forward(config, decoder: bool = False) -> nn.Module:
    """The feed-forward layer that the configuration asks for, of the encoder or of the decoder."""
    mlp_type = config.decoder_mlp_type if decoder else config.mlp_type
    size = config.decoder_intermediate_size if decoder else config.intermediate_size
    act_fn = ACTIVATIONS[config.decoder_hidden_act if decoder else config.hidden_act]()
    dropout = config.decoder_dropout if decoder else config.hidden_dropout
    bias = config.decoder_mlp_bias if decoder else config.mlp_bias
    if mlp_type == "moe":
        experts = config.decoder_num_experts if decoder else config.num_experts
        chosen = config.decoder_num_experts_per_tok if decoder else config.num_experts_per_tok
        return MixtureOfExperts(config, config.hidden_size, size, experts, chosen, act_fn, dropout, bias)
    layer = GatedFeedForward if mlp_type == "gated" else FeedForward
    return layer(config.hidden_size, size, act_fn, dropout, bias)


class FirstSubsamplingConv2d(nn.Conv2d):
    """Convolution over the single plane of features, as a linear map of its few inputs per output.

    Takes `(b, frames, bins)` and gives `(b, c, t, f)` in channels-last memory, fastest for the next one.
    """

    def __init__(self, channels: int, kernel: int, stride: int) -> None:
        super().__init__(1, channels, kernel, stride)

    def forward(self, features: Tensor) -> Tensor:
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        patches = features.unfold(1, kernel, stride).unfold(2, kernel, stride).flatten(3)  # (b, t, f, kernel²)
        return nn.functional.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class Subsampling(nn.Module):
    """Strided convolutions over (frames, bins) and a projection, or a projection alone (`"linear"`).

    The convolutions do not pad, so the last frames that fill no window are dropped, and the frames of an item depend
    on nothing beyond its own length.
    """

    # kernel and stride of each convolution
    LAYERS = {
        "linear": (),
        "conv2d4": ((3, 2), (3, 2)),
        "conv2d6": ((3, 2), (5, 3)),
        "conv2d8": ((3, 2), (3, 2), (3, 2)),
    }

    def __init__(self, config) -> None:
        super().__init__()
        self.layers = self.LAYERS[config.subsampling_type]
        channels, bins = 1, config.input_size
        self.convs = nn.ModuleList()
        for kernel, stride in self.layers:
            size = config.hidden_size
            is_first = len(self.convs) == 0
            self.convs.append(
                FirstSubsamplingConv2d(size, kernel, stride) if is_first else nn.Conv2d(channels, size, kernel, stride)
            )
            channels, bins = size, (bins - kernel) // stride + 1
        self.out_proj = nn.Linear(channels * bins, config.hidden_size)
        if not self.layers:
            self.layer_norm = nn.LayerNorm(config.hidden_size, eps=1e-5)
            self.dropout = nn.Dropout(config.hidden_dropout)

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Encoder frames of `lengths` feature frames; 0 where they fill no window."""
        for kernel, stride in self.layers:
            lengths = torch.div(lengths - kernel, stride, rounding_mode="floor") + 1
        return lengths.clamp_min(0)

    def forward(self, features: Tensor) -> Tensor:
        """`(b, frames, bins)` → `(b, t, hidden_size)`."""
        if not self.layers:
            return self.dropout(self.layer_norm(self.out_proj(features)))
        hidden = features
        for conv in self.convs:
            # The first layer's output is a view, on which autograd pays for working in place with two copies.
            hidden = nn.functional.relu(conv(hidden), inplace=not torch.is_grad_enabled())
        return self.out_proj(hidden.transpose(1, 2).flatten(2))
