"""Convolutions and norms over frames in `(batch, frames, channels)` layout, the layout of the layers around them.

Shape legend: `b` batch, `t` frames, `c` channels. In every mask 1 = real.
"""

import torch
from torch import Tensor, nn

from .causal_cache import CausalCache


class FrameConv1d(nn.Conv1d):
    """Convolution over frames as one product of matrices: its few taps lie beside each other in every frame.

    `causal` pads `kernel - 1` zero frames in front and none behind, otherwise `kernel // 2` on both sides.
    """

    cache_index = 0

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, causal: bool = False, stride: int = 1
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride=stride)
        self.causal = causal

    def forward(self, hidden: Tensor, cache: CausalCache | None = None) -> Tensor:
        """`(b, t, c)` → `(b, t', c')`; with a `cache` (causal only) the frames of earlier steps come in front."""
        kernel, step = self.kernel_size[0], self.stride[0]
        if cache is not None:
            hidden = cache.extend_convolution(self.cache_index, hidden, kernel - 1)
        else:
            edges = (kernel - 1, 0) if self.causal else (kernel // 2, kernel // 2)
            hidden = nn.functional.pad(hidden, (0, 0, *edges))
        return self.convolve(hidden, step)

    def convolve(self, hidden: Tensor, step: int = 1) -> Tensor:
        """Without padding: `(b, t, c)` → `(b, (t - kernel) // step + 1, c')`."""
        kernel = self.kernel_size[0]
        last = (hidden.shape[1] - kernel) // step * step
        taps = torch.cat([hidden[:, tap : tap + last + 1 : step] for tap in range(kernel)], dim=2)
        return self.multiply(taps)

    def multiply(self, taps: Tensor) -> Tensor:
        """The product itself, `(b, t', kernel * c)` → `(b, t', c')`."""
        return nn.functional.linear(taps, self.flat_weight(), self.bias)

    def flat_weight(self) -> Tensor:
        """The weight as that of a linear layer, `(c', kernel * c)`: tap after tap."""
        return self.weight.permute(0, 2, 1).flatten(1)


class FrameConvTranspose1d(nn.ConvTranspose1d):
    """Twice as many frames: kernel 4, stride 2, one frame cut at both ends."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, kernel_size=4, stride=2, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        """`(b, t, c)` → `(b, 2t, c)`."""
        return super().forward(hidden.transpose(1, 2)).transpose(1, 2)


class FrameGroupNorm(nn.GroupNorm):
    """Group norm over frames and the channels of a group; a mask leaves padding out of the statistics."""

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """`(b, t, c)`, mask `(b, t)` or `None` = all frames count → `(b, t, c)`."""
        if mask is None:
            channels_first = hidden.transpose(1, 2)
            normed = nn.functional.group_norm(channels_first, self.num_groups, self.weight, self.bias, self.eps)
            return normed.transpose(1, 2)
        grouped = hidden.unflatten(2, (self.num_groups, -1))  # (b, t, groups, c / groups)
        real = mask[:, :, None, None].to(hidden.dtype)
        count = real.sum(dim=1, keepdim=True) * grouped.shape[3]
        mean = (grouped * real).sum(dim=(1, 3), keepdim=True) / count
        centred = grouped - mean
        variance = (centred * real).square().sum(dim=(1, 3), keepdim=True) / count
        normed = (centred * torch.rsqrt(variance + self.eps)).flatten(2)
        return normed * self.weight + self.bias


def masked(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """`hidden (b, t, c)` with padded frames at zero; `mask (b, t)` or `None` = no padding."""
    return hidden if mask is None else hidden * mask[..., None].to(hidden.dtype)
