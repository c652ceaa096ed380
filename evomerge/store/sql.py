"""The study store in an SQL database: SQLite on one machine, PostgreSQL for several.

Each write opens one transaction and first puts a mark of its own in place of the last one, if the
controller that writes still has the study: there all writes to one study queue up. By the mark it
is known after a broken connection whether the commit came through, and noticed when a study was put
back to a backup under a live controller. Who changes the study's row holds that first, then the
mark. Every method rides out a server that restarts. Knows nothing of connections' settings
(`engine`), of the schema's history (`migrations`) or of Optuna (`mirror`).
"""

from __future__ import annotations

import threading
import uuid
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from evomerge.errors import StoreUnreachable
from evomerge.store import rules
from evomerge.store.base import Controller, Refusal, StudyRecord, Tell
from evomerge.store.claims import SqlClaims
from evomerge.store.engine import LOCK_WAIT_S, CommitUnknown, make_engine, transaction
from evomerge.store.migrations import prepare
from evomerge.store.queries import (
    MARK_TOLD,
    check_startable,
    close_attempt,
    close_open_attempts,
    count_refusal,
    holder,
    leave_mark,
    lock,
    read_outlines,
    read_tells,
    read_trials,
    record_score,
    set_study,
    set_trial,
    start_trial,
    take,
    take_on,
    tell_orders,
)
from evomerge.store.reconnecting import RECONNECT_S, reconnecting
from evomerge.store.rows import (
    CONTROLLER,
    OUTCOMES,
    SCORE,
    STUDY,
    controller_columns,
    score_from,
    study_from,
    trial_columns,
)
from evomerge.store.tables import attempts, marks, refusals, scores, studies, trials
from evomerge.trial import Attempt, Failure, NewTrial, Part, Score, State, Trial

RUNNING, COMPLETE, FAIL = State.RUNNING.value, State.COMPLETE.value, State.FAIL.value


class SqlStore(SqlClaims):
    """A StudyStore in the database at `url`; an empty database gets its tables on the way.

    Safe to share between threads; each process opens its own. Raises StoreError, StoreLocked or
    SchemaTooNew if the database cannot be used. A connection that breaks later is sought again for
    `reconnect_s` seconds before StoreUnreachable is raised.
    """

    def __init__(
        self, url: str, *, lock_wait_s: float = LOCK_WAIT_S, reconnect_s: float = RECONNECT_S
    ) -> None:
        self.reconnect_s = reconnect_s
        self._last: dict[str, _Last] = defaultdict(_Last)
        self.engine = make_engine(url, lock_wait_s=lock_wait_s)
        prepare(self.engine)

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()

    @reconnecting
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
            if self.study(record.name) != record:
                raise rules.study_changed(record.name) from None
        except CommitUnknown as error:
            raise StoreUnreachable(str(error)) from error

    @reconnecting
    def study(self, name: str) -> StudyRecord:
        with transaction(self.engine, write=False) as connection:
            row = connection.execute(sa.select(*STUDY).where(studies.c.name == name)).first()
        if row is None:
            raise rules.study_not_found(name)
        return study_from(row)

    @reconnecting
    def studies(self) -> Sequence[StudyRecord]:
        query = sa.select(*STUDY).order_by(studies.c.created_at, studies.c.id)
        with transaction(self.engine, write=False) as connection:
            return [study_from(row) for row in connection.execute(query)]

    @reconnecting
    def update_study(
        self,
        study: str,
        spec: Mapping[str, Any],
        inspection: Mapping[str, Any],
        *,
        controller: str,
    ) -> None:
        with self._changing(study, controller) as (connection, study_id):
            set_study(connection, study_id, {"spec": spec, "inspection": inspection})

    @reconnecting
    def acquire(
        self, study: str, controller: Controller, *, now: datetime, force: bool = False
    ) -> None:
        with self._marking(study) as (connection, _, mark):
            study_id, _ = lock(connection, study)
            leave_mark(connection, study, study_id, None, mark)
            if not force:
                rules.check_free(study, holder(connection, study_id), controller.token, now)
            set_study(connection, study_id, controller_columns(controller))
            close_open_attempts(connection, study_id, now)

    @reconnecting
    def renew(self, study: str, controller: str, *, lease_until: datetime) -> None:
        with self._changing(study, controller) as (connection, study_id):
            set_study(connection, study_id, {"controller_lease_until": lease_until})

    @reconnecting
    def release(self, study: str, controller: str) -> None:
        with self._changing(study, controller) as (connection, study_id):
            set_study(connection, study_id, {column.name: None for column in CONTROLLER})

    @reconnecting
    def controller(self, study: str) -> Controller | None:
        with self._reading(study) as (connection, study_id):
            return holder(connection, study_id)

    @reconnecting
    def create_trials(self, study: str, trials: Sequence[NewTrial], *, controller: str) -> None:
        try:
            with self._writing(study, controller) as (connection, study_id):
                if trials:
                    rows = [trial_columns(study_id, trial) for trial in trials]
                    connection.execute(sa.insert(_TRIALS), rows)
        except IntegrityError:
            raise rules.trial_exists(study) from None

    @reconnecting
    def trials(
        self, study: str, *, outcomes: bool = True, numbers: range | None = None
    ) -> Sequence[Trial]:
        with self._reading(study) as (connection, study_id):
            return read_trials(connection, study_id, numbers, outcomes=outcomes)

    @reconnecting
    def outlines(self, study: str, *, numbers: range, attempts: bool = False) -> Sequence[Trial]:
        with self._reading(study) as (connection, study_id):
            return read_outlines(connection, study_id, numbers, attempts=attempts)

    @reconnecting
    def told(self, study: str, *, after: int = -1, limit: int) -> Sequence[Tell]:
        with self._reading(study) as (connection, study_id):
            return read_tells(connection, study_id, after, limit)

    @reconnecting
    def trial(self, study: str, number: int) -> Trial:
        with self._reading(study) as (connection, study_id):
            found = read_trials(connection, study_id, range(number, number + 1), outcomes=True)
        if not found:
            raise rules.no_trial(study, number)
        return found[0]

    @reconnecting
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
                earlier = start_trial(connection, study, study_id, number, part)
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
        except IntegrityError:
            raise rules.token_used(study, token) from None
        return Attempt(**{**row, "state": State.RUNNING})

    @reconnecting
    def renew_attempts(
        self, study: str, tokens: Collection[str], *, lease_until: datetime, controller: str
    ) -> None:
        with self._writing(study, controller) as (connection, study_id):
            connection.execute(
                attempts.update()
                .where(attempts.c.study_id == study_id, attempts.c.state == RUNNING)
                .where(attempts.c.token.in_(list(tokens)))
                .values(lease_until=lease_until)
            )

    @reconnecting
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
            number, part = close_attempt(connection, study, study_id, token, closed)
            record_score(connection, study_id, number, part, score, values)

    @reconnecting
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
        why = {"error": failure.error, "message": failure.message}
        closed = {"state": FAIL, "seconds": dict(seconds), "finished_at": now, **why}
        if worker is not None:
            closed["worker"] = worker
        with self._writing(study, controller) as (connection, study_id):
            number, part = close_attempt(connection, study, study_id, token, closed)
            if part == "search":
                kept = why if trial_state is State.FAIL else {}
                set_trial(connection, study_id, number, {"state": trial_state.value, **kept})

    @reconnecting
    def refuse(self, study: str, token: str, *, controller: str) -> Refusal | None:
        with self._writing(study, controller) as (connection, study_id):
            state = connection.execute(
                sa.select(attempts.c.state).where(
                    attempts.c.study_id == study_id, attempts.c.token == token
                )
            ).scalar()
            why = rules.refusal(None if state is None else State(state))
            if why is not None:
                count_refusal(connection, study_id, why)
            return why

    @reconnecting
    def refusals(self, study: str) -> Mapping[Refusal, int]:
        with self._reading(study) as (connection, study_id):
            query = sa.select(refusals.c.kind, refusals.c.count)
            rows = connection.execute(query.where(refusals.c.study_id == study_id))
            return {kind: count for kind, count in rows}

    @reconnecting
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
            check_startable(connection, study, study_id, number, part)
            record_score(connection, study_id, number, part, score, values)

    @reconnecting
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

    @reconnecting
    def mark_told(self, study: str, orders: Mapping[int, int], *, controller: str) -> None:
        try:
            with self._writing(study, controller) as (connection, study_id):
                recorded = tell_orders(connection, study_id, orders)
                for number, order in orders.items():
                    if number not in recorded:
                        raise rules.no_trial(study, number)
                    rules.check_order(number, recorded[number], order)
                if orders:
                    rows = [{"this": number, "place": place} for number, place in orders.items()]
                    connection.execute(MARK_TOLD, [{"of": study_id, **row} for row in rows])
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
        """A transaction that has the study's trials to itself and has checked who writes."""
        with self._marking(study) as (connection, last, mark):
            yield connection, take_on(connection, study, controller, last, mark)

    @contextmanager
    def _changing(self, study: str, controller: str) -> Iterator[tuple[sa.Connection, int]]:
        """The same, for a change of the study's row."""
        with self._marking(study) as (connection, last, mark):
            yield connection, take(connection, study, controller, last, mark)

    @contextmanager
    def _marking(self, study: str) -> Iterator[tuple[sa.Connection, str | None, str]]:
        """A transaction, the mark that this store's last write left, and the one to leave.

        Where the connection breaks in the commit, whether that came through decides between a
        quiet end and StoreUnreachable.
        """
        mark = uuid.uuid4().hex
        with self._last[study].lock:
            try:
                with transaction(self.engine, write=True) as connection:
                    yield connection, self._last[study].mark, mark
            except CommitUnknown as error:
                if not self._has_mark(study, mark):
                    raise StoreUnreachable(str(error)) from error
            self._last[study].mark = mark

    @reconnecting
    def _has_mark(self, study: str, mark: str) -> bool:
        try:
            with transaction(self.engine, write=True) as connection:
                study_id, _ = lock(connection, study)
                # waits for the row: a commit whose client is gone may still be under way
                last = sa.select(marks.c.mark).where(marks.c.study_id == study_id)
                return connection.execute(last.with_for_update()).scalar() == mark
        except CommitUnknown as error:  # of a transaction that wrote nothing
            raise StoreUnreachable(str(error)) from error


@dataclass
class _Last:
    """This store's last write to a study, and who may write the next."""

    mark: str | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


_TRIALS = trials  # a method's parameter has the table's name
_SCORE_OF_TRIAL = sa.and_(scores.c.study_id == trials.c.study_id, scores.c.trial == trials.c.number)
