"""Snake, the periodic activation (https://arxiv.org/abs/2006.08195)."""

import torch
from torch import Tensor, nn


# Keeps the division finite where a channel has learned alpha 0.
_EPSILON = 1e-9


class Snake(nn.Module):
    """x + sin^2(alpha x) / alpha with one alpha, not its logarithm, a channel. Maps 0 to 0."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels))

    def forward(self, hidden: Tensor) -> Tensor:
        """`(b, channels, t)` to the same shape."""
        alpha = self.alpha[:, None]
        scale = (alpha + _EPSILON).reciprocal()
        if torch.is_grad_enabled():
            return torch.addcmul(hidden, torch.sin(hidden * alpha).square(), scale)
        # In place: fresh memory costs a CPU several times what the sine costs.
        return (hidden * alpha).sin_().square_().mul_(scale).add_(hidden)
