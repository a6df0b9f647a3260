"""Learning-rate schedules that `transformers.get_scheduler` does not have."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def wenet_warmup_factor(step: int, warmup_steps: int) -> float:
    """Factor of WeNet's `warmuplr` after `step` updates: W**0.5 * min(n**-0.5, n * W**-1.5) with n = max(step, 1).

    It rises linearly to 1 at `warmup_steps` (W) and falls with the inverse square root afterwards. As upstream,
    the first two updates both use n = 1. With W = 0 the factor is n**-0.5.
    """
    n = max(step, 1)
    if warmup_steps == 0:
        return n**-0.5
    return warmup_steps**0.5 * min(n**-0.5, n * warmup_steps**-1.5)


def wenet_warmup_scheduler(optimizer: Optimizer, warmup_steps: int) -> LambdaLR:
    """`LambdaLR` over [`wenet_warmup_factor`]; the optimiser's learning rate is the peak."""
    return LambdaLR(optimizer, lambda step: wenet_warmup_factor(step, warmup_steps))
