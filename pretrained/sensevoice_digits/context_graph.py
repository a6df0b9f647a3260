"""Hot words for beam search: an Aho-Corasick automaton over token sequences (WeNet's `ContextGraph`).

Every matched token of a phrase earns a bonus; falling off the phrase gives it back; a completed phrase keeps it.
"""

from collections import deque
from collections.abc import Sequence


class ContextGraph:
    """Automaton of the phrases; node 0 is the root.

    Args:
        phrases: token ids of each phrase; empty ones are ignored.
        token_score: bonus per matched token.

    A phrase that is a prefix of one inserted earlier is not marked as an end, as upstream.
    """

    def __init__(self, phrases: Sequence[Sequence[int]], token_score: float) -> None:
        self.token_score = token_score
        self.children: list[dict[int, int]] = [{}]
        self.node_score = [0.0]
        self.output_score = [0.0]
        self.is_end = [False]
        self.fail = [0]
        for phrase in phrases:
            self._insert(phrase)
        self._link()

    def _insert(self, phrase: Sequence[int]) -> None:
        node = 0
        for position, token in enumerate(phrase):
            if token not in self.children[node]:
                score = self.node_score[node] + self.token_score
                is_end = position == len(phrase) - 1
                self.children[node][token] = len(self.children)
                self.children.append({})
                self.node_score.append(score)
                self.output_score.append(score if is_end else 0.0)
                self.is_end.append(is_end)
                self.fail.append(0)
            node = self.children[node][token]

    def _link(self) -> None:
        """Fail links breadth first; a node also earns the outputs of the phrases that end on its fail chain."""
        queue = deque(self.children[0].values())
        while queue:
            node = queue.popleft()
            for token, child in self.children[node].items():
                fail = self.fail[node]
                while token not in self.children[fail] and fail != 0:
                    fail = self.fail[fail]
                self.fail[child] = self.children[fail].get(token, 0)
                output = self.fail[child]
                while output != 0 and not self.is_end[output]:
                    output = self.fail[output]
                self.output_score[child] += self.output_score[output]
                queue.append(child)

    def step(self, node: int, token: int) -> tuple[float, int]:
        """Score gained by `token` in `node`, and the next node."""
        matched = self.children[node].get(token)
        if matched is not None:
            return self.token_score + self.output_score[matched], matched
        target = self.fail[node]
        while token not in self.children[target] and target != 0:
            target = self.fail[target]
        target = self.children[target].get(token, 0)
        return self.node_score[target] - self.node_score[node] + self.output_score[target], target

    def back_off(self, node: int) -> float:
        """Score of ending in `node`: the bonus of an unfinished match is given back."""
        return -self.node_score[node]
