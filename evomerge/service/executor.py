"""Executors: where attempts run, as the controller sees it.

Only JSON crosses: a job goes out, an event comes back. Knows nothing of stores and samplers; never
retries, since attempts and their leases are the controller's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from evomerge.trial import Failure, Part


@dataclass(frozen=True)
class Setup:
    """What a worker needs before its first job, as JSON.

    `digests` are the contents of the spec's checkpoints by path, `dtype` what it scores in.
    `fingerprint` is the inspection's: a worker with other versions of the libraries refuses.
    """

    spec: Mapping[str, Any]
    digests: Mapping[str, str]
    dtype: str
    fingerprint: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"spec": dict(self.spec), "digests": dict(self.digests), "dtype": self.dtype,
                "fingerprint": dict(self.fingerprint)}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One attempt to run: a recipe to materialise and the part of the items to score it on."""

    token: str
    recipe: Mapping[str, Any]
    part: Part


@dataclass(frozen=True)
class Event:
    """What became of a job.

    Exactly one of `score` (JSON of a Score) and `failure` is set. `candidate` tells a bad candidate
    (the trial fails) from infrastructure trouble (the attempt is retried). `notes` are lines for
    whoever watches: what happened on the way and changed no outcome.
    """

    token: str
    worker: str
    score: Mapping[str, Any] | None = None
    failure: Failure | None = None
    candidate: bool = False
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pool:
    """Where an executor's workers come from, so that several studies can share it.

    `name` is the same for whoever draws on the same cluster or machine and for nobody else.
    `resources` is all that it holds, in use or not, and `worker` what one worker takes of it;
    `capacity` is how many such workers it would hold, were it empty.
    """

    name: str
    resources: Mapping[str, float]
    worker: Mapping[str, float]
    capacity: int


class Executor(Protocol):
    """Runs jobs on workers that may die at any moment."""

    def inspect(self, spec: Mapping[str, Any]) -> Mapping[str, Any]:
        """Have one worker check a spec against its checkpoints and tasks; no model is loaded.

        Returns the JSON of an Inspection. Raises the UserError that the worker raised.
        """

    def prepare(self, setup: Setup) -> None:
        """Tell every worker, present and to come, what it will score. Comes before any submit.

        A worker that refuses gets no job; where all refuse, `poll` raises InfrastructureError with
        the reason, or every job comes back as WorkerLost with it.
        """

    def free(self) -> int:
        """How many more jobs can be submitted now without queueing behind another."""

    def pool(self) -> Pool | None:
        """What its workers are taken from, as it is now; None if no other study draws on that."""

    def limit(self, count: int | None) -> None:
        """Hold no more than so many workers from now on; None ends the limit. No job is cut short:
        what is above the limit goes when its job ends, and is had again when the limit rises.
        """

    def submit(self, job: Job) -> None:
        """Start a job. Exactly one event reports it, or none if the executor is closed."""

    def cancel(self, token: str) -> None:
        """Give up on a job whose lease lapsed: end its worker. No event follows; a token that is
        not running is ignored."""

    def poll(self, timeout_s: float) -> Sequence[Event]:
        """Events since the last call; waits up to `timeout_s` seconds for the first one."""

    def alive(self) -> Collection[str]:
        """Tokens of jobs whose worker got on with its work since the last call. Their leases start
        anew; an executor that cannot tell returns none, and a lease is then a job's time limit."""

    def close(self, *, now: bool) -> None:
        """End the workers: after their current job, or at once with `now`."""
