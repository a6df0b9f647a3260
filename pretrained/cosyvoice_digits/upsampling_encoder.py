"""Encoder of CosyVoice 2's flow: tokens at 25 Hz in, conditions at 50 Hz out, looking only a few tokens ahead.

Upstream: `cosyvoice/transformer/upsample_encoder.py`.

Shape legend: `b` batch, `n` tokens, `c` channels. In every mask 1 = real.
"""

import torch
from torch import Tensor, nn

from .causal_cache import CausalCache, number_layers
from .frame_convolution import FrameConv1d, masked
from .lookahead_convolution import LookaheadConvolution
from .relative_position_encoder import (
    FrameEmbedding,
    RelativePositionAttention,
    RelativePositionLayer,
    RelativePositions,
    relative_positions,
    relative_positions_of_step,
)
from .unet_1d import attention_visibility


class UpsamplingEncoder(nn.Module):
    """Look-ahead, layers, every frame twice and a causal convolution, layers, norm."""

    ratio = 2

    def __init__(self, config) -> None:
        super().__init__()
        size = config.hidden_size
        self.normalize_before = config.normalize_before
        self.invariant = config.padding == "invariant"
        self.chunk_size = config.encoder_chunk_size
        self.embed = FrameEmbedding(size, config)
        self.lookahead = LookaheadConvolution(size, size, config.num_lookahead_tokens)
        self.layers = nn.ModuleList(RelativePositionLayer(config) for _ in range(config.num_hidden_layers))
        self.upsample_conv = FrameConv1d(size, size, 2 * self.ratio + 1, causal=True)
        self.upsampled_embed = FrameEmbedding(size, config)
        self.upsampled_layers = nn.ModuleList(
            RelativePositionLayer(config) for _ in range(config.num_upsampled_layers)
        )
        self.layer_norm = nn.LayerNorm(size, eps=1e-5)
        number_layers(self, FrameConv1d)
        number_layers(self, RelativePositionAttention)

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor | None,
        streaming: bool = False,
        num_following: int = 0,
        num_left_chunks: int = -1,
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            hidden (`(b, n, c)`): embedded tokens. mask (`(b, n)`, bool, `None` = no padding).
            streaming: layers see their chunk and `num_left_chunks` before it, all of them where that is negative.
            num_following: the last tokens of every row that only serve as look-ahead and have no frames.

        Returns:
            frames `(b, 2(n - num_following), c)` and their mask.
        """
        hidden = self.embed(hidden)
        if self.invariant:
            # Upstream's padded tokens are the embedding's bias, which the last tokens of a row see ahead of them.
            hidden = masked(hidden, mask)
        hidden = self.lookahead(hidden)
        if num_following:
            if mask is not None:
                mask = mask[:, num_following:]  # real ones first
            hidden = hidden[:, : hidden.shape[1] - num_following]
        chunk_size = self.chunk_size if streaming else 0
        hidden = self._layers(self.layers, self.embed, hidden, mask, chunk_size, num_left_chunks)
        hidden = self.upsample_conv(hidden.repeat_interleave(self.ratio, dim=1))
        if mask is not None:
            mask = mask.repeat_interleave(self.ratio, dim=1)
        hidden = self.upsampled_embed(hidden)
        hidden = self._layers(
            self.upsampled_layers, self.upsampled_embed, hidden, mask, chunk_size * self.ratio, num_left_chunks
        )
        return (self.layer_norm(hidden) if self.normalize_before else hidden), mask

    def _layers(
        self,
        layers: nn.ModuleList,
        embed: FrameEmbedding,
        hidden: Tensor,
        mask: Tensor | None,
        chunk_size: int,
        num_left_chunks: int,
    ) -> Tensor:
        positions = embed.drop_positions(relative_positions(hidden.shape[1], hidden.shape[2], hidden.device))
        visible = attention_visibility(hidden.shape[1], mask, chunk_size, hidden.device, num_left_chunks)
        for layer in layers:
            hidden = layer(hidden, positions, visible)
        return hidden

    def new_caches(
        self, batch_size: int, num_left_chunks: int = -1, dtype: torch.dtype | None = None
    ) -> tuple[CausalCache, CausalCache]:
        """For a stream: what is remembered at the rate of the tokens, and at that of the frames."""
        sizes = (self.chunk_size, self.chunk_size * self.ratio)
        tokens, frames = (CausalCache([0] * batch_size, size, num_left_chunks, dtype) for size in sizes)
        return tokens, frames

    def step(self, hidden: Tensor, counts: list[int], caches: tuple[CausalCache, CausalCache]) -> Tensor:
        """The next tokens of a stream.

        Args:
            hidden (`(b, n + num_lookahead, c)`): row `b` has `counts[b]` tokens and those after them, then zeros, of
                which `embed_step` makes what is needed here.
            counts: its largest number is `n`.

        Returns:
            frames `(b, 2n, c)`, of which the first `2 counts[b]` are real.
        """
        tokens, frames = caches
        tokens.begin(counts, hidden.device)
        hidden = self.lookahead.step(hidden, tokens)
        positions = relative_positions_of_step(tokens, hidden.shape[2], hidden.device)
        hidden = self._layers_of_step(self.layers, hidden, positions, tokens)
        tokens.end()
        frames.begin([self.ratio * count for count in counts], hidden.device)
        hidden = self.upsample_conv(hidden.repeat_interleave(self.ratio, dim=1), frames)
        hidden = self.upsampled_embed(hidden)
        positions = relative_positions_of_step(frames, hidden.shape[2], hidden.device)
        hidden = self._layers_of_step(self.upsampled_layers, hidden, positions, frames)
        frames.end()
        return self.layer_norm(hidden) if self.normalize_before else hidden

    @staticmethod
    def _layers_of_step(
        layers: nn.ModuleList, hidden: Tensor, positions: RelativePositions, cache: CausalCache
    ) -> Tensor:
        for layer in layers:
            hidden = layer(hidden, positions, cache.visible, cache)
        return hidden

    def embed_step(self, hidden: Tensor, available: Tensor) -> Tensor:
        """Embedded tokens of a step, zero where there is none: `(b, n', c)`, mask `(b, n')`."""
        return torch.where(available[..., None], self.embed(hidden), 0.0)
