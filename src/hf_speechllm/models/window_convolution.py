"""Convolutions without padding, as a product over windows of frames.

Shape legend: `b` batch, `t` frames, `c` channels.
"""

from collections.abc import Callable

from torch import Tensor, nn


Activation = Callable[[Tensor], Tensor]


class WindowConv1d(nn.Conv1d):
    """`nn.Conv1d` that can also be had in `(batch, frames, channels)` layout: the frames of a window lie one behind
    the other in memory, so that a window is a row of a matrix.

    Of one group, without padding and dilation.
    """

    def convolve(self, frames: Tensor, activation: Activation | None = None) -> Tensor:
        """`(b, t, c)` of any float type → `(b, (t - kernel) // stride + 1, c')`, through the activation if given."""
        width = frames.shape[2]
        windows = frames.flatten(1).unfold(1, self.kernel_size[0] * width, self.stride[0] * width)
        return self.multiply(windows, activation)

    def multiply(self, windows: Tensor, activation: Activation | None = None) -> Tensor:
        """The product itself, `(b, t', kernel * c)` → `(b, t', c')`."""
        product = nn.functional.linear(windows.to(self.weight.dtype), self.flat_weight(), self.bias)
        return product if activation is None else activation(product)

    def flat_weight(self) -> Tensor:
        """The weight as that of a linear layer, `(c', kernel * c)`: tap after tap."""
        return self.weight.permute(0, 2, 1).flatten(1)
