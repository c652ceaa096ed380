"""SIGKILL at every write of a short study, before and after it commits; resume; compare.

The process that dies is a fork, so that hundreds of kill points take a minute and not an hour.
Afterwards the final table must be the uninterrupted run's, bit for bit, and nothing may have been
evaluated twice but what was cut off.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import cast

import pytest
from run_synthetic import rows, run_synthetic

from evomerge.store import open_store
from evomerge.store.base import StudyStore
from evomerge.testing.faults import KillAt
from evomerge.testing.synthetic import Row, SyntheticExecutor, synthetic_spec
from evomerge.trial import State

SPEC = synthetic_spec(
    budget={"trials": 6, "finalists": 2},
    sampler={"name": "cmaes", "population": 3, "seed": 7},
)
# the search part of a killed study may have one cut-off attempt for each worker
WORKERS_BEFORE, WORKERS_AFTER = 2, 3


def _url(path: Path) -> str:
    return f"sqlite:///{path / 'study.db'}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Row], int]:
    """The uninterrupted run's table, and how many writes it took."""
    store = KillAt(open_store(_url(tmp_path_factory.mktemp("whole"))))
    typed = cast(StudyStore, store)
    assert run_synthetic(SPEC, typed, SyntheticExecutor(WORKERS_BEFORE))
    return rows(typed, SPEC), store.writes


def _die_at(url: str, write: int, *, after: bool) -> None:
    """Run the study in a fork that is killed at its write number `write`."""
    child = os.fork()
    if child == 0:
        try:
            store = cast(StudyStore, KillAt(open_store(url), write, after=after))
            run_synthetic(SPEC, store, SyntheticExecutor(WORKERS_BEFORE))
        finally:
            os._exit(1)  # it should have been killed
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"the study ended before write {write}"
    assert os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("residue", range(4))
def test_killed_at_any_write_and_resumed_the_study_ends_the_same(
    whole: tuple[list[Row], int], tmp_path: Path, after: bool, residue: int
) -> None:
    expected, writes = whole
    assert writes > 90
    for write in range(residue, writes, 4):
        folder = tmp_path / str(write)
        folder.mkdir()
        _die_at(_url(folder), write, after=after)
        store = open_store(_url(folder))
        assert run_synthetic(SPEC, store, SyntheticExecutor(WORKERS_AFTER, seed=write))
        assert rows(store, SPEC) == expected, f"killed at write {write}"
        trials = store.trials(SPEC.name)
        completed = [(t.number, a.part) for t in trials for a in t.attempts if _complete(a.state)]
        assert len(completed) == len(set(completed)), "nothing is evaluated to the end twice"
        cut_off = [a for t in trials for a in t.attempts if a.state is State.FAIL]
        assert len(cut_off) <= WORKERS_BEFORE


def test_killed_again_and_again_the_study_still_ends_the_same(
    whole: tuple[list[Row], int], tmp_path: Path
) -> None:
    expected, writes = whole
    for _ in range(writes // 7 + 1):
        if _finished_or_killed(_url(tmp_path), after_writes=7):
            break
    store = open_store(_url(tmp_path))
    assert run_synthetic(SPEC, store)
    assert rows(store, SPEC) == expected


def _finished_or_killed(url: str, *, after_writes: int) -> bool:
    child = os.fork()
    if child == 0:
        store = cast(StudyStore, KillAt(open_store(url), after_writes))
        done = run_synthetic(SPEC, store, SyntheticExecutor(WORKERS_BEFORE))
        os._exit(0 if done else 1)
    _, status = os.waitpid(child, 0)
    return os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0


def _complete(state: State) -> bool:
    return state is State.COMPLETE
