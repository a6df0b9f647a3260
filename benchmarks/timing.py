"""Side-by-side timing: ours and the peer in turn, one process, one thread, and the ratio of their fastest runs."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm


@dataclass
class Comparison:
    """Seconds of every run of both sides, taken in turn (peer, ours, peer, ours, ...)."""

    name: str
    goal: str
    peer: list[float]
    ours: list[float]

    @property
    def ratio(self) -> float:
        """Fastest peer run over our fastest run: how many times faster we are."""
        return min(self.peer) / min(self.ours)

    @property
    def spread(self) -> tuple[float, float]:
        """Smallest and largest ratio of neighbouring runs: what noise alone does to the figure."""
        ratios = [peer / ours for peer, ours in zip(self.peer, self.ours, strict=True)]
        return min(ratios), max(ratios)

    def row(self) -> str:
        """A line of the table in RESULTS.md."""
        low, high = self.spread
        middle = median(peer / ours for peer, ours in zip(self.peer, self.ours, strict=True))
        return (
            f"| {self.name} | {1e3 * min(self.peer):.2f} | {1e3 * min(self.ours):.2f} | **{self.ratio:.2f}** "
            f"| {middle:.2f} ({low:.2f} to {high:.2f}) | {self.goal} |"
        )


HEADER = (
    "| what | peer, ms | ours, ms | ratio of the fastest | median (range) of neighbouring runs | goal |\n"
    "|---|---|---|---|---|---|"
)


def compare(
    name: str,
    goal: str,
    peer: Callable[[], object],
    ours: Callable[[], object],
    runs: int = 9,
    warm_up: bool = True,
) -> Comparison:
    """Time both after a warm-up of one run each; CPU time of the process, since other work may share the machine.

    Args:
        warm_up: switch off where both have just run.
    """
    torch.set_num_threads(1)
    if warm_up:
        peer()
        ours()
    comparison = Comparison(name, goal, [], [])
    for _ in tqdm(range(runs), desc=name, leave=False):
        for function, seconds in ((peer, comparison.peer), (ours, comparison.ours)):
            start = time.process_time()
            function()
            seconds.append(time.process_time() - start)
    return comparison


def report(text: str, output: Path | None) -> None:
    """Print, and append to the file: what was measured stays if a later comparison fails."""
    print(text, flush=True)
    if output is not None:
        with output.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
