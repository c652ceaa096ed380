"""What a study cost: seconds in each phase of its attempts, and on the wall clock.

Knows nothing of scores. Pure function of the trials' attempts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from evomerge.trial import Attempt, State, Trial

Span = tuple[datetime, datetime]
_OURS = "controller"  # spent beside attempts, not within one


@dataclass(frozen=True)
class Cost:
    """Seconds. `phases` sums what workers measured (materialise, score, ...) over all attempts, and
    `controller`, the controller's own time since the result before.

    `wall_s` runs from the first start to the last finish; `idle_s` is the part of it when no
    attempt was open: the controller between attempts, and any time the study was not running.
    `overhead_s` sums, over finished attempts, what their phases do not account for: sending out,
    waiting for the worker, recording. None where no attempt has finished.
    """

    phases: dict[str, float]
    attempts: int
    failed_attempts: int
    workers: int
    wall_s: float | None
    idle_s: float | None
    overhead_s: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def cost(trials: Sequence[Trial]) -> Cost:
    """Add up every attempt of every trial."""
    attempts = [attempt for trial in trials for attempt in trial.attempts]
    timed = [a for a in attempts if a.finished_at is not None]
    spans = [span for a in timed if (span := _span(a)) is not None]
    wall = _wall(spans)
    return Cost(
        phases=_phases(attempts),
        attempts=len(attempts),
        failed_attempts=sum(a.state is State.FAIL for a in attempts),
        workers=len({a.worker for a in attempts if a.worker}),
        wall_s=wall,
        idle_s=None if wall is None else max(0.0, wall - covered_s(spans)),
        overhead_s=None if wall is None else _overhead(timed),
    )


def covered_s(spans: Iterable[Span]) -> float:
    """Seconds covered by at least one of the spans."""
    total, end = 0.0, None
    for start, finish in sorted(spans):
        begin = start if end is None else max(start, end)
        total += max(0.0, (finish - begin).total_seconds())
        end = finish if end is None else max(end, finish)
    return total


def _phases(attempts: Sequence[Attempt]) -> dict[str, float]:
    names = dict.fromkeys(phase for attempt in attempts for phase in attempt.seconds)
    return {name: math.fsum(a.seconds.get(name, 0.0) for a in attempts) for name in names}


def _span(attempt: Attempt) -> Span | None:
    return None if attempt.finished_at is None else (attempt.started_at, attempt.finished_at)


def _wall(spans: Sequence[Span]) -> float | None:
    if not spans:
        return None
    first, last = min(start for start, _ in spans), max(finish for _, finish in spans)
    return (last - first).total_seconds()


def _overhead(attempts: Sequence[Attempt]) -> float:
    return math.fsum(
        max(0.0, covered_s([span]) - math.fsum(s for p, s in a.seconds.items() if p != _OURS))
        for a in attempts
        if (span := _span(a)) is not None
    )
