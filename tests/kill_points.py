"""A small synthetic study, killed at a numbered point and taken up again by another controller.

Points lie before, in and after every store commit and before and after every executor call.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import cast

from run_synthetic import rows

from evomerge.service.ledger import utc_now
from evomerge.service.study import build_controller, controlling, open_study
from evomerge.store import open_store
from evomerge.store.base import StudyStore
from evomerge.testing.faults import CALLS, WRITES, Fate, Killed, kill_by_signal
from evomerge.testing.synthetic import Row, SyntheticExecutor, synthetic_spec
from evomerge.trial import State

SPEC = synthetic_spec(
    budget={"trials": 6, "finalists": 2},
    sampler={"name": "cmaes", "population": 3, "seed": 7},
)
# the search part of a killed study may have one cut-off attempt for each worker
WORKERS_BEFORE, WORKERS_AFTER = 2, 3


def later() -> datetime:
    """The clock of the next controller, when the lease of the one before has lapsed."""
    return utc_now() + timedelta(hours=1)


def run(
    store: StudyStore,
    executor: SyntheticExecutor,
    clock: Callable[[], datetime] = utc_now,
) -> bool:
    """Create or resume, and run; whether it came to its end."""
    record = open_study(SPEC, store, executor, clock=clock)
    with controlling(record, store, clock) as token:
        return build_controller(record, store, executor, token, clock=clock).run()


def run_to(fate: Fate, store: StudyStore) -> None:
    """Run until the fate strikes, if it does."""
    executor = fate.bind(SyntheticExecutor(WORKERS_BEFORE), CALLS)
    run(cast(StudyStore, fate.bind(store, WRITES)), cast(SyntheticExecutor, executor))


def uninterrupted(store: StudyStore) -> tuple[list[Row], int]:
    """The table that every killed run must end with, and how many points a run passes."""
    fate = Fate()
    run_to(fate, store)
    return rows(store, SPEC), fate.points


def die_here(store: StudyStore, point: int) -> None:
    """Die at the point by an exception that nothing outlives."""
    try:
        run_to(Fate(point), store)
    except Killed:
        return
    raise AssertionError(f"the study ended before point {point}")


def die_in_a_fork(url: str, point: int, *, or_finish: bool = False) -> bool:
    """Die at the point by SIGKILL; False if the study was at its end first, and may be."""
    child = os.fork()
    if child == 0:
        try:
            run_to(Fate(point, kill_by_signal), open_store(url))
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed or or_finish, f"the study ended before point {point}"
    return killed


def resume_and_compare(store: StudyStore, expected: list[Row], point: int) -> None:
    """Go on with another number of workers: same table, nothing done twice, little lost."""
    assert run(store, SyntheticExecutor(WORKERS_AFTER, seed=point), later)
    assert rows(store, SPEC) == expected, f"killed at point {point}"
    trials = store.trials(SPEC.name, outcomes=False)
    attempts = [attempt for trial in trials for attempt in trial.attempts]
    complete = [(a.trial, a.part) for a in attempts if a.state is State.COMPLETE]
    assert len(complete) == len(set(complete)), "nothing is evaluated to the end twice"
    assert sum(a.state is State.FAIL for a in attempts) <= WORKERS_BEFORE
    assert store.refusals(SPEC.name) == {}
