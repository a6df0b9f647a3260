"""Log-probabilities of whole answers, and the DPO loss on them.

Paper: https://arxiv.org/abs/2305.18290. Upstream: `forward_dpo` of `cosyvoice/llm/llm.py` and
`cosyvoice/utils/losses.py`. Training itself uses TRL; these functions say what upstream computes, to compare with.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def answer_log_probs(
    logits: Tensor, targets: Tensor, reduction: str = "sum", compatibility: str | None = None, ignore_index: int = -100
) -> Tensor:
    """Log-probability of each row's targets.

    Args:
        logits (`(batch, positions, tokens)`), targets (`(batch, positions)`, int64): what each position predicts.
        reduction: `"sum"`, as TRL, or `"mean"` over a row's targets.
        compatibility (`"upstream"`, *optional*): upstream's mask is inverted (issue 1449): the mean over the positions
            *without* a target of the log-probability of token 0.

    Returns:
        `(batch,)` float32.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction: expected 'sum' or 'mean', got {reduction!r}")
    if compatibility not in (None, "upstream"):
        raise ValueError(f"compatibility: expected None or 'upstream', got {compatibility!r}")
    counted = targets != ignore_index
    log_probs = logits.float().log_softmax(dim=-1)
    chosen = log_probs.gather(-1, targets.masked_fill(~counted, 0)[..., None])[..., 0]
    if compatibility == "upstream":
        counted, reduction = ~counted, "mean"
    total = chosen.masked_fill(~counted, 0.0).sum(dim=-1)
    return total / counted.sum(dim=-1) if reduction == "mean" else total


@dataclass(frozen=True)
class DpoResult:
    """Scalar `loss`, and `chosen_rewards`, `rejected_rewards` `(batch,)`."""

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float = 0.01,
    label_smoothing: float = 0.0,
) -> DpoResult:
    """Equation 7 of the paper on log-probabilities `(batch,)` of the policy and of the reference; with
    `label_smoothing` that of conservative DPO."""
    margin = beta * ((chosen - rejected) - (reference_chosen - reference_rejected))
    right = torch.nn.functional.logsigmoid(margin)
    wrong = torch.nn.functional.logsigmoid(-margin)
    return DpoResult(
        loss=-((1.0 - label_smoothing) * right + label_smoothing * wrong).mean(),
        chosen_rewards=beta * (chosen - reference_chosen).detach(),
        rejected_rewards=beta * (rejected - reference_rejected).detach(),
    )
