"""Continuous integrate-and-fire against loops over frames, in values and gradients, and at its edges."""

import pytest
import torch

from hf_speechllm.models.cif import (
    append_tail,
    dynamic_threshold,
    fire_cumulative,
    fire_rounded,
    fire_sequential,
    integrate,
    integrate_exactly,
)


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected.to(actual.dtype), atol=atol, rtol=1e-5)


def loop(hidden, alphas, threshold=1.0, step=1.0):
    """The definition, one frame after the other in float64: embeddings of each item, and the firing track."""
    tracks, embeddings = [], []
    for states, weights in zip(hidden.double(), alphas.double(), strict=True):
        held, token, track, tokens = torch.zeros(()).double(), torch.zeros_like(states[0]), [], []
        for frame, weight in zip(states, weights, strict=True):
            before, held = held, held + weight
            track.append(held)
            if held >= threshold:
                tokens.append(token + (1 - before) * frame)
                held = held - step
                token = (weight - (1 - before)) * frame
            else:
                token = token + weight * frame
        tracks.append(torch.stack(track))
        embeddings.append(torch.stack(tokens) if tokens else states[:0])
    return embeddings, torch.stack(tracks)


def overlaps(hidden, alphas, length):
    """Exact shares of one item: overlap of each frame's stretch with each token's."""
    passed = alphas.double().cumsum(0) * length / alphas.double().sum()
    before = torch.cat([passed.new_zeros(1), passed[:-1]])
    rows = [
        (torch.minimum(passed, torch.tensor(k + 1.0)) - torch.maximum(before, torch.tensor(float(k)))).clamp_min(0)
        for k in range(length)
    ]
    return torch.stack(rows) @ hidden.double()


def random_case(batch=3, frames=40, seed=0, largest=0.6):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, frames, 5, generator=generator)
    alphas = torch.rand(batch, frames, generator=generator) * largest
    alphas[1, frames // 2 :] = 0.0
    return hidden, alphas


# -- the two rules ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fire", [fire_cumulative, fire_sequential, fire_rounded])
def test_rules_equal_the_loop(fire):
    for seed in range(20):
        hidden, alphas = random_case(seed=seed)
        expected, track = loop(hidden, alphas)
        firing = fire(alphas)
        count = max(len(rows) for rows in expected) + 2
        embeddings = integrate(hidden, alphas, firing, count)
        for row, rows in enumerate(expected):
            close(embeddings[row, : len(rows)], rows)
            assert bool((embeddings[row, len(rows) :] == 0).all()), "what has not fired is no token"
        close((firing.peaks >= 1.0).long(), (track >= 1.0).long(), atol=0)
        if fire is not fire_cumulative:
            close(firing.peaks, track)


def test_cumulative_peak_is_one_plus_the_fraction():
    firing = fire_cumulative(torch.tensor([[0.25, 0.5, 0.5, 0.5, 0.25]]))
    close(firing.peaks, torch.tensor([[0.25, 0.75, 1.25, 0.75, 1.0]]))
    assert firing.fires.tolist() == [[False, False, True, False, True]]


def test_frame_that_crosses_two_thresholds():
    hidden = torch.arange(1.0, 5.0)[None, :, None]
    alphas = torch.tensor([[0.5, 2.2, 0.4, 0.2]])
    cumulative, sequential = fire_cumulative(alphas), fire_sequential(alphas)
    # Upstream's parallel rule loses a token; the loop fires it one frame later.
    assert cumulative.fires.tolist() == [[False, True, True, False]]
    assert sequential.fires.tolist() == [[False, True, True, True]]
    close(cumulative.peaks, torch.tensor([[0.5, 1.7, 1.1, 0.3]]))
    close(sequential.peaks, torch.tensor([[0.5, 2.7, 2.1, 1.3]]))
    # 0.5 * 1 + 1.5 * 2, then 0.7 * 2 + 0.3 * 3.
    close(integrate(hidden, alphas, cumulative, 3)[0, :, 0], torch.tensor([3.5, 2.3, 0.0]))
    close(integrate(hidden, alphas, sequential, 3)[0], loop(hidden, alphas)[0][0])
    exact = integrate_exactly(hidden, alphas, torch.tensor([3]), 3)
    close(exact[0], overlaps(hidden[0], alphas[0], 3))


def test_sequential_rule_leaves_the_rest_to_the_next_frame():
    hidden = torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(3))
    alphas = torch.rand(2, 30, generator=torch.Generator().manual_seed(4)) * 2.5
    expected, track = loop(hidden, alphas)
    for fire in (fire_sequential, fire_rounded):
        firing = fire(alphas)
        close(firing.peaks, track, atol=3e-5)
        count = max(len(rows) for rows in expected)
        embeddings = integrate(hidden, alphas, firing, count)
        for row, rows in enumerate(expected):
            close(embeddings[row, : len(rows)], rows, atol=3e-4)


@pytest.mark.parametrize(("threshold", "step"), [(1 - 1e-4, 1 - 1e-4), (0.9, 1.0), (0.8, 0.8)])
def test_other_thresholds(threshold, step):
    hidden, alphas = random_case(seed=5)
    _, track = loop(hidden, alphas, threshold, step)
    close(fire_sequential(alphas, threshold, step).peaks, track)
    close(fire_rounded(alphas, threshold, step).peaks, track)


def test_rounded_rule_is_float32_bit_for_bit():
    alphas = torch.rand(4, 200, generator=torch.Generator().manual_seed(6))
    held, track = torch.zeros(4), []
    for frame in range(200):
        held = held + alphas[:, frame]
        track.append(held)
        held = torch.where(held >= 1.0, held - 1.0, held)
    assert torch.equal(fire_rounded(alphas).peaks, torch.stack(track, 1))


# -- gradients --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fire", [fire_cumulative, fire_sequential, fire_rounded])
def test_gradients_equal_those_of_the_loop(fire):
    hidden, alphas = random_case(seed=7)
    weight = torch.randn(3, 12, 5, generator=torch.Generator().manual_seed(8))

    first = [hidden.clone().double().requires_grad_(), alphas.clone().double().requires_grad_()]
    rows, _ = loop(*first)
    sum((row[:12] * weight[i, : len(row)].double()).sum() for i, row in enumerate(rows)).backward()
    second = [hidden.clone().requires_grad_(), alphas.clone().requires_grad_()]
    (integrate(*second, fire(second[1]), 12) * weight).sum().backward()
    close(second[0].grad, first[0].grad)
    close(second[1].grad, first[1].grad, atol=1e-4)


def test_exact_gradients():
    hidden, alphas = random_case(seed=9)
    alphas = alphas + 0.01
    lengths = torch.tensor([4, 3, 7])
    arguments = [hidden.double().requires_grad_(), alphas.double().requires_grad_()]
    expected = torch.stack([
        torch.nn.functional.pad(overlaps(h, a, int(n)), (0, 0, 0, 7 - int(n)))
        for h, a, n in zip(*arguments, lengths, strict=True)
    ])  # fmt: skip
    weight = torch.randn(3, 7, 5).double()
    expected_gradients = torch.autograd.grad((expected * weight).sum(), arguments)
    actual = integrate_exactly(*arguments, lengths, 7)
    close(actual, expected)
    for got, want in zip(torch.autograd.grad((actual * weight).sum(), arguments), expected_gradients, strict=True):
        close(got, want, atol=1e-4)


# -- training: as many embeddings as tokens ---------------------------------------------------------------------------
def test_every_token_gets_weight_one_whatever_rounding_says():
    """With upstream's rounding a good part of the utterances lose their last token."""
    ones = torch.ones(1, 120, 1)
    lost = 0
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        alphas = torch.rand(1, 120, generator=generator)
        length = torch.tensor([int(torch.randint(5, 40, (1,), generator=generator))])
        embeddings = integrate_exactly(ones, alphas, length, int(length))
        close(embeddings, torch.ones(1, int(length), 1), atol=1e-5)
        scaled = alphas * (length / alphas.sum())
        lost += int(integrate(ones, scaled, fire_rounded(scaled), int(length))[0, -1, 0] == 0)
    assert lost > 10


@pytest.mark.parametrize("length", [1, 2, 9, 60])
def test_alphas_far_from_the_length(length):
    hidden = torch.randn(2, 7, 3)
    alphas = torch.tensor([[0.99] * 7, [1e-6] * 6 + [0.9]])
    embeddings = integrate_exactly(hidden, alphas, torch.tensor([length, length]), length)
    for row in range(2):
        close(embeddings[row], overlaps(hidden[row], alphas[row], length), atol=1e-4)


# -- edges ------------------------------------------------------------------------------------------------------------
def test_nothing_fires():
    hidden, alphas = torch.randn(2, 4, 3), torch.full((2, 4), 0.2)
    for fire in (fire_cumulative, fire_sequential, fire_rounded):
        firing = fire(alphas)
        assert not bool(firing.fires.any())
        assert integrate(hidden, alphas, firing, 0).shape == (2, 0, 3)
        assert bool((integrate(hidden, alphas, firing, 2) == 0).all())


def test_no_weight_at_all():
    hidden = torch.randn(2, 4, 3, requires_grad=True)
    alphas = torch.zeros(2, 4, requires_grad=True)
    embeddings = integrate_exactly(hidden, alphas, torch.tensor([2, 0]), 2)
    embeddings.sum().backward()
    assert bool((embeddings == 0).all())
    assert bool(hidden.grad.isfinite().all()) and bool(alphas.grad.isfinite().all())


def test_no_frame():
    hidden, alphas = torch.randn(2, 0, 3), torch.zeros(2, 0)
    for fire in (fire_cumulative, fire_sequential, fire_rounded):
        assert fire(alphas).peaks.shape == (2, 0)
        assert integrate(hidden, alphas, fire(alphas), 0).shape == (2, 0, 3)
    assert bool((integrate_exactly(hidden, alphas, torch.tensor([1, 0]), 1) == 0).all())


def test_padded_frames_without_weight_change_nothing():
    hidden, alphas = random_case(seed=11)
    longer, more = torch.nn.functional.pad(hidden, (0, 0, 0, 6), value=9.0), torch.nn.functional.pad(alphas, (0, 6))
    for fire in (fire_cumulative, fire_sequential):
        close(integrate(longer, more, fire(more), 8), integrate(hidden, alphas, fire(alphas), 8))
    lengths = torch.tensor([5, 2, 9])
    close(integrate_exactly(longer, more, lengths, 9), integrate_exactly(hidden, alphas, lengths, 9))


def test_half_precision_is_summed_in_float32():
    hidden, alphas = random_case(frames=200, seed=12)
    expected = integrate(hidden.bfloat16().float(), alphas, fire_cumulative(alphas), 20)
    actual = integrate(hidden.bfloat16(), alphas, fire_cumulative(alphas), 20)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, expected.bfloat16())


def test_tail_follows_each_utterance():
    alphas = torch.tensor([[0.5, 0.4, 0.3], [0.5, 0.0, 0.0]])
    tailed = append_tail(alphas, torch.tensor([3, 1]), 0.45)
    close(tailed, torch.tensor([[0.5, 0.4, 0.3, 0.45], [0.5, 0.45, 0.0, 0.0]]))


def test_dynamic_threshold_is_the_papers():
    close(dynamic_threshold(torch.tensor([[0.6, 0.7], [1.0, 1.0], [0.0, 0.0]])), torch.tensor([1.3 / 2, 1.0, 0.0]))
