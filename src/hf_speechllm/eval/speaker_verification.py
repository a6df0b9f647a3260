"""Speaker verification: how well similarities of embeddings tell pairs of one speaker from pairs of two."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def cosine_similarities(embeddings: Tensor, others: Tensor) -> Tensor:
    """Cosines `(n, m)`, float32, of embeddings `(n, d)` and `(m, d)`; that of a zero embedding is 0."""
    rows, columns = (torch.nn.functional.normalize(values.float(), dim=-1) for values in (embeddings, others))
    return rows @ columns.T


def all_pairs(embeddings: Tensor, speakers: Sequence[object]) -> tuple[np.ndarray, np.ndarray]:
    """Every pair of two recordings once.

    Args:
        embeddings (`(n, d)`): of the recordings. speakers: who speaks in each.

    Returns:
        cosines `(n * (n - 1) / 2,)` float32, and whether both recordings have one speaker, bool of the same shape.
    """
    numbers = {speaker: number for number, speaker in enumerate(dict.fromkeys(speakers))}
    labels = torch.tensor([numbers[speaker] for speaker in speakers])
    first, second = torch.triu_indices(len(labels), len(labels), offset=1)
    return cosine_similarities(embeddings, embeddings)[first, second].numpy(), (labels[first] == labels[second]).numpy()


def equal_error_rate(scores: np.ndarray, is_same: np.ndarray) -> tuple[float, float]:
    """The error rate at which as many pairs of two speakers are accepted as pairs of one are refused.

    A pair is accepted from a threshold on. Between two neighbouring thresholds both rates are interpolated linearly.

    Args:
        scores (`(pairs,)`): higher for pairs that seem to have one speaker. is_same (`(pairs,)`, bool): whether they do.

    Returns:
        the rate, from 0 to 1, and a threshold at which it is had.

    Raises:
        ValueError: scores that are not finite, or no pair of one of both kinds.
    """
    scores, is_same = np.asarray(scores, dtype=np.float64), np.asarray(is_same, dtype=bool)
    if not np.isfinite(scores).all():
        raise ValueError("scores: expected finite numbers, got NaN or infinity")
    same, different = int(is_same.sum()), int((~is_same).sum())
    if not same or not different:
        raise ValueError(f"is_same: expected pairs of one and of two speakers, got {same} and {different}")
    order = np.argsort(-scores, kind="stable")
    scores, is_same = scores[order], is_same[order]
    # Equal scores are accepted together: an operating point lies behind the last of each value.
    ends = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))
    thresholds = np.concatenate(([np.inf], scores[ends]))
    refused = 1.0 - np.concatenate(([0.0], np.cumsum(is_same)[ends])) / same
    accepted = np.concatenate(([0.0], np.cumsum(~is_same)[ends])) / different
    after = int(np.argmax(accepted >= refused))
    before = after - 1
    gap_before, gap_after = refused[before] - accepted[before], accepted[after] - refused[after]
    share = gap_before / (gap_before + gap_after)
    rate = accepted[before] + share * (accepted[after] - accepted[before])
    return float(rate), float(thresholds[after if share > 0.5 or before == 0 else before])
