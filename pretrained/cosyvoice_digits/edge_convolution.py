"""Convolutions over `(batch, channels, time)` whose edges are zeros, on any side, and their two ways to run.

A network is written once, against a *pass*: [`WholePass`] sees whole sequences, [`StreamPass`] the next piece of
sequences without an end. What a stream gives, piece by piece, is what the whole pass gives: a convolution that looks
ahead gives its outputs that much later, and where two branches meet ([`StreamPass.add`]), the one that is early waits.

Shape legend: `b` batch, `c` channels, `t` positions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm


class EdgeConv1d(nn.Conv1d):
    """A convolution over its input with `left` zeros before and `right` zeros after it.

    A double input is convolved in double precision, whatever the type of the weights.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        dilation: int = 1,
        left: int = 0,
        right: int = 0,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, dilation=dilation)
        self.left, self.right = left, right
        self.span = (kernel_size - 1) * dilation

    @classmethod
    def centred(cls, in_channels: int, out_channels: int, kernel_size: int, dilation: int = 1) -> "EdgeConv1d":
        """As many outputs as inputs; looks as far ahead as back. The kernel must be odd."""
        edge = (kernel_size - 1) * dilation // 2
        return cls(in_channels, out_channels, kernel_size, dilation=dilation, left=edge, right=edge)

    @classmethod
    def causal(cls, in_channels: int, out_channels: int, kernel_size: int, dilation: int = 1) -> "EdgeConv1d":
        """As many outputs as inputs, of which none sees a later input."""
        return cls(in_channels, out_channels, kernel_size, dilation=dilation, left=(kernel_size - 1) * dilation)

    def whole(self, hidden: Tensor) -> Tensor:
        """`(b, in, t)` with its edges to `(b, out, t')`."""
        edge = max(self.left, self.right)
        if self.left == self.right:
            return self._convolve(hidden, edge)
        if self.stride[0] > 1:
            return self._convolve(functional.pad(hidden, (self.left, self.right)), 0)
        # Outputs that are too many on one side cost less than a copy of the input with its edge.
        first = edge - self.left
        count = hidden.shape[-1] + self.left + self.right - self.span
        return self._convolve(hidden, edge)[..., first : first + count]

    def inside(self, hidden: Tensor) -> Tensor:
        """`hidden` as it is, without edges."""
        return self._convolve(hidden, 0)

    def _convolve(self, hidden: Tensor, padding: int) -> Tensor:
        weight, bias = self.weight, self.bias
        if hidden.dtype == torch.float64 and weight.dtype != torch.float64:
            weight, bias = self._double_weight(), bias.double()
        elif hidden.device.type == "cpu":
            # An image of height 1: a hidden state whose channels lie side by side in memory, as the first layer gets
            # and all others keep, needs no reordering.
            image, kernel = hidden[:, :, None], weight[:, :, None]
            stride, dilation = (1, self.stride[0]), (1, self.dilation[0])
            return functional.conv2d(image, kernel, bias, stride, (0, padding), dilation)[:, :, 0]
        return functional.conv1d(hidden, weight, bias, self.stride, padding, self.dilation)

    def _double_weight(self) -> Tensor:
        if not parametrize.is_parametrized(self, "weight"):
            return self.weight.double()
        # The product of magnitude and direction in double precision, too.
        parts = self.parametrizations.weight
        return torch._weight_norm(parts.original1.double(), parts.original0.double(), 0)


class EdgeConvTranspose1d(nn.ConvTranspose1d):
    """A transposed convolution, trimmed on both sides so that `t` positions become `t * stride`.

    The kernel must be the stride and an even number more.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding=(kernel_size - stride) // 2)
        # Earlier inputs that reach into the outputs of the next.
        self.reach = (kernel_size - 1) // stride

    def whole(self, hidden: Tensor) -> Tensor:
        """`(b, in, t)` to `(b, out, t * stride)`."""
        return self._spread(hidden, self.padding[0])

    def untrimmed(self, hidden: Tensor) -> Tensor:
        """`(b, out, (t - 1) * stride + kernel)`: position 0 is `padding` before the first output."""
        return self._spread(hidden, 0)

    def _spread(self, hidden: Tensor, padding: int) -> Tensor:
        if hidden.device.type != "cpu":
            return functional.conv_transpose1d(hidden, self.weight, self.bias, self.stride, padding)
        # As for the other convolutions.
        image, kernel = hidden[:, :, None], self.weight[:, :, None]
        stride = (1, self.stride[0])
        return functional.conv_transpose2d(image, kernel, self.bias, stride, (0, padding))[:, :, 0]


class RepeatConv1d(EdgeConv1d):
    """Every position repeated `rate` times, then a causal convolution: `t` positions become `t * rate`.

    Neither is done as it is said: several taps of the kernel fall on repetitions of one input, so that their sum, one
    for each of the `rate` outputs of an input, is convolved with the inputs themselves. It is the same, of a fraction
    of the work.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, rate: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size)
        self.rate = rate
        # Of the inputs before the newest, so many are seen.
        self.left = self.span = -(-(kernel_size - 1) // rate)

    def whole(self, hidden: Tensor) -> Tensor:
        """`(b, in, t)` to `(b, out, t * rate)`."""
        return self._convolve(hidden, self.left)[..., : hidden.shape[-1] * self.rate]

    def _convolve(self, hidden: Tensor, padding: int) -> Tensor:
        size, rate = self.kernel_size[0], self.rate
        taps = torch.arange(size, device=hidden.device)
        outputs = torch.arange(rate, device=hidden.device)[:, None]
        # Output `o` of an input sees with tap `j` what lies `size - 1 - j` repetitions before it.
        seen = (outputs - (size - 1) + taps).div(rate, rounding_mode="floor") + self.left
        shares = functional.one_hot(seen, self.left + 1).to(self.weight.dtype)
        weight = self.weight
        kernels = torch.cat([weight @ share for share in shares])[:, :, None]
        image = hidden[:, :, None]
        spread = functional.conv2d(image, kernels, self.bias.repeat(rate), padding=(0, padding))[:, :, 0]
        # (b, rate * out, t) to (b, out, t * rate); nothing moves where channels lie side by side in memory.
        spread = spread.transpose(1, 2).reshape(len(hidden), -1, self.out_channels)
        return spread.transpose(1, 2)


class WholePass:
    """Sequences from beginning to end; rows of a batch may end earlier.

    Args:
        lengths (`(b,)`, int64, *optional*): what the rows have of the first axis, in its positions; default all of it.
        masked: whether to zero what lies after a row's end behind every layer, as layers that look ahead need it.
        rate, extra: the layers give `rate` positions for one of the first axis, and `extra` more.
    """

    def __init__(self, lengths: Tensor | None = None, masked: bool = True, rate: int = 1, extra: int = 0) -> None:
        self.lengths = lengths
        self.masked = masked and lengths is not None
        self.rate, self.extra = rate, extra

    def at(self, rate: int, extra: int = 0) -> "WholePass":
        """The pass for layers that give `rate` positions for one of the first axis, and `extra` more."""
        return WholePass(self.lengths, self.masked, rate, extra)

    def zero_padding(self, hidden: Tensor) -> Tensor:
        """`hidden` `(b, c, t)`, 0 after the end of each row."""
        if not self.masked:
            return hidden
        ends = self.lengths * self.rate + self.extra
        real = torch.arange(hidden.shape[-1], device=hidden.device) < ends[:, None]
        return hidden * real[:, None].to(hidden.dtype)

    def conv(self, layer: EdgeConv1d, hidden: Tensor) -> Tensor:
        return self.zero_padding(layer.whole(hidden))

    def upsample(self, layer: EdgeConvTranspose1d | RepeatConv1d, hidden: Tensor) -> Tensor:
        if isinstance(layer, RepeatConv1d):
            return self.conv(layer, hidden)
        return self.zero_padding(layer.whole(hidden))

    def add(self, *branches: Tensor) -> Tensor:
        """Sum of branches of one length. The first is overwritten where no gradient is needed."""
        return _sum(branches)

    def reflect_first(self, hidden: Tensor) -> Tensor:
        """Put the second position in front of the first, once more."""
        # As an image, which keeps the channels side by side in memory.
        image = hidden[:, :, None]
        return torch.cat((image[..., 1:2], image), dim=-1)[:, :, 0]


@dataclass
class LayerPast:
    """What one layer remembers.

    Args:
        tensors: inputs that are still needed, or results that wait for another branch.
        begun: whether the beginning of the sequence is behind it.
    """

    tensors: tuple[Tensor, ...]
    begun: bool = True


@dataclass
class StreamPast:
    """What all layers remember, in the order in which they run."""

    layers: list[LayerPast] = field(default_factory=list)


class StreamPass:
    """The next piece of sequences that advance together.

    Args:
        past: what the piece before left in `new`; `None` at the beginning. It is not changed.
        is_last: nothing comes after this piece.

    Attributes:
        new: the past of the next piece, once the network has run.
    """

    def __init__(self, past: StreamPast | None, is_last: bool) -> None:
        self.is_last = is_last
        self.new = StreamPast()
        self._past: Iterator[LayerPast] = iter(past.layers if past is not None else ())

    def at(self, rate: int, extra: int = 0) -> "StreamPass":
        """The same pass: its rows have one length."""
        return self

    def zero_padding(self, hidden: Tensor) -> Tensor:
        return hidden

    def take(self) -> LayerPast | None:
        """What the layer that runs now has left at the piece before."""
        return next(self._past, None)

    def keep(self, *tensors: Tensor, begun: bool = True) -> None:
        """What the layer that runs now leaves to the next piece."""
        # Not views, which would keep the whole piece alive.
        self.new.layers.append(LayerPast(tuple(tensor.clone() for tensor in tensors), begun))

    def conv(self, layer: EdgeConv1d, hidden: Tensor) -> Tensor:
        past = self.take()
        left = hidden.new_zeros(*hidden.shape[:2], layer.left) if past is None else past.tensors[0]
        inputs = torch.cat((left, hidden), dim=-1)
        if self.is_last and layer.right:
            inputs = functional.pad(inputs, (0, layer.right))
        stride = layer.stride[0]
        count = max(0, (inputs.shape[-1] - layer.span - 1) // stride + 1)
        self.keep(inputs[..., count * stride :])
        if count == 0:
            return hidden.new_zeros(len(hidden), layer.out_channels, 0)
        return layer.inside(inputs[..., : (count - 1) * stride + layer.span + 1])

    def upsample(self, layer: EdgeConvTranspose1d | RepeatConv1d, hidden: Tensor) -> Tensor:
        if isinstance(layer, RepeatConv1d):
            return self.conv(layer, hidden)
        past = self.take()
        before = 0 if past is None else past.tensors[0].shape[-1]
        inputs = hidden if past is None else torch.cat((past.tensors[0], hidden), dim=-1)
        begun = inputs.shape[-1] > 0
        self.keep(inputs[..., max(0, inputs.shape[-1] - layer.reach) :], begun=begun)
        if not begun or not (hidden.shape[-1] or self.is_last):
            return hidden.new_zeros(len(hidden), layer.out_channels, 0)
        output = layer.untrimmed(inputs)
        rate, edge = layer.stride[0], layer.padding[0]
        # Outputs before the reach of the next input are settled; those of the piece before have been given.
        first = before * rate if past is not None and past.begun else edge
        return output[..., first : inputs.shape[-1] * rate + (edge if self.is_last else 0)]

    def add(self, *branches: Tensor) -> Tensor:
        past = self.take()
        if past is not None:
            branches = tuple(torch.cat(pair, dim=-1) for pair in zip(past.tensors, branches, strict=True))
        ready = min(branch.shape[-1] for branch in branches)
        self.keep(*(branch[..., ready:] for branch in branches))
        return _sum([branch[..., :ready] for branch in branches])

    def reflect_first(self, hidden: Tensor) -> Tensor:
        past = self.take()
        if past is not None and past.begun:
            self.keep()
            return hidden
        inputs = hidden if past is None else torch.cat((past.tensors[0], hidden), dim=-1)
        if inputs.shape[-1] < 2:
            self.keep(inputs, begun=False)
            return inputs[..., :0]
        self.keep()
        return torch.cat((inputs[..., 1:2], inputs), dim=-1)


def _sum(branches: Sequence[Tensor]) -> Tensor:
    total = branches[0]
    for branch in branches[1:]:
        total = total + branch if torch.is_grad_enabled() else total.add_(branch)
    return total


# Either way to run a network.
Pass = WholePass | StreamPass


def normalize_weights(module: nn.Module) -> None:
    """Keep the weights of `module` as magnitude and direction, to train them."""
    weight_norm(module)


def fold_normalized_weights(module: nn.Module) -> None:
    """Turn magnitudes and directions of all weights inside `module` into plain weights."""
    for part in module.modules():
        if parametrize.is_parametrized(part, "weight"):
            parametrize.remove_parametrizations(part, "weight")
