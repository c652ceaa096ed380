"""A score as people read it: each task's value and the weighted mean, with 95% intervals.

Knows nothing of trials or of who is compared with whom. An interval here speaks of one model alone;
whether two models differ is a paired question, answered in `evomerge.scoring.statistics`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evomerge.trial import Score, TaskScore

Interval = tuple[float, float]

_Z = 1.959964  # standard normal quantile of 0.975


@dataclass(frozen=True)
class Measurement:
    """A model on one part of the items.

    `values` are the metrics as lm-eval reports them; `mean` is the objective's weighted mean, where
    a metric with lower-is-better counts with its sign turned. An interval is None where neither
    outcomes nor a standard error are known.
    """

    values: Mapping[str, float]
    mean: float
    intervals: Mapping[str, Interval | None]
    mean_interval: Interval | None
    items: Mapping[str, int]

    def values_json(self) -> dict[str, float]:
        return {**self.values, "mean": self.mean}

    def intervals_json(self) -> dict[str, Interval | None]:
        return {**self.intervals, "mean": self.mean_interval}


def measure(score: Score, weights: Mapping[str, float]) -> Measurement:
    """The tasks of the objective, in its order, and their weighted mean."""
    tasks = {name: score.tasks[name] for name in weights}
    intervals = {name: interval(task) for name, task in tasks.items()}
    (mean,) = score.values(weights, pareto=False)
    return Measurement(
        values={name: task.value for name, task in tasks.items()},
        mean=mean,
        intervals=intervals,
        mean_interval=_mean_interval(mean, tasks, intervals, weights),
        items={name: task.n for name, task in tasks.items()},
    )


def interval(task: TaskScore) -> Interval | None:
    """A 95% interval of one task's value.

    Wilson's where the value is the share of items that are right, else value ± z stderr; None
    where neither is known.
    """
    from evomerge.scoring.statistics import wilson_interval  # scipy: half a second to import

    right, n = math.fsum(task.outcomes), len(task.outcomes)
    if n and set(task.outcomes) <= {0.0, 1.0} and math.isclose(right / n, task.value):
        return wilson_interval(right, n)
    if task.stderr is None or not math.isfinite(task.stderr):
        return None
    return task.value - _Z * task.stderr, task.value + _Z * task.stderr


def to_json(measurement: Measurement | None, part: str) -> dict[str, Any]:
    """`{part: {TASK: x, "mean": x}, "intervals": ..., "items": ...}`; None where not measured."""
    if measurement is None:
        return {part: None, "intervals": None, "items": None}
    return {
        part: measurement.values_json(),
        "intervals": measurement.intervals_json(),
        "items": dict(measurement.items),
    }


def _mean_interval(
    mean: float,
    tasks: Mapping[str, TaskScore],
    intervals: Mapping[str, Interval | None],
    weights: Mapping[str, float],
) -> Interval | None:
    """Combine the tasks' intervals (lᵢ, uᵢ) of values xᵢ with shares wᵢ that sum to 1:

        mean - √Σ wᵢ²(xᵢ - lᵢ)²,  mean + √Σ wᵢ²(uᵢ - xᵢ)²

    so that a task at 0 or 1 keeps its uncertainty, which its standard error would call 0.

    Source: Zou & Donner 2008, Statistics in Medicine 27:1693-1702.
    """
    total = math.fsum(weights.values())
    below, above = [], []
    for name, task in tasks.items():
        known = intervals[name]
        if known is None:
            return None
        down, up = task.value - known[0], known[1] - task.value
        if not task.higher_is_better:
            down, up = up, down
        below.append((weights[name] / total * down) ** 2)
        above.append((weights[name] / total * up) ** 2)
    return mean - math.sqrt(math.fsum(below)), mean + math.sqrt(math.fsum(above))
