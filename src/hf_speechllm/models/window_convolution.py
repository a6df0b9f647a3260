"""Convolutions without padding, as a product over windows of frames.

Shape legend: `b` batch, `t` frames, `c` channels.
"""

from torch import Tensor, nn


class WindowConv1d(nn.Conv1d):
    """`nn.Conv1d` that can also be had in `(batch, frames, channels)` layout: the frames of a window lie one behind
    the other in memory, so that a window is a row of a matrix.

    Of one group, without padding and dilation.
    """

    def convolve(self, frames: Tensor) -> Tensor:
        """`(b, t, c)` of any float type → `(b, (t - kernel) // stride + 1, c')`."""
        width = frames.shape[2]
        return self.multiply(frames.flatten(1).unfold(1, self.kernel_size[0] * width, self.stride[0] * width))

    def multiply(self, windows: Tensor) -> Tensor:
        """The product itself, `(b, t', kernel * c)` → `(b, t', c')`."""
        return nn.functional.linear(windows.to(self.weight.dtype), self.flat_weight(), self.bias)

    def flat_weight(self) -> Tensor:
        """The weight as that of a linear layer, `(c', kernel * c)`: tap after tap."""
        return self.weight.permute(0, 2, 1).flatten(1)
