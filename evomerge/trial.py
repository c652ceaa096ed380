"""Trials, attempts and scores: what happened in a study, as frozen data.

Knows nothing of where these are kept (`store`), who makes them (`service`) or how a score is
measured (`scoring`).

    WAITING -> RUNNING -> COMPLETE | PRUNED | FAIL
       ^          |
       +----------+   a lapsed lease or a lost worker: the next attempt
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, Literal

Part = Literal["search", "selection", "report"]
Kind = Literal["base", "source", "uniform", "task_arithmetic", "published", "search", "refined"]
CANDIDATES: tuple[Kind, ...] = ("search", "refined")
"""The kinds of trials that may win; the others are baselines. The sampler is told of `search`."""
Genome = tuple[float, ...]


class State(enum.StrEnum):
    """The state of a trial, or of one attempt at it."""

    WAITING = "WAITING"
    RUNNING = "RUNNING"
    COMPLETE = "COMPLETE"
    PRUNED = "PRUNED"
    FAIL = "FAIL"

    @property
    def finished(self) -> bool:
        return self in (State.COMPLETE, State.PRUNED, State.FAIL)


@dataclass(frozen=True)
class TaskScore:
    """One task's result on one part of its items.

    `outcomes` [n] are the metric's values on each item alone, in item order (accuracy: 0 or 1);
    empty where an item alone has none. `value` is lm-eval's aggregate over exactly these items.
    `margin`, more being better, says how clearly the model is right where `value` is the same: a
    mean over the items, in nats; None where the task has none (see `scoring.margins`).
    """

    metric: str
    value: float
    stderr: float | None
    n: int
    higher_is_better: bool = True
    outcomes: tuple[float, ...] = ()
    margin: float | None = None

    @property
    def merit(self) -> float:
        """The value with the sign that makes more better."""
        return self.value if self.higher_is_better else -self.value


@dataclass(frozen=True)
class Score:
    """A candidate's result on one part of the items, task by task."""

    tasks: Mapping[str, TaskScore]

    def values(self, weights: Mapping[str, float], *, pareto: bool) -> tuple[float, ...]:
        """What the sampler maximises: the weighted mean [1], or one value for each task [t].

        A metric where lower is better enters with its sign turned.
        """
        merits = {name: self.tasks[name].merit for name in weights}
        return tuple(merits.values()) if pareto else (weighted_mean(merits, weights),)

    @property
    def margins(self) -> dict[str, float]:
        """The margins of the tasks that have one."""
        return {n: task.margin for n, task in self.tasks.items() if task.margin is not None}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Score:
        return cls(
            {
                name: TaskScore(**{**task, "outcomes": tuple(task["outcomes"])})
                for name, task in document["tasks"].items()
            }
        )


def weighted_mean(values: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The mean over tasks by the objective's weights, which need not sum to 1."""
    return math.fsum(w * values[name] for name, w in weights.items()) / math.fsum(weights.values())


def tiebreak(margins: Mapping[str, float], weights: Mapping[str, float]) -> float | None:
    """What decides, more being better, between candidates whose weighted mean is the same.

    The mean of the margins by the same weights; None unless each of the tasks has a finite one.
    """
    if not all(name in margins and math.isfinite(margins[name]) for name in weights):
        return None
    return weighted_mean(margins, weights)


@dataclass(frozen=True)
class Failure:
    """Why a trial or an attempt failed: the error's class name and its message."""

    error: str
    message: str


@dataclass(frozen=True)
class Attempt:
    """One execution of a trial on one part of the items, owned by whoever holds its token."""

    trial: int
    part: Part
    number: int
    token: str
    state: State
    worker: str | None
    started_at: datetime
    lease_until: datetime
    finished_at: datetime | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    failure: Failure | None = None


@dataclass(frozen=True)
class NewTrial:
    """A trial about to be recorded. `genome` is None for a baseline."""

    number: int
    kind: Kind
    label: str
    genome: Genome | None
    recipe: Mapping[str, Any]
    recipe_digest: str


@dataclass(frozen=True)
class Trial:
    """One point of the search, or one baseline.

    `state` speaks of the search part: a trial is COMPLETE once scored there. `scores` holds a score
    for every part scored so far; `tell_order` is its place among the results told to the sampler,
    or, under the asynchronous schedule, among all that was asked for and told.
    `attempts` are in the order they were started, of every part.
    """

    number: int
    kind: Kind
    label: str
    genome: Genome | None
    recipe: Mapping[str, Any]
    recipe_digest: str
    state: State
    values: tuple[float, ...] | None = None
    scores: Mapping[Part, Score] = field(default_factory=dict)
    failure: Failure | None = None
    tell_order: int | None = None
    attempts: tuple[Attempt, ...] = ()

    @property
    def seconds(self) -> float:
        """Wall seconds of every attempt, summed over its phases."""
        return math.fsum(s for attempt in self.attempts for s in attempt.seconds.values())
