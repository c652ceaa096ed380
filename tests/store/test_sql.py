"""What the SQL store promises beyond the protocol: processes that race, die or find it unusable."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from evomerge.errors import StoreError, StoreLocked, StudyBusy
from evomerge.store import open_store, sql
from evomerge.store.base import StudyStore
from evomerge.store.engine import _use_wal
from evomerge.store.sql import SqlStore
from evomerge.testing.faults import WRITES, KillAt
from evomerge.testing.store_builders import (
    LEASE,
    NOW,
    StudyUnderTest,
    holder,
    new_trial,
    record,
    score,
)
from evomerge.trial import State

PROCESSES = 4
spawn = multiprocessing.get_context("spawn")


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/store.db"


@pytest.fixture
def store(url: str) -> Iterator[SqlStore]:
    store = SqlStore(url)
    yield store
    store.close()


def race(work: Callable[..., None], *args: Any) -> list[Any]:
    """Run `work(start, answers, place, *args)` in several processes that start at one moment."""
    start, answers = spawn.Barrier(PROCESSES), spawn.Queue()
    racers = [
        spawn.Process(target=work, args=(start, answers, place, *args))
        for place in range(PROCESSES)
    ]
    for racer in racers:
        racer.start()
    found = [answers.get(timeout=120) for _ in racers]
    for racer in racers:
        racer.join()
    return found


def _open(start: Any, answers: Any, place: int, url: str) -> None:
    import alembic.command  # noqa: F401  so that all arrive together

    start.wait()
    try:
        open_store(url).create_study(record(f"study-{place}"))
        answers.put("opened")
    except Exception as error:
        answers.put(repr(error))


def test_any_number_of_processes_may_open_an_empty_store_at_once(url: str) -> None:
    assert race(_open, url) == ["opened"] * PROCESSES
    assert len(open_store(url).studies()) == PROCESSES


def _acquire(start: Any, answers: Any, place: int, url: str) -> None:
    store = open_store(url)
    start.wait()
    try:
        store.acquire("s", holder(f"c{place}"), now=NOW)
        answers.put("mine")
    except StudyBusy:
        answers.put("busy")


def test_of_processes_that_acquire_at_once_one_succeeds(url: str, store: SqlStore) -> None:
    store.create_study(record())
    assert sorted(race(_acquire, url)) == ["busy"] * (PROCESSES - 1) + ["mine"]


def _start(start: Any, answers: Any, place: int, url: str) -> None:
    study = StudyUnderTest.__new__(StudyUnderTest)
    study.store, study.name = open_store(url), "s"
    start.wait()
    try:
        answers.put(study.start(0, token=f"t{place}").number)
    except ValueError:
        answers.put(0)


def test_of_processes_that_start_one_trial_at_once_one_succeeds(url: str, store: SqlStore) -> None:
    StudyUnderTest(store)
    assert sorted(race(_start, url)) == [0] * (PROCESSES - 1) + [1]
    assert len(store.trial("s", 0).attempts) == 1


def script(study: StudyUnderTest) -> None:
    """A study's life after its creation, with every kind of write."""
    store = study.store
    store.update_study("s", {"budget": 9}, {}, controller="c1")
    store.renew("s", "c1", lease_until=NOW + 2 * LEASE)
    study.start(0, token="t0")
    study.finish("t0", score(0.25, (1.0, 0.0, 0.5)))
    study.start(1, token="t1")
    study.fail("t1", state=State.WAITING)
    study.reuse(1)
    store.mark_told("s", {0: 0, 1: 1}, controller="c1")
    store.create_trials("s", [new_trial(n) for n in range(2, 40)], controller="c1")
    study.start(2, token="t2")
    store.acquire("s", holder("c2"), now=NOW + timedelta(seconds=5), force=True)
    store.release("s", "c2")


def _die_in_commit(url: str, nth: int) -> None:
    """Run the script in a process that is killed at the n-th commit, its statements all sent."""
    store = SqlStore(url)
    study = StudyUnderTest(store)
    count = iter(range(10_000))

    @sa.event.listens_for(store.engine, "commit")
    def die(connection: sa.Connection) -> None:
        writing = connection.get_execution_options()["evomerge_write"]
        if writing and next(count) == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    script(study)


def _die_at_write(url: str, nth: int, after: bool) -> None:
    study = StudyUnderTest(open_store(url))
    study.store = KillAt(study.store, nth, after=after)  # type: ignore[assignment]
    script(study)


def states_of_the_script(url: str) -> list[Any]:
    """What the store says before the first write of the script and after each one."""
    study = StudyUnderTest(open_store(url))
    seen = [study.everything()]
    plain = study.store

    class Watched:
        def __getattr__(self, name: str) -> Any:
            method = getattr(plain, name)

            def call(*args: Any, **kwargs: Any) -> Any:
                result = method(*args, **kwargs)
                if name in WRITES:
                    seen.append(_Plain(plain).everything())
                return result

            return call

    study.store = Watched()  # type: ignore[assignment]
    script(study)
    return seen


class _Plain(StudyUnderTest):
    """An existing study, to look at."""

    def __init__(self, store: StudyStore) -> None:
        self.store, self.name = store, "s"


def test_kill_9_at_any_write_leaves_all_of_it_or_nothing(tmp_path: Path) -> None:
    expected = states_of_the_script(f"sqlite:///{tmp_path}/whole.db")
    killed: dict[str, tuple[Callable[..., None], tuple[Any, ...], int]] = {}
    for nth in range(len(expected) - 1):
        killed[f"in-{nth}"] = (_die_in_commit, (nth,), nth)
        killed[f"after-{nth}"] = (_die_at_write, (nth, True), nth + 1)
    killed["before-3"] = (_die_at_write, (3, False), 3)
    for name, (work, args, writes_done) in killed.items():
        url = f"sqlite:///{tmp_path}/{name}.db"
        child = multiprocessing.get_context("fork").Process(target=work, args=(url, *args))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL, name
        assert _Plain(open_store(url)).everything() == expected[writes_done], name


def test_a_database_locked_by_another_process_says_what_to_do(url: str, store: SqlStore) -> None:
    store.create_study(record())
    store.close()
    with sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        impatient = SqlStore(url, lock_wait_s=0.05)
        with pytest.raises(StoreLocked, match=r"store\.db.*locked.*run the same command again"):
            impatient.acquire("s", holder(), now=NOW)
        assert impatient.study("s") == record()
        other.execute("ROLLBACK")
        impatient.acquire("s", holder(), now=NOW)
    other.close()


def test_a_database_held_exclusively_is_locked_too(url: str, store: SqlStore) -> None:
    store.close()
    with sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None) as other:
        other.execute("PRAGMA locking_mode=EXCLUSIVE")
        other.execute("BEGIN IMMEDIATE")
        other.execute("CREATE TABLE theirs (a)")
        with pytest.raises(StoreLocked):
            SqlStore(url, lock_wait_s=0.05)
    other.close()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("evomerge.db", r"'evomerge\.db' is not a store URL; expected .*sqlite:///evomerge\.db"),
        ("", "not a store URL"),
        ("sqlite://", "memory://"),
        ("sqlite:///:memory:", "memory://"),
        ("nosuch://x/y", "nosuch"),
        ("postgresql+nosuch://me:secret@x/y", "nosuch"),
        ("sqlite:////nonexistent-folder/x.db", "unable to open.*does the folder exist"),
        ("sqlite:////proc/x.db", "unable to open"),
    ],
)
def test_a_url_that_names_no_store_is_one_clear_line(url: str, said: str) -> None:
    with pytest.raises(StoreError, match=said) as caught:
        open_store(url)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_file_that_is_no_database_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("not a database, but somebody's notes\n" * 100)
    with pytest.raises(StoreError, match="not a database; name another file"):
        open_store(f"sqlite:///{file}")
    assert file.read_text().startswith("not a database")


def test_a_folder_is_no_database(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="unable to open"):
        open_store(f"sqlite:///{tmp_path}")


def test_a_damaged_database_is_a_store_error(url: str, store: SqlStore) -> None:
    store.create_study(record())
    store.close()
    file = Path(url.removeprefix("sqlite:///"))
    file.write_bytes(file.read_bytes()[:4096] + b"\xff" * (file.stat().st_size - 4096))
    with pytest.raises(StoreError, match=r"store\.db"):
        open_store(url).study("s")


def test_reading_does_not_create_a_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no store at"):
        open_store(f"sqlite:///{tmp_path}/none.db", create=False)
    assert not list(tmp_path.iterdir())


def test_opening_an_existing_store_imports_neither_alembic_nor_optuna(url: str) -> None:
    open_store(url).close()
    program = (
        "import sys; from evomerge.store import open_store; "
        f"open_store({url!r}).studies(); "
        "print([m for m in ('alembic', 'optuna', 'torch', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_sqlite_runs_in_wal_mode_with_foreign_keys(url: str, store: SqlStore) -> None:
    with store.engine.connect() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        }
    assert pragmas == {"journal_mode": "wal", "synchronous": 1, "foreign_keys": 1}


def test_the_switch_to_wal_is_tried_again_while_another_process_makes_it(tmp_path: Path) -> None:
    real = sqlite3.connect(tmp_path / "new.db")
    refusals = iter(["database is locked"] * 2)

    class Contended:
        def execute(self, sql: str) -> sqlite3.Cursor:
            for reason in refusals if "=" in sql else ():
                raise sqlite3.OperationalError(reason)
            return real.execute(sql)

    _use_wal(Contended(), lock_wait_s=60)  # type: ignore[arg-type]
    assert real.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    real.close()


def test_a_reader_is_not_held_up_by_a_writer(url: str, store: SqlStore) -> None:
    StudyUnderTest(store)
    with store.engine.connect().execution_options(evomerge_write=True) as writer, writer.begin():
        writer.exec_driver_sql("UPDATE evomerge_trials SET label = 'half done'")
        assert SqlStore(url, lock_wait_s=0.05).trial("s", 0).label == "trial 0"
        writer.get_transaction().rollback()  # type: ignore[union-attr]


def _blocked(url: str) -> bool:
    with sa.create_engine(url).connect() as connection:
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        return bool(connection.exec_driver_sql(waiting).scalar())


@pytest.mark.parametrize("keep", [False, True])
def test_who_takes_a_study_over_waits_for_the_write_under_way_and_sees_it(
    postgres_url: str, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = SqlStore(postgres_url), SqlStore(postgres_url)
    study = StudyUnderTest(ours)
    start_trial, takers = sql.start_trial, []

    def interrupted(*arguments: Any) -> int:
        taker = threading.Thread(
            target=lambda: theirs.acquire("s", holder("c2"), now=NOW, force=True)
        )
        taker.start()
        takers.append(taker)
        while not _blocked(postgres_url):
            assert taker.is_alive()
        if not keep:
            raise KeyboardInterrupt
        return start_trial(*arguments)

    monkeypatch.setattr(sql, "start_trial", interrupted)
    if keep:
        study.start()
    else:
        with pytest.raises(KeyboardInterrupt):
            study.start()
    takers[0].join()
    trial = study.trial()
    assert (trial.state, [a.state for a in trial.attempts]) == (State.WAITING, [State.FAIL] * keep)
    with pytest.raises(StudyBusy):
        study.finish()
    ours.close()
    theirs.close()
