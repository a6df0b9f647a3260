"""Discriminators of waveforms: multi-period and multi-scale (HiFi-GAN), multi-scale STFT (EnCodec), multi-resolution
spectrogram (UnivNet).

Sources: https://arxiv.org/abs/2010.05646 (MPD, MSD), https://arxiv.org/abs/2210.13438 (MS-STFT); layer sizes as in
`speechtokenizer/discriminators.py` of SpeechTokenizer, which are those of the two papers.
https://arxiv.org/abs/2106.07889 (MRSD), as in `cosyvoice/hifigan/discriminator.py` of CosyVoice.

All take a waveform `(b, 1, samples)` or `(b, samples)` float32 and return a [`DiscriminatorOutput`]. `shrink` divides
every width, for experiments on a CPU and for tests; 1 is the published size.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm, weight_norm


_SLOPE = 0.1
_STFT_SLOPE = 0.2


@dataclass
class DiscriminatorOutput:
    """What discriminators say about a batch of waveforms.

    Args:
        scores: one tensor per sub-discriminator; 1 = real, 0 = generated.
        features: for each sub-discriminator, the outputs of its layers; HiFi-GAN counts the scores among them.
    """

    scores: list[Tensor] = field(default_factory=list)
    features: list[list[Tensor]] = field(default_factory=list)

    def add(self, other: "DiscriminatorOutput") -> None:
        """Append the sub-discriminators of `other`."""
        self.scores += other.scores
        self.features += other.features


def with_channel(waveform: Tensor) -> Tensor:
    """`(b, samples)` or `(b, 1, samples)` to the latter."""
    return waveform[:, None] if waveform.dim() == 2 else waveform


def judge(layers: nn.ModuleList, score: nn.Module, hidden: Tensor) -> DiscriminatorOutput:
    """One score per place, and the features of every layer on the way to it."""
    features = []
    for layer in layers:
        hidden = functional.leaky_relu(layer(hidden), _SLOPE)
        features.append(hidden)
    scores = score(hidden)
    return DiscriminatorOutput([scores.flatten(1)], [[*features, scores]])


class PeriodDiscriminator(nn.Module):
    """Every `period`-th sample in a row of its own, then convolutions along the rows."""

    def __init__(self, period: int, shrink: int = 1) -> None:
        super().__init__()
        self.period = period
        widths = [1, *(width // shrink for width in (32, 128, 512, 1024, 1024))]
        strides = (3, 3, 3, 3, 1)
        self.layers = nn.ModuleList(
            weight_norm(nn.Conv2d(inside, outside, (5, 1), (stride, 1), padding=(2, 0)))
            for inside, outside, stride in zip(widths[:-1], widths[1:], strides, strict=True)
        )
        self.score = weight_norm(nn.Conv2d(widths[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, waveform: Tensor) -> DiscriminatorOutput:
        waveform = with_channel(waveform)
        if missing := -waveform.shape[-1] % self.period:
            waveform = functional.pad(waveform, (0, missing), mode="reflect")
        hidden = waveform.unflatten(-1, (-1, self.period))
        return judge(self.layers, self.score, hidden)


class ScaleDiscriminator(nn.Module):
    """Strided, grouped convolutions over the waveform itself."""

    def __init__(self, shrink: int = 1, use_spectral_norm: bool = False) -> None:
        super().__init__()
        normalize = spectral_norm if use_spectral_norm else weight_norm
        widths = [1, *(width // shrink for width in (128, 128, 256, 512, 1024, 1024, 1024))]
        kernels = (15, 41, 41, 41, 41, 41, 5)
        strides = (1, 2, 2, 4, 4, 1, 1)
        groups = (1, 4, 16, 16, 16, 16, 1)
        self.layers = nn.ModuleList(
            normalize(
                nn.Conv1d(
                    inside,
                    outside,
                    kernel,
                    stride,
                    padding=kernel // 2,
                    groups=math.gcd(group, inside, outside),  # a shrunk layer may be narrower than its groups
                )
            )
            for inside, outside, kernel, stride, group in zip(
                widths[:-1], widths[1:], kernels, strides, groups, strict=True
            )
        )
        self.score = normalize(nn.Conv1d(widths[-1], 1, 3, padding=1))

    def forward(self, waveform: Tensor) -> DiscriminatorOutput:
        hidden = with_channel(waveform)
        return judge(self.layers, self.score, hidden)


class StftDiscriminator(nn.Module):
    """Convolutions over time and frequency of a complex spectrogram, its real and imaginary part as two channels."""

    def __init__(self, n_fft: int, hop_length: int, filters: int = 32) -> None:
        super().__init__()
        self.n_fft, self.hop_length = n_fft, hop_length
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        # Upstream leaves the first layer without weight norm.
        self.layers = nn.ModuleList([nn.Conv2d(2, filters, (3, 9), padding=(1, 4))])
        for dilation in (1, 2, 4):
            self.layers.append(
                weight_norm(
                    nn.Conv2d(filters, filters, (3, 9), stride=(1, 2), dilation=(dilation, 1), padding=(dilation, 4))
                )
            )
        self.layers.append(weight_norm(nn.Conv2d(filters, filters, (3, 3), padding=1)))
        self.score = weight_norm(nn.Conv2d(filters, 1, (3, 3), padding=1))

    def forward(self, waveform: Tensor) -> DiscriminatorOutput:
        spectrum = torch.stft(
            with_channel(waveform)[:, 0].float(),
            self.n_fft,
            self.hop_length,
            window=self.window,
            center=False,
            return_complex=True,
        )
        spectrum = spectrum / self.window.square().sum().sqrt()
        hidden = torch.stack((spectrum.real, spectrum.imag), dim=1).transpose(2, 3)
        features = []
        for layer in self.layers:
            hidden = functional.leaky_relu(layer(hidden), _STFT_SLOPE)
            features.append(hidden)
        return DiscriminatorOutput([self.score(hidden)], [features])


class SpectrogramDiscriminator(nn.Module):
    """Convolutions over time and frequency of the magnitudes of a spectrogram."""

    def __init__(self, n_fft: int, hop_length: int, win_length: int, filters: int = 32) -> None:
        super().__init__()
        self.n_fft, self.hop_length, self.win_length = n_fft, hop_length, win_length
        self.register_buffer("window", torch.hann_window(win_length), persistent=False)
        sizes = [(1, (3, 9), 1), *[(filters, (3, 9), 2)] * 3, (filters, (3, 3), 1)]
        self.layers = nn.ModuleList(
            weight_norm(nn.Conv2d(inside, filters, kernel, (1, stride), padding=(1, kernel[1] // 2)))
            for inside, kernel, stride in sizes
        )
        self.score = weight_norm(nn.Conv2d(filters, 1, (3, 3), padding=1))

    def forward(self, waveform: Tensor) -> DiscriminatorOutput:
        spectrum = torch.stft(
            with_channel(waveform)[:, 0].float(),
            self.n_fft,
            self.hop_length,
            self.win_length,
            self.window,
            return_complex=True,
        )
        hidden = spectrum.abs().transpose(1, 2)[:, None]
        return judge(self.layers, self.score, hidden)


class _Group(nn.Module):
    """Sub-discriminators that see the same waveform."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, waveform: Tensor) -> DiscriminatorOutput:
        output = DiscriminatorOutput()
        for member in self.members:
            output.add(member(waveform))
        return output


class MultiPeriodDiscriminator(_Group):
    """MPD: periods that share few multiples."""

    def __init__(self, periods: Sequence[int] = (2, 3, 5, 7, 11), shrink: int = 1) -> None:
        super().__init__([PeriodDiscriminator(period, shrink) for period in periods])


class MultiScaleDiscriminator(_Group):
    """MSD: the waveform, and its averages over 2 and 4 samples. The first has spectral instead of weight norm."""

    def __init__(self, scales: int = 3, shrink: int = 1) -> None:
        super().__init__([ScaleDiscriminator(shrink, use_spectral_norm=scale == 0) for scale in range(scales)])

    def forward(self, waveform: Tensor) -> DiscriminatorOutput:
        waveform, output = with_channel(waveform), DiscriminatorOutput()
        for scale, member in enumerate(self.members):
            if scale:
                waveform = functional.avg_pool1d(waveform, 4, 2, padding=2)
            output.add(member(waveform))
        return output


class MultiScaleStftDiscriminator(_Group):
    """MS-STFT: spectrograms of several windows, each moved by a quarter of its length.

    Args:
        filters: channels of every layer. n_ffts: window lengths in samples; clips must be at least as long.
    """

    def __init__(
        self, filters: int = 32, n_ffts: Sequence[int] = (1024, 2048, 512, 256, 128), shrink: int = 1
    ) -> None:
        super().__init__([StftDiscriminator(n_fft, n_fft // 4, filters // shrink) for n_fft in n_ffts])


class MultiResolutionSpectrogramDiscriminator(_Group):
    """MRSD: spectrograms of three resolutions.

    Args:
        filters: channels of every layer. resolutions: samples of a transform, between two, and of its window.
    """

    def __init__(
        self,
        filters: int = 32,
        resolutions: Sequence[tuple[int, int, int]] = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240)),
        shrink: int = 1,
    ) -> None:
        super().__init__([SpectrogramDiscriminator(*sizes, filters // shrink) for sizes in resolutions])


class DiscriminatorEnsemble(nn.Module):
    """Named discriminators that are trained together.

    Args:
        members: name → discriminator; their order is that of the outputs. Example:
            `{"mpd": MultiPeriodDiscriminator(), "msd": MultiScaleDiscriminator()}`.
    """

    def __init__(self, members: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleDict(dict(members))

    def forward(self, real: Tensor, fake: Tensor) -> tuple[DiscriminatorOutput, DiscriminatorOutput]:
        """Judge both, in one call: a data-parallel wrapper must see one pass per backward pass."""
        return self.judge(real), self.judge(fake)

    def judge(self, waveform: Tensor) -> DiscriminatorOutput:
        """What all members say of `waveform` `(b, 1, samples)` or `(b, samples)`."""
        output = DiscriminatorOutput()
        for member in self.members.values():
            output.add(member(waveform))
        return output


def build_discriminators(names: Sequence[str], shrink: int = 1) -> DiscriminatorEnsemble:
    """Discriminators by their short names, for recipes.

    Args:
        names: of `"mpd"`, `"msd"`, `"msstftd"`, `"mrsd"`. shrink: divides every width.
    Raises:
        ValueError: an unknown name.
    """
    known = {
        "mpd": MultiPeriodDiscriminator,
        "msd": MultiScaleDiscriminator,
        "msstftd": MultiScaleStftDiscriminator,
        "mrsd": MultiResolutionSpectrogramDiscriminator,
    }
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"discriminators: expected names among {sorted(known)}, found {unknown}")
    return DiscriminatorEnsemble({name: known[name](shrink=shrink) for name in names})
