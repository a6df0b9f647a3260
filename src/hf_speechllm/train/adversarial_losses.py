"""Least-squares adversarial losses and feature matching, as HiFi-GAN has them (https://arxiv.org/abs/2010.05646), and
the relativistic loss of StyleTTS 2 and HiFTNet (https://arxiv.org/abs/2306.07691, equation 13).

Each takes what [`DiscriminatorOutput`] holds: one tensor per sub-discriminator, averaged on its own and then summed,
so that the number of scores of a sub-discriminator does not weigh.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def discriminator_loss(real_scores: Sequence[Tensor], fake_scores: Sequence[Tensor]) -> Tensor:
    """Sum over sub-discriminators of mean (1 - D(x))^2 + mean D(G)^2 (equation 1), a scalar.

    Args:
        real_scores, fake_scores: scores of any shapes, one tensor per sub-discriminator.
    """
    terms = [
        (1 - real).square().mean() + fake.square().mean() for real, fake in zip(real_scores, fake_scores, strict=True)
    ]
    return torch.stack(terms).sum()


def adversarial_loss(fake_scores: Sequence[Tensor]) -> Tensor:
    """Sum over sub-discriminators of mean (1 - D(G))^2 (equation 2), a scalar: what the generator lowers."""
    return torch.stack([(1 - fake).square().mean() for fake in fake_scores]).sum()


def feature_matching_loss(
    real_features: Sequence[Sequence[Tensor]], fake_features: Sequence[Sequence[Tensor]]
) -> Tensor:
    """Twice the summed mean absolute difference of all feature maps (equation 4 with its weight of 2), a scalar.

    Args:
        real_features, fake_features: feature maps per layer per sub-discriminator. The real ones are constants.
    """
    terms = [
        (real.detach() - fake).abs().mean()
        for real_maps, fake_maps in zip(real_features, fake_features, strict=True)
        for real, fake in zip(real_maps, fake_maps, strict=True)
    ]
    return 2 * torch.stack(terms).sum()


def relativistic_loss(better: Sequence[Tensor], worse: Sequence[Tensor], margin: float) -> Tensor:
    """Truncated pointwise relativistic loss, a scalar, summed over sub-discriminators.

    Where a score that should be higher is less above the other than in the median, its squared distance to the median;
    the mean of that, as far as it is under `margin`. The discriminators lower it for real over generated, the
    generator for generated over real.

    Args:
        better, worse: scores of one shape, one tensor per sub-discriminator.
    """
    terms = []
    for high, low in zip(better, worse, strict=True):
        lead = high - low - (high - low).median()
        behind = lead < 0
        # Upstream's mean of nothing is not a number.
        mean = (lead.square() * behind).sum() / behind.sum().clamp_min(1)
        terms.append(margin - torch.relu(margin - mean))
    return torch.stack(terms).sum()
