"""The search's scores over its trials, in as many points as a chart can show.

Knows nothing of charts' pixels or of stores; it is given trials in the order of their numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MOST_RUNS = 600  # about as many columns of pixels as the chart has


@dataclass(frozen=True)
class Dot:
    """A trial in the history: its place in the search, and its score (None: it failed)."""

    x: int
    score: float | None
    label: str


class History:
    """Dots of a search, thinned once there are many.

    Up to MOST_RUNS trials each is a dot. Of more, places are cut into runs of 2, 4, 8, ... of them,
    MOST_RUNS runs at most, and each run keeps its highest score, its lowest and one failed trial,
    the earliest where scores are equal. So the best so far is exact at the end of every run.
    """

    def __init__(self) -> None:
        self.each = 1
        """How many places a run has."""
        self.scored = 0
        """How many trials have a score, shown or not."""
        self._runs: dict[int, list[Dot]] = {}

    def put(self, dot: Dot) -> None:
        """Add a trial; places count from 1."""
        self.scored += dot.score is not None
        self._add(dot)
        while len(self._runs) > MOST_RUNS:
            self.each *= 2
            dots, self._runs = self.dots(), {}
            for kept in dots:
                self._add(kept)

    def dots(self) -> list[Dot]:
        """What is shown, by place."""
        return sorted((dot for run in self._runs.values() for dot in run), key=lambda d: d.x)

    def _add(self, dot: Dot) -> None:
        run = (dot.x - 1) // self.each
        self._runs[run] = _extremes([*self._runs.get(run, ()), dot])


def _extremes(dots: Sequence[Dot]) -> list[Dot]:
    scored = [(dot.score, -dot.x, dot) for dot in dots if dot.score is not None]
    failed = [dot for dot in dots if dot.score is None][:1]
    if not scored:
        return failed
    high = max(scored, key=lambda entry: entry[:2])[2]
    low = min(scored, key=lambda entry: (entry[0], -entry[1]))[2]
    return [*failed, high, *([low] if low != high else [])]
