"""CAM++ speaker embeddings (https://arxiv.org/abs/2303.00332), the speaker encoder of CosyVoice.

Upstream: 3D-Speaker `speakerlab/models/campplus`, FunASR `funasr/models/campplus`; CosyVoice ships it as an ONNX graph
in which every norm that follows a convolution has been multiplied into it. This model has those convolutions with a
bias and the remaining norms.

Shape legend: `b` batch, `t` feature frames of 10 ms, `f` mel bins, `c` channels, `n` frames of 20 ms. In every mask
True = real. Padded frames are zeroed before every convolution, so that a recording of a batch equals the recording
alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_campplus import CampplusConfig


@dataclass
class CampplusOutput(ModelOutput):
    """
    Args:
        embeddings (`(b, embedding_size)`): speaker embeddings, not normalised.
    """

    embeddings: Tensor | None = None


class ResidualBlock2d(nn.Module):
    """Two convolutions over frequency and time; the first may halve the frequencies."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, stride=(stride, 1), padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.shortcut = nn.Conv2d(channels, channels, 1, stride=(stride, 1)) if stride != 1 else None

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        """`(b, c, f, t)` → `(b, c, f / stride, t)`; mask (`(b, 1, 1, t)`, float)."""
        update = self.conv2(self.conv1(image * mask).relu() * mask)
        return (update + (image if self.shortcut is None else self.shortcut(image))).relu()


class CampplusHead(nn.Module):
    """Residual convolutions that leave an eighth of the frequencies."""

    def __init__(self, config: CampplusConfig) -> None:
        super().__init__()
        channels = config.head_channels
        self.conv1 = nn.Conv2d(1, channels, 3, padding=1)
        self.stages = nn.ModuleList(
            nn.ModuleList(ResidualBlock2d(channels, 2 if block == 0 else 1) for block in range(count))
            for count in config.num_head_blocks
        )
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=(2, 1), padding=1)

    def forward(self, input_features: Tensor, mask: Tensor) -> Tensor:
        """`(b, t, f)` → `(b, head_channels * f / 8, t)`; mask (`(b, 1, 1, t)`, float)."""
        image = self.conv1(input_features.transpose(1, 2)[:, None] * mask).relu()
        for blocks in self.stages:
            for block in blocks:
                image = block(image, mask)
        return self.conv2(image * mask).relu().flatten(1, 2)


class ContextGate(nn.Module):
    """A convolution, each frame of it gated by the averages of the recording and of its segment."""

    def __init__(self, config: CampplusConfig, dilation: int) -> None:
        super().__init__()
        size, added = config.bottleneck_size, config.growth_rate
        self.segment_length = config.segment_length
        padding = (config.kernel_size - 1) // 2 * dilation
        self.conv = nn.Conv1d(size, added, config.kernel_size, padding=padding, dilation=dilation, bias=False)
        self.fc1 = nn.Conv1d(size, size // 2, 1)
        self.fc2 = nn.Conv1d(size // 2, added, 1)

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        """`(b, bottleneck_size, n)` → `(b, growth_rate, n)`; mask (`(b, 1, n)`, float)."""
        hidden_states = hidden_states * mask
        average = hidden_states.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
        frames = hidden_states.shape[-1]
        missing = -frames % self.segment_length
        segments, real = (
            nn.functional.pad(values, (0, missing)).unflatten(-1, (-1, self.segment_length)).sum(-1)
            for values in (hidden_states, mask)
        )
        # A segment without a real frame is only ever seen by padding.
        of_segment = (segments / real.clamp_min(1)).repeat_interleave(self.segment_length, dim=-1)[..., :frames]
        gate = self.fc2(self.fc1(average + of_segment).relu()).sigmoid()
        return self.conv(hidden_states) * gate


class DenseLayer(nn.Module):
    """Norm, bottleneck, gated convolution; its output is appended to its input."""

    def __init__(self, config: CampplusConfig, channels: int, dilation: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels, eps=config.batch_norm_eps)
        self.bottleneck = nn.Conv1d(channels, config.bottleneck_size, 1)
        self.gate = ContextGate(config, dilation)

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        """`(b, c, n)` → `(b, c + growth_rate, n)`."""
        bottleneck = self.bottleneck(self.norm(hidden_states).relu()).relu()
        return torch.cat([hidden_states, self.gate(bottleneck, mask)], dim=1)


class Transition(nn.Module):
    """Norm and a map to half of the channels."""

    def __init__(self, config: CampplusConfig, channels: int, bias: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels, eps=config.batch_norm_eps)
        self.proj = nn.Conv1d(channels, channels // 2, 1, bias=bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.proj(self.norm(hidden_states).relu())


class CampplusModel(PreTrainedModel):
    """Filter banks to speaker embeddings."""

    config_class = CampplusConfig
    config: CampplusConfig
    base_model_prefix = "model"
    main_input_name = "input_features"
    # Nothing attends here, so that a CosyVoice may be told any kernel for the parts that do.
    _supports_sdpa = True
    input_modalities = ("audio",)
    _no_split_modules = ["DenseLayer", "ResidualBlock2d"]

    def __init__(self, config: CampplusConfig) -> None:
        super().__init__(config)
        self.head = CampplusHead(config)
        channels = config.initial_size
        self.tdnn = nn.Conv1d(config.head_channels * config.num_mel_bins // 8, channels, 5, stride=2, padding=2)
        self.blocks = nn.ModuleList()
        self.transitions = nn.ModuleList()
        last = len(config.num_block_layers) - 1
        for block, (layers, dilation) in enumerate(zip(config.num_block_layers, config.block_dilations, strict=True)):
            self.blocks.append(
                nn.ModuleList(
                    DenseLayer(config, channels + layer * config.growth_rate, dilation) for layer in range(layers)
                )
            )
            channels += layers * config.growth_rate
            # Behind the last one upstream has another norm, which its graph has multiplied into the map.
            self.transitions.append(Transition(config, channels, bias=block == last))
            channels //= 2
        self.dense = nn.Linear(2 * channels, config.embedding_size, bias=False)
        self.norm = nn.BatchNorm1d(config.embedding_size, eps=config.batch_norm_eps, affine=False)
        self.post_init()

    def forward(self, input_features: Tensor, attention_mask: Tensor | None = None) -> CampplusOutput:
        """
        Args:
            input_features (`(b, t, f)`): filter banks of [`CampplusFeatureExtractor`].
            attention_mask (`(b, t)`): 1 = real frame, real ones first; `None` = all.
        """
        input_features = input_features.to(self.tdnn.weight.dtype)
        mask = torch.ones_like(input_features[..., 0]) if attention_mask is None else attention_mask
        mask = mask.to(input_features.dtype)[:, None]
        hidden = self.head(input_features, mask[:, None])
        hidden = self.tdnn(hidden * mask).relu()
        mask = mask[..., ::2]
        for layers, transition in zip(self.blocks, self.transitions, strict=True):
            for layer in layers:
                hidden = layer(hidden, mask)
            hidden = transition(hidden)
        embeddings = self.dense(mean_and_deviation(hidden.relu(), mask))
        return CampplusOutput(self.norm(embeddings))


def mean_and_deviation(hidden_states: Tensor, mask: Tensor) -> Tensor:
    """Mean and unbiased standard deviation over real frames, `(b, c, n)` and `(b, 1, n)` → `(b, 2 * c)`.

    The deviation of a single frame, which upstream makes NaN, is 0.
    """
    count = mask.sum(-1)
    mean = (hidden_states * mask).sum(-1) / count
    squares = ((hidden_states - mean[..., None]).square() * mask).sum(-1)
    return torch.cat([mean, (squares / (count - 1).clamp_min(1)).sqrt()], dim=-1)


__all__ = ["CampplusModel", "CampplusOutput"]
