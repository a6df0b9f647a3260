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
    """Every pair of two recordings once; memory grows with the square of their number.

    Args:
        embeddings (`(n, d)`): of the recordings. speakers: who speaks in each.

    Returns:
        cosines `(n * (n - 1) / 2,)` float32, and whether both recordings have one speaker, bool of the same shape.
    """
    numbers = {speaker: number for number, speaker in enumerate(dict.fromkeys(speakers))}
    labels = torch.tensor([numbers[speaker] for speaker in speakers])
    first, second = torch.triu_indices(len(labels), len(labels), offset=1)
    cosines = cosine_similarities(embeddings, embeddings)[first, second]
    return cosines.numpy(), (labels[first] == labels[second]).numpy()


def equal_error_rate(scores: np.ndarray, is_same: np.ndarray) -> tuple[float, float]:
    """The error rate at which as many pairs of two speakers are accepted as pairs of one are refused.

    A pair is accepted from a threshold on. Between two neighbouring thresholds both rates are interpolated linearly.

    Args:
        scores (`(pairs,)`): higher for pairs that seem to have one speaker.
        is_same (`(pairs,)`, bool): whether they have.

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


def speaker_similarity(
    embeddings: Tensor,
    speakers: Sequence[str],
    reference_embeddings: Tensor,
    reference_speakers: Sequence[str],
    not_with: Sequence[int | None] | None = None,
) -> dict[str, float | int]:
    """How alike recordings are to references of their speaker, and to those of all others.

    Args:
        embeddings (`(n, d)`), speakers: of the recordings. reference_embeddings (`(m, d)`), reference_speakers: of the
            references.
        not_with (*optional*): for each recording a reference that it is not compared with, as its own source.

    Returns:
        `recordings`, the number of those whose speaker has a reference, others are left out; `same_speaker`, the mean
        over recordings of their mean cosine with the references of their speaker; `other_speakers`, the same with
        each other speaker; `nearest_speaker`, percent of recordings most alike to their own. Where there are no such
        cosines, a figure is left out.
    """
    names = list(dict.fromkeys(reference_speakers))
    cosines = cosine_similarities(embeddings, reference_embeddings).double()
    compared = torch.ones_like(cosines)
    for row, reference in enumerate(not_with or ()):
        if reference is not None:
            compared[row, reference] = 0.0
    members = torch.tensor([[name == other for name in names] for other in reference_speakers]).double()
    # 0 / 0 where a speaker has no reference left.
    means = (cosines * compared) @ members / (compared @ members)
    rows = [row for row, speaker in enumerate(speakers) if speaker in names]
    rows = [row for row in rows if not means[row, names.index(speakers[row])].isnan()]
    figures: dict[str, float | int] = {"recordings": len(rows)}
    if not rows:
        return figures
    own = torch.tensor([names.index(speakers[row]) for row in rows])
    means = means[rows]
    figures["same_speaker"] = float(means.gather(1, own[:, None]).mean())
    others = means.scatter(1, own[:, None], float("nan")).flatten()
    others = others[~others.isnan()]
    if len(others):
        figures["other_speakers"] = float(others.mean())
        figures["nearest_speaker"] = 100.0 * float((means.nan_to_num(-2.0).argmax(1) == own).double().mean())
    return figures
