"""Finite scalar quantisation: every coordinate rounded to one of a few values (https://arxiv.org/abs/2309.15505)."""

import torch
from torch import Tensor, nn


# CosyVoice's export stretches tanh to just below one, so that rounding never leaves the outermost level.
_STRETCH = 0.9990000128746033


class FiniteScalarQuantizer(nn.Module):
    """Projects to `size` coordinates and rounds each to `levels` (odd) integers around zero.

    A token is the number with these digits; coordinate 0 is its least significant one.
    """

    def __init__(self, hidden_size: int, levels: int, size: int) -> None:
        super().__init__()
        self.levels = levels
        self.size = size
        self.project_down = nn.Linear(hidden_size, size)

    def bounded(self, hidden_states: Tensor) -> Tensor:
        """Coordinates before rounding, `(…, hidden_size)` → `(…, size)` float32, within `±(levels - 1) / 2`."""
        half = (self.levels - 1) / 2
        return self.project_down(hidden_states).float().tanh() * (_STRETCH * half)

    def quantize(self, hidden_states: Tensor) -> Tensor:
        """Rounded coordinates `(…, size)`; the gradient passes as if nothing had been rounded."""
        bounded = self.bounded(hidden_states)
        return bounded + (bounded.round() - bounded).detach()

    def encode(self, hidden_states: Tensor) -> Tensor:
        """Tokens `(…)`, int64, of `(…, hidden_size)`."""
        digits = self.bounded(hidden_states).round().long() + (self.levels - 1) // 2
        powers = self.levels ** torch.arange(self.size, device=digits.device)
        return (digits * powers).sum(dim=-1)

    @torch.no_grad()
    def standardize(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Sets the projection so that every coordinate of these vectors `(n, hidden_size)` has mean 0 and variance 1:
        the scale at which rounding to -1, 0 and 1 keeps most.

        Returns:
            mean and deviation `(size,)`, float32, of the coordinates before.
        """
        projected = self.project_down(hidden_states).float()
        mean, deviation = projected.mean(dim=0), projected.std(dim=0).clamp_min(1e-6)
        self.project_down.weight.div_(deviation[:, None].to(self.project_down.weight.dtype))
        self.project_down.bias.copy_((self.project_down.bias.float() - mean) / deviation)
        return mean, deviation

    def decode(self, tokens: Tensor) -> Tensor:
        """Rounded coordinates `(…, size)`, float32, of tokens `(…)`."""
        powers = self.levels ** torch.arange(self.size, device=tokens.device)
        return ((tokens[..., None] // powers) % self.levels - (self.levels - 1) // 2).float()
