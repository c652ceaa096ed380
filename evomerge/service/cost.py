"""What a study cost: seconds in each phase of its attempts, and on the wall clock.

Knows nothing of scores. A function of the trials' attempts alone.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from evomerge.trial import Attempt, State, Trial

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_OURS = "controller"  # spent beside attempts, not within one


@dataclass(frozen=True)
class Cost:
    """Seconds. `phases` sums what workers measured (materialise, score, ...) over all attempts, and
    `controller`, the controller's own time since the result before.

    `wall_s` runs from the first start to the last finish; `idle_s` is the part of it when no
    attempt was open: the controller between attempts, and any time the study was not running.
    `overhead_s` sums, over finished attempts, what their phases do not account for: sending out,
    waiting for the worker, recording. None where no attempt has finished. `reused` counts scores
    that took no attempt, as the store had them of the same recipe, items and scorer.
    """

    phases: dict[str, float]
    attempts: int
    failed_attempts: int
    reused: int
    workers: int
    wall_s: float | None
    idle_s: float | None
    overhead_s: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Costs:
    """Adds up attempts as trials are put in; keeps some 50 bytes of each."""

    def __init__(self) -> None:
        self._phases: dict[str, array[float]] = {}
        self._overhead = array("d")
        self._starts, self._ends = array("q"), array("q")  # microseconds since 1970
        self._workers: set[str] = set()
        self._attempts = self._failed = self._reused = 0

    def put(self, trial: Trial) -> None:
        """Add every attempt and score of a trial."""
        for attempt in trial.attempts:
            self._put(attempt)
        measured = {a.part for a in trial.attempts if a.state is State.COMPLETE}
        self._reused += len(trial.scores.keys() - measured)

    def total(self) -> Cost:
        """The cost of everything put in."""
        wall = max(self._ends) - min(self._starts) if self._ends else None
        idle = None if wall is None else max(0, wall - covered_us(self._starts, self._ends))
        return Cost(
            phases={name: math.fsum(seconds) for name, seconds in self._phases.items()},
            attempts=self._attempts,
            failed_attempts=self._failed,
            reused=self._reused,
            workers=len(self._workers),
            wall_s=None if wall is None else wall / 1e6,
            idle_s=None if idle is None else idle / 1e6,
            overhead_s=None if wall is None else math.fsum(self._overhead),
        )

    def _put(self, attempt: Attempt) -> None:
        self._attempts += 1
        self._failed += attempt.state is State.FAIL
        if attempt.worker:
            self._workers.add(attempt.worker)
        for phase, seconds in attempt.seconds.items():
            self._phases.setdefault(phase, array("d")).append(seconds)
        if attempt.finished_at is None:
            return
        start, end = _microseconds(attempt.started_at), _microseconds(attempt.finished_at)
        self._starts.append(start)
        self._ends.append(end)
        known = math.fsum(s for phase, s in attempt.seconds.items() if phase != _OURS)
        self._overhead.append(max(0.0, max(0, end - start) / 1e6 - known))


def cost(trials: Iterable[Trial]) -> Cost:
    """Add up every attempt of every trial."""
    costs = Costs()
    for trial in trials:
        costs.put(trial)
    return costs.total()


def covered_us(starts: Sequence[int], ends: Sequence[int]) -> int:
    """Microseconds covered by at least one of the spans [n] from `starts` to `ends`."""
    import numpy as np

    start, end = np.asarray(starts, np.int64), np.asarray(ends, np.int64)
    if not len(start):
        return 0
    order = np.argsort(start, kind="stable")
    start, reached = start[order], np.maximum.accumulate(end[order])
    before = np.concatenate([start[:1], reached[:-1]])
    return int(np.maximum(0, reached - np.maximum(start, before)).sum())


def _microseconds(instant: datetime) -> int:
    return (instant - _EPOCH) // timedelta(microseconds=1)
