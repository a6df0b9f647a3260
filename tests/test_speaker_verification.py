"""Equal error rate, speaker similarity and mel distance against brute force."""

from itertools import combinations

import numpy as np
import pytest
import torch
from tiny_s3_tokenizer import tiny_campplus

from hf_speechllm.eval.mel_distance import mel_distance, warping_path
from hf_speechllm.eval.speaker_embeddings import embed_speakers
from hf_speechllm.eval.speaker_verification import all_pairs, equal_error_rate, speaker_similarity
from hf_speechllm.models.feature_extraction_campplus import CampplusFeatureExtractor


def error_rate_by_trying(scores: np.ndarray, is_same: np.ndarray) -> float:
    """Where the line through the operating points of all thresholds crosses the diagonal."""
    points = [(0.0, 1.0)]
    for threshold in sorted(set(scores.tolist()), reverse=True):
        accepted = [same for score, same in zip(scores, is_same, strict=True) if score >= threshold]
        points.append((accepted.count(False) / (~is_same).sum(), 1 - accepted.count(True) / is_same.sum()))
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x1 >= y1:
            # x0 + s (x1 - x0) = y0 + s (y1 - y0)
            return x0 + (y0 - x0) / ((x1 - x0) - (y1 - y0)) * (x1 - x0)
    raise AssertionError


@pytest.mark.parametrize("values", [None, 4])
@pytest.mark.parametrize("seed", range(8))
def test_equal_error_rate(seed, values):
    """With few values, many scores are alike."""
    rng = np.random.default_rng(seed)
    is_same = rng.random(60) < 0.3
    scores = rng.normal(size=60) + 1.2 * is_same
    if values is not None:
        scores = np.round(scores * values / 4) / values
    rate, threshold = equal_error_rate(scores, is_same)
    assert rate == pytest.approx(error_rate_by_trying(scores, is_same), abs=1e-12)
    refused, accepted = (scores < threshold)[is_same].mean(), (scores >= threshold)[~is_same].mean()
    assert min(refused, accepted) - 1e-12 <= rate <= max(refused, accepted) + 1e-12
    order = rng.permutation(60)
    assert equal_error_rate(scores[order], is_same[order]) == (rate, threshold)
    assert equal_error_rate(3 * scores - 7, is_same)[0] == pytest.approx(rate)


def test_equal_error_rate_at_the_ends():
    same = np.array([True, True, False, False])
    assert equal_error_rate(np.array([0.9, 0.8, 0.1, 0.2]), same)[0] == 0
    assert 0.2 < equal_error_rate(np.array([0.9, 0.8, 0.1, 0.2]), same)[1] <= 0.8
    assert equal_error_rate(np.array([0.1, 0.2, 0.9, 0.8]), same)[0] == 1
    assert equal_error_rate(np.zeros(4), same)[0] == 0.5
    for wrong in (np.ones(4, dtype=bool), np.zeros(4, dtype=bool)):
        with pytest.raises(ValueError, match="pairs of one and of two speakers"):
            equal_error_rate(np.arange(4.0), wrong)
    with pytest.raises(ValueError, match="finite"):
        equal_error_rate(np.array([0.1, np.nan, 0.2, 0.3]), same)


def test_every_pair_once():
    embeddings = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    scores, is_same = all_pairs(embeddings, ["a", "b", "a", "c", "b"])
    expected = [
        float(torch.nn.functional.cosine_similarity(embeddings[i], embeddings[j], dim=0))
        for i, j in combinations(range(5), 2)
    ]
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert np.flatnonzero(is_same).tolist() == [1, 6]


def test_similarity_to_own_and_other_speakers():
    generator = torch.Generator().manual_seed(0)
    found, references = torch.randn(4, 6, generator=generator), torch.randn(5, 6, generator=generator)
    speakers, owners = ["a", "b", "nobody", "b"], ["a", "a", "b", "c", "b"]
    not_with = [1, None, None, 4]
    figures = speaker_similarity(found, speakers, references, owners, not_with)
    same, others, right = [], [], 0
    for row in (0, 1, 3):
        means = {}
        for name in "abc":
            members = [place for place, owner in enumerate(owners) if owner == name and place != not_with[row]]
            cosines = torch.nn.functional.cosine_similarity(found[row], references[members])
            means[name] = float(cosines.mean())
        same.append(means.pop(speakers[row]))
        others += means.values()
        right += same[-1] > max(means.values())
    assert figures["recordings"] == 3
    assert figures["same_speaker"] == pytest.approx(np.mean(same), abs=1e-6)
    assert figures["other_speakers"] == pytest.approx(np.mean(others), abs=1e-6)
    assert figures["nearest_speaker"] == pytest.approx(100 * right / 3)


def test_similarity_without_references():
    references = torch.eye(2)
    assert speaker_similarity(torch.eye(2), ["x", "y"], references, ["a", "b"]) == {"recordings": 0}
    # The only reference of the first is itself.
    figures = speaker_similarity(torch.eye(2), ["a", "b"], references, ["a", "b"], [0, None])
    assert figures["recordings"] == 1 and figures["same_speaker"] == pytest.approx(1.0)
    alone = speaker_similarity(torch.eye(2), ["a", "a"], references, ["a", "a"])
    assert "other_speakers" not in alone and alone["same_speaker"] == pytest.approx(0.5)
    assert speaker_similarity(torch.zeros(0, 2), [], references, ["a", "b"]) == {"recordings": 0}
    assert speaker_similarity(torch.eye(2), ["a", "b"], torch.zeros(0, 2), []) == {"recordings": 0}


def test_embeddings_do_not_depend_on_the_batch():
    encoder = tiny_campplus()
    generator = torch.Generator().manual_seed(0)
    waveforms = [0.1 * torch.randn(samples, generator=generator) for samples in (9000, 300, 24000, 600, 12000)]
    embeddings, rows = embed_speakers(encoder, waveforms, 24000, batch_size=2)
    assert rows == [0, 2, 3, 4] and embeddings.shape == (4, 6)
    for place, row in enumerate(rows):
        alone, _ = embed_speakers(encoder, [waveforms[row]], 24000)
        torch.testing.assert_close(embeddings[place], alone[0])
    extractor = CampplusFeatureExtractor(feature_size=16)
    at_rate, _ = embed_speakers(encoder, [waveforms[2]], 16000)
    with torch.no_grad():
        expected = encoder(**extractor(waveforms[2], sampling_rate=16000)).embeddings
    torch.testing.assert_close(at_rate, expected)


def cheapest_way(costs: np.ndarray) -> list[tuple[int, int]]:
    """All ways, one after the other."""

    def ways(i: int, j: int):
        if (i, j) == (0, 0):
            yield [(0, 0)]
            return
        for di, dj in ((1, 1), (1, 0), (0, 1)):
            if i >= di and j >= dj:
                for way in ways(i - di, j - dj):
                    yield [*way, (i, j)]

    return min(ways(costs.shape[0] - 1, costs.shape[1] - 1), key=lambda way: sum(costs[pair] for pair in way))


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (5, 1), (4, 4), (3, 6), (6, 4)])
def test_warping_path_is_the_cheapest(shape):
    for seed in range(4):
        costs = np.random.default_rng(seed).random(shape)
        assert [tuple(pair) for pair in warping_path(costs).tolist()] == cheapest_way(costs)


def test_mel_distance():
    generator = torch.Generator().manual_seed(0)
    mel = torch.randn(40, 8, generator=generator)
    assert mel_distance(mel, mel) == 0
    # Other timing costs nothing, another level costs what it is.
    slow = mel.repeat_interleave(torch.randint(1, 4, (40,), generator=generator), dim=0)
    assert mel_distance(mel, slow) == 0
    assert mel_distance(slow + 0.25, mel + 0.25) == 0
    assert 0 < mel_distance(mel, slow + 0.25) <= 0.25 + 1e-6
    other = torch.randn(55, 8, generator=generator)
    costs = (mel[:, None] - other).abs().mean(-1).numpy()
    path = warping_path(costs)
    assert mel_distance(mel, other) == pytest.approx(np.mean([costs[i, j] for i, j in path]), rel=1e-5)
    assert mel_distance(other, mel) == pytest.approx(mel_distance(mel, other))


def test_mel_distance_of_nothing():
    for first, second in (((0, 8), (3, 8)), ((3, 8), (0, 8)), ((3, 8), (3, 7)), ((8,), (3, 8))):
        with pytest.raises(ValueError, match="expected"):
            mel_distance(torch.zeros(first), torch.zeros(second))
    with pytest.raises(ValueError, match="finite"):
        mel_distance(torch.full((2, 3), float("nan")), torch.zeros(2, 3))
