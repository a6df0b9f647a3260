"""Velocity network of CosyVoice 1 and 2: a one-dimensional U-Net of residual convolutions and transformer layers.

Upstream: `cosyvoice/flow/decoder.py` over Matcha-TTS (https://arxiv.org/abs/2309.03199), `matcha/models/components`.
Version 1 halves the frame rate once, looks both ways and uses group norm; version 2 keeps the rate and is causal.

Shape legend: `b` batch, `t` frames, `m` mel bins, `c` channels, `n` times. In every mask 1 = real.
"""

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .cached_attention import CachedSelfAttention
from .causal_cache import CausalCache, chunk_visibility, number_layers
from .convolution import PointwiseConv1d
from .flow_matching import sinusoidal_time_embedding
from .frame_convolution import FrameConv1d, FrameConvTranspose1d, FrameGroupNorm, masked


_GROUPS = 8


class UNet1dFeedForward(nn.Module):
    """fc2(act(fc1(x))), four times as wide inside."""

    def __init__(self, hidden_size: int, hidden_act: str, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, 4 * hidden_size)
        self.act_fn = ACT2FN[hidden_act]
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.fc2(self.dropout(self.act_fn(self.fc1(hidden))))


class UNet1dLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer."""

    def __init__(self, hidden_size: int, config) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(hidden_size, eps=1e-5)
        self.self_attn = CachedSelfAttention(
            config, hidden_size, config.estimator_num_attention_heads, config.estimator_head_dim, bias=False
        )
        self.attention_dropout = nn.Dropout(config.estimator_dropout)
        self.post_attention_layernorm = nn.LayerNorm(hidden_size, eps=1e-5)
        self.mlp = UNet1dFeedForward(hidden_size, config.estimator_hidden_act, config.estimator_dropout)

    def forward(self, hidden: Tensor, visible: Tensor | None, cache: CausalCache | None = None) -> Tensor:
        """`(b, t, c)` → `(b, t, c)`; visible: see [`CachedSelfAttention`]."""
        attended = self.self_attn(self.input_layernorm(hidden), visible, cache=cache)
        hidden = hidden + self.attention_dropout(attended)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class UNet1dBlock(nn.Module):
    """Convolution of kernel 3, norm, Mish."""

    def __init__(self, in_channels: int, out_channels: int, config) -> None:
        super().__init__()
        self.conv = FrameConv1d(in_channels, out_channels, 3, causal=config.estimator_is_causal)
        self.grouped = not config.estimator_is_causal
        self.invariant = config.padding == "invariant"
        self.norm = FrameGroupNorm(_GROUPS, out_channels) if self.grouped else nn.LayerNorm(out_channels, eps=1e-5)

    def forward(self, hidden: Tensor, mask: Tensor | None, cache: CausalCache | None = None) -> Tensor:
        hidden = self.conv(masked(hidden, mask), cache)
        if self.grouped:
            # Upstream counts padded frames in the statistics.
            hidden = self.norm(hidden, mask if self.invariant else None)
        else:
            hidden = self.norm(hidden)
        return masked(nn.functional.mish(hidden), mask)


class UNet1dResidual(nn.Module):
    """Two blocks with the time added between them, and a projected residual."""

    def __init__(self, in_channels: int, out_channels: int, time_size: int, config) -> None:
        super().__init__()
        self.time_proj = nn.Linear(time_size, out_channels)
        self.block1 = UNet1dBlock(in_channels, out_channels, config)
        self.block2 = UNet1dBlock(out_channels, out_channels, config)
        self.shortcut = PointwiseConv1d(in_channels, out_channels, bias=True)

    def forward(self, hidden: Tensor, mask: Tensor | None, time: Tensor, cache: CausalCache | None) -> Tensor:
        """`(b, t, c)`, time `(1 or b, c')`: already projected → `(b, t, c')`."""
        inner = self.block1(hidden, mask, cache) + time[:, None]
        return self.block2(inner, mask, cache) + self.shortcut(masked(hidden, mask))


class UNet1dStage(nn.Module):
    """A residual, transformer layers and (except in the middle) a convolution that may change the frame rate."""

    def __init__(
        self, in_channels: int, out_channels: int, time_size: int, config, resample: nn.Module | None
    ) -> None:
        super().__init__()
        self.residual = UNet1dResidual(in_channels, out_channels, time_size, config)
        self.layers = nn.ModuleList(
            UNet1dLayer(out_channels, config) for _ in range(config.estimator_layers_per_stage)
        )
        self.resample = resample

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor | None,
        visible: Tensor | None,
        time: Tensor,
        cache: CausalCache | None,
    ) -> Tensor:
        hidden = self.residual(hidden, mask, time, cache)
        for layer in self.layers:
            hidden = layer(hidden, visible, cache)
        return hidden

    def change_rate(self, hidden: Tensor, mask: Tensor | None, cache: CausalCache | None) -> Tensor:
        """The convolution at the end of the stage."""
        hidden = masked(hidden, mask)
        if isinstance(self.resample, FrameConvTranspose1d):
            return self.resample(hidden)
        return self.resample(hidden, cache)


class UNet1d(nn.Module):
    """The velocity of a noisy mel spectrogram, given tokens, speaker, prompt and time.

    `config` needs `num_mel_bins`, `padding` and the fields that begin with `estimator_`.
    """

    def __init__(self, config) -> None:
        super().__init__()
        channels, bins, causal = config.estimator_channels, config.num_mel_bins, config.estimator_is_causal
        time_size = 4 * channels[0]
        self.chunk_size = config.estimator_chunk_size
        self.time_embedding_size = 4 * bins  # upstream: the number of input channels
        self.time_fc1 = nn.Linear(self.time_embedding_size, time_size)
        self.time_fc2 = nn.Linear(time_size, time_size)
        self.down_stages, self.mid_stages, self.up_stages = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        last, size = len(channels) - 1, 4 * bins
        for index, out_size in enumerate(channels):
            resample = (
                FrameConv1d(out_size, out_size, 3, causal=causal)
                if index == last
                else FrameConv1d(out_size, out_size, 3, stride=2)
            )
            self.down_stages.append(UNet1dStage(size, out_size, time_size, config, resample))
            size = out_size
        for _ in range(config.estimator_num_mid_stages):
            self.mid_stages.append(UNet1dStage(size, size, time_size, config, None))
        outward = [*reversed(channels), channels[0]]
        for index in range(len(channels)):
            out_size = outward[index + 1]
            resample = (
                FrameConv1d(out_size, out_size, 3, causal=causal) if index == last else FrameConvTranspose1d(out_size)
            )
            self.up_stages.append(UNet1dStage(2 * outward[index], out_size, time_size, config, resample))
        self.final_block = UNet1dBlock(channels[0], channels[0], config)
        self.out_proj = PointwiseConv1d(channels[0], bins, bias=True)
        number_layers(self, FrameConv1d)
        number_layers(self, CachedSelfAttention)

    def embed_times(self, times: Tensor) -> list[Tensor]:
        """What each residual adds for times `(n,)` in 0..1: one `(n, c)` for each, in their order."""
        embedded = sinusoidal_time_embedding(times, self.time_embedding_size).to(self.time_fc1.weight.dtype)
        embedded = self.time_fc2(nn.functional.silu(self.time_fc1(embedded)))
        embedded = nn.functional.mish(embedded)
        stages = (*self.down_stages, *self.mid_stages, *self.up_stages)
        return [stage.residual.time_proj(embedded) for stage in stages]

    def forward(
        self,
        noisy: Tensor,
        conditions: Tensor,
        speaker: Tensor,
        prompt: Tensor,
        times: list[Tensor],
        mask: Tensor | None = None,
        streaming: bool = False,
        cache: CausalCache | None = None,
        num_left_chunks: int = -1,
    ) -> Tensor:
        """
        Args:
            noisy, conditions, prompt (`(b, t, m)`): sample, encoded tokens, mel of the prompt (0 elsewhere).
            speaker (`(b, m)`), times: from [`embed_times`], each `(1 or b, c)`.
            mask (`(b, t)`): `None` = no padding.
            streaming: attention sees its chunk and `num_left_chunks` before it, all of them where that is negative.
            cache: frames of earlier steps, of a causal network, in place of `mask`, `streaming` and `num_left_chunks`.

        Returns:
            the velocity `(b, t, m)`, zero where padded.
        """
        speaker = speaker[:, None].expand(-1, noisy.shape[1], -1)
        hidden = torch.cat([noisy, conditions, speaker, prompt], dim=2)
        time = iter(times)
        skips, masks = [], [mask]

        def visible_to(hidden: Tensor, mask: Tensor | None) -> Tensor | None:
            if cache is not None:
                return cache.visible
            chunk_size = self.chunk_size if streaming else 0
            return attention_visibility(hidden.shape[1], mask, chunk_size, hidden.device, num_left_chunks)

        for stage in self.down_stages:
            mask = masks[-1]
            hidden = stage(hidden, mask, visible_to(hidden, mask), next(time), cache)
            skips.append(hidden)
            hidden = stage.change_rate(hidden, mask, cache)
            masks.append(None if mask is None else mask[:, ::2])
        masks.pop()  # the last stage kept its rate
        visible = visible_to(hidden, masks[-1])
        for stage in self.mid_stages:
            hidden = stage(hidden, masks[-1], visible, next(time), cache)
        for stage in self.up_stages:
            mask, skip = masks.pop(), skips.pop()
            # Doubling an odd number of frames that was halved gives one too many.
            hidden = torch.cat([hidden[:, : skip.shape[1]], skip], dim=2)
            hidden = stage(hidden, mask, visible_to(hidden, mask), next(time), cache)
            hidden = stage.change_rate(hidden, mask, cache)
        hidden = self.final_block(hidden, mask, cache)
        return masked(self.out_proj(masked(hidden, mask)), mask)


def attention_visibility(
    num_frames: int, mask: Tensor | None, chunk_size: int, device: torch.device, num_left_chunks: int = -1
) -> Tensor | None:
    """What the frames of whole sequences see, bool, broadcasting to `(b, heads, t, t)`; `None` = all see all.

    Args:
        mask (`(b, t)`): 1 = real.
        chunk_size: frames of a chunk, which sees itself and `num_left_chunks` before it (negative = all); 0 = no
            chunks.
    """
    visible = chunk_visibility([0], [num_frames], chunk_size, device, num_left_chunks)
    if mask is not None:
        real = mask.bool()[:, None, None, :]
        visible = real if visible is None else visible & real
        if chunk_size and num_left_chunks >= 0:
            # A padded frame whose chunks are padding must see something, or its softmax is undefined.
            visible = visible | ~visible.any(dim=-1, keepdim=True)
    return visible
