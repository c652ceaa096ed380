"""What the SQL store's transactions are made of: each function is a statement or two.

Every one runs on a connection whose transaction is `sql`'s, and commits nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from evomerge.store import rules
from evomerge.store.base import Controller, Refusal, Tell
from evomerge.store.rows import (
    ATTEMPT,
    CONTROLLER,
    OUTCOMES,
    OUTLINE,
    SCORE,
    TRIAL,
    controller_from,
    score_columns,
    trials_from,
)
from evomerge.store.tables import attempts, marks, refusals, scores, studies, trials
from evomerge.trial import Part, Score, State, Trial

_ATTEMPTS = attempts  # a parameter has the table's name
RUNNING, WAITING = State.RUNNING.value, State.WAITING.value
COMPLETE, FAIL = State.COMPLETE.value, State.FAIL.value

# what every trial needs is put together once: that costs more than to send it
_LOCK = (
    sa.select(studies.c.id, studies.c.controller_token)
    .where(studies.c.name == sa.bindparam("study"))
    .with_for_update(key_share=True)
)
_THIS_TRIAL = (trials.c.study_id == sa.bindparam("of"), trials.c.number == sa.bindparam("this"))
MARK_TOLD = trials.update().where(*_THIS_TRIAL).values(tell_order=sa.bindparam("place"))
_SET_TRIAL = trials.update().where(*_THIS_TRIAL)
_CLOSE_ATTEMPT = (
    attempts.update()
    .where(
        attempts.c.study_id == sa.bindparam("of"),
        attempts.c.token == sa.bindparam("with"),
        attempts.c.state == RUNNING,
    )
    .returning(attempts.c.trial, attempts.c.part)
)
_THIS_ATTEMPT = (
    attempts.c.study_id == sa.bindparam("of"),
    attempts.c.trial == sa.bindparam("this"),
    attempts.c.part == sa.bindparam("part"),
)
_THIS_SCORE = (
    scores.c.study_id == sa.bindparam("of"),
    scores.c.trial == sa.bindparam("this"),
    scores.c.part == sa.bindparam("part"),
)
_EARLIER = sa.select(sa.func.count()).select_from(attempts).where(*_THIS_ATTEMPT).scalar_subquery()
_STARTABLE = sa.select(
    trials.c.state,
    _EARLIER,
    sa.exists().where(*_THIS_ATTEMPT, attempts.c.state == RUNNING),
    sa.exists().where(*_THIS_SCORE),
).where(*_THIS_TRIAL)
_REPLACE_MARK = (
    marks.update()
    .where(marks.c.study_id == sa.bindparam("of"), marks.c.mark == sa.bindparam("last"))
    .values(mark=sa.bindparam("new"))
)
_CONTROLLED = sa.select(studies.c.id).where(
    studies.c.name == sa.bindparam("study"),
    studies.c.controller_token == sa.bindparam("controller"),
)
_TAKE_ON = (
    marks.update()
    .where(marks.c.study_id == _CONTROLLED.scalar_subquery())
    .where(marks.c.mark == sa.bindparam("last"))
    .values(mark=sa.bindparam("new"))
    .returning(marks.c.study_id)
)
_START = (
    trials.update()
    .where(*_THIS_TRIAL, trials.c.state == WAITING)
    .where(~sa.exists().where(*_THIS_ATTEMPT, attempts.c.state == RUNNING))
    .where(~sa.exists().where(*_THIS_SCORE))
    .values(state=RUNNING)
    .returning(_EARLIER)
)


def holder(connection: sa.Connection, study_id: int) -> Controller | None:
    """Who runs the study, as recorded."""
    row = connection.execute(sa.select(*CONTROLLER).where(studies.c.id == study_id)).one()
    return controller_from(row)


def set_study(connection: sa.Connection, study_id: int, values: Mapping[str, Any]) -> None:
    """Change columns of the study's row."""
    connection.execute(studies.update().where(studies.c.id == study_id).values(**values))


def set_trial(
    connection: sa.Connection, study_id: int, number: int, values: Mapping[str, Any]
) -> None:
    """Change columns of a trial's row."""
    connection.execute(_SET_TRIAL, {"of": study_id, "this": number, **values})


def close_open_attempts(connection: sa.Connection, study_id: int, now: datetime) -> None:
    """Fail every open attempt of the study; its running trials wait again."""
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


def check_startable(
    connection: sa.Connection, study: str, study_id: int, number: int, part: Part
) -> int:
    """Check that a part of a trial may be started or answered; returns how many attempts it had."""
    row = connection.execute(_STARTABLE, {"of": study_id, "this": number, "part": part}).first()
    if row is None:
        raise rules.no_trial(study, number)
    state, earlier, open_attempt, scored = row
    rules.check_startable(
        number, part, state=State(state), open_attempt=bool(open_attempt), scored=bool(scored)
    )
    return int(earlier)


def start_trial(
    connection: sa.Connection, study: str, study_id: int, number: int, part: Part
) -> int:
    """Compare and set: the trial runs if a part of it may be started; how many attempts it had."""
    if part == "search":
        row = connection.execute(_START, {"of": study_id, "this": number, "part": part}).first()
        if row is not None:
            return int(row[0])
    return check_startable(connection, study, study_id, number, part)


def close_attempt(
    connection: sa.Connection, study: str, study_id: int, token: str, values: Mapping[str, Any]
) -> tuple[int, Part]:
    """Compare and set: close the open attempt with that token; returns its trial and part."""
    row = connection.execute(_CLOSE_ATTEMPT, {"of": study_id, "with": token, **values}).first()
    if row is None:
        raise rules.stale(study, token)
    return row[0], row[1]


def lock(connection: sa.Connection, study: str) -> tuple[int, str | None]:
    """Hold the study's row: its id and its controller's token."""
    row = connection.execute(_LOCK, {"study": study}).first()
    if row is None:
        raise rules.study_not_found(study)
    return row[0], row[1]


def take(
    connection: sa.Connection, study: str, controller: str, last: str | None, mark: str
) -> int:
    """Hold the study's row for its controller and leave a mark; the study's id."""
    study_id, recorded = lock(connection, study)
    rules.check_fence(study, recorded, controller)
    leave_mark(connection, study, study_id, last, mark)
    return study_id


def take_on(
    connection: sa.Connection, study: str, controller: str, last: str | None, mark: str
) -> int:
    """The same in one statement and without the study's row, which must not be changed then."""
    if last is not None:
        row = {"study": study, "controller": controller, "last": last, "new": mark}
        study_id = connection.execute(_TAKE_ON, row).scalar()
        if study_id is not None:
            return int(study_id)
    return take(connection, study, controller, last, mark)  # which knows what is wrong, if anything


def leave_mark(
    connection: sa.Connection, study: str, study_id: int, last: str | None, mark: str
) -> None:
    """Record which write to the study was the last, and hold that record.

    Raises StoreError if the one before was not `last`; with None for it any will do.
    """
    if last is not None:
        replaced = connection.execute(_REPLACE_MARK, {"of": study_id, "last": last, "new": mark})
        if not replaced.rowcount:
            raise rules.not_as_left(study)
        return
    update = marks.update().where(marks.c.study_id == study_id).values(mark=mark)
    if not connection.execute(update).rowcount:
        connection.execute(marks.insert(), {"study_id": study_id, "mark": mark})


def count_refusal(connection: sa.Connection, study_id: int, kind: Refusal) -> None:
    """Count one refused result."""
    row = (refusals.c.study_id == study_id, refusals.c.kind == kind)
    update = refusals.update().where(*row).values(count=refusals.c.count + 1)
    if connection.execute(update).rowcount == 0:
        connection.execute(refusals.insert(), {"study_id": study_id, "kind": kind, "count": 1})


def record_score(
    connection: sa.Connection,
    study_id: int,
    number: int,
    part: Part,
    score: Score,
    values: tuple[float, ...],
) -> None:
    """Record a score; for the search part the trial is COMPLETE with `values`."""
    rows = score_columns(study_id, number, part, score)
    if rows:
        connection.execute(scores.insert(), rows)
    if part == "search":
        done = {"state": COMPLETE, "objectives": tuple(values)}
        set_trial(connection, study_id, number, done)


def tell_orders(
    connection: sa.Connection, study_id: int, orders: Mapping[int, int]
) -> dict[int, int | None]:
    """The place in the order of tells of each of these trials that there is."""
    query = sa.select(trials.c.number, trials.c.tell_order).where(
        trials.c.study_id == study_id, trials.c.number.in_(list(orders))
    )
    return {row[0]: row[1] for row in connection.execute(query)}


def read_trials(
    connection: sa.Connection, study_id: int, numbers: range | None = None, *, outcomes: bool
) -> list[Trial]:
    """Trials of the study in the order of numbers, or those of a range of step 1."""
    columns = (*SCORE, OUTCOMES) if outcomes else SCORE
    trial_query = sa.select(*TRIAL).where(trials.c.study_id == study_id)
    attempt_query = sa.select(*ATTEMPT).where(attempts.c.study_id == study_id)
    score_query = sa.select(*columns).where(scores.c.study_id == study_id)
    if numbers is not None:
        trial_query = trial_query.where(*_within(trials.c.number, numbers))
        attempt_query = attempt_query.where(*_within(attempts.c.trial, numbers))
        score_query = score_query.where(*_within(scores.c.trial, numbers))
    return trials_from(
        connection.execute(trial_query.order_by(trials.c.number)),
        connection.execute(attempt_query.order_by(attempts.c.id)),
        connection.execute(score_query.order_by(scores.c.trial, scores.c.task)),
    )


def read_outlines(
    connection: sa.Connection, study_id: int, numbers: range, *, attempts: bool
) -> list[Trial]:
    """Trials of a range without genomes, recipes and outcomes."""
    trial_query = sa.select(*OUTLINE).where(trials.c.study_id == study_id)
    trial_query = trial_query.where(*_within(trials.c.number, numbers))
    attempt_query = sa.select(*ATTEMPT).where(_ATTEMPTS.c.study_id == study_id)
    attempt_query = attempt_query.where(*_within(_ATTEMPTS.c.trial, numbers))
    score_query = sa.select(*SCORE).where(scores.c.study_id == study_id)
    score_query = score_query.where(*_within(scores.c.trial, numbers))
    return trials_from(
        connection.execute(trial_query.order_by(trials.c.number)),
        connection.execute(attempt_query.order_by(_ATTEMPTS.c.id)) if attempts else (),
        connection.execute(score_query.order_by(scores.c.trial, scores.c.task)),
    )


def read_tells(connection: sa.Connection, study_id: int, after: int, limit: int) -> list[Tell]:
    """The first `limit` tells of a later place than `after`."""
    told = connection.execute(
        sa.select(
            trials.c.tell_order,
            trials.c.number,
            trials.c.genome,
            trials.c.objectives,
            trials.c.state,
        )
        .where(trials.c.study_id == study_id, trials.c.tell_order > after)
        .order_by(trials.c.tell_order)
        .limit(limit)
    ).all()
    margins = _margins(connection, study_id, after, told[-1][0]) if told else {}
    return [
        Tell(order, number, genome, values if state == COMPLETE else None, margins.get(number, {}))
        for order, number, genome, values, state in told
    ]


def _margins(
    connection: sa.Connection, study_id: int, after: int, last: int
) -> dict[int, dict[str, float]]:
    """By trial the margins on the search items of what was told in the places (after, last]."""
    query = (
        sa.select(scores.c.trial, scores.c.task, scores.c.margin)
        .where(trials.c.study_id == study_id, scores.c.study_id == study_id)
        .where(scores.c.trial == trials.c.number, scores.c.part == "search")
        .where(trials.c.tell_order > after, trials.c.tell_order <= last)
        .where(scores.c.margin.is_not(None))
    )
    found: dict[int, dict[str, float]] = defaultdict(dict)
    for number, task, margin in connection.execute(query):
        found[number][task] = margin
    return found


def _within(column: sa.Column[int], numbers: range) -> tuple[sa.ColumnElement[bool], ...]:
    return column >= numbers.start, column < numbers.stop
