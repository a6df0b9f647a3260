"""CTC searches and alignment: greedy, prefix beam search with times and hot words, forced alignment, token borders.

The prefix beam search follows WeNet's rules to the last bit of its float64 scores (`search.py`): per frame only the
best `beam` tokens are extended, every prefix carries the log-probability of ending in blank or in its last token, and
beside it the Viterbi score of the best path, which yields the frame of each token's peak. Implementation: one top-k
and one copy to Python per utterance, prefixes as nodes of a trie, peak frames as linked pairs, and a new prefix
becomes an object only if it survives the frame.

Shape legend: `b` batch, `t` frames, `v` vocabulary, `n` tokens.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .context_graph import ContextGraph


_NEG_INF = -math.inf
# A linked list of frame indices: (earlier, frame); None is the empty list.
Frames = tuple | None


def ctc_greedy_search(log_probs: Tensor, lengths: Tensor, blank: int) -> list[tuple[list[int], list[int]]]:
    """Best label of every frame, repeats merged, blanks dropped.

    Args:
        log_probs (`(b, t, v)`), lengths (`(b,)`): real frames.

    Returns:
        per item its tokens and, of each, the frame where it is most probable.
    """
    best, labels = log_probs.max(dim=-1)
    return [
        collapse(label_row[:length], best_row[:length], blank)
        for label_row, best_row, length in zip(labels.tolist(), best.tolist(), lengths.tolist(), strict=True)
    ]


def collapse(labels: list[int], log_probs: list[float], blank: int) -> tuple[list[int], list[int]]:
    """Merge repeats and drop blanks; returns the tokens and the most probable frame of each run."""
    tokens, frames, previous = [], [], blank
    for frame, label in enumerate(labels):
        if label != previous and label != blank:
            tokens.append(label)
            frames.append(frame)
        elif label != blank and log_probs[frame] > log_probs[frames[-1]]:
            frames[-1] = frame
        previous = label
    return tokens, frames


def log_add(a: float, b: float) -> float:
    """log(exp(a) + exp(b)), with the operations in upstream's order."""
    if a < b:
        a, b = b, a
    if b == _NEG_INF:
        return a
    return a + math.log(1.0 + math.exp(b - a))


class Hypothesis:
    """One prefix of the beam."""

    __slots__ = ("node", "last", "s", "ns", "v_s", "v_ns", "token_prob", "frames_s", "frames_ns")

    def __init__(
        self,
        node: int,
        last: int,
        s: float = _NEG_INF,
        ns: float = _NEG_INF,
        v_s: float = _NEG_INF,
        v_ns: float = _NEG_INF,
        token_prob: float = _NEG_INF,
        frames_s: Frames = None,
        frames_ns: Frames = None,
    ) -> None:
        self.node, self.last = node, last
        self.s, self.ns = s, ns  # log-probability of all paths ending in blank / in the last token
        self.v_s, self.v_ns = v_s, v_ns  # the same of the best path alone
        self.token_prob = token_prob  # log-probability of the last token at its peak
        self.frames_s, self.frames_ns = frames_s, frames_ns  # peaks along the best paths

    @property
    def score(self) -> float:
        return log_add(self.s, self.ns)

    @property
    def frames(self) -> Frames:
        return self.frames_s if self.v_s > self.v_ns else self.frames_ns


@dataclass
class PrefixBeam:
    """State of a prefix beam search: it can stop after any frame, be saved, and go on.

    Nodes are the prefixes seen so far: `parents[i]` and `tokens[i]` spell node `i`, node 0 is the empty prefix.
    """

    hypotheses: list[Hypothesis] = field(default_factory=lambda: [Hypothesis(0, -1, s=0.0, v_s=0.0, v_ns=0.0)])
    num_frames: int = 0
    parents: list[int] = field(default_factory=lambda: [-1])
    tokens: list[int] = field(default_factory=lambda: [-1])
    children: list[dict[int, int]] = field(default_factory=lambda: [{}])
    context_nodes: list[int] = field(default_factory=lambda: [0])
    context_scores: list[float] = field(default_factory=lambda: [0.0])

    def child(self, node: int, token: int, graph: ContextGraph | None) -> int:
        """The node of prefix `node` followed by `token`, made on first use with its hot-word state."""
        known = self.children[node].get(token)
        if known is not None:
            return known
        known = len(self.parents)
        self.children[node][token] = known
        self.parents.append(node)
        self.tokens.append(token)
        self.children.append({})
        gain, context_node = graph.step(self.context_nodes[node], token) if graph is not None else (0.0, 0)
        self.context_nodes.append(context_node)
        self.context_scores.append(self.context_scores[node] + gain)
        return known

    def spell(self, node: int) -> list[int]:
        """Tokens of a prefix."""
        prefix = []
        while node > 0:
            prefix.append(self.tokens[node])
            node = self.parents[node]
        return prefix[::-1]

    def to_dict(self) -> dict:
        """Plain lists and numbers (JSON-able; `-Infinity` included), to save the state of a stream.

        Only the prefixes still in the beam and their ancestors are kept.
        """
        keep = {0}
        for hypothesis in self.hypotheses:
            node = hypothesis.node
            while node > 0:
                keep.add(node)
                node = self.parents[node]
        order = sorted(keep)
        renumbered = {node: index for index, node in enumerate(order)}
        return {
            "num_frames": self.num_frames,
            "parents": [renumbered.get(self.parents[node], -1) for node in order],
            "tokens": [self.tokens[node] for node in order],
            "context_nodes": [self.context_nodes[node] for node in order],
            "context_scores": [self.context_scores[node] for node in order],
            "hypotheses": [
                [renumbered[h.node], h.last, h.s, h.ns, h.v_s, h.v_ns, h.token_prob]
                + [unlink(h.frames_s), unlink(h.frames_ns)]
                for h in self.hypotheses
            ],
        }

    @classmethod
    def from_dict(cls, data: dict) -> "PrefixBeam":
        """Inverse of [`to_dict`]."""
        children: list[dict[int, int]] = [{} for _ in data["parents"]]
        for node, (parent, token) in enumerate(zip(data["parents"], data["tokens"], strict=True)):
            if parent >= 0:
                children[parent][token] = node
        return cls(
            hypotheses=[Hypothesis(*row[:7], link(row[7]), link(row[8])) for row in data["hypotheses"]],
            num_frames=data["num_frames"],
            parents=list(data["parents"]),
            tokens=list(data["tokens"]),
            children=children,
            context_nodes=list(data["context_nodes"]),
            context_scores=list(data["context_scores"]),
        )


def unlink(frames: Frames) -> list[int]:
    """Linked frames as a list, first to last."""
    flat = []
    while frames is not None:
        frames, frame = frames
        flat.append(frame)
    return flat[::-1]


def link(frames: list[int]) -> Frames:
    """Inverse of [`unlink`]."""
    linked = None
    for frame in frames:
        linked = (linked, frame)
    return linked


def advance_prefix_beam(
    beam: PrefixBeam,
    top_log_probs: list[list[float]],
    top_tokens: list[list[int]],
    beam_size: int,
    blank: int,
    graph: ContextGraph | None = None,
) -> None:
    """Consume frames, in place: the log-probabilities of their best `beam_size` tokens, descending, and these."""
    for log_probs, tokens in zip(top_log_probs, top_tokens, strict=True):
        _advance_one_frame(beam, log_probs, tokens, beam_size, blank, graph)
        beam.num_frames += 1


def _advance_one_frame(
    beam: PrefixBeam,
    log_probs: list[float],
    tokens: list[int],
    beam_size: int,
    blank: int,
    graph: ContextGraph | None,
) -> None:
    frame = beam.num_frames
    current = beam.hypotheses
    scores = [log_add(h.s, h.ns) for h in current]
    viterbi = [h.v_s if h.v_s > h.v_ns else h.v_ns for h in current]
    # Prefixes of the beam that also extend another prefix of the beam collect from both; all others have one source.
    in_beam = {h.node: None for h in current}
    merged: dict[int, Hypothesis] = {}
    # (total score, the hypothesis or what it takes to build one), in the order upstream would have created them: its
    # sort is stable, so this order breaks ties.
    candidates: list[tuple | None] = []
    place: dict[int, int] = {}

    def collecting(node: int, last: int) -> Hypothesis:
        entry = merged.get(node)
        if entry is None:
            entry = merged[node] = Hypothesis(node, last)
            place[node] = len(candidates)
            candidates.append(None)
        return entry

    for token, log_prob in zip(tokens, log_probs, strict=True):
        if token == blank:
            for hypothesis, score, best in zip(current, scores, viterbi, strict=True):
                entry = collecting(hypothesis.node, hypothesis.last)
                entry.s = score + log_prob
                entry.v_s = best + log_prob
                entry.frames_s = hypothesis.frames
            continue
        for hypothesis, score, best in zip(current, scores, viterbi, strict=True):
            if token == hypothesis.last:
                # *u → *u: the run of u goes on.
                entry = collecting(hypothesis.node, token)
                entry.ns = log_add(entry.ns, hypothesis.ns + log_prob)
                run = hypothesis.v_ns + log_prob
                if entry.v_ns < run:
                    entry.v_ns = run
                    if entry.token_prob < log_prob:
                        entry.token_prob = log_prob
                        entry.frames_ns = (hypothesis.frames_ns[0], frame) if hypothesis.frames_ns else None
                # *u blank u → *uu
                path, best_path, frames = hypothesis.s + log_prob, hypothesis.v_s + log_prob, hypothesis.frames_s
            else:
                path, best_path = score + log_prob, best + log_prob
                frames = hypothesis.frames_s if hypothesis.v_s > hypothesis.v_ns else hypothesis.frames_ns
            known = beam.children[hypothesis.node].get(token)
            if known in in_beam:
                entry = collecting(known, token)
                entry.ns = log_add(entry.ns, path)
                if entry.v_ns < best_path:
                    entry.v_ns, entry.token_prob, entry.frames_ns = best_path, log_prob, (frames, frame)
                continue
            total = path
            if graph is not None:
                gain, _ = graph.step(beam.context_nodes[hypothesis.node], token)
                total += beam.context_scores[hypothesis.node] + gain
            candidates.append((total, hypothesis.node, token, path, best_path, log_prob, frames))

    for node, entry in merged.items():
        candidates[place[node]] = (log_add(entry.s, entry.ns) + beam.context_scores[node], entry)
    candidates.sort(key=_first, reverse=True)

    survivors = []
    for candidate in candidates[:beam_size]:
        if len(candidate) == 2:
            survivors.append(candidate[1])
            continue
        _, parent, token, path, best_path, log_prob, frames = candidate
        fresh = Hypothesis(beam.child(parent, token, graph), token, ns=path)
        if best_path > _NEG_INF:
            fresh.v_ns, fresh.token_prob, fresh.frames_ns = best_path, log_prob, (frames, frame)
        survivors.append(fresh)
    beam.hypotheses = survivors


def _first(candidate: tuple) -> float:
    return candidate[0]


@dataclass
class PrefixBeamResult:
    """N-best list of one utterance, best first: tokens, scores, and the frame of each token's peak."""

    tokens: list[list[int]]
    scores: list[float]
    frames: list[list[int]]


def finish_prefix_beam(beam: PrefixBeam, graph: ContextGraph | None = None, end: str = "resort") -> PrefixBeamResult:
    """The n-best list after the frames seen so far; the beam itself is left as it is.

    Args:
        end: what hot words do at the end. `"resort"` (as WeNet's C++ runtime): the bonus of an unfinished match is
            taken back and the list sorted again. `"upstream"` (WeNet's Python): that correction *replaces* the whole
            bonus and the order stays, so the scores need not descend.
    """
    totals = []
    for hypothesis in beam.hypotheses:
        total = log_add(hypothesis.s, hypothesis.ns)
        if graph is not None:
            back_off = graph.back_off(beam.context_nodes[hypothesis.node])
            total += back_off if end == "upstream" else beam.context_scores[hypothesis.node] + back_off
        totals.append(total)
    order = list(range(len(totals)))
    if graph is not None and end == "resort":
        order.sort(key=totals.__getitem__, reverse=True)
    return PrefixBeamResult(
        tokens=[beam.spell(beam.hypotheses[i].node) for i in order],
        scores=[totals[i] for i in order],
        frames=[unlink(beam.hypotheses[i].frames) for i in order],
    )


def ctc_prefix_beam_search(
    log_probs: Tensor,
    lengths: Tensor,
    beam_size: int,
    blank: int,
    graph: ContextGraph | None = None,
    end: str = "resort",
) -> list[PrefixBeamResult]:
    """Prefix beam search of a padded batch `(b, t, v)` of log-probabilities; `lengths` `(b,)` counts real frames."""
    values, indices = log_probs.topk(min(beam_size, log_probs.shape[-1]), dim=-1)
    results = []
    for value_rows, index_rows, length in zip(values.cpu(), indices.cpu(), lengths.tolist(), strict=True):
        beam = PrefixBeam()
        advance_prefix_beam(beam, value_rows[:length].tolist(), index_rows[:length].tolist(), beam_size, blank, graph)
        results.append(finish_prefix_beam(beam, graph, end))
    return results


def ctc_forced_alignment(
    log_probs: Tensor, lengths: Tensor, labels: Tensor, label_lengths: Tensor, blank: int
) -> Tensor:
    """Viterbi path of each item's labels through the CTC lattice.

    Args:
        log_probs (`(b, t, v)`), lengths (`(b,)`): real frames. labels (`(b, n)`), label_lengths (`(b,)`).

    Returns:
        `(b, t)` int64: a label or blank for every frame; padded frames are blank.

    Raises:
        ValueError: an item has fewer frames than its labels (and the blanks between equal neighbours) need.
    """
    batch, max_labels = labels.shape
    device = log_probs.device
    labels = labels.masked_fill(torch.arange(max_labels, device=device) >= label_lengths[:, None], blank)
    repeats = (labels[:, 1:] == labels[:, :-1]) & (
        torch.arange(max_labels, device=device)[1:] < label_lengths[:, None]
    )
    needed = label_lengths + repeats.sum(dim=1)
    if (needed > lengths).any():
        item = int((needed > lengths).nonzero()[0])
        raise ValueError(
            f"forced alignment: item {item} has {int(lengths[item])} frames, its labels need {int(needed[item])}"
        )
    if not bool(label_lengths.any()):
        return torch.full(log_probs.shape[:2], blank, device=device)
    states = torch.full((batch, 2 * max_labels + 1), blank, device=device)
    states[:, 1::2] = labels
    # A path may skip the blank between two different labels.
    skippable = torch.zeros_like(states, dtype=torch.bool)
    skippable[:, 3::2] = labels[:, 1:] != labels[:, :-1]
    emission = log_probs.gather(2, states[:, None, :].expand(-1, log_probs.shape[1], -1)).double()  # (b, t, 2n + 1)
    score = torch.full_like(emission[:, 0], _NEG_INF)
    score[:, :2] = emission[:, 0, :2]
    back = torch.zeros(emission.shape, dtype=torch.int64, device=device)
    for frame in range(1, emission.shape[1]):
        stay, step = score, torch.nn.functional.pad(score[:, :-1], (1, 0), value=_NEG_INF)
        skip = torch.nn.functional.pad(score[:, :-2], (2, 0), value=_NEG_INF).masked_fill(~skippable, _NEG_INF)
        best, back[:, frame] = torch.stack([stay, step, skip]).max(dim=0)
        # Items that have ended keep their score; the trace starts at their own last frame.
        score = torch.where((frame < lengths)[:, None], best + emission[:, frame], score)
    last = 2 * label_lengths
    row = torch.arange(batch, device=device)
    ends_in_label = (label_lengths > 0) & (score[row, (last - 1).clamp_min(0)] > score[row, last])
    state = torch.where(ends_in_label, last - 1, last)
    path = torch.full(emission.shape[:2], blank, device=device)
    for frame in range(emission.shape[1] - 1, -1, -1):
        inside = frame < lengths
        path[:, frame] = torch.where(inside, states[row, state], blank)
        state = torch.where(inside, state - back[row, frame, state], state)
    return path


def token_borders(
    peaks: list[int], duration: float, seconds_per_frame: float, max_token_duration: float = 1.0
) -> list[tuple[float, float]]:
    """Start and end of each token in seconds from the frames of their peaks (WeNet's `gen_timestamps_from_peak`).

    Borders lie midway between neighbouring peaks, at most half of `max_token_duration` from the token's own.
    """
    half = max_token_duration / 2
    borders = []
    for index, peak in enumerate(peaks):
        centre = peak * seconds_per_frame
        earliest = 0.0 if index == 0 else (peaks[index - 1] + peak) / 2 * seconds_per_frame
        latest = duration if index == len(peaks) - 1 else (peak + peaks[index + 1]) / 2 * seconds_per_frame
        borders.append((max(earliest, centre - half), min(latest, centre + half)))
    return borders
