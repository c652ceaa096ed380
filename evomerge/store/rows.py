"""Rows to frozen data and back: trials, attempts, scores, studies.

Pure functions of rows; runs no query.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import sqlalchemy as sa

from evomerge.store.base import Controller, StudyRecord
from evomerge.store.tables import attempts, scores, studies, trials
from evomerge.trial import Attempt, Failure, NewTrial, Part, Score, State, TaskScore, Trial

Row = Sequence[Any]

STUDY = (
    studies.c.name,
    studies.c.spec,
    studies.c.inspection,
    studies.c.scorer_digest,
    studies.c.created_at,
)
CONTROLLER = (
    studies.c.controller_token,
    studies.c.controller_host,
    studies.c.controller_pid,
    studies.c.controller_started,
    studies.c.controller_lease_until,
)
TRIAL = (
    trials.c.number,
    trials.c.kind,
    trials.c.label,
    trials.c.genome,
    trials.c.recipe,
    trials.c.recipe_digest,
    trials.c.state,
    trials.c.objectives,
    trials.c.error,
    trials.c.message,
    trials.c.tell_order,
)
# for reading a long study through
OUTLINE = tuple(sa.null() if column.name in ("genome", "recipe") else column for column in TRIAL)
ATTEMPT = (
    attempts.c.trial,
    attempts.c.part,
    attempts.c.number,
    attempts.c.token,
    attempts.c.state,
    attempts.c.worker,
    attempts.c.started_at,
    attempts.c.lease_until,
    attempts.c.finished_at,
    attempts.c.seconds,
    attempts.c.error,
    attempts.c.message,
)
SCORE = (
    scores.c.trial,
    scores.c.part,
    scores.c.task,
    scores.c.metric,
    scores.c.value,
    scores.c.stderr,
    scores.c.n,
    scores.c.higher_is_better,
    scores.c.margin,
)
OUTCOMES = scores.c.outcomes


def study_from(row: Row) -> StudyRecord:
    """A study from the columns STUDY."""
    name, spec, inspection, scorer_digest, created_at = row
    return StudyRecord(name, spec, inspection, scorer_digest, created_at)


def controller_from(row: Row) -> Controller | None:
    """A controller from the columns CONTROLLER; None where there is none."""
    token, host, pid, started, lease_until = row
    return None if token is None else Controller(token, host, pid, started, lease_until)


def controller_columns(controller: Controller) -> dict[str, Any]:
    """A controller as the columns of its study."""
    return {
        "controller_token": controller.token,
        "controller_host": controller.host,
        "controller_pid": controller.pid,
        "controller_started": controller.started,
        "controller_lease_until": controller.lease_until,
    }


def trial_columns(study_id: int, trial: NewTrial) -> dict[str, Any]:
    """A new trial as a row."""
    return {
        "study_id": study_id,
        "number": trial.number,
        "kind": trial.kind,
        "label": trial.label,
        "genome": trial.genome,
        "recipe": trial.recipe,
        "recipe_digest": trial.recipe_digest,
        "state": State.WAITING.value,
    }


def score_columns(study_id: int, trial: int, part: Part, score: Score) -> list[dict[str, Any]]:
    """A score as rows, one for each task."""
    return [
        {
            "study_id": study_id,
            "trial": trial,
            "part": part,
            "task": name,
            "metric": task.metric,
            "value": task.value,
            "stderr": task.stderr,
            "n": task.n,
            "higher_is_better": task.higher_is_better,
            "margin": task.margin,
            "outcomes": task.outcomes,
        }
        for name, task in score.tasks.items()
    ]


def trials_from(
    trial_rows: Iterable[Row], attempt_rows: Iterable[Row], score_rows: Iterable[Row]
) -> list[Trial]:
    """Put trials together. `attempt_rows` come in the order they were started."""
    attempts_of: dict[int, list[Attempt]] = defaultdict(list)
    for row in attempt_rows:
        attempts_of[row[0]].append(_attempt_from(row))
    tasks_of: dict[int, dict[Part, dict[str, TaskScore]]] = defaultdict(lambda: defaultdict(dict))
    for row in score_rows:
        tasks_of[row[0]][row[1]][row[2]] = _task_score_from(row)
    return [
        _trial_from(
            row,
            tuple(attempts_of[row[0]]),
            {part: Score(tasks) for part, tasks in tasks_of[row[0]].items()},
        )
        for row in trial_rows
    ]


def score_from(rows: Sequence[Row]) -> Score:
    """One score from the rows of one trial and part, outcomes included."""
    return Score({row[2]: _task_score_from(row) for row in rows})


def _trial_from(row: Row, tries: tuple[Attempt, ...], marks: dict[Part, Score]) -> Trial:
    number, kind, label, genome, recipe, digest, state, objectives, error, message, order = row
    return Trial(
        number=number,
        kind=kind,
        label=label,
        genome=genome,
        recipe={} if recipe is None else recipe,
        recipe_digest=digest,
        state=State(state),
        values=objectives,
        scores=marks,
        failure=_failure(error, message),
        tell_order=order,
        attempts=tries,
    )


def _attempt_from(row: Row) -> Attempt:
    trial, part, number, token, state, worker, started, lease, finished, seconds, *why = row
    return Attempt(
        trial=trial,
        part=part,
        number=number,
        token=token,
        state=State(state),
        worker=worker,
        started_at=started,
        lease_until=lease,
        finished_at=finished,
        seconds=seconds,
        failure=_failure(*why),
    )


def _task_score_from(row: Row) -> TaskScore:
    _, _, _, metric, value, stderr, n, higher, margin, *outcomes = row
    return TaskScore(metric, value, stderr, n, higher, outcomes[0] if outcomes else (), margin)


def _failure(error: str | None, message: str | None) -> Failure | None:
    return None if error is None else Failure(error, message or "")
