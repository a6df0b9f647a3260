"""SEANet encoder and decoder: convolutions that change the rate, residual units, and an LSTM at frame rate.

Source: EnCodec (https://arxiv.org/abs/2210.13438) as SpeechTokenizer has it (`speechtokenizer/modules/seanet.py`): not
causal, reflected edges, a 1x1 convolution as the shortcut of a residual unit, an LSTM that may read both ways in the
encoder and comes right after the first convolution in the decoder.

Shape legend: `b` batch, `c` channels, `t` positions at some rate. All modules map `(b, c, t)` to `(b, c', t')`. All
rows of a batch have the length `t`: the edges are reflected.

Streaming: the decoder sees a bounded number of later positions and its LSTM reads forward, so what it makes of a whole
can be made piece by piece. `stream` takes the next positions and what was remembered of those before; it returns what
is settled by now. The encoder has no such method: its LSTM reads backwards as well.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm


# Of the first and the last convolution.
_KERNEL_SIZE = 7


@dataclass
class ConvolutionPast:
    """Input that a convolution still needs.

    Args:
        inputs (`(b, c, n)`): the last positions. has_edge: the reflected left edge is in front of them, or was.
    """

    inputs: Tensor
    has_edge: bool


@dataclass
class SeanetDecoderState:
    """What the decoder remembers between two pieces of a stream, in the order of its layers.

    Args:
        convolutions: of every convolution with a kernel wider than 1.
        frames (`list` of `(b, c, n)`, n 0 or 1): the last input of every transposed convolution.
        shortcuts (`list` of `(b, c, n)`): input of every residual unit whose convolutions have not answered yet.
        lstm (two `(layers, b, c)`): hidden state and cell; `None` before the first frame.
    """

    convolutions: list[ConvolutionPast] = field(default_factory=list)
    frames: list[Tensor] = field(default_factory=list)
    shortcuts: list[Tensor] = field(default_factory=list)
    lstm: tuple[Tensor, Tensor] | None = None


class SeanetStream:
    """One step of a stream: hands the past to the layers in their order and collects the new one."""

    def __init__(self, past: SeanetDecoderState | None, is_last: bool) -> None:
        self.is_last = is_last
        self.new = SeanetDecoderState()
        self.lstm = None if past is None else past.lstm
        self._convolutions: Iterator[ConvolutionPast] = iter(past.convolutions if past else ())
        self._frames: Iterator[Tensor] = iter(past.frames if past else ())
        self._shortcuts: Iterator[Tensor] = iter(past.shortcuts if past else ())

    def convolution(self) -> ConvolutionPast | None:
        return next(self._convolutions, None)

    def frame(self) -> Tensor | None:
        return next(self._frames, None)

    def shortcut(self) -> Tensor | None:
        return next(self._shortcuts, None)


class Snake(nn.Module):
    """x + sin^2(alpha x) / (alpha + 1e-9) with one alpha a channel (https://arxiv.org/abs/2006.08195)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + (self.alpha + 1e-9).reciprocal() * torch.sin(self.alpha * hidden).square()


def make_activation(name: str, channels: int) -> nn.Module:
    """`"elu"` or `"snake"`, which has parameters."""
    return Snake(channels) if name == "snake" else nn.ELU()


def reflect_edges(hidden: Tensor, left: int, right: int) -> Tensor:
    """Reflect both ends. An input that is too short for it is continued by zeros first, as upstream."""
    missing = max(left, right) - hidden.shape[-1] + 1
    if missing <= 0:
        return functional.pad(hidden, (left, right), mode="reflect")
    padded = functional.pad(functional.pad(hidden, (0, missing)), (left, right), mode="reflect")
    return padded[..., : padded.shape[-1] - missing]


class ReflectConv1d(nn.Module):
    """A convolution over reflected edges: `t` positions become `ceil(t / stride)`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        dilation: int = 1,
        use_weight_norm: bool = True,
    ) -> None:
        super().__init__()
        conv = nn.Conv1d(in_channels, out_channels, kernel_size, stride, dilation=dilation)
        self.conv = weight_norm(conv) if use_weight_norm else conv
        span = (kernel_size - 1) * dilation - (stride - 1)
        self.stride, self.right = stride, span // 2
        self.left = span - self.right

    def forward(self, hidden: Tensor) -> Tensor:
        # The last window is filled by a longer reflection.
        extra = -hidden.shape[-1] % self.stride
        if self.left or self.right or extra:
            hidden = reflect_edges(hidden, self.left, self.right + extra)
        return self.conv(hidden)

    def stream(self, hidden: Tensor, step: SeanetStream) -> Tensor:
        """The next outputs; stride 1 only. They come `right` positions late, until the last piece."""
        if not self.left:
            return self.conv(hidden) if hidden.shape[-1] else self._nothing(hidden)
        past = step.convolution()
        has_edge = past is not None and past.has_edge
        inputs = hidden if past is None else torch.cat((past.inputs, hidden), dim=-1)
        if not has_edge:
            if step.is_last and inputs.shape[-1]:
                inputs = reflect_edges(inputs, self.left, self.right)
                has_edge = True
            elif inputs.shape[-1] > max(self.left, self.right):
                inputs = functional.pad(inputs, (self.left, 0), mode="reflect")
                has_edge = True
        elif step.is_last and self.right:
            inputs = functional.pad(inputs, (0, self.right), mode="reflect")
        span = self.left + self.right
        if not has_edge or inputs.shape[-1] <= span:
            step.new.convolutions.append(ConvolutionPast(inputs, has_edge))
            return self._nothing(hidden)
        step.new.convolutions.append(ConvolutionPast(inputs[..., inputs.shape[-1] - span :], has_edge))
        return self.conv(inputs)

    def _nothing(self, hidden: Tensor) -> Tensor:
        return hidden.new_empty(hidden.shape[0], self.conv.out_channels, 0)


class TrimmedConvTranspose1d(nn.Module):
    """A transposed convolution with a kernel of two strides, trimmed: `t` positions become `t * stride`."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, use_weight_norm: bool = True) -> None:
        super().__init__()
        conv = nn.ConvTranspose1d(in_channels, out_channels, 2 * stride, stride)
        self.conv = weight_norm(conv) if use_weight_norm else conv
        self.stride = stride
        self.right = stride // 2
        self.left = stride - self.right

    def forward(self, hidden: Tensor) -> Tensor:
        output = self.conv(hidden)
        return output[..., self.left : output.shape[-1] - self.right]

    def stream(self, hidden: Tensor, step: SeanetStream) -> Tensor:
        """The next outputs, `left` of them late: each position reaches over its own stride and the next."""
        past = step.frame()
        is_first = past is None or not past.shape[-1]
        inputs = hidden if past is None else torch.cat((past, hidden), dim=-1)
        step.new.frames.append(inputs[..., -1:])
        if not inputs.shape[-1] or not (hidden.shape[-1] or step.is_last):
            return hidden.new_empty(hidden.shape[0], self.conv.out_channels, 0)
        output = self.conv(inputs)
        # What the position before the first of these inputs adds is missing from the first stride, and what the next
        # input will add from the last.
        start = self.left if is_first else self.stride
        end = output.shape[-1] - (self.right if step.is_last else self.stride)
        return output[..., start:end]


class ResidualUnit(nn.Module):
    """Two convolutions with half of the channels between them, and a 1x1 convolution around them."""

    def __init__(
        self, channels: int, kernel_size: int, dilation: int, activation: str, use_weight_norm: bool = True
    ) -> None:
        super().__init__()
        inner = channels // 2
        self.act1 = make_activation(activation, channels)
        self.conv1 = ReflectConv1d(channels, inner, kernel_size, dilation=dilation, use_weight_norm=use_weight_norm)
        self.act2 = make_activation(activation, inner)
        self.conv2 = ReflectConv1d(inner, channels, 1, use_weight_norm=use_weight_norm)
        self.shortcut = ReflectConv1d(channels, channels, 1, use_weight_norm=use_weight_norm)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.shortcut(hidden) + self.conv2(self.act2(self.conv1(self.act1(hidden))))

    def stream(self, hidden: Tensor, step: SeanetStream) -> Tensor:
        """The next outputs, as late as those of the first convolution."""
        past = step.shortcut()
        waiting = hidden if past is None else torch.cat((past, hidden), dim=-1)
        inner = self.conv2.stream(self.act2(self.conv1.stream(self.act1(hidden), step)), step)
        ready = inner.shape[-1]
        step.new.shortcuts.append(waiting[..., ready:])
        return self.shortcut.stream(waiting[..., :ready], step) + inner


class SkipLstm(nn.Module):
    """An LSTM whose input is added to its output; one that reads both ways adds it to each half."""

    def __init__(self, channels: int, num_layers: int, bidirectional: bool = False) -> None:
        super().__init__()
        self.lstm = nn.LSTM(channels, channels, num_layers, bidirectional=bidirectional)

    def forward(self, hidden: Tensor) -> Tensor:
        return self._run(hidden, None)[0]

    def stream(self, hidden: Tensor, step: SeanetStream) -> Tensor:
        """The outputs of `hidden`, at once."""
        if not hidden.shape[-1]:
            step.new.lstm = step.lstm
            return hidden
        output, step.new.lstm = self._run(hidden, step.lstm)
        return output

    def _run(self, hidden: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        inputs = hidden.permute(2, 0, 1)
        output, past = self.lstm(inputs, past)
        if self.lstm.bidirectional:
            inputs = inputs.repeat(1, 1, 2)
        return (output + inputs).permute(1, 2, 0), past


class DownsamplingStage(nn.Module):
    """Residual units, then a strided convolution that doubles the channels."""

    def __init__(self, channels: int, stride: int, units: list[ResidualUnit], activation: str, norm: bool) -> None:
        super().__init__()
        self.units = nn.ModuleList(units)
        self.act = make_activation(activation, channels)
        self.downsample = ReflectConv1d(channels, 2 * channels, 2 * stride, stride, use_weight_norm=norm)

    def forward(self, hidden: Tensor) -> Tensor:
        for unit in self.units:
            hidden = unit(hidden)
        return self.downsample(self.act(hidden))


class UpsamplingStage(nn.Module):
    """A transposed convolution that halves the channels, then residual units."""

    def __init__(self, channels: int, stride: int, units: list[ResidualUnit], activation: str, norm: bool) -> None:
        super().__init__()
        self.act = make_activation(activation, channels)
        self.upsample = TrimmedConvTranspose1d(channels, channels // 2, stride, use_weight_norm=norm)
        self.units = nn.ModuleList(units)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.upsample(self.act(hidden))
        for unit in self.units:
            hidden = unit(hidden)
        return hidden

    def stream(self, hidden: Tensor, step: SeanetStream) -> Tensor:
        hidden = self.upsample.stream(self.act(hidden), step)
        for unit in self.units:
            hidden = unit.stream(hidden, step)
        return hidden


@dataclass(frozen=True)
class SeanetShape:
    """What encoder and decoder share.

    Args:
        num_filters: channels at the sampling rate. ratios: of the decoder's stages. hidden_size: channels of a frame.
        num_residual_layers, residual_kernel_size, dilation_growth_rate: of the residual units.
        num_lstm_layers: 0 = no LSTM. bidirectional: of the encoder's LSTM. activation: `"elu"` or `"snake"`.
        use_weight_norm: direction and magnitude of every convolution are separate parameters.
    """

    num_filters: int
    ratios: tuple[int, ...]
    hidden_size: int
    num_residual_layers: int
    residual_kernel_size: int
    dilation_growth_rate: int
    num_lstm_layers: int
    bidirectional: bool
    activation: str
    use_weight_norm: bool

    def units(self, channels: int) -> list[ResidualUnit]:
        """The residual units of a stage."""
        return [
            ResidualUnit(
                channels,
                self.residual_kernel_size,
                self.dilation_growth_rate**index,
                self.activation,
                self.use_weight_norm,
            )
            for index in range(self.num_residual_layers)
        ]


class SeanetEncoder(nn.Module):
    """Waveform `(b, 1, samples)` → frames `(b, hidden_size, ceil(samples / hop))`."""

    def __init__(self, shape: SeanetShape) -> None:
        super().__init__()
        norm, channels = shape.use_weight_norm, shape.num_filters
        self.input_conv = ReflectConv1d(1, channels, _KERNEL_SIZE, use_weight_norm=norm)
        self.stages = nn.ModuleList()
        for ratio in reversed(shape.ratios):
            self.stages.append(DownsamplingStage(channels, ratio, shape.units(channels), shape.activation, norm))
            channels *= 2
        self.lstm = SkipLstm(channels, shape.num_lstm_layers, shape.bidirectional) if shape.num_lstm_layers else None
        channels *= 2 if shape.bidirectional else 1
        self.output_act = make_activation(shape.activation, channels)
        self.output_conv = ReflectConv1d(channels, shape.hidden_size, _KERNEL_SIZE, use_weight_norm=norm)

    def forward(self, waveform: Tensor) -> Tensor:
        hidden = self.input_conv(waveform)
        for stage in self.stages:
            hidden = stage(hidden)
        if self.lstm is not None:
            hidden = self.lstm(hidden)
        return self.output_conv(self.output_act(hidden))


class SeanetDecoder(nn.Module):
    """Frames `(b, hidden_size, t)` → waveform `(b, 1, t * hop)`."""

    def __init__(self, shape: SeanetShape) -> None:
        super().__init__()
        norm, channels = shape.use_weight_norm, shape.num_filters << len(shape.ratios)
        self.input_conv = ReflectConv1d(shape.hidden_size, channels, _KERNEL_SIZE, use_weight_norm=norm)
        self.lstm = SkipLstm(channels, shape.num_lstm_layers) if shape.num_lstm_layers else None
        self.stages = nn.ModuleList()
        for ratio in shape.ratios:
            units = shape.units(channels // 2)
            self.stages.append(UpsamplingStage(channels, ratio, units, shape.activation, norm))
            channels //= 2
        self.output_act = make_activation(shape.activation, channels)
        self.output_conv = ReflectConv1d(channels, 1, _KERNEL_SIZE, use_weight_norm=norm)

    def forward(self, frames: Tensor) -> Tensor:
        hidden = self.input_conv(frames)
        if self.lstm is not None:
            hidden = self.lstm(hidden)
        for stage in self.stages:
            hidden = stage(hidden)
        return self.output_conv(self.output_act(hidden))

    def stream(
        self, frames: Tensor, past: SeanetDecoderState | None, is_last: bool
    ) -> tuple[Tensor, SeanetDecoderState]:
        """The samples that are settled once `frames` `(b, hidden_size, t)` have come; `t` may be 0.

        All pieces together give what `forward` makes of the whole.

        Args:
            past: the state that the piece before gave; `None` at the start. It is not changed.
            is_last: no frame comes after these.
        Returns:
            samples `(b, 1, n)`, and the state for the next piece.
        """
        step = SeanetStream(past, is_last)
        hidden = self.input_conv.stream(frames, step)
        if self.lstm is not None:
            hidden = self.lstm.stream(hidden, step)
        for stage in self.stages:
            hidden = stage.stream(hidden, step)
        return self.output_conv.stream(self.output_act(hidden), step), step.new

    @property
    def lookahead(self) -> int:
        """How many samples a stream is late: the sum of what each layer waits for, in samples."""
        samples_per_position = 1
        total = self.output_conv.right
        for stage in reversed(self.stages):
            total += sum(unit.conv1.right for unit in stage.units) * samples_per_position
            total += stage.upsample.left * samples_per_position
            samples_per_position *= stage.upsample.stride
        return total + self.input_conv.right * samples_per_position
