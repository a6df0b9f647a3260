"""Losses by which the first level of a codec imitates a self-supervised teacher (SpeechTokenizer, section 3.3).

Source: https://arxiv.org/abs/2308.16692, equations 1 and 2; upstream `speechtokenizer/trainer/loss.py`, whose `t_axis`
raises. Of two lengths the common beginning counts. Both take `features` and `targets` `(b, frames, channels)` float,
and `mask` `(b, frames)`, 1 = a frame of real audio; `None` = all real.
"""

import torch
from torch import Tensor
from torch.nn import functional


_EPSILON = 1e-8


def _common(features: Tensor, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    frames = min(features.shape[1], targets.shape[1])
    features, targets = features[:, :frames].float(), targets[:, :frames].float()
    if mask is None:
        return features, targets, features.new_ones(features.shape[:2], dtype=torch.bool)
    real = mask[:, :frames].bool()
    return features * real[..., None], targets * real[..., None], real


def d_axis_loss(features: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over items and channels of -log sigmoid(cosine over time) (equation 1).

    A masked frame adds nothing to a cosine.
    """
    features, targets, _ = _common(features, targets, mask)
    cosine = functional.cosine_similarity(features, targets, dim=1, eps=_EPSILON)
    return -functional.logsigmoid(cosine).mean()


def t_axis_loss(features: Tensor, targets: Tensor, mask: Tensor | None = None, cosine_weight: float = 1.0) -> Tensor:
    """Mean over real frames of |difference| + `cosine_weight` * -log sigmoid(cosine over channels) (equation 2)."""
    features, targets, real = _common(features, targets, mask)
    distance = (features - targets).abs().mean(dim=-1)
    cosine = functional.cosine_similarity(features, targets, dim=-1, eps=_EPSILON)
    return (distance - cosine_weight * functional.logsigmoid(cosine))[real].mean()
