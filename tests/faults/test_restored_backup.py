"""A store put back to an earlier state: between two runs, and under a live controller."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from kill_points import SPEC, WORKERS_BEFORE, later, run, uninterrupted
from run_synthetic import rows

from evomerge.errors import StoreError
from evomerge.service.executor import Event
from evomerge.store import open_store
from evomerge.testing.synthetic import Row, SyntheticExecutor
from evomerge.trial import State


@pytest.fixture(scope="module")
def expected() -> list[Row]:
    return uninterrupted(open_store("memory://"))[0]


def copy(source: Path, target: Path) -> None:
    """As `sqlite3 SOURCE '.backup TARGET'` does, also over a database that is in use."""
    with sqlite3.connect(source) as old, sqlite3.connect(target) as new:
        old.backup(new)
    old.close()
    new.close()


class Meddled(SyntheticExecutor):
    """Calls back before the n-th result comes."""

    def __init__(self, meddle: Callable[[int], None]) -> None:
        super().__init__(WORKERS_BEFORE)
        self._meddle = meddle

    def poll(self, timeout_s: float) -> Sequence[Event]:
        self._meddle(self.ran)
        return super().poll(timeout_s)


@pytest.mark.parametrize("taken", [0, 5, 13, 20, 30])
def test_a_study_goes_on_from_its_backup_to_the_same_end(
    tmp_path: Path, expected: list[Row], taken: int
) -> None:
    file, backup = tmp_path / "store.db", tmp_path / "backup.db"
    store = open_store(f"sqlite:///{file}")

    def back_up(ran: int) -> None:
        if ran == taken:
            copy(file, backup)

    assert run(store, Meddled(back_up))
    store.close()
    copy(backup, file)
    restored = open_store(f"sqlite:///{file}")
    assert rows(restored, SPEC) != expected
    assert run(restored, SyntheticExecutor(3), later)
    assert rows(restored, SPEC) == expected


@pytest.mark.parametrize("taken", [3, 12, 17])
@pytest.mark.parametrize("later_on", [1, 6])
def test_a_controller_whose_store_is_put_back_stops_and_says_what_to_do(
    tmp_path: Path, expected: list[Row], taken: int, later_on: int
) -> None:
    file, backup = tmp_path / "store.db", tmp_path / "backup.db"
    store = open_store(f"sqlite:///{file}")

    def put_back(ran: int) -> None:
        if ran == taken:
            copy(file, backup)
        if ran == taken + later_on:
            copy(backup, file)

    with pytest.raises(StoreError, match=r"not as this process left it.*same command") as caught:
        run(store, Meddled(put_back))
    assert "\n" not in str(caught.value)
    assert run(store, SyntheticExecutor(3), later)
    assert rows(store, SPEC) == expected
    complete = [a.token for t in store.trials(SPEC.name) for a in t.attempts
                if a.state is State.COMPLETE]  # fmt: skip
    assert len(complete) == len(set(complete))
