"""Sine waves of a fundamental frequency and its harmonics, with noise: what excites a neural source-filter vocoder.

Paper: https://arxiv.org/abs/1904.12088. Upstream: CosyVoice, `cosyvoice/hifigan/generator.py`, `SineGen` (`"sample"`
below) and `SineGen2` (`"linear"`, and causal: `"nearest"`).

The three differ in how the phase moves between frames. With `C[i]` the turns that a harmonic has made at the end of
frame `i` of `hop` samples:

* `"sample"`: sample by sample; sample `o` of frame `i` is at `C[i - 1] + (o + 1) f[i] / rate`.
* `"linear"`: on a line from `C[i]` in the middle of frame `i` to `C[i + 1]` in the middle of the next, and constant
  before the first middle and after the last.
* `"nearest"`: `C[i]` in all of frame `i`.

Upstream adds the turns up in float32, whose error grows with the length of the audio. Here they are added up in
float64 and only their fraction is kept, so that a stream that goes on from there gives what the whole gives.
Upstream's `SineGen2` draws an initial phase, adds it to sample 0 and then reads the middle of every frame: it never
arrives, and does not exist here.

Shape legend: `b` batch, `t` frames, `n = t * hop` samples, `h` harmonics with the fundamental.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


PHASES = ("sample", "linear", "nearest")


@dataclass
class SinePast:
    """Where the sines of a stream are.

    Args:
        turns (`(b, h)`, float64): fraction of the turns made before `frequencies`.
        frequencies (`(b, 0 or 1, h)`, float32): turns per sample in the frame that waits for the next (`"linear"`).
        begun: whether a frame is behind that.
    """

    turns: Tensor
    frequencies: Tensor
    begun: bool


class SineSource(nn.Module):
    """Excitation from the fundamental frequency: `(b, t)` Hz to `(b, n)` samples in -1..1.

    Args:
        num_harmonics: those above the fundamental. hop_length: samples per frame.
        amplitude: of a sine. noise_std: of the noise where there is voice, whose amplitude is a third of `amplitude`
            elsewhere. voiced_threshold: Hz above which there is voice. phase: see the module.
    """

    def __init__(
        self,
        num_harmonics: int,
        sampling_rate: int,
        hop_length: int,
        amplitude: float,
        noise_std: float,
        voiced_threshold: float,
        phase: str,
    ) -> None:
        super().__init__()
        self.sampling_rate, self.hop_length, self.phase = sampling_rate, hop_length, phase
        self.amplitude, self.noise_std, self.voiced_threshold = amplitude, noise_std, voiced_threshold
        self.num_sines = num_harmonics + 1
        self.proj = nn.Linear(self.num_sines, 1)

    def frequencies(self, f0: Tensor) -> Tensor:
        """Turns per sample of every harmonic, `(b, t, h)` float32, from `(b, t)` Hz."""
        multiples = torch.arange(1, self.num_sines + 1, device=f0.device, dtype=torch.float32)
        turns = f0.float()[..., None] * multiples / self.sampling_rate
        # Upstream's SineGen2 drops whole turns here. It changes nothing but the rounding, and the middle between two
        # frames where one of them is beyond the sampling rate.
        return turns if self.phase == "sample" else turns % 1

    def radians(
        self,
        frequencies: Tensor,
        past: SinePast | None = None,
        is_last: bool = True,
        num_frames: Tensor | None = None,
    ) -> tuple[Tensor, SinePast]:
        """Phase of every harmonic in radians, `(b, n, h)` float32, and the past of the next piece.

        Args:
            frequencies (`(b, t, h)`): of [`frequencies`].
            past: of the piece before; `None` at the beginning. is_last: nothing comes after these frames. Before, the
                last frame of `"linear"` waits for the next piece.
            num_frames (`(b,)`, int64, *optional*): frames of each item, in one pass; default all `t`.
        """
        hop, device = self.hop_length, frequencies.device
        if past is None:
            turns = frequencies.new_zeros(len(frequencies), self.num_sines, dtype=_wide(frequencies))
            past = SinePast(turns, frequencies[:, :0], False)
        frequencies = torch.cat((past.frequencies, frequencies), dim=1)
        before = past.turns[:, None] + torch.cumsum(frequencies.to(_wide(frequencies)) * hop, dim=1)
        ends = torch.cat((past.turns[:, None], before), dim=1) % 1
        count = frequencies.shape[1] - (self.phase == "linear" and not is_last and frequencies.shape[1] > 0)
        begun = past.begun or count > 0
        new = SinePast(ends[:, count], frequencies[:, count:], begun)
        starts, ends, own = (part[:, :count].float() for part in (ends, ends[:, 1:], frequencies))
        if self.phase == "nearest":
            return ends.repeat_interleave(hop, dim=1) * (2 * math.pi), new
        offsets = torch.arange(hop, device=device, dtype=torch.float32)[:, None]
        if self.phase == "sample":
            grid = starts[:, :, None] + (offsets + 1) * own[:, :, None]
            return grid.flatten(1, 2) * (2 * math.pi), new
        # Samples before the middle are on the line that comes from the frame before, the others on that to the next.
        following = torch.cat((frequencies[:, 1:], torch.zeros_like(own[:, :1])), dim=1)[:, :count]
        arriving = own if past.begun else torch.cat((torch.zeros_like(own[:, :1]), own[:, 1:]), dim=1)
        if num_frames is not None:
            last = torch.arange(count, device=device) == num_frames[:, None] - 1
            following = following.masked_fill(last[..., None], 0.0)
        distance = offsets + 0.5 - hop / 2
        grid = ends[:, :, None] + distance * torch.where(distance < 0, arriving[:, :, None], following[:, :, None])
        return grid.flatten(1, 2) * (2 * math.pi), new

    def upstream_radians(self, frequencies: Tensor) -> Tensor:
        """The phases of whole utterances as upstream adds them up, `(b, n, h)` radians, float32 throughout.

        After a second of a high voice they are wrong in the third digit; only for comparison with upstream.
        """
        hop = self.hop_length
        if self.phase == "sample":
            return torch.cumsum(frequencies.repeat_interleave(hop, dim=1), dim=1) % 1 * (2 * math.pi)
        radians = (torch.cumsum(frequencies, dim=1) * 2 * math.pi).transpose(1, 2) * hop
        mode = {"scale_factor": float(hop), "mode": self.phase}
        return torch.nn.functional.interpolate(radians, **mode).transpose(1, 2)

    def sines(self, radians: Tensor, f0: Tensor, noise: Tensor, phase: Tensor | None = None) -> Tensor:
        """Sines and noise, `(b, n, h)` float32.

        Args:
            radians (`(b, n, h)`): phases. f0 (`(b, t)`): Hz of the same frames. noise (`(b, n, h)`): of unit scale.
            phase (`(b, h)`, *optional*): radians to add, upstream's initial phase of `"sample"`.
        """
        if phase is not None:
            radians = radians + phase[:, None].to(radians)
        voiced = (f0.float() > self.voiced_threshold).repeat_interleave(self.hop_length, dim=1)[..., None]
        noise_scale = torch.where(voiced, self.noise_std, self.amplitude / 3)
        return torch.where(voiced, self.amplitude * torch.sin(radians), 0.0) + noise_scale * noise

    def forward(self, sines: Tensor) -> Tensor:
        """Excitation `(b, n)` of `sines` `(b, n, h)`."""
        return torch.tanh(self.proj(sines.to(self.proj.weight.dtype)))[..., 0]


def _wide(tensor: Tensor) -> torch.dtype:
    """float64, and float32 on the devices that have no other."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64
