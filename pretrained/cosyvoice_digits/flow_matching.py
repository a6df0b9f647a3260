"""Conditional flow matching: from noise to a mel spectrogram along a learned velocity.

Flow matching: https://arxiv.org/abs/2210.02747, in the form of Matcha-TTS (https://arxiv.org/abs/2309.03199);
guidance: https://arxiv.org/abs/2207.12598. Upstream: `cosyvoice/flow/flow_matching.py`.

Shape legend: `b` batch, `t` frames, `m` mel bins. In every mask 1 = real.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


# Frames that are drawn at once for the fixed noise: 300 s at 50 Hz.
_FIXED_NOISE_FRAMES = 15000


def time_steps(num_steps: int, schedule: str) -> list[tuple[float, float]]:
    """Times at which the velocity is taken, and the length of the step from each, `num_steps` pairs.

    `"cosine"` is t = 1 - cos(pi/2 · i/n), small steps first; `"linear"` is t = i/n. Upstream adds the steps up in
    float32, and the embedding of time multiplies by 1000: the sums are taken in its order.

    Raises:
        ValueError: fewer than one step.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps: expected at least 1, got {num_steps}")
    times = torch.linspace(0, 1, num_steps + 1)
    if schedule == "cosine":
        times = 1 - torch.cos(times * 0.5 * torch.pi)
    steps, time = [], times[0]
    for following in times[1:]:
        step = following - time
        steps.append((float(time), float(step)))
        time = time + step
    return steps


@lru_cache(maxsize=2)
def _noise_blocks(num_bins: int, num_blocks: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    blocks = [torch.randn(1, num_bins, _FIXED_NOISE_FRAMES, generator=generator) for _ in range(num_blocks)]
    return torch.cat(blocks, dim=2).transpose(1, 2)


def fixed_noise(num_frames: int, num_bins: int, device: torch.device) -> Tensor:
    """The noise that every utterance of CosyVoice 2 and 3 starts from, `(1, num_frames, num_bins)` float32.

    It is what `torch.manual_seed(0); torch.randn(1, 80, 15000)` gives on a CPU, drawn there for every device. Neither
    is it part of upstream's checkpoints, nor does it have to be of ours: the generator of the CPU gives the same
    numbers on every machine, and drawing them takes some milliseconds where storing them takes 4.8 MB. Longer
    utterances, which upstream refuses, go on with the next 15000 frames of the same generator.
    """
    blocks = max(1, -(-num_frames // _FIXED_NOISE_FRAMES))
    return _noise_blocks(num_bins, blocks)[:, :num_frames].to(device, copy=True)


def euler_solve(
    velocity: Callable[[Tensor, int], Tensor], noise: Tensor, steps: list[tuple[float, float]], guidance: float
) -> Tensor:
    """Follow the velocity from noise at time 0 to a mel spectrogram at time 1.

    Guidance moves away from what the network says without conditions: (1 + g)·v(x, conditions) - g·v(x, nothing).

    Args:
        velocity: gives `(2b, t, m)` for `(b, t, m)` and the number of the step: rows with conditions, then the same
            rows without; only the first `b` rows where `guidance` is 0.
        noise (`(b, t, m)`), steps: see [`time_steps`].

    Returns:
        `(b, t, m)`, float32.
    """
    sample = noise.float()
    for number, (_, step) in enumerate(steps):
        direction = velocity(sample, number).float()
        if guidance:
            with_conditions, without = direction.chunk(2)
            direction = (1.0 + guidance) * with_conditions - guidance * without
        sample = sample + step * direction
    return sample


@dataclass
class FlowMatchingDraws:
    """The random draws of one training step.

    Args:
        times (`(b,)`): uniform in 0..1.
        noise (`(b, t or more, m)`): standard normal.
        keep_conditions (`(b,)`, bool): `False` trains a row without tokens, speaker and prompt, for guidance.
        prompt_frames (`(b,)`, int64): frames of the target that the row is given as its prompt, 0 = none.
        streaming (`bool`): whether the attention sees chunks, as in a stream.
    """

    times: Tensor
    noise: Tensor
    keep_conditions: Tensor
    prompt_frames: Tensor
    streaming: bool = False


def draw_flow_matching(
    mel: Tensor,
    mel_lengths: Tensor,
    condition_dropout: float,
    prompt_probability: float,
    longest_prompt: float,
    streaming_probability: float,
    generator: torch.Generator | None = None,
) -> FlowMatchingDraws:
    """Draws as upstream makes them, all from one generator: `(b, t, m)` targets with `(b,)` real frames each.

    A row gets a prompt with `prompt_probability`; its length is uniform in 0..`longest_prompt` of the row, both ends
    included. `streaming_probability` is that of the whole batch.
    """
    batch, device = mel.shape[0], mel.device if generator is None else generator.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device).to(mel.device)

    times = uniform(batch)
    noise = torch.randn(mel.shape, generator=generator, device=device).to(mel.device)
    keep = uniform(batch) > condition_dropout
    longest = (longest_prompt * mel_lengths).long().to(mel.device)
    frames = (uniform(batch) * (longest + 1)).long().clamp(max=longest)
    frames = torch.where(uniform(batch) < prompt_probability, frames, 0)
    streaming = bool(uniform(1) < streaming_probability)
    return FlowMatchingDraws(times, noise, keep, frames, streaming)


def prompt_frames_of(mel: Tensor, prompt_frames: Tensor) -> Tensor:
    """The first `prompt_frames[b]` frames of each row of `mel (b, t, m)`, zero behind them."""
    given = torch.arange(mel.shape[1], device=mel.device) < prompt_frames[:, None]
    return torch.where(given[..., None], mel, 0.0)


def interpolate_to_target(mel: Tensor, draws: FlowMatchingDraws, sigma_min: float) -> tuple[Tensor, Tensor]:
    """The point on the straight way from noise to `mel` at the drawn time, and the velocity there, `(b, t, m)` each.

    y = (1 - (1 - sigma)·t)·z + t·x,   u = x - (1 - sigma)·z
    """
    time = draws.times[:, None, None].to(mel.dtype)
    noise = draws.noise[:, : mel.shape[1]].to(mel.dtype)
    point = (1 - (1 - sigma_min) * time) * noise + time * mel
    return point, mel - (1 - sigma_min) * noise


def velocity_loss(predicted: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over real frames and all bins, a scalar in float32; mask `(b, t)`."""
    real = mask[..., None].float()
    error = ((predicted.float() - target.float()) * real).square().sum()
    return error / (real.sum() * target.shape[2])


def sinusoidal_time_embedding(times: Tensor, size: int) -> Tensor:
    """Sines then cosines of 1000·t at `size / 2` frequencies from 1 down to 1/10000: `(n,)` → `(n, size)` float32."""
    half = size // 2
    frequencies = torch.exp(torch.arange(half, device=times.device).float() * -(math.log(10000) / (half - 1)))
    phase = 1000 * times.float()[:, None] * frequencies
    return torch.cat([phase.sin(), phase.cos()], dim=-1)
