"""How many trials of a study are in which state: what is left to know of those that are over.

Knows nothing of stores; whoever changes a trial takes the old one out and puts the new one in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Self

from evomerge.trial import Part, State, Trial


@dataclass
class Counts:
    """Of every trial: `scored` by part; `searched` and `finished` count search trials alone."""

    trials: int = 0
    searched: int = 0
    finished: int = 0
    failed: int = 0
    scored: Counter[Part] = field(default_factory=Counter)

    @classmethod
    def of(cls, trials: Iterable[Trial]) -> Self:
        counts = cls()
        for trial in trials:
            counts.put(trial)
        return counts

    def put(self, trial: Trial, times: int = 1) -> None:
        """Count a trial in, or out with `times=-1`."""
        searched = times * (trial.kind == "search")
        self.trials += times
        self.searched += searched
        self.finished += searched * trial.state.finished
        self.failed += times * (trial.state is State.FAIL)
        for part in trial.scores:
            self.scored[part] += times
