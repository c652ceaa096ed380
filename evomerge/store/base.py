"""The contract of a study store.

Each method is one transaction: done whole or not at all, and on return it outlives the process.
(A power cut may take the last transactions whole, in order: an earlier state of the study is left.)
Only the controller writes. Knows nothing of samplers, executors or models. The clock is passed in
(`now`, aware UTC). `evomerge.testing.store_contract` tests every sentence here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, Protocol

from evomerge.trial import Attempt, Failure, Genome, NewTrial, Part, Score, State, Trial

Refusal = Literal["late", "repeated", "stray"]
"""Why a result is refused: its attempt was given up before it came, it has one already, or there
never was such an attempt."""


@dataclass(frozen=True)
class StudyRecord:
    """A study as it is kept.

    `spec` is the JSON of the StudySpec with its space written out; `inspection` is what was found
    when the study was created: the digests of the checkpoints, the items of each task with the part
    each belongs to, and the `scorer_digest` under which scores may be reused.
    """

    name: str
    spec: Mapping[str, Any]
    inspection: Mapping[str, Any]
    scorer_digest: str
    created_at: datetime


@dataclass(frozen=True)
class Controller:
    """Who runs a study: a fencing token, and where that process lives."""

    token: str
    host: str
    pid: int
    started: float
    lease_until: datetime


@dataclass(frozen=True)
class Claim:
    """What a running study asks of a pool of workers; it holds until its lease lapses.

    `pool` names the cluster or machine. `wanted` is how many workers it has work for, `held` how
    many were at work when the claim was made, `worker` what one of them takes of the pool, by
    resource. `since` says who came first among equals.
    """

    study: str
    token: str
    pool: str
    priority: int
    wanted: int
    held: int
    worker: Mapping[str, float]
    since: datetime
    lease_until: datetime


@dataclass(frozen=True)
class Tell:
    """A result as it was told: its place in the order of tells, and what the sampler learned.

    `values` is None of a trial that is not COMPLETE. `margins` are those of its tasks on the search
    items, where there are any.
    """

    order: int
    number: int
    genome: Genome | None
    values: tuple[float, ...] | None
    margins: Mapping[str, float] = field(default_factory=dict)


class StudyStore(Protocol):
    """Studies, trials, attempts and scores.

    A study is named in every call. Every method but those of claims raises StudyNotFound for an
    unknown study and ValueError for an unknown trial number. A write under a controller token that
    is no longer the study's raises StudyBusy and changes nothing; so a released study is written by
    nobody, while a lease that lapsed unnoticed still holds until another controller takes over. A
    write to a study that was put back to an earlier state since this store last wrote it raises
    StoreError and changes nothing, until it is acquired anew.

    Every float comes back bit for bit, in genomes, values and outcomes, -0.0 and subnormals too.
    A text comes back with what no database keeps (NUL, half a surrogate pair) replaced by U+FFFD.
    NaN is kept among outcomes; a NaN stderr and a margin that is not finite come back as None; NaN
    among `values` or as a task's value raises ValueError, since that candidate failed. What is
    returned is not to be changed.
    """

    def create_study(self, record: StudyRecord) -> None:
        """Record a new study; the very same record again changes nothing. Raises StudyChanged if
        the name is taken.
        """

    def study(self, name: str) -> StudyRecord:
        """The study of that name."""

    def studies(self) -> Sequence[StudyRecord]:
        """Every study, oldest first."""

    def update_study(
        self,
        study: str,
        spec: Mapping[str, Any],
        inspection: Mapping[str, Any],
        *,
        controller: str,
    ) -> None:
        """Replace spec and inspection. The caller has checked that it is still the same study:
        budget, workers and the places of its files may differ, contents may not.
        """

    def acquire(
        self, study: str, controller: Controller, *, now: datetime, force: bool = False
    ) -> None:
        """Become the study's controller.

        In the same transaction every RUNNING attempt of the study is closed as FAIL (WorkerLost:
        its controller ended) and every RUNNING trial goes back to WAITING.

        Raises StudyBusy, naming host, pid and the seconds left, while another token's lease is
        live, unless `force` (the caller knows that the other process is dead). Of any number of
        processes that try at once without `force`, one succeeds.
        """

    def renew(self, study: str, controller: str, *, lease_until: datetime) -> None:
        """Extend the controller's lease."""

    def release(self, study: str, controller: str) -> None:
        """Give the study up at an orderly end."""

    def controller(self, study: str) -> Controller | None:
        """Who runs the study now, as recorded; None after a release."""

    def create_trials(self, study: str, trials: Sequence[NewTrial], *, controller: str) -> None:
        """Record trials as WAITING, all or none, before any is dispatched.

        Raises ValueError if one of the numbers is taken.
        """

    def trials(
        self, study: str, *, outcomes: bool = True, numbers: range | None = None
    ) -> Sequence[Trial]:
        """Every trial in the order of numbers, with attempts and scores; of a range (of step 1)
        those that there are.

        With `outcomes=False` per-item outcomes are left empty, which is much faster.
        """

    def outlines(self, study: str, *, numbers: range, attempts: bool = False) -> Sequence[Trial]:
        """The trials of a range (of step 1) without what makes them large, for reading a long study
        through: no genome, an empty recipe, no per-item outcomes, and no attempts but where asked.
        """

    def told(self, study: str, *, after: int = -1, limit: int) -> Sequence[Tell]:
        """What was told, in the order of tells: the first `limit` of a later place than `after`."""

    def trial(self, study: str, number: int) -> Trial:
        """One trial, with everything."""

    def start_attempt(
        self,
        study: str,
        number: int,
        part: Part,
        *,
        token: str,
        worker: str | None,
        now: datetime,
        lease_until: datetime,
        controller: str,
    ) -> Attempt:
        """Open the next attempt at a trial on a part; for the search part the trial turns RUNNING.

        Attempt numbers count from 1 for each (trial, part). Raises ValueError if an attempt at that
        trial and part is open, if the part is scored already, if the study has seen the token
        before, or, for the search part, if the trial is not WAITING.
        """

    def renew_attempts(
        self, study: str, tokens: Collection[str], *, lease_until: datetime, controller: str
    ) -> None:
        """Extend the leases of the open attempts among `tokens`; the others are left alone."""

    def finish(
        self,
        study: str,
        token: str,
        score: Score,
        values: tuple[float, ...],
        *,
        worker: str,
        seconds: Mapping[str, float],
        now: datetime,
        controller: str,
    ) -> None:
        """Accept the result of the live attempt `token`, with its outcomes, in one transaction.

        The attempt is COMPLETE; for the search part the trial is COMPLETE with `values`; for other
        parts `values` are not kept. Raises StaleAttempt (and changes nothing) if it is not open.
        """

    def fail_attempt(
        self,
        study: str,
        token: str,
        failure: Failure,
        *,
        trial_state: State,
        worker: str | None,
        seconds: Mapping[str, float],
        now: datetime,
        controller: str,
    ) -> None:
        """Close the live attempt `token` as FAIL.

        `trial_state` is WAITING (to be tried again) or FAIL (the candidate is bad; the trial keeps
        the failure), else ValueError. For a part other than search the trial is left alone. A
        `worker` of None leaves the one named at the start. Raises StaleAttempt if it is not open.
        """

    def refuse(self, study: str, token: str, *, controller: str) -> Refusal | None:
        """Count a result that came for an attempt which is not open; why, or None if it is open."""

    def refusals(self, study: str) -> Mapping[Refusal, int]:
        """How many results were refused, by reason; a reason that never was is left out."""

    def reuse(
        self,
        study: str,
        number: int,
        part: Part,
        score: Score,
        values: tuple[float, ...],
        *,
        controller: str,
    ) -> None:
        """Record a score that the store already held (see `known_score`), as `finish` does but with
        no attempt. Raises ValueError where `start_attempt` would.
        """

    def known_score(self, scorer_digest: str, recipe_digest: str, part: Part) -> Score | None:
        """The score, with outcomes, of the first trial of any study with that scorer digest, recipe
        digest and part; None if there is none.
        """

    def mark_told(self, study: str, orders: Mapping[int, int], *, controller: str) -> None:
        """Record each trial number's place in the order of tells, all or none.

        Places need not follow on one another. Told once, never again: ValueError if a trial already
        has another place, or another trial that place. The same place again changes nothing.
        """

    def claim(self, claim: Claim) -> None:
        """Record what a study asks of a pool, in place of what it asked before, of this pool or
        another and under whatever token. The study need not exist: its inspection comes first.
        """

    def claims(self, *, now: datetime) -> Sequence[Claim]:
        """Every claim whose lease is live, oldest first; of the same age in the order of names."""

    def withdraw(self, study: str, token: str) -> None:
        """Take a study's claim back, unless it has another token by now."""

    def close(self) -> None:
        """Let go of connections. The store is not used afterwards."""
