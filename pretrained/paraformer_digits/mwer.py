"""Minimum word error rate training of a one-pass decoder, on sampled candidates.

A non-autoregressive decoder has one output path. Paraformer (https://arxiv.org/abs/2206.08317, section 2.4) makes more
by masking the best score at random positions, where the second best then stands:

    L = sum_i P(y_i) / sum_j P(y_j) * (W(y_i, y*) - mean_j W(y_j, y*))

with `W` the edit distance to the reference. Here the first candidate is the unmasked path, the one that recognition
gives; the paper leaves that open.

Shape legend: `b` utterances, `k` candidates of each, `n` positions, `v` vocabulary.
"""

import torch
from torch import Tensor


def sample_candidates(
    logits: Tensor, num_candidates: int, mask_probability: float = 0.5, generator: torch.Generator | None = None
) -> Tensor:
    """Token ids `(b, k, n)`: the best ids of `logits` `(b, n, v)`, replaced by the second best at random positions.

    Candidate 0 is never masked. The draws come from `generator` (on its device) or torch's global one (CPU).
    """
    batch, positions, _ = logits.shape
    best = logits.detach().topk(2, dim=-1).indices  # (b, n, 2)
    device = "cpu" if generator is None else generator.device
    drawn = torch.rand(batch, num_candidates, positions, generator=generator, device=device).to(logits.device)
    masked = drawn < mask_probability
    masked[:, 0] = False
    return torch.where(masked, best[:, None, :, 1], best[:, None, :, 0])


def edit_distance(hypotheses: Tensor, references: Tensor) -> Tensor:
    """Levenshtein distances `(r,)` int64 between rows `(r, n)` and `(r, m)` of ids; negative ids are not there."""
    hypotheses, lengths = _to_front(hypotheses)
    references, reference_lengths = _to_front(references)
    rows, width = hypotheses.shape[0], references.shape[1]
    steps = torch.arange(width + 1, device=hypotheses.device)
    row = steps.expand(rows, -1)
    distances = row
    for position in range(hypotheses.shape[1]):
        substituted = row[:, :-1] + (hypotheses[:, position, None] != references).long()
        best = torch.cat([row[:, :1] + 1, torch.minimum(row[:, 1:] + 1, substituted)], dim=1)
        # Insertions run along the row: min over earlier cells of their value plus the way from there.
        row = (best - steps).cummin(dim=1).values + steps
        distances = torch.where((position < lengths)[:, None], row, distances)
        row = distances
    return distances.gather(1, reference_lengths[:, None])[:, 0]


def _to_front(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Rows with their non-negative ids in front, and how many those are."""
    order = (ids < 0).long().argsort(dim=1, stable=True)
    return ids.gather(1, order), (ids >= 0).sum(dim=1)


def mwer_loss(
    logits: Tensor,
    token_mask: Tensor,
    candidates: Tensor,
    references: Tensor,
    ignored_ids: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor]:
    """
    Args:
        logits (`(b, n, v)`), token_mask (`(b, n)`, bool): True = a position of the utterance.
        candidates (`(b, k, n)`): from `sample_candidates`.
        references (`(b, m)`): ids of the text, negative = padding.
        ignored_ids: units that are no text (blank, sentence marks); they count neither as tokens nor as errors.

    Returns:
        the loss, a mean over utterances, and the expected number of errors `(b,)` under the renormalised
        probabilities, without gradient.
    """
    log_probs = logits.float().log_softmax(dim=-1)
    picked = log_probs.gather(2, candidates.transpose(1, 2)).masked_fill(~token_mask[..., None], 0.0)
    posterior = picked.sum(dim=1).softmax(dim=-1)  # (b, k)
    text = candidates.masked_fill(~token_mask[:, None], -1)
    reference = references
    for unit in ignored_ids:
        text, reference = text.masked_fill(text == unit, -1), reference.masked_fill(reference == unit, -1)
    batch, count, _ = text.shape
    repeated = reference[:, None].expand(-1, count, -1).flatten(0, 1)
    errors = edit_distance(text.flatten(0, 1), repeated).view(batch, count).to(posterior.dtype)
    relative = errors - errors.mean(dim=1, keepdim=True)
    return (posterior * relative).sum(dim=1).mean(), (posterior * errors).sum(dim=1).detach()
