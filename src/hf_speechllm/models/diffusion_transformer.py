"""Velocity network of CosyVoice 3: a diffusion transformer whose norms are modulated by time.

DiT: https://arxiv.org/abs/2212.09748; upstream: `cosyvoice/flow/DiT`, which took it from F5-TTS
(https://arxiv.org/abs/2410.06885). A quirk to keep: rotary positions are applied before the heads are split, so that
only the first head's worth of channels turns, in neighbouring pairs.

Shape legend: `b` batch, `t` frames, `m` mel bins, `c` channels, `n` times. In every mask 1 = real.
"""

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .cached_attention import CachedSelfAttention
from .causal_cache import CausalCache, number_layers
from .flow_matching import sinusoidal_time_embedding
from .unet_1d import attention_visibility


_TIME_EMBEDDING_SIZE = 256
_POSITION_KERNEL, _POSITION_GROUPS = 31, 16
_NORM_EPS = 1e-6
_ROTARY_BASE = 10000.0


def rotary_frequencies(head_dim: int, device: torch.device | None = None) -> Tensor:
    """Angle per frame of each pair of channels, `(head_dim / 2,)` float32."""
    return 1.0 / (_ROTARY_BASE ** (torch.arange(0, head_dim, 2, device=device).float() / head_dim))


class GroupedCausalConv1d(nn.Conv1d):
    """Causal convolution in groups over `(b, t, c)`."""

    cache_index = 0

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, _POSITION_KERNEL, groups=_POSITION_GROUPS)

    def forward(self, hidden: Tensor, cache: CausalCache | None = None) -> Tensor:
        past = self.kernel_size[0] - 1
        if cache is not None:
            hidden = cache.extend_convolution(self.cache_index, hidden, past)
        else:
            hidden = nn.functional.pad(hidden, (0, 0, past, 0))
        return super().forward(hidden.transpose(1, 2)).transpose(1, 2)


class DiffusionTransformerInput(nn.Module):
    """Everything a frame is told, projected, plus its neighbourhood."""

    def __init__(self, config) -> None:
        super().__init__()
        size = config.estimator_hidden_size
        self.proj = nn.Linear(4 * config.num_mel_bins, size)
        self.conv1 = GroupedCausalConv1d(size)
        self.conv2 = GroupedCausalConv1d(size)

    def forward(self, frames: Tensor, cache: CausalCache | None) -> Tensor:
        """`(b, t, 4m)` → `(b, t, c)`."""
        hidden = self.proj(frames)
        around = nn.functional.mish(self.conv1(hidden, cache))
        return hidden + nn.functional.mish(self.conv2(around, cache))


class DiffusionTransformerFeedForward(nn.Module):
    """fc2(gelu(fc1(x))), GELU by tanh."""

    def __init__(self, hidden_size: int, intermediate_size: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.fc2(self.dropout(nn.functional.gelu(self.fc1(hidden), approximate="tanh")))


class DiffusionTransformerLayer(GradientCheckpointingLayer):
    """Attention and feed-forward; time shifts and scales their inputs and gates their outputs."""

    def __init__(self, config) -> None:
        super().__init__()
        size = config.estimator_hidden_size
        self.modulation = nn.Linear(size, 6 * size)
        self.input_layernorm = nn.LayerNorm(size, eps=_NORM_EPS, elementwise_affine=False)
        self.self_attn = CachedSelfAttention(
            config, size, config.estimator_num_attention_heads, config.estimator_head_dim, bias=True
        )
        self.attention_dropout = nn.Dropout(config.estimator_dropout)
        self.post_attention_layernorm = nn.LayerNorm(size, eps=_NORM_EPS, elementwise_affine=False)
        self.mlp = DiffusionTransformerFeedForward(size, config.estimator_intermediate_size, config.estimator_dropout)

    def forward(
        self,
        hidden: Tensor,
        time: Tensor,
        visible: Tensor | None,
        rotation: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: CausalCache | None = None,
    ) -> Tensor:
        """`(b, t, c)`, time `(1 or b, 6c)` → `(b, t, c)`."""
        shift1, scale1, gate1, shift2, scale2, gate2 = time[:, None].chunk(6, dim=2)
        normed = self.input_layernorm(hidden) * (1 + scale1) + shift1
        attended = self.attention_dropout(self.self_attn(normed, visible, rotation, cache))
        if mask is not None:
            attended = attended * mask[..., None].to(attended.dtype)
        hidden = hidden + gate1 * attended
        normed = self.post_attention_layernorm(hidden) * (1 + scale2) + shift2
        return hidden + gate2 * self.mlp(normed)


class DiffusionTransformer(nn.Module):
    """The velocity of a noisy mel spectrogram, given tokens, speaker, prompt and time.

    `config` needs `num_mel_bins` and the fields that begin with `estimator_`.
    """

    def __init__(self, config) -> None:
        super().__init__()
        size = config.estimator_hidden_size
        self.head_dim = config.estimator_head_dim
        self.chunk_size = config.estimator_chunk_size
        self.time_fc1 = nn.Linear(_TIME_EMBEDDING_SIZE, size)
        self.time_fc2 = nn.Linear(size, size)
        self.input = DiffusionTransformerInput(config)
        self.layers = nn.ModuleList(
            DiffusionTransformerLayer(config) for _ in range(config.estimator_num_hidden_layers)
        )
        self.final_modulation = nn.Linear(size, 2 * size)
        self.layer_norm = nn.LayerNorm(size, eps=_NORM_EPS, elementwise_affine=False)
        self.out_proj = nn.Linear(size, config.num_mel_bins)
        number_layers(self, GroupedCausalConv1d)
        number_layers(self, CachedSelfAttention)

    def embed_times(self, times: Tensor) -> list[Tensor]:
        """The modulations for times `(n,)` in 0..1: `(n, 6c)` for each layer, then `(n, 2c)` for the last norm."""
        embedded = sinusoidal_time_embedding(times, _TIME_EMBEDDING_SIZE).to(self.time_fc1.weight.dtype)
        embedded = nn.functional.silu(self.time_fc2(nn.functional.silu(self.time_fc1(embedded))))
        return [layer.modulation(embedded) for layer in self.layers] + [self.final_modulation(embedded)]

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
        """As [`UNet1d.forward`], but what is returned for padded frames means nothing."""
        num_frames, device = noisy.shape[1], noisy.device
        speaker = speaker[:, None].expand(-1, num_frames, -1)
        hidden = self.input(torch.cat([noisy, prompt, conditions, speaker], dim=2), cache)
        if cache is None:
            chunk_size = self.chunk_size if streaming else 0
            visible = attention_visibility(num_frames, mask, chunk_size, device, num_left_chunks)
            rotation = self._rotation([0], num_frames, device)
        else:
            visible = cache.visible
            rotation = self._rotation(cache.lengths[:1] if cache.uniform else cache.lengths, num_frames, device)
        for layer, time in zip(self.layers, times, strict=False):
            hidden = layer(hidden, time, visible, rotation, mask, cache)
        scale, shift = times[-1][:, None].chunk(2, dim=2)
        return self.out_proj(self.layer_norm(hidden) * (1 + scale) + shift)

    def _rotation(self, starts: list[int], num_frames: int, device: torch.device) -> tuple[Tensor, Tensor]:
        position = torch.tensor(starts, device=device)[:, None] + torch.arange(num_frames, device=device)
        angles = position[..., None].float() * rotary_frequencies(self.head_dim, device)
        angles = angles.repeat_interleave(2, dim=-1)
        return angles.cos(), angles.sin()
