"""CTC searches against plain re-implementations and brute force; forced alignment; hot words; token borders."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_speechllm.models.context_graph import ContextGraph
from hf_speechllm.models.ctc import (
    PrefixBeam,
    advance_prefix_beam,
    ctc_forced_alignment,
    ctc_greedy_search,
    ctc_prefix_beam_search,
    finish_prefix_beam,
    log_add,
    token_borders,
)


NEG_INF = -math.inf


def random_log_probs(frames: int, vocabulary: int, seed: int, sharpness: float = 2.0) -> torch.Tensor:
    """`(1, frames, vocabulary)`; neighbouring frames are alike, so that runs and repeats occur."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(frames, vocabulary, generator=generator)
    for frame in range(1, frames):
        logits[frame] = 0.6 * logits[frame - 1] + 0.8 * logits[frame]
    return (sharpness * logits).log_softmax(-1)[None]


def collapse_path(path: tuple[int, ...], blank: int) -> tuple[int, ...]:
    return tuple(label for label, _ in itertools.groupby(path) if label != blank)


# -- the rules, as a dictionary of prefixes ---------------------------------------------------------------------------
class Entry:
    def __init__(self):
        self.s = self.ns = self.v_s = self.v_ns = self.token_prob = NEG_INF
        self.times_s, self.times_ns = [], []

    def score(self):
        return float(np.logaddexp(self.s, self.ns))

    def viterbi(self):
        return self.v_s if self.v_s > self.v_ns else self.v_ns

    def times(self):
        return self.times_s if self.v_s > self.v_ns else self.times_ns


def context_of(prefix: tuple[int, ...], graph: ContextGraph | None) -> tuple[float, int]:
    """Bonus of a prefix and the automaton's node, walked from the root."""
    total, node = 0.0, 0
    for token in prefix if graph else ():
        gain, node = graph.step(node, token)
        total += gain
    return total, node


def plain_prefix_beam_search(log_probs: torch.Tensor, beam: int, blank: int, graph=None) -> list[tuple]:
    """n-best `(tokens, acoustic score, frames)` of one utterance `(t, v)`."""
    start = Entry()
    start.s = start.v_s = start.v_ns = 0.0
    current = [((), start)]
    for t, row in enumerate(log_probs):
        top = row.topk(min(beam, len(row)))
        following: dict[tuple, Entry] = {}
        for p, u in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            for prefix, old in current:
                last = prefix[-1] if prefix else None
                if u == blank:
                    new = following.setdefault(prefix, Entry())
                    new.s = float(np.logaddexp(new.s, old.score() + p))
                    new.v_s = old.viterbi() + p
                    new.times_s = list(old.times())
                    continue
                if u == last:
                    new = following.setdefault(prefix, Entry())
                    new.ns = float(np.logaddexp(new.ns, old.ns + p))
                    if new.v_ns < old.v_ns + p:
                        new.v_ns = old.v_ns + p
                        if new.token_prob < p:
                            new.token_prob = p
                            new.times_ns = old.times_ns[:-1] + [t]
                    path, best, times = old.s + p, old.v_s + p, old.times_s
                else:
                    path, best, times = old.score() + p, old.viterbi() + p, old.times()
                new = following.setdefault((*prefix, u), Entry())
                new.ns = float(np.logaddexp(new.ns, path))
                if new.v_ns < best:
                    new.v_ns, new.token_prob, new.times_ns = best, p, [*times, t]
        ranked = sorted(following.items(), key=lambda kv: kv[1].score() + context_of(kv[0], graph)[0], reverse=True)
        current = ranked[:beam]
    return [(list(prefix), entry.score(), entry.times()) for prefix, entry in current]


def assert_same_nbest(result, expected: list[tuple]) -> None:
    assert result.tokens == [tokens for tokens, _, _ in expected]
    assert result.frames == [frames for _, _, frames in expected]
    torch.testing.assert_close(
        torch.tensor(result.scores, dtype=torch.float64),
        torch.tensor([score for _, score, _ in expected], dtype=torch.float64),
        atol=1e-9,
        rtol=1e-9,
    )


@pytest.mark.parametrize("beam", [1, 2, 3, 10])
@pytest.mark.parametrize("vocabulary", [2, 3, 5, 40])
def test_prefix_beam_search_follows_the_rules(vocabulary, beam):
    seen_repeats = 0
    for seed in range(12):
        for sharpness in (0.5, 2.0, 5.0):
            log_probs = random_log_probs(1 + 3 * seed, vocabulary, seed, sharpness)
            lengths = torch.tensor([log_probs.shape[1]])
            (result,) = ctc_prefix_beam_search(log_probs, lengths, beam, blank=0)
            assert_same_nbest(result, plain_prefix_beam_search(log_probs[0], beam, 0))
            seen_repeats += any(a == b for t in result.tokens for a, b in itertools.pairwise(t))
    assert seen_repeats > 0 or vocabulary == 40


@settings(max_examples=60, deadline=None, database=None)
@given(
    seed=st.integers(0, 10**6),
    frames=st.integers(0, 14),
    vocabulary=st.integers(2, 6),
    beam=st.integers(1, 8),
    blank=st.integers(0, 1),
    phrases=st.lists(st.lists(st.integers(2, 5), min_size=1, max_size=3), max_size=3),
)
def test_prefix_beam_search_with_hot_words_follows_the_rules(seed, frames, vocabulary, beam, blank, phrases):
    log_probs = random_log_probs(frames, vocabulary, seed)
    graph = ContextGraph(phrases, 1.5) if phrases else None
    lengths = torch.tensor([frames])
    (upstream,) = ctc_prefix_beam_search(log_probs, lengths, beam, blank, graph, end="upstream")
    expected = plain_prefix_beam_search(log_probs[0], beam, blank, graph)
    contexts = [context_of(tuple(tokens), graph) for tokens, _, _ in expected]
    back = [graph.back_off(node) if graph else 0.0 for _, node in contexts]
    replaced = [(tokens, score + b, times) for (tokens, score, times), b in zip(expected, back, strict=True)]
    assert_same_nbest(upstream, replaced)

    (resorted,) = ctc_prefix_beam_search(log_probs, lengths, beam, blank, graph, end="resort")
    totals = [score + gain + b for (_, score, _), (gain, _), b in zip(expected, contexts, back, strict=True)]
    order = sorted(range(len(totals)), key=totals.__getitem__, reverse=True) if graph else range(len(totals))
    assert_same_nbest(resorted, [(expected[i][0], totals[i], expected[i][2]) for i in order])
    assert resorted.scores == sorted(resorted.scores, reverse=True)


@pytest.mark.parametrize("frames,vocabulary", [(1, 2), (3, 2), (5, 2), (4, 3), (5, 3), (4, 4)])
def test_prefix_scores_are_sums_over_all_paths(frames, vocabulary):
    log_probs = random_log_probs(frames, vocabulary, seed=frames, sharpness=1.0)
    rows = log_probs[0].double()
    totals: dict[tuple, float] = {}
    for path in itertools.product(range(vocabulary), repeat=frames):
        score = float(sum(rows[t, label] for t, label in enumerate(path)))
        prefix = collapse_path(path, 0)
        totals[prefix] = float(np.logaddexp(totals.get(prefix, NEG_INF), score))
    (result,) = ctc_prefix_beam_search(log_probs, torch.tensor([frames]), 10**4, blank=0)
    found = {tuple(t): s for t, s in zip(result.tokens, result.scores, strict=True) if s > NEG_INF}
    assert found.keys() == totals.keys()
    for prefix, total in totals.items():
        assert found[prefix] == pytest.approx(total, abs=1e-9)
    assert math.fsum(math.exp(s) for s in found.values()) == pytest.approx(1.0, abs=1e-5)
    assert tuple(result.tokens[0]) == max(totals, key=totals.get)


def test_prefix_beam_of_a_batch_is_that_of_its_items():
    lengths = [9, 1, 0, 14]
    items = [random_log_probs(14, 5, seed)[0] for seed in range(4)]
    results = ctc_prefix_beam_search(torch.stack(items), torch.tensor(lengths), 4, blank=0)
    for item, length, result in zip(items, lengths, results, strict=True):
        (alone,) = ctc_prefix_beam_search(item[None, :length], torch.tensor([length]), 4, blank=0)
        assert (alone.tokens, alone.scores, alone.frames) == (result.tokens, result.scores, result.frames)
    assert results[2].tokens == [[]] and results[2].scores == [0.0]


@pytest.mark.parametrize("phrases", [[], [[2, 3], [3, 3, 1], [1]]])
@pytest.mark.parametrize("cut", range(0, 16, 3))
def test_saved_beam_goes_on_as_if_nothing_had_happened(cut, phrases):
    graph = ContextGraph(phrases, 2.0) if phrases else None
    for seed in range(5):
        log_probs = random_log_probs(15, 4, seed)[0]
        top = log_probs.topk(4)
        values, indices = top.values.tolist(), top.indices.tolist()
        whole = PrefixBeam()
        advance_prefix_beam(whole, values, indices, 6, 0, graph)

        first = PrefixBeam()
        advance_prefix_beam(first, values[:cut], indices[:cut], 6, 0, graph)
        text = json.dumps(first.to_dict())
        second = PrefixBeam.from_dict(json.loads(text))
        assert json.dumps(second.to_dict()) == text
        advance_prefix_beam(second, values[cut:], indices[cut:], 6, 0, graph)
        assert json.dumps(first.to_dict()) == text, "the saved beam must not change"
        assert second.num_frames == whole.num_frames == 15
        for end in ("resort", "upstream"):
            one, other = finish_prefix_beam(whole, graph, end), finish_prefix_beam(second, graph, end)
            assert (one.tokens, one.scores, one.frames) == (other.tokens, other.scores, other.frames)


def test_saved_beam_keeps_only_living_prefixes():
    beam = PrefixBeam()
    for seed in range(20):
        top = random_log_probs(15, 30, seed)[0].topk(5)
        advance_prefix_beam(beam, top.values.tolist(), top.indices.tolist(), 5, 0)
        longest = max(len(beam.spell(h.node)) for h in beam.hypotheses)
        assert len(beam.to_dict()["parents"]) <= 1 + 5 * longest < len(beam.parents) + 5 * longest


def test_finishing_leaves_the_beam_as_it_is():
    beam, graph = PrefixBeam(), ContextGraph([[1, 2]], 3.0)
    top = random_log_probs(8, 4, 3)[0].topk(3)
    advance_prefix_beam(beam, top.values.tolist(), top.indices.tolist(), 3, 0, graph)
    before = json.dumps(beam.to_dict())
    finish_prefix_beam(beam, graph, "resort")
    finish_prefix_beam(beam, graph, "upstream")
    assert json.dumps(beam.to_dict()) == before


def test_log_add():
    assert log_add(NEG_INF, NEG_INF) == NEG_INF
    assert log_add(-3.0, NEG_INF) == log_add(NEG_INF, -3.0) == -3.0
    assert log_add(-1.0, -2.0) == log_add(-2.0, -1.0) == pytest.approx(math.log(math.exp(-1) + math.exp(-2)))


# -- greedy -----------------------------------------------------------------------------------------------------------
def test_greedy_search():
    labels = [[0, 2, 2, 0, 2, 1, 1, 0], [1, 1, 1, 3, 3, 3, 3, 3], [0] * 8]
    peaks = [[1.0, 3.0, 4.0, 1.0, 2.0, 5.0, 3.0, 1.0], [1.0, 2.0, 1.5, 1.0, 9.0, 9.0, 9.0, 9.0], [1.0] * 8]
    logits = torch.zeros(3, 8, 4)
    for row in range(3):
        for frame in range(8):
            logits[row, frame, labels[row][frame]] = peaks[row][frame]
    results = ctc_greedy_search(logits.log_softmax(-1), torch.tensor([8, 4, 8]), blank=0)
    # Repeats merge unless a blank divides them; a token's frame is its most probable one, the first among equals.
    assert results == [([2, 2, 1], [2, 4, 5]), ([1, 3], [1, 3]), ([], [])]


@pytest.mark.parametrize("blank", [0, 3])
def test_greedy_search_is_grouping(blank):
    for seed in range(20):
        log_probs = random_log_probs(20, 4, seed)
        best, labels = (row.tolist() for row in log_probs[0].max(-1))
        runs = [list(run) for label, run in itertools.groupby(range(20), labels.__getitem__) if label != blank]
        expected = [labels[run[0]] for run in runs], [max(run, key=best.__getitem__) for run in runs]
        assert ctc_greedy_search(log_probs, torch.tensor([20]), blank) == [expected]


# -- forced alignment -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("labels", [[], [1], [1, 2], [1, 1], [2, 1, 2], [1, 1, 2]])
@pytest.mark.parametrize("frames", [3, 4, 6])
def test_forced_alignment_is_the_best_of_all_paths(frames, labels):
    needed = len(labels) + sum(a == b for a, b in itertools.pairwise(labels))
    if frames < needed:
        pytest.skip("no path exists")
    for seed in range(5):
        log_probs = random_log_probs(frames, 3, seed, sharpness=1.0)
        rows = log_probs[0].double()
        paths = itertools.product(range(3), repeat=frames)
        best = max(
            float(sum(rows[t, label] for t, label in enumerate(path)))
            for path in paths
            if collapse_path(path, 0) == tuple(labels)
        )
        path = ctc_forced_alignment(
            log_probs, torch.tensor([frames]), torch.tensor([labels], dtype=torch.long), torch.tensor([len(labels)]), 0
        )[0].tolist()
        assert collapse_path(tuple(path), 0) == tuple(labels)
        assert float(sum(rows[t, label] for t, label in enumerate(path))) == pytest.approx(best, abs=1e-9)


def test_forced_alignment_of_a_batch_is_that_of_its_items():
    log_probs = torch.cat([random_log_probs(12, 5, seed) for seed in range(4)])
    lengths, counts = torch.tensor([12, 5, 7, 3]), torch.tensor([4, 2, 0, 2])
    labels = torch.tensor([[1, 2, 2, 3], [4, 4, 0, 0], [0, 0, 0, 0], [2, 3, 4, 4]])
    paths = ctc_forced_alignment(log_probs, lengths, labels, counts, 0)
    assert paths.shape == (4, 12)
    for row in range(4):
        t, n = int(lengths[row]), int(counts[row])
        alone = ctc_forced_alignment(log_probs[[row], :t], lengths[[row]], labels[[row], :n], counts[[row]], 0)
        assert paths[row, :t].tolist() == alone[0].tolist()
        assert paths[row, t:].tolist() == [0] * (12 - t)


def test_nothing_to_align():
    empty = torch.zeros(2, 0, dtype=torch.long)
    counts = torch.tensor([0, 0])
    path = ctc_forced_alignment(random_log_probs(3, 4, 0).expand(2, -1, -1), torch.tensor([3, 1]), empty, counts, 2)
    assert path.tolist() == [[2, 2, 2], [2, 2, 2]]
    assert ctc_forced_alignment(torch.zeros(2, 0, 4), torch.tensor([0, 0]), empty, counts, 0).shape == (2, 0)


@pytest.mark.parametrize("labels,needed", [([1, 2, 3], 3), ([1, 1], 3), ([1, 1, 1, 2], 6)])
def test_forced_alignment_refuses_too_few_frames(labels, needed):
    for frames in (needed, needed - 1):
        log_probs = random_log_probs(8, 4, 0).expand(2, -1, -1)
        rows = torch.tensor([[1, *labels[1:]], labels])
        arguments = (log_probs, torch.tensor([8, frames]), rows, torch.tensor([1, len(labels)]), 0)
        if frames == needed:
            assert collapse_path(tuple(ctc_forced_alignment(*arguments)[1, :frames].tolist()), 0) == tuple(labels)
        else:
            with pytest.raises(ValueError, match=f"item 1 has {frames} frames, its labels need {needed}"):
                ctc_forced_alignment(*arguments)


# -- hot words --------------------------------------------------------------------------------------------------------
def walk(graph: ContextGraph, tokens: list[int]) -> list[float]:
    node, gains = 0, []
    for token in tokens:
        gain, node = graph.step(node, token)
        gains.append(gain)
    return [*gains, graph.back_off(node)]


def test_bonus_of_one_phrase_by_hand():
    graph = ContextGraph([[1, 2, 3]], 2.0)
    # Each match earns 2; the last one also the phrase's 6; falling off or ending gives the running 6 back: 6 stay.
    assert walk(graph, [1, 2, 3]) == [2.0, 2.0, 8.0, -6.0]
    assert walk(graph, [1, 2, 3, 9]) == [2.0, 2.0, 8.0, -6.0, -0.0]
    assert walk(graph, [1, 2, 9]) == [2.0, 2.0, -4.0, -0.0]
    assert walk(graph, [1, 2]) == [2.0, 2.0, -4.0]
    # A mismatch that begins the phrase anew keeps the first token's bonus.
    assert walk(graph, [1, 2, 1, 2, 3]) == [2.0, 2.0, -2.0, 2.0, 8.0, -6.0]


def test_fail_links_by_hand():
    graph = ContextGraph([[1, 2, 3], [2, 4], [2]], 2.0)
    # 1 2 falls to the 2 of "2 4" and goes on there; "2" is a prefix of an earlier phrase, so it is no phrase itself.
    assert walk(graph, [1, 2, 4]) == [2.0, 2.0, 4.0, -4.0]
    ordered = ContextGraph([[2], [1, 2, 3]], 2.0)
    # Inserted first it is one: inside "1 2 3" its own bonus of 2 comes on top.
    assert walk(ordered, [1, 2, 3]) == [2.0, 4.0, 8.0, -6.0]
    assert walk(ordered, [2, 2]) == [4.0, 2.0, -2.0]


def test_both_end_rules_by_hand():
    """Two frames say "1 2" or "1 3": 2 is likelier, 3 completes the phrase "1 3", and "1 2 5" stays unfinished."""
    probabilities = torch.tensor([[[0.1, 0.9, 0.0, 0.0, 0.0, 0.0], [0.1, 0.0, 0.5, 0.4, 0.0, 0.0]]]).log()
    lengths = torch.tensor([2])
    graph = ContextGraph([[1, 3], [1, 2, 5]], 1.0)
    (plain,) = ctc_prefix_beam_search(probabilities, lengths, 3, 0)
    assert plain.tokens == [[1, 2], [1, 3], [1]]
    # Bonuses: "1 2" 2, "1 3" 1 + 3 = 4, "1" 1; in the end -2, -2, -1.
    acoustic = dict(zip(map(tuple, plain.tokens), plain.scores, strict=True))
    (resort,) = ctc_prefix_beam_search(probabilities, lengths, 3, 0, graph, end="resort")
    assert resort.tokens == [[1, 3], [1, 2], [1]]
    assert resort.scores == pytest.approx([acoustic[1, 3] + 2, acoustic[1, 2], acoustic[1,]])
    (upstream,) = ctc_prefix_beam_search(probabilities, lengths, 3, 0, graph, end="upstream")
    assert upstream.tokens == [[1, 3], [1, 2], [1]]
    assert upstream.scores == pytest.approx([acoustic[1, 3] - 2, acoustic[1, 2] - 2, acoustic[1,] - 1])


def test_resorting_changes_the_order():
    """In the beam the unfinished "1 2" leads; taking its bonus back lets "1 3" win."""
    probabilities = torch.tensor([[[0.1, 0.9, 0.0, 0.0], [0.0, 0.0, 0.4, 0.6]]]).log()
    graph = ContextGraph([[1, 2, 9]], 1.0)
    (upstream,) = ctc_prefix_beam_search(probabilities, torch.tensor([2]), 2, 0, graph, end="upstream")
    (resort,) = ctc_prefix_beam_search(probabilities, torch.tensor([2]), 2, 0, graph, end="resort")
    assert upstream.tokens == [[1, 2], [1, 3]] and upstream.scores[0] < upstream.scores[1]
    assert resort.tokens == [[1, 3], [1, 2]] and resort.scores[0] > resort.scores[1]


def test_empty_phrases_are_ignored():
    assert walk(ContextGraph([[], [1]], 1.0), [1, 2]) == [2.0, -1.0, -0.0]


# -- times ------------------------------------------------------------------------------------------------------------
def test_token_borders_by_hand():
    assert token_borders([], 3.0, 0.04) == []
    assert token_borders([5], 0.5, 0.04) == [(0.0, 0.5)]
    borders = token_borders([5, 10, 100], 5.0, 0.04)
    expected = [(0.0, 0.3), (0.3, 0.9), (3.5, 4.5)]
    assert np.allclose(borders, expected)
    assert token_borders([50], 10.0, 0.04, max_token_duration=0.2) == [pytest.approx((1.9, 2.1))]


@settings(max_examples=50, deadline=None, database=None)
@given(st.lists(st.integers(0, 500), unique=True, min_size=1, max_size=30).map(sorted))
def test_token_borders_do_not_overlap(peaks):
    borders = token_borders(peaks, 501 * 0.04, 0.04)
    assert all(0 <= start <= peak * 0.04 <= end for (start, end), peak in zip(borders, peaks, strict=True))
    assert all(end - start <= 1.0 + 1e-9 for start, end in borders)
    assert all(a[1] <= b[0] + 1e-9 for a, b in itertools.pairwise(borders))
