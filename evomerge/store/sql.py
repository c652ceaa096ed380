"""The study store in an SQL database: SQLite on one machine, PostgreSQL for several.

Each write opens one transaction and first locks and reads the study's row: there the controller's
token is compared, and there all writes to one study queue up. Knows nothing of connections'
settings (`engine`), of the schema's history (`migrations`) or of Optuna (`mirror`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from evomerge.store import rules
from evomerge.store.base import Controller, StudyRecord
from evomerge.store.engine import LOCK_WAIT_S, make_engine, transaction
from evomerge.store.migrations import prepare
from evomerge.store.rows import (
    ATTEMPT,
    CONTROLLER,
    OUTCOMES,
    SCORE,
    STUDY,
    TRIAL,
    controller_columns,
    controller_from,
    score_columns,
    score_from,
    study_from,
    trial_columns,
    trials_from,
)
from evomerge.store.tables import attempts, scores, studies, trials
from evomerge.trial import Attempt, Failure, NewTrial, Part, Score, State, Trial

RUNNING, WAITING = State.RUNNING.value, State.WAITING.value
COMPLETE, FAIL = State.COMPLETE.value, State.FAIL.value


class SqlStore:
    """A StudyStore in the database at `url`; an empty database gets its tables on the way.

    Safe to share between threads; each process opens its own. Raises StoreError, StoreLocked or
    SchemaTooNew if the database cannot be used.
    """

    def __init__(self, url: str, *, lock_wait_s: float = LOCK_WAIT_S) -> None:
        self.engine = make_engine(url, lock_wait_s=lock_wait_s)
        prepare(self.engine)

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()

    def create_study(self, record: StudyRecord) -> None:
        row = {
            "name": record.name,
            "spec": record.spec,
            "inspection": record.inspection,
            "scorer_digest": record.scorer_digest,
            "created_at": record.created_at,
        }
        try:
            with transaction(self.engine, write=True) as connection:
                connection.execute(studies.insert(), row)
        except IntegrityError:
            raise rules.study_changed(record.name) from None

    def study(self, name: str) -> StudyRecord:
        with transaction(self.engine, write=False) as connection:
            row = connection.execute(sa.select(*STUDY).where(studies.c.name == name)).first()
        if row is None:
            raise rules.study_not_found(name)
        return study_from(row)

    def studies(self) -> Sequence[StudyRecord]:
        query = sa.select(*STUDY).order_by(studies.c.created_at, studies.c.id)
        with transaction(self.engine, write=False) as connection:
            return [study_from(row) for row in connection.execute(query)]

    def update_study(
        self,
        study: str,
        spec: Mapping[str, Any],
        inspection: Mapping[str, Any],
        *,
        controller: str,
    ) -> None:
        with self._writing(study, controller) as (connection, study_id):
            _update_study(connection, study_id, {"spec": spec, "inspection": inspection})

    def acquire(
        self, study: str, controller: Controller, *, now: datetime, force: bool = False
    ) -> None:
        with transaction(self.engine, write=True) as connection:
            query = sa.select(studies.c.id).where(studies.c.name == study).with_for_update()
            study_id = connection.execute(query).scalar()
            if study_id is None:
                raise rules.study_not_found(study)
            if not force:
                rules.check_free(study, _holder(connection, study_id), controller.token, now)
            _update_study(connection, study_id, controller_columns(controller))
            _close_open_attempts(connection, study_id, now)

    def renew(self, study: str, controller: str, *, lease_until: datetime) -> None:
        with self._writing(study, controller) as (connection, study_id):
            _update_study(connection, study_id, {"controller_lease_until": lease_until})

    def release(self, study: str, controller: str) -> None:
        with self._writing(study, controller) as (connection, study_id):
            _update_study(connection, study_id, {column.name: None for column in CONTROLLER})

    def controller(self, study: str) -> Controller | None:
        with self._reading(study) as (connection, study_id):
            return _holder(connection, study_id)

    def create_trials(self, study: str, trials: Sequence[NewTrial], *, controller: str) -> None:
        try:
            with self._writing(study, controller) as (connection, study_id):
                if trials:
                    rows = [trial_columns(study_id, trial) for trial in trials]
                    connection.execute(sa.insert(_TRIALS), rows)
        except IntegrityError:
            raise rules.trial_exists(study) from None

    def trials(self, study: str, *, outcomes: bool = True) -> Sequence[Trial]:
        with self._reading(study) as (connection, study_id):
            return _read_trials(connection, study_id, outcomes=outcomes)

    def trial(self, study: str, number: int) -> Trial:
        with self._reading(study) as (connection, study_id):
            found = _read_trials(connection, study_id, number, outcomes=True)
        if not found:
            raise rules.no_trial(study, number)
        return found[0]

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
        try:
            with self._writing(study, controller) as (connection, study_id):
                earlier = _check_startable(connection, study, study_id, number, part)
                row: dict[str, Any] = {
                    "trial": number,
                    "part": part,
                    "number": earlier + 1,
                    "token": token,
                    "state": RUNNING,
                    "worker": worker,
                    "started_at": now,
                    "lease_until": lease_until,
                    "seconds": {},
                }
                connection.execute(attempts.insert(), {"study_id": study_id, **row})
                if part == "search":
                    _update_trial(connection, study_id, number, {"state": RUNNING})
        except IntegrityError:
            raise rules.token_used(study, token) from None
        return Attempt(**{**row, "state": State.RUNNING})

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
        closed = {
            "state": COMPLETE,
            "worker": worker,
            "seconds": dict(seconds),
            "finished_at": now,
        }
        with self._writing(study, controller) as (connection, study_id):
            number, part = _close_attempt(connection, study, study_id, token, closed)
            _record_score(connection, study_id, number, part, score, values)

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
        why = {"error": failure.error, "message": failure.message}
        closed = {"state": FAIL, "seconds": dict(seconds), "finished_at": now, **why}
        if worker is not None:
            closed["worker"] = worker
        with self._writing(study, controller) as (connection, study_id):
            number, part = _close_attempt(connection, study, study_id, token, closed)
            if part == "search":
                kept = why if trial_state is State.FAIL else {}
                _update_trial(connection, study_id, number, {"state": trial_state.value, **kept})

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
        with self._writing(study, controller) as (connection, study_id):
            _check_startable(connection, study, study_id, number, part)
            _record_score(connection, study_id, number, part, score, values)

    def known_score(self, scorer_digest: str, recipe_digest: str, part: Part) -> Score | None:
        with transaction(self.engine, write=False) as connection:
            first = connection.execute(
                sa.select(scores.c.study_id, scores.c.trial)
                .join_from(scores, trials, _SCORE_OF_TRIAL)
                .join(studies, studies.c.id == trials.c.study_id)
                .where(studies.c.scorer_digest == scorer_digest)
                .where(trials.c.recipe_digest == recipe_digest, scores.c.part == part)
                .order_by(scores.c.study_id, scores.c.trial)
                .limit(1)
            ).first()
            if first is None:
                return None
            one = (scores.c.study_id == first[0], scores.c.trial == first[1])
            query = sa.select(*SCORE, OUTCOMES).where(*one, scores.c.part == part)
            return score_from(connection.execute(query.order_by(scores.c.task)).all())

    def mark_told(self, study: str, orders: Mapping[int, int], *, controller: str) -> None:
        try:
            with self._writing(study, controller) as (connection, study_id):
                recorded = _tell_orders(connection, study_id, orders)
                for number, order in orders.items():
                    if number not in recorded:
                        raise rules.no_trial(study, number)
                    rules.check_order(number, recorded[number], order)
                if orders:
                    rows = [{"this": number, "place": place} for number, place in orders.items()]
                    connection.execute(_MARK_TOLD, [{"of": study_id, **row} for row in rows])
        except IntegrityError:
            raise rules.order_taken(study) from None

    @contextmanager
    def _reading(self, study: str) -> Iterator[tuple[sa.Connection, int]]:
        with transaction(self.engine, write=False) as connection:
            query = sa.select(studies.c.id).where(studies.c.name == study)
            study_id = connection.execute(query).scalar()
            if study_id is None:
                raise rules.study_not_found(study)
            yield connection, study_id

    @contextmanager
    def _writing(self, study: str, controller: str) -> Iterator[tuple[sa.Connection, int]]:
        """A transaction that holds the study's row and has checked who writes."""
        with transaction(self.engine, write=True) as connection:
            row = connection.execute(
                sa.select(studies.c.id, studies.c.controller_token)
                .where(studies.c.name == study)
                .with_for_update()
            ).first()
            if row is None:
                raise rules.study_not_found(study)
            rules.check_fence(study, row[1], controller)
            yield connection, row[0]


_TRIALS = trials  # a method's parameter has the table's name
_SCORE_OF_TRIAL = sa.and_(scores.c.study_id == trials.c.study_id, scores.c.trial == trials.c.number)
_MARK_TOLD = (
    trials.update()
    .where(trials.c.study_id == sa.bindparam("of"), trials.c.number == sa.bindparam("this"))
    .values(tell_order=sa.bindparam("place"))
)


def _holder(connection: sa.Connection, study_id: int) -> Controller | None:
    row = connection.execute(sa.select(*CONTROLLER).where(studies.c.id == study_id)).one()
    return controller_from(row)


def _update_study(connection: sa.Connection, study_id: int, values: Mapping[str, Any]) -> None:
    connection.execute(studies.update().where(studies.c.id == study_id).values(**values))


def _update_trial(
    connection: sa.Connection, study_id: int, number: int, values: Mapping[str, Any]
) -> None:
    one = (trials.c.study_id == study_id, trials.c.number == number)
    connection.execute(trials.update().where(*one).values(**values))


def _close_open_attempts(connection: sa.Connection, study_id: int, now: datetime) -> None:
    why = rules.CONTROLLER_ENDED
    connection.execute(
        attempts.update()
        .where(attempts.c.study_id == study_id, attempts.c.state == RUNNING)
        .values(state=FAIL, finished_at=now, error=why.error, message=why.message)
    )
    connection.execute(
        trials.update()
        .where(trials.c.study_id == study_id, trials.c.state == RUNNING)
        .values(state=WAITING)
    )


def _check_startable(
    connection: sa.Connection, study: str, study_id: int, number: int, part: Part
) -> int:
    """Check that a part of a trial may be started or answered; returns how many attempts it had."""
    state = connection.execute(
        sa.select(trials.c.state).where(trials.c.study_id == study_id, trials.c.number == number)
    ).scalar()
    if state is None:
        raise rules.no_trial(study, number)
    earlier = connection.execute(
        sa.select(attempts.c.state).where(
            attempts.c.study_id == study_id,
            attempts.c.trial == number,
            attempts.c.part == part,
        )
    ).scalars()
    states = list(earlier)
    scored = connection.execute(
        sa.select(scores.c.task)
        .where(scores.c.study_id == study_id, scores.c.trial == number, scores.c.part == part)
        .limit(1)
    ).first()
    rules.check_startable(
        number,
        part,
        state=State(state),
        open_attempt=RUNNING in states,
        scored=scored is not None,
    )
    return len(states)


def _close_attempt(
    connection: sa.Connection, study: str, study_id: int, token: str, values: Mapping[str, Any]
) -> tuple[int, Part]:
    """Compare and set: close the open attempt with that token; returns its trial and part."""
    row = connection.execute(
        attempts.update()
        .where(
            attempts.c.study_id == study_id,
            attempts.c.token == token,
            attempts.c.state == RUNNING,
        )
        .values(**values)
        .returning(attempts.c.trial, attempts.c.part)
    ).first()
    if row is None:
        raise rules.stale(study, token)
    return row[0], row[1]


def _record_score(
    connection: sa.Connection,
    study_id: int,
    number: int,
    part: Part,
    score: Score,
    values: tuple[float, ...],
) -> None:
    rows = score_columns(study_id, number, part, score)
    if rows:
        connection.execute(scores.insert(), rows)
    if part == "search":
        done = {"state": COMPLETE, "objectives": tuple(values)}
        _update_trial(connection, study_id, number, done)


def _tell_orders(
    connection: sa.Connection, study_id: int, orders: Mapping[int, int]
) -> dict[int, int | None]:
    query = sa.select(trials.c.number, trials.c.tell_order).where(
        trials.c.study_id == study_id, trials.c.number.in_(list(orders))
    )
    return {row[0]: row[1] for row in connection.execute(query)}


def _read_trials(
    connection: sa.Connection, study_id: int, number: int | None = None, *, outcomes: bool
) -> list[Trial]:
    columns = (*SCORE, OUTCOMES) if outcomes else SCORE
    trial_query = sa.select(*TRIAL).where(trials.c.study_id == study_id)
    attempt_query = sa.select(*ATTEMPT).where(attempts.c.study_id == study_id)
    score_query = sa.select(*columns).where(scores.c.study_id == study_id)
    if number is not None:
        trial_query = trial_query.where(trials.c.number == number)
        attempt_query = attempt_query.where(attempts.c.trial == number)
        score_query = score_query.where(scores.c.trial == number)
    return trials_from(
        connection.execute(trial_query.order_by(trials.c.number)),
        connection.execute(attempt_query.order_by(attempts.c.id)),
        connection.execute(score_query.order_by(scores.c.trial, scores.c.task)),
    )
