"""Cross-entropy of a language model's head without the logits of all positions at once.

The logits of `n` positions over a vocabulary of 152,000 take `n` times 0.6 MB in float32, several times over when they
are differentiated. Here the head is applied to a few positions at a time, and once more in the backward pass, so that
the memory is that of one chunk. Value and gradients are those of the loss on all logits.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


# Logits of a chunk: 256 x 152,000 in float32 are 156 MB, 256 x 33,000 are 34 MB.
DEFAULT_CHUNK_SIZE = 256


def chunked_cross_entropy(
    hidden_states: Tensor,
    head: nn.Module,
    labels: Tensor,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    num_items: Tensor | int | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Mean negative log-likelihood of `labels`, computed in float32.

    Args:
        hidden_states (`(..., hidden_size)`): inputs of the head.
        head (`nn.Module`): hidden states to logits over the vocabulary. It is called as a module, so that an adapter
            around it, a shared weight and gathered parameters work.
        labels (`(...)`, int64): the token that each position is to predict; nothing is shifted here.
        chunk_size (`int`): positions whose logits exist at a time.
        num_items (*optional*): what the sum is divided by; the number of labels that count by default.
        ignore_index (`int`): positions with this label do not count, and their logits are never computed.

    Returns:
        scalar, float32; 0 where no label counts.

    Raises:
        ValueError: shapes that do not match, or a chunk of less than one position.
    """
    if hidden_states.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels: expected shape {tuple(hidden_states.shape[:-1])} as the hidden states, got {tuple(labels.shape)}"
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
    counted = labels != ignore_index
    hidden_states, labels = hidden_states[counted], labels[counted]
    # Also connects an empty selection with the graph: every process of a distributed run needs its backward pass.
    total = hidden_states.float().sum() * 0.0
    for start in range(0, labels.shape[0], chunk_size):
        part = slice(start, start + chunk_size)
        if torch.is_grad_enabled():
            chunk = checkpoint(_summed_loss, head, hidden_states[part], labels[part], use_reentrant=False)
        else:
            chunk = _summed_loss(head, hidden_states[part], labels[part])
        total = total + chunk
    if num_items is None:
        return total / max(labels.shape[0], 1)
    return total / (num_items.to(total.device) if isinstance(num_items, Tensor) else num_items)


def _summed_loss(head: nn.Module, hidden_states: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(head(hidden_states).float(), labels, reduction="sum")
