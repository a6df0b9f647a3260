"""SAN-M: self-attention with a memory block, the encoder of Paraformer and SenseVoice (https://arxiv.org/abs/2006.01713).

The memory is a depthwise convolution (FSMN) over the attention's values, added to its output. Parameter names are
those of transformers' `fun_asr_nano`, which has the same encoder; upstream: `funasr/models/sanm`,
`funasr/models/sense_voice`.

Shape legend: `b` batch, `t` frames, `s` keys, `h` heads, `d` size of a head, `c` channels. In every mask True = real.
"""

import math

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import MultiHeadAttention
from .convolution import DepthwiseConv1d


def sanm_positions(positions: Tensor, size: int) -> Tensor:
    """Table rows `(..., size)` float32 for integer `positions` `(...)`: all sines, then all cosines.

    Upstream counts frames from 1, adds the rows at the width of the features (after low-frame-rate stacking), and
    spreads the exponents over `size / 2 - 1` steps (`SinusoidalPositionEncoder`).
    """
    steps = torch.arange(size // 2, dtype=torch.float32, device=positions.device)
    phase = positions[..., None].float() * torch.exp(steps * (-math.log(10000.0) / (size / 2 - 1)))
    return torch.cat([phase.sin(), phase.cos()], dim=-1)


class FsmnMemory(nn.Module):
    """Feed-forward sequential memory: `mask * dropout(conv(mask * x) + mask * x)`.

    `shift` moves the window towards the past; with `shift = kernel_size // 2` it is causal, and can be streamed.
    """

    def __init__(self, channels: int, kernel_size: int, shift: int, dropout: float) -> None:
        super().__init__()
        self.left_context = (kernel_size - 1) // 2 + shift
        self.right_context = kernel_size - 1 - self.left_context
        self.symmetric = self.left_context == self.right_context
        self.conv = DepthwiseConv1d(channels, kernel_size, self.left_context if self.symmetric else 0, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, hidden_states: Tensor, frame_mask: Tensor | None, past: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            hidden_states (`(b, t, c)`), frame_mask (`(b, t)`, `None` = no padding).
            past (`(b, left_context, c)`): inputs before a streamed piece; causal windows only. `None` = zeros.

        Returns:
            memory `(b, t, c)`, and the inputs that the next piece needs as its `past`.
        """
        padded = None if frame_mask is None else ~frame_mask[..., None]
        if padded is not None:
            hidden_states = hidden_states.masked_fill(padded, 0.0)
        inputs = hidden_states
        if past is not None:
            inputs = torch.cat([past, inputs], dim=1)
        elif not self.symmetric:
            inputs = nn.functional.pad(inputs, (0, 0, self.left_context, self.right_context))
        memory = self.dropout(self.conv(inputs) + hidden_states)
        if padded is not None:
            memory = memory.masked_fill(padded, 0.0)
        return memory, inputs[:, inputs.shape[1] - self.left_context :]


class SanmAttention(MultiHeadAttention):
    """Self-attention plus the memory of its values. The first layer also maps the features to the hidden size."""

    def __init__(self, config, input_size: int) -> None:
        size = config.hidden_size
        super().__init__(
            config, size, config.num_attention_heads, None, None, config.attention_dropout, True, True, True
        )
        if input_size != size:
            self.q_proj = nn.Linear(input_size, size)
            self.k_proj = nn.Linear(input_size, size)
            self.v_proj = nn.Linear(input_size, size)
        self.fsmn = FsmnMemory(size, config.fsmn_kernel_size, config.fsmn_shift, config.attention_dropout)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        frame_mask: Tensor | None,
        past: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor]]:
        """
        Args:
            hidden_states (`(b, t, input_size)`), frame_mask (`(b, t)`).
            attention_mask: bool `(b or 1, 1, t or 1, s)`; `None` = every key is visible.
            past: keys and values of earlier windows, `(b, h, s - t, d)` each. The memory sees the window alone.

        Returns:
            output `(b, t, c)`, attention weights (eager only), keys and values with the past `(b, h, s, d)`.
        """
        query = self.split_heads(self.q_proj(hidden_states))
        key = self.split_heads(self.k_proj(hidden_states))
        values = self.v_proj(hidden_states)
        memory, _ = self.fsmn(values, frame_mask)
        value = self.split_heads(values)
        if past is not None:
            key = torch.cat([past[0], key], dim=2)
            value = torch.cat([past[1], value], dim=2)
        context, weights = self.attend(query, key, value, attention_mask)
        return self.o_proj(context.flatten(2)) + memory, weights, (key, value)

    def forward_joined(self, hidden_states: Tensor, lengths: list[int]) -> Tensor:
        """Utterances of `lengths` one behind the other, `(1, t, input_size)` → `(1, t, c)`: the projections see all
        frames at once, memory and attention those of one utterance."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        projected = [projection(hidden_states).split(lengths, dim=1) for projection in projections]
        contexts, memories = [], []
        for query, key, values in zip(*projected, strict=True):
            memory, _ = self.fsmn(values, None)
            heads = (self.split_heads(query), self.split_heads(key), self.split_heads(values))
            context, _ = self.attend(*heads, None)
            contexts.append(context.flatten(2))
            memories.append(memory)
        return self.o_proj(torch.cat(contexts, dim=1)) + torch.cat(memories, dim=1)


class SanmFeedForward(nn.Module):
    """`fc2(dropout(relu(fc1(x))))`."""

    def __init__(self, config) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.dropout(nn.functional.relu(self.fc1(hidden_states), inplace=True)))


class SanmEncoderLayer(GradientCheckpointingLayer):
    """Pre-norm layer. The first one has no residual around its attention where the sizes differ."""

    def __init__(self, config, input_size: int, add_norm: bool) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(input_size, eps=config.layer_norm_eps)
        self.self_attn = SanmAttention(config, input_size)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SanmFeedForward(config)
        self.final_layernorm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if add_norm else nn.Identity()
        )
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.has_residual = input_size == config.hidden_size

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        frame_mask: Tensor | None,
        past: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor]]:
        """Arguments and results as of `SanmAttention`."""
        attended, weights, present = self.self_attn(
            self.input_layernorm(hidden_states), attention_mask, frame_mask, past
        )
        return self._transform(hidden_states, attended), weights, present

    def forward_joined(self, hidden_states: Tensor, lengths: list[int]) -> Tensor:
        """As `SanmAttention.forward_joined`."""
        return self._transform(
            hidden_states, self.self_attn.forward_joined(self.input_layernorm(hidden_states), lengths)
        )

    def _transform(self, hidden_states: Tensor, attended: Tensor) -> Tensor:
        """What follows the attention."""
        attended = self.dropout(attended)
        hidden_states = hidden_states + attended if self.has_residual else attended
        hidden_states = hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))
        return self.final_layernorm(hidden_states)


class SanmEncoder(nn.Module):
    """Scaled features with positions, then the layers. The length does not change.

    `num_timestamp_prediction_layers` of the layers (SenseVoice's `tp_encoders`) come after a norm of the others; the
    last layer has a norm too, so that each half ends in one.
    """

    def __init__(self, config) -> None:
        super().__init__()
        self.config = config
        self.scale = config.hidden_size**0.5
        normed = {config.num_hidden_layers - config.num_timestamp_prediction_layers - 1, config.num_hidden_layers - 1}
        self.layers = nn.ModuleList(
            SanmEncoderLayer(config, config.input_size if index == 0 else config.hidden_size, index in normed)
            for index in range(config.num_hidden_layers)
        )

    def embed(self, features: Tensor, start: int = 0) -> Tensor:
        """Features `(b, t, input_size)` scaled, with the positions `start + 1 … start + t` added."""
        positions = torch.arange(start + 1, start + features.shape[1] + 1, device=features.device)
        return features * self.scale + sanm_positions(positions, features.shape[2]).to(features.dtype)

    def forward(
        self, features: Tensor, frame_mask: Tensor | None, output_hidden_states: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """One pass over whole utterances.

        Args:
            features (`(b, t, input_size)`), frame_mask (`(b, t)`, `None` = no padding).

        Returns:
            the last layer's output `(b, t, hidden_size)`; padded frames hold values that mean nothing. With
            `output_hidden_states` also the input of the first layer and the output of every layer.
        """
        attention_mask = None if frame_mask is None else frame_mask[:, None, None, :]
        hidden_states = self.embed(features)
        if self.training and self.layers[0].gradient_checkpointing:
            # Reentrant checkpointing gives a layer gradients only where an input asks for one; features do not.
            hidden_states.requires_grad_()
        collected = [hidden_states]
        for layer in self.layers:
            hidden_states, _, _ = layer(hidden_states, attention_mask, frame_mask)
            if output_hidden_states:
                collected.append(hidden_states)
        return hidden_states, tuple(collected) if output_hidden_states else None

    def forward_joined(self, utterances: list[Tensor]) -> list[Tensor]:
        """Whole utterances `(t, input_size)` of any lengths at once, without padding: `(t, hidden_size)` each.

        A product over many frames takes less time than the products over each utterance, since the weights are read
        once; no dropout, no checkpointing."""
        lengths = [len(frames) for frames in utterances]
        hidden_states = torch.cat([self.embed(frames[None]) for frames in utterances], dim=1)
        for layer in self.layers:
            hidden_states = layer.forward_joined(hidden_states, lengths)
        return list(hidden_states[0].split(lengths))
