"""The study store in memory: the same contract as SQL's, gone with the process.

For tests and for a search that nobody wants to keep. What it returns is shared with it: frozen
data, not to be changed by the caller.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from evomerge.store import rules
from evomerge.store.base import Claim, Controller, Refusal, StudyRecord, Tell
from evomerge.trial import Attempt, Failure, NewTrial, Part, Score, State, Trial


@dataclass
class _Study:
    record: StudyRecord
    controller: Controller | None = None
    trials: dict[int, Trial] = field(default_factory=dict)
    open: dict[str, Attempt] = field(default_factory=dict)  # running attempts by token
    tokens: dict[str, int] = field(default_factory=dict)  # of every attempt, and its trial
    refusals: Counter[Refusal] = field(default_factory=Counter)


class MemoryStore:
    """A StudyStore that lives as long as its process. Safe to share between threads."""

    def __init__(self) -> None:
        self._studies: dict[str, _Study] = {}
        self._claims: dict[str, Claim] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        """Nothing to close."""

    def create_study(self, record: StudyRecord) -> None:
        with self._lock:
            plain = replace(record, spec=_plain(record.spec), inspection=_plain(record.inspection))
            kept = self._studies.setdefault(record.name, _Study(plain))
            if kept.record != plain:
                raise rules.study_changed(record.name)

    def study(self, name: str) -> StudyRecord:
        with self._reading(name) as study:
            return study.record

    def studies(self) -> Sequence[StudyRecord]:
        with self._lock:
            records = [study.record for study in self._studies.values()]
        return sorted(records, key=lambda record: record.created_at)

    def update_study(
        self,
        study: str,
        spec: Mapping[str, Any],
        inspection: Mapping[str, Any],
        *,
        controller: str,
    ) -> None:
        with self._writing(study, controller) as kept:
            kept.record = replace(kept.record, spec=_plain(spec), inspection=_plain(inspection))

    def acquire(
        self, study: str, controller: Controller, *, now: datetime, force: bool = False
    ) -> None:
        with self._reading(study) as kept:
            if not force:
                rules.check_free(study, kept.controller, controller.token, now)
            kept.controller = controller
            why = rules.CONTROLLER_ENDED
            for attempt in list(kept.open.values()):
                _close(kept, attempt, state=State.FAIL, finished_at=now, failure=why)
                if attempt.part == "search":
                    _change(kept, attempt.trial, state=State.WAITING)

    def renew(self, study: str, controller: str, *, lease_until: datetime) -> None:
        with self._writing(study, controller) as kept:
            assert kept.controller is not None
            kept.controller = replace(kept.controller, lease_until=lease_until)

    def release(self, study: str, controller: str) -> None:
        with self._writing(study, controller) as kept:
            kept.controller = None

    def controller(self, study: str) -> Controller | None:
        with self._reading(study) as kept:
            return kept.controller

    def create_trials(self, study: str, trials: Sequence[NewTrial], *, controller: str) -> None:
        with self._writing(study, controller) as kept:
            numbers = [trial.number for trial in trials]
            if len(set(numbers)) < len(numbers) or kept.trials.keys() & set(numbers):
                raise rules.trial_exists(study)
            kept.trials |= {trial.number: _waiting(trial) for trial in trials}

    def trials(
        self, study: str, *, outcomes: bool = True, numbers: range | None = None
    ) -> Sequence[Trial]:
        with self._reading(study) as kept:
            found = [
                kept.trials[number]
                for number in sorted(kept.trials)
                if numbers is None or number in numbers
            ]
        if outcomes:
            return found
        return [replace(trial, scores=rules.without_outcomes(trial.scores)) for trial in found]

    def outlines(self, study: str, *, numbers: range, attempts: bool = False) -> Sequence[Trial]:
        return [
            replace(
                trial,
                genome=None,
                recipe={},
                attempts=trial.attempts if attempts else (),
            )
            for trial in self.trials(study, outcomes=False, numbers=numbers)
        ]

    def told(self, study: str, *, after: int = -1, limit: int) -> Sequence[Tell]:
        with self._reading(study) as kept:
            found = [
                Tell(
                    trial.tell_order,
                    trial.number,
                    trial.genome,
                    trial.values if trial.state is State.COMPLETE else None,
                    trial.scores["search"].margins if "search" in trial.scores else {},
                )
                for trial in kept.trials.values()
                if trial.tell_order is not None and trial.tell_order > after
            ]
        return sorted(found, key=lambda tell: tell.order)[:limit]

    def trial(self, study: str, number: int) -> Trial:
        with self._reading(study) as kept:
            return _trial(kept, number)

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
        with self._writing(study, controller) as kept:
            _check_startable(kept, number, part)
            if token in kept.tokens:
                raise rules.token_used(study, token)
            kept.tokens[token] = number
            trial = kept.trials[number]
            earlier = sum(attempt.part == part for attempt in trial.attempts)
            attempt = Attempt(
                number, part, earlier + 1, token, State.RUNNING, worker, now, lease_until
            )
            kept.open[token] = attempt
            _change(kept, number, attempts=(*trial.attempts, attempt))
            if part == "search":
                _change(kept, number, state=State.RUNNING)
            return attempt

    def renew_attempts(
        self, study: str, tokens: Collection[str], *, lease_until: datetime, controller: str
    ) -> None:
        with self._writing(study, controller) as kept:
            for token in kept.open.keys() & set(tokens):
                attempt = kept.open[token]
                kept.open[token] = replace(attempt, lease_until=lease_until)
                _swap(kept, attempt, kept.open[token])

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
        score = rules.checked(score, values)
        done = {"worker": worker, "seconds": dict(seconds), "finished_at": now}
        with self._writing(study, controller) as kept:
            attempt = _open_attempt(kept, token)
            _close(kept, attempt, state=State.COMPLETE, **done)
            _record_score(kept, attempt.trial, attempt.part, score, values)

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
        rules.check_trial_state(trial_state)
        failure = rules.plain(failure)
        done = {"seconds": dict(seconds), "finished_at": now, "failure": failure}
        if worker is not None:
            done["worker"] = worker
        with self._writing(study, controller) as kept:
            attempt = _open_attempt(kept, token)
            _close(kept, attempt, state=State.FAIL, **done)
            if attempt.part == "search":
                why = failure if trial_state is State.FAIL else None
                _change(kept, attempt.trial, state=trial_state, failure=why)

    def refuse(self, study: str, token: str, *, controller: str) -> Refusal | None:
        with self._writing(study, controller) as kept:
            tries = kept.trials[kept.tokens[token]].attempts if token in kept.tokens else ()
            why = rules.refusal(next((a.state for a in tries if a.token == token), None))
            if why is not None:
                kept.refusals[why] += 1
            return why

    def refusals(self, study: str) -> Mapping[Refusal, int]:
        with self._reading(study) as kept:
            return dict(kept.refusals)

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
        score = rules.checked(score, values)
        with self._writing(study, controller) as kept:
            _check_startable(kept, number, part)
            _record_score(kept, number, part, score, values)

    def known_score(self, scorer_digest: str, recipe_digest: str, part: Part) -> Score | None:
        with self._lock:
            for study in self._studies.values():
                if study.record.scorer_digest != scorer_digest:
                    continue
                for _, trial in sorted(study.trials.items()):
                    if trial.recipe_digest == recipe_digest and part in trial.scores:
                        return trial.scores[part]
        return None

    def mark_told(self, study: str, orders: Mapping[int, int], *, controller: str) -> None:
        with self._writing(study, controller) as kept:
            for number, order in orders.items():
                rules.check_order(number, _trial(kept, number).tell_order, order)
            taken = {t.tell_order for n, t in kept.trials.items() if n not in orders} - {None}
            if len(set(orders.values())) < len(orders) or taken & set(orders.values()):
                raise rules.order_taken(study)
            for number, order in orders.items():
                _change(kept, number, tell_order=order)

    def claim(self, claim: Claim) -> None:
        with self._lock:
            self._claims[claim.study] = replace(claim, worker=_plain(claim.worker))

    def claims(self, *, now: datetime) -> Sequence[Claim]:
        with self._lock:
            live = [claim for claim in self._claims.values() if claim.lease_until > now]
        return sorted(live, key=lambda claim: (claim.since, claim.study))

    def withdraw(self, study: str, token: str) -> None:
        with self._lock:
            if study in self._claims and self._claims[study].token == token:
                del self._claims[study]

    @contextmanager
    def _reading(self, study: str) -> Iterator[_Study]:
        with self._lock:
            if study not in self._studies:
                raise rules.study_not_found(study)
            yield self._studies[study]

    @contextmanager
    def _writing(self, study: str, controller: str) -> Iterator[_Study]:
        """The study under lock, once it is checked who writes. Callers check before they change."""
        with self._reading(study) as kept:
            recorded = kept.controller.token if kept.controller else None
            rules.check_fence(study, recorded, controller)
            yield kept


def _plain(document: Mapping[str, Any]) -> dict[str, Any]:
    # what a database would give back: tuples as lists, nothing shared with the caller
    plain: dict[str, Any] = json.loads(json.dumps(document))
    return plain


def _waiting(new: NewTrial) -> Trial:
    return Trial(
        number=new.number,
        kind=new.kind,
        label=new.label,
        genome=None if new.genome is None else tuple(new.genome),
        recipe=_plain(new.recipe),
        recipe_digest=new.recipe_digest,
        state=State.WAITING,
    )


def _trial(kept: _Study, number: int) -> Trial:
    if number not in kept.trials:
        raise rules.no_trial(kept.record.name, number)
    return kept.trials[number]


def _open_attempt(kept: _Study, token: str) -> Attempt:
    if token not in kept.open:
        raise rules.stale(kept.record.name, token)
    return kept.open[token]


def _change(kept: _Study, number: int, **changes: Any) -> None:
    kept.trials[number] = replace(kept.trials[number], **changes)


def _close(kept: _Study, attempt: Attempt, **changes: Any) -> None:
    del kept.open[attempt.token]
    _swap(kept, attempt, replace(attempt, **changes))


def _swap(kept: _Study, old: Attempt, new: Attempt) -> None:
    tries = kept.trials[old.trial].attempts
    _change(kept, old.trial, attempts=tuple(new if a is old else a for a in tries))


def _check_startable(kept: _Study, number: int, part: Part) -> None:
    trial = _trial(kept, number)
    running = any(a.trial == number and a.part == part for a in kept.open.values())
    scored = part in trial.scores
    rules.check_startable(number, part, state=trial.state, open_attempt=running, scored=scored)


def _record_score(
    kept: _Study, number: int, part: Part, score: Score, values: tuple[float, ...]
) -> None:
    _change(kept, number, scores={**kept.trials[number].scores, part: score})
    if part == "search":
        _change(kept, number, state=State.COMPLETE, values=tuple(values))
