"""Two convolutions that let every token see a few tokens after it, as the first layer of a stream.

Upstream: `PreLookaheadLayer` in `cosyvoice/transformer/upsample_encoder.py`.

Shape legend: `b` batch, `n` tokens, `c` channels.
"""

from torch import Tensor, nn

from .causal_cache import CausalCache
from .frame_convolution import FrameConv1d


class LookaheadConvolution(nn.Module):
    """A convolution over the token and `num_lookahead` after it, a causal one of kernel 3, and a residual."""

    def __init__(self, channels: int, inner_channels: int, num_lookahead: int) -> None:
        super().__init__()
        self.num_lookahead = num_lookahead
        self.conv1 = FrameConv1d(channels, inner_channels, num_lookahead + 1)
        self.conv2 = FrameConv1d(inner_channels, channels, 3, causal=True)

    def forward(self, hidden: Tensor) -> Tensor:
        """`(b, n, c)` → `(b, n, c)`; what comes after the last token is zero."""
        return self.step(nn.functional.pad(hidden, (0, 0, 0, self.num_lookahead)), None)

    def step(self, hidden: Tensor, cache: CausalCache | None) -> Tensor:
        """`(b, n + num_lookahead, c)`, the last of which are seen only → `(b, n, c)`."""
        inner = nn.functional.leaky_relu(self.conv1.convolve(hidden))
        return self.conv2(inner, cache) + hidden[:, : inner.shape[1]]
