"""Loss and accuracy of speech language models: label smoothing and length normalisation as upstream defines them.

Upstream: `cosyvoice/transformer/label_smoothing_loss.py`, the Kullback-Leibler divergence from a target with `1 - s`
on the right token and `s / (n - 1)` on each other. Without smoothing it is the cross-entropy.
"""

import math

import torch
from torch import Tensor


def smoothed_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    smoothing: float = 0.0,
    length_normalized: bool = True,
    num_items: Tensor | int | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """
    Args:
        logits (`(batch, positions, tokens)`), targets (`(batch, positions)`, int64): what each position is to predict;
            `ignore_index` where nothing is.
        smoothing (`float`): `s` above.
        length_normalized (`bool`): divide by the number of targets, otherwise by the batch size.
        num_items (*optional*): divide by this instead, as `Trainer` does when it accumulates gradients.

    Returns:
        scalar, float32; 0 where nothing is to be predicted.
    """
    batch, counted = targets.shape[0], targets != ignore_index
    log_probs, chosen = logits[counted].float().log_softmax(dim=-1), targets[counted]
    right = log_probs.gather(1, chosen[:, None])[:, 0]
    total = -(1.0 - smoothing) * right
    if smoothing > 0.0:
        share = smoothing / (logits.shape[-1] - 1)
        entropy = (1.0 - smoothing) * math.log(1.0 - smoothing) + smoothing * math.log(share)
        total = total - share * (log_probs.sum(dim=-1) - right) + entropy
    if num_items is None:
        num_items = max(chosen.shape[0], 1) if length_normalized else batch
    # The second term connects an empty selection with the graph, for processes of a distributed run.
    return (total.sum() + logits.sum() * 0.0) / num_items


@torch.no_grad()
def token_accuracy(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """Share of targets that the most probable token is, scalar; arguments as above."""
    counted = targets != ignore_index
    return (logits.argmax(dim=-1)[counted] == targets[counted]).float().mean()
