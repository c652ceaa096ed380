"""A store put back to an earlier state: between two runs, and under a live controller."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from kill_points import SPEC, WORKERS_BEFORE, later, run, uninterrupted
from postgres_server import Postgres
from run_synthetic import rows

from evomerge.errors import StoreError
from evomerge.service.executor import Event
from evomerge.store import open_store
from evomerge.testing.synthetic import Row, SyntheticExecutor
from evomerge.trial import State


@pytest.fixture(scope="module")
def expected() -> list[Row]:
    return uninterrupted(open_store("memory://"))[0]


class SqliteFile:
    """As `sqlite3 SOURCE '.backup TARGET'` does, also over a database that is in use."""

    def __init__(self, folder: Path) -> None:
        self._file, self._backup = folder / "store.db", folder / "backup.db"
        self.url = f"sqlite:///{self._file}"

    def take(self) -> None:
        self._copy(self._file, self._backup)

    def put_back(self) -> None:
        self._copy(self._backup, self._file)

    def _copy(self, source: Path, target: Path) -> None:
        with sqlite3.connect(source) as old, sqlite3.connect(target) as new:
            old.backup(new)
        old.close()
        new.close()


class PostgresDatabase:
    """By pg_dump and pg_restore."""

    def __init__(self, server: Postgres, url: str) -> None:
        self._server, self.url = server, url

    def take(self) -> None:
        self._server.dump(self.url)

    def put_back(self) -> None:
        self._server.restore(self.url)


Backup = SqliteFile | PostgresDatabase


@pytest.fixture(params=["sqlite", "postgresql"])
def backup(request: pytest.FixtureRequest, tmp_path: Path) -> Backup:
    if request.param == "sqlite":
        return SqliteFile(tmp_path)
    server = request.getfixturevalue("own_postgres")
    return PostgresDatabase(server, request.getfixturevalue("postgres_url"))


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
    backup: Backup, expected: list[Row], taken: int
) -> None:
    store = open_store(backup.url)

    def back_up(ran: int) -> None:
        if ran == taken:
            backup.take()

    assert run(store, Meddled(back_up))
    store.close()
    backup.put_back()
    restored = open_store(backup.url)
    assert rows(restored, SPEC) != expected
    assert run(restored, SyntheticExecutor(3), later)
    assert rows(restored, SPEC) == expected
    restored.close()


@pytest.mark.parametrize("taken", [3, 12, 17])
@pytest.mark.parametrize("later_on", [1, 6])
def test_a_controller_whose_store_is_put_back_stops_and_says_what_to_do(
    backup: Backup, expected: list[Row], taken: int, later_on: int
) -> None:
    store = open_store(backup.url)

    def meddle(ran: int) -> None:
        if ran == taken:
            backup.take()
        if ran == taken + later_on:
            backup.put_back()

    with pytest.raises(StoreError, match=r"not as this process left it.*same command") as caught:
        run(store, Meddled(meddle))
    assert "\n" not in str(caught.value)
    assert run(store, SyntheticExecutor(3), later)
    assert rows(store, SPEC) == expected
    complete = [a.token for t in store.trials(SPEC.name) for a in t.attempts
                if a.state is State.COMPLETE]  # fmt: skip
    assert len(complete) == len(set(complete))
    store.close()
