"""Repetition-aware sampling: the closed form is the distribution of the two draws, for every kind of row."""

import pytest
import torch

from hf_speechllm.models.ras_sampling import (
    RasSettings,
    RepetitionAwareSampling,
    SeededDraw,
    nucleus,
    ras_probabilities,
    two_step_draw,
)


def by_definition(logits: torch.Tensor, history: list[int], settings: RasSettings) -> torch.Tensor:
    """The distribution of the two draws of one row, summed over every first draw, in float64."""
    full = logits.double().softmax(dim=-1)
    order = full.sort(descending=True, stable=True)
    candidates, total = [], 0.0
    for probability, token in zip(order.values.tolist(), order.indices.tolist(), strict=True):
        if total >= settings.top_p or len(candidates) >= settings.top_k:
            break
        candidates.append((token, probability))
        total += probability
    result = torch.zeros_like(full)
    for token, probability in candidates:
        share = probability / total
        if history[-settings.window :].count(token) < settings.window * settings.threshold:
            result[token] += share
            continue
        second = logits.double().clone()
        second[token] = float("-inf")
        result += share * second.softmax(dim=-1)
    return result


@pytest.mark.parametrize("seed", range(20))
def test_closed_form_is_the_sum_over_both_draws(seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = 30
    settings = RasSettings(
        top_p=0.3 + 0.7 * float(torch.rand((), generator=generator)),
        top_k=int(torch.randint(1, 40, (), generator=generator)),
        window=int(torch.randint(1, 14, (), generator=generator)),
        threshold=0.35 * float(torch.rand((), generator=generator)),
    )
    scale = 10 ** (3 * torch.rand(6, 1, generator=generator) - 1)
    logits = scale * torch.randn(6, tokens, generator=generator)
    logits[0, :10] = float("-inf")
    history = torch.randint(0, tokens, (6, 12), generator=generator)
    history[:, -1] = logits.argmax(dim=-1)
    found = ras_probabilities(logits, history, settings)
    for row in range(6):
        expected = by_definition(logits[row], history[row].tolist(), settings)
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(6))


def test_a_certain_token_that_repeats_gives_way():
    """Its probability rounds to 1, and the second draw is decided by logits that are 0 in float32."""
    logits = torch.tensor([[200.0, 1.0, 0.0, float("-inf")]])
    found = ras_probabilities(logits, torch.tensor([[0]]), RasSettings())
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.731059, 0.268941, 0.0]]))
    alone = torch.tensor([[float("-inf"), 3.0]])
    assert ras_probabilities(alone, torch.tensor([[1, 1]]), RasSettings()).tolist() == [[0.0, 1.0]]


def test_draws_have_the_distribution():
    """20,000 draws of both kinds."""
    torch.manual_seed(0)
    logits, history, settings = 2 * torch.randn(12), [3, 7, 1, 1, 5], RasSettings(window=4, threshold=0.25)
    logits[1] = logits.max() + 1
    expected = ras_probabilities(logits[None], torch.tensor([history]), settings)[0]
    generator = torch.Generator().manual_seed(1)
    drawn = torch.tensor([two_step_draw(logits, history, settings, generator) for _ in range(20000)])
    found = torch.bincount(drawn, minlength=12) / 20000
    assert (found - expected).abs().max() < 0.015
    assert expected[1] == 0.0 and expected.max() < 0.9


def test_nucleus_takes_the_token_that_crosses():
    ids, values, inside = nucleus(torch.tensor([[0.5, 0.2, 0.2, 0.1]]), RasSettings(top_p=0.6, top_k=3))
    assert ids.tolist() == [[0, 1, 2]] and inside.tolist() == [[True, True, False]]
    assert nucleus(torch.tensor([[0.25] * 4]), RasSettings(top_p=1.0, top_k=25))[0].tolist() == [[0, 1, 2, 3]]


def test_processor_looks_at_the_answer_and_at_its_slice_only():
    settings = RasSettings(top_p=0.9, top_k=5, window=3, threshold=0.3)
    scores = torch.randn(2, 20)
    ids = torch.tensor([[12, 12, 12, 14, 5], [13, 13, 13, 19, 11]])
    processed = RepetitionAwareSampling(settings, prompt_length=3, first_token_id=10, num_tokens=8)(ids, scores)
    expected = ras_probabilities(scores[:, 10:18], ids[:, 3:] - 10, settings).log()
    assert torch.equal(processed[:, 10:18], expected)
    assert torch.isneginf(processed[:, :10]).all() and torch.isneginf(processed[:, 18:]).all()
    cold = RepetitionAwareSampling(settings, 3, 10, 8, temperature=0.5)(ids, scores)
    torch.testing.assert_close(cold, RepetitionAwareSampling(settings, 3, 10, 8)(ids, 2 * scores))
    with pytest.raises(ValueError, match="temperature"):
        RepetitionAwareSampling(settings, temperature=0.0)


def test_a_row_draws_in_a_batch_what_it_draws_alone():
    scores = torch.randn(3, 9).log_softmax(dim=-1)
    ids = torch.zeros(3, 1, dtype=torch.long)
    together = SeededDraw([torch.Generator().manual_seed(seed) for seed in range(3)], 2, 6)(ids, scores)
    assert ((together == 0).sum(dim=-1) == 1).all() and torch.isneginf(together[:, :2]).all()
    for row in range(3):
        alone = SeededDraw([torch.Generator().manual_seed(row)], 2, 6)(ids[:1], scores[row : row + 1])
        assert torch.equal(alone[0], together[row])
    with pytest.raises(ValueError, match="one for each of 3"):
        SeededDraw([torch.Generator()])(ids, scores)
