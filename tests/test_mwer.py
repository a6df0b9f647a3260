"""Minimum-word-error training on sampled candidates, against plain loops, and its effect on a small overfit."""

import itertools
import math

import pytest
import torch
from tiny_funasr_paraformer import pad, pad_labels, tiny_features, tiny_model

from hf_speechllm.models.mwer import edit_distance, mwer_loss, sample_candidates


def levenshtein(first: list[int], second: list[int]) -> int:
    """Textbook recursion over prefixes."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def test_edit_distance_of_every_short_pair():
    texts = [list(t) for n in range(4) for t in itertools.product([3, 4], repeat=n)]
    pairs = list(itertools.product(texts, texts))
    first = torch.tensor([a + [-1] * (4 - len(a)) for a, _ in pairs])
    second = torch.tensor([b + [-100] * (3 - len(b)) for _, b in pairs])
    assert edit_distance(first, second).tolist() == [levenshtein(a, b) for a, b in pairs]


def test_edit_distance_skips_holes_and_takes_long_rows():
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(-1, 5, (30, 17), generator=generator)
    second = torch.randint(-1, 5, (30, 12), generator=generator)
    expected = [
        levenshtein([x for x in a if x >= 0], [x for x in b if x >= 0])
        for a, b in zip(first.tolist(), second.tolist(), strict=True)
    ]
    assert edit_distance(first, second).tolist() == expected


def test_candidates_hold_the_best_or_second_best_unit():
    logits = torch.randn(3, 50, 7, generator=torch.Generator().manual_seed(1))
    candidates = sample_candidates(logits, 6, 0.3, torch.Generator().manual_seed(2))
    best = logits.topk(2, dim=-1).indices
    assert torch.equal(candidates[:, 0], best[..., 0])
    masked = candidates == best[:, None, :, 1]
    assert bool((masked | (candidates == best[:, None, :, 0])).all())
    assert 0.2 < float(masked[:, 1:].float().mean()) < 0.4
    assert torch.equal(candidates, sample_candidates(logits, 6, 0.3, torch.Generator().manual_seed(2)))


def brute_force(logits, lengths, candidates, references, ignored):
    """The formula, term by term, in Python."""
    total, expected = 0.0, []
    for row in range(len(logits)):
        log_probs = logits[row].log_softmax(-1)
        scores, errors = [], []
        for candidate in candidates[row].tolist():
            kept = candidate[: lengths[row]]
            scores.append(sum(log_probs[position, unit] for position, unit in enumerate(kept)))
            errors.append(levenshtein([u for u in kept if u not in ignored], references[row]))
        probabilities = torch.stack(scores).exp() / sum(score.exp() for score in scores)
        mean = sum(errors) / len(errors)
        total = total + sum(p * (w - mean) for p, w in zip(probabilities, errors, strict=True))
        expected.append(float(sum(p.detach() * w for p, w in zip(probabilities, errors, strict=True))))
    return total / len(logits), expected


def test_loss_and_gradient_equal_the_formula():
    generator = torch.Generator().manual_seed(3)
    lengths, references = [6, 3], [[3, 4, 5, 6, 7], [5]]
    first = torch.randn(2, 6, 9, generator=generator).double().requires_grad_()
    second = first.detach().float().requires_grad_()
    candidates = sample_candidates(second, 5, 0.5, generator)
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    expected, errors = brute_force(first, lengths, candidates, references, (0, 1, 2))
    actual, expected_errors = mwer_loss(second, mask, candidates, pad_labels(references), (0, 1, 2))
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(expected_errors, torch.tensor(errors), atol=1e-4, rtol=1e-4)
    expected.backward()
    actual.backward()
    torch.testing.assert_close(second.grad.double(), first.grad, atol=1e-5, rtol=1e-4)
    assert bool((second.grad[1, 3:] == 0).all()), "padded positions take no part"


@pytest.mark.parametrize("lengths", [[0, 0], [4, 0]])
def test_empty_texts(lengths):
    logits = torch.randn(2, max(lengths), 9, requires_grad=True)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    candidates = sample_candidates(logits, 3)
    loss, errors = mwer_loss(logits, mask, candidates, pad_labels([[], []]), (0, 1, 2))
    loss.backward()
    assert math.isfinite(float(loss.detach())) and bool(errors.isfinite().all())


def test_expected_error_falls_on_a_small_overfit():
    """From a half-trained recogniser, the MWER loss alone makes the expected and the greedy errors fall."""
    model = tiny_model("paraformer", sampling_ratio=0.0, label_smoothing=0.0).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch = pad(tiny_features(model, 40, 30, 50, 35))
    labels = pad_labels([[5, 6, 7, 8, 9, 10], [11, 5, 12], [13, 9, 7, 5, 14, 15, 16], [6, 8, 12, 17]])

    def train(steps: int, rate: float) -> None:
        optimizer = torch.optim.Adam(model.parameters(), lr=rate)
        for step in range(steps):
            optimizer.zero_grad()
            model(**batch, labels=labels, generator=torch.Generator().manual_seed(step)).loss.backward()
            optimizer.step()

    def errors() -> tuple[float, float]:
        with torch.no_grad():
            output = model(**batch, labels=labels)
            candidates = sample_candidates(output.logits, 64, 0.3, torch.Generator().manual_seed(9))
            mask = torch.arange(output.logits.shape[1]) < output.token_lengths[:, None]
            _, expected = mwer_loss(output.logits, mask, candidates, labels, (0, 1, 2))
            _, greedy = mwer_loss(output.logits, mask, candidates[:, :1], labels, (0, 1, 2))
        return float(expected.sum()), float(greedy.sum())

    train(12, 5e-3)
    before = errors()
    assert before[1] > 3, "the overfit must leave something to improve"
    model.config.mwer_weight, model.config.mwer_num_candidates = 1.0, 16
    model.config.decoder_weight, model.config.predictor_weight = 0.0, 0.0
    train(40, 2e-3)
    after = errors()
    assert after[0] < 0.8 * before[0], (before, after)
    assert after[1] < before[1], (before, after)
