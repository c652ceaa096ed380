"""What every store refuses, in the same words: shared by the SQL store and the in-memory one.

Builds exceptions and checks values; keeps nothing and reads nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime

from evomerge.errors import (
    StaleAttempt,
    StoreError,
    StudyBusy,
    StudyChanged,
    StudyNotFound,
    StudyTaken,
)
from evomerge.store.base import Controller, Refusal
from evomerge.trial import Failure, Part, Score, State, TaskScore

CONTROLLER_ENDED = Failure("WorkerLost", "its controller ended before a result came")


def study_not_found(study: str) -> StudyNotFound:
    """A study is named that is not there."""
    return StudyNotFound(f"no study {study!r} in this store; `evomerge status` lists what is there")


def study_changed(study: str) -> StudyChanged:
    """A study is created under a name that is taken."""
    return StudyChanged(
        f"a study {study!r} is in this store already; resume it, or give the new one another name"
    )


def check_free(study: str, holder: Controller | None, token: str, now: datetime) -> None:
    """Refuse to take a study from another controller whose lease is live."""
    if holder is None or holder.token == token or holder.lease_until <= now:
        return
    left = math.ceil((holder.lease_until - now).total_seconds())
    raise StudyBusy(
        f"study {study!r} is being run by process {holder.pid} on {holder.host}: stop it "
        f"with Ctrl-C there; if it is dead, the study is free in {left} s"
    )


def check_fence(study: str, recorded: str | None, token: str) -> None:
    """Refuse a write by a process that no longer is the study's controller."""
    if recorded != token:
        what = "it was given up" if recorded is None else "another process has taken it over"
        raise StudyTaken(
            f"this process no longer runs study {study!r}: {what}. Nothing is lost, and this one "
            "has written nothing since; `evomerge status` says who runs it"
        )


def not_as_left(study: str) -> StoreError:
    """A study is written that was put back, or edited, since this process last wrote it."""
    return StoreError(
        f"study {study!r} is not as this process left it; if the store was restored from a backup, "
        "run the same command again: the study goes on from what is there"
    )


def no_trial(study: str, number: int) -> ValueError:
    """A trial is named that is not there."""
    return ValueError(f"study {study!r} has no trial {number}")


def trial_exists(study: str) -> ValueError:
    """A trial is created under a number that is taken."""
    return ValueError(f"study {study!r}: one of these trial numbers is recorded already")


def stale(study: str, token: str) -> StaleAttempt:
    """A result came for an attempt that is not open."""
    return StaleAttempt(f"study {study!r}: attempt {token} is not open; its result is refused")


def refusal(state: State | None) -> Refusal | None:
    """Why a result is refused whose attempt is in that state; None stands for no such attempt."""
    if state is None:
        return "stray"
    if state is State.RUNNING:
        return None
    return "repeated" if state is State.COMPLETE else "late"


def plain(failure: Failure) -> Failure:
    """The failure in characters that every database keeps: a library's message may hold any."""
    return Failure(_plain(failure.error), _plain(failure.message))


def token_used(study: str, token: str) -> ValueError:
    """An attempt is started under a token that another attempt has or had."""
    return ValueError(f"study {study!r}: attempt token {token} was used before")


def check_startable(
    number: int, part: Part, *, state: State, open_attempt: bool, scored: bool
) -> None:
    """Refuse to start, or to answer from the store, what is running or done."""
    if open_attempt:
        raise ValueError(f"trial {number}: an attempt on its {part} part is open")
    if scored:
        raise ValueError(f"trial {number}: its {part} part is scored already")
    if part == "search" and state is not State.WAITING:
        raise ValueError(f"trial {number} is {state}, not WAITING")


def check_trial_state(state: State) -> None:
    """Refuse a state in which no failed attempt leaves a trial."""
    if state not in (State.WAITING, State.FAIL):
        raise ValueError(f"a failed attempt leaves its trial WAITING or FAIL, not {state}")


def check_order(number: int, recorded: int | None, order: int) -> None:
    """Refuse to tell a trial twice."""
    if recorded is not None and recorded != order:
        raise ValueError(f"trial {number} was told as number {recorded}, it cannot be told again")


def order_taken(study: str) -> ValueError:
    """Two trials are told in one place."""
    return ValueError(f"study {study!r}: another trial has that place in the order of tells")


def checked(score: Score, values: tuple[float, ...]) -> Score:
    """The score as it is kept. Raises ValueError for NaN among values; outcomes may hold it."""
    if any(math.isnan(value) for value in values):
        raise ValueError(f"NaN among a trial's values {values}; that candidate failed")
    return Score({name: _checked(name, task) for name, task in score.tasks.items()})


def without_outcomes(scores: Mapping[Part, Score]) -> dict[Part, Score]:
    """The same scores with no per-item outcomes."""
    return {
        part: Score({name: replace(task, outcomes=()) for name, task in score.tasks.items()})
        for part, score in scores.items()
    }


def _plain(text: str) -> str:
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return whole.replace("\0", "\N{REPLACEMENT CHARACTER}")


def _checked(name: str, task: TaskScore) -> TaskScore:
    if math.isnan(task.value):
        raise ValueError(f"task {name!r}: {task.metric} is NaN; that candidate failed")
    if task.stderr is not None and math.isnan(task.stderr):
        task = replace(task, stderr=None)
    if task.margin is not None and not math.isfinite(task.margin):
        task = replace(task, margin=None)
    return task
