"""PostgreSQL goes away in the middle of a study: restarted, or a connection cut; nothing is lost.

The server is really stopped and started. What became of a commit whose connection broke is asked
of the database, so that nothing is written twice.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, cast

import psycopg
import pytest
import sqlalchemy as sa
from kill_points import SPEC, run, uninterrupted
from postgres_server import Postgres
from run_synthetic import rows

from evomerge.errors import StoreUnreachable, StudyBusy
from evomerge.store import open_store
from evomerge.store.base import StudyStore
from evomerge.store.engine import transaction
from evomerge.store.sql import SqlStore
from evomerge.testing.faults import WRITES, Fate
from evomerge.testing.store_builders import (
    LEASE,
    NOW,
    StudyUnderTest,
    claim,
    holder,
    new_trial,
    record,
    score,
)
from evomerge.testing.synthetic import SyntheticExecutor
from evomerge.trial import State


@pytest.fixture
def store(postgres_url: str) -> Iterator[SqlStore]:
    store = SqlStore(postgres_url, reconnect_s=120)
    yield store
    store.close()


def cut(connection: sa.Connection) -> None:
    """Break a connection from the server's side."""
    pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar()
    with sa.create_engine(connection.engine.url).begin() as other:
        other.exec_driver_sql(f"SELECT pg_terminate_backend({pid})")


WRITTEN: dict[str, Callable[[StudyUnderTest], Any]] = {
    "update_study": lambda s: s.store.update_study("s", {"a": 1}, {}, controller="c1"),
    "acquire": lambda s: s.store.acquire("s", holder("c2"), now=NOW, force=True),
    "renew": lambda s: s.store.renew("s", "c1", lease_until=NOW + 2 * LEASE),
    "release": lambda s: s.store.release("s", "c1"),
    "create_trials": lambda s: s.store.create_trials("s", [new_trial(5)], controller="c1"),
    "start_attempt": lambda s: s.start(1, token="t9"),
    "renew_attempts": lambda s: s.store.renew_attempts(
        "s", ["t1"], lease_until=NOW + 2 * LEASE, controller="c1"
    ),
    "finish": lambda s: s.finish(),
    "fail_attempt": lambda s: s.fail(state=State.WAITING),
    "refuse": lambda s: s.store.refuse("s", "stray", controller="c1"),
    "reuse": lambda s: s.reuse(1),
    "mark_told": lambda s: s.store.mark_told("s", {0: 0}, controller="c1"),
    "claim": lambda s: s.store.claim(claim("c2")),
    "withdraw": lambda s: s.store.withdraw("s", "c1"),
}


def test_every_write_is_here() -> None:
    assert WRITTEN.keys() == WRITES - {"create_study"}


@pytest.mark.parametrize("came_through", [False, True])
@pytest.mark.parametrize("write", WRITTEN)
def test_a_write_whose_commit_is_cut_off_is_done_once(
    store: SqlStore, write: str, came_through: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = StudyUnderTest(open_store("memory://"))
    study = StudyUnderTest(store)
    for one in (twin, study):
        one.start()
        one.store.claim(claim())
    WRITTEN[write](twin)
    cuts = _cut_the_next_commit(store, monkeypatch, came_through=came_through)
    WRITTEN[write](study)
    assert cuts == [write]
    assert study.everything() == twin.everything()


def _cut_the_next_commit(
    store: SqlStore, monkeypatch: pytest.MonkeyPatch, *, came_through: bool
) -> list[str]:
    """The next commit's answer never comes, be it that it was done or that it was not."""
    cuts: list[str] = []
    commit = store.engine.dialect.do_commit

    def broken(connection: Any) -> None:
        if cuts:
            return commit(connection)
        cuts.append(_caller())
        if came_through:
            connection.commit()
        connection.dbapi_connection.close()
        raise psycopg.OperationalError("the connection is lost")

    monkeypatch.setattr(store.engine.dialect, "do_commit", broken)
    return cuts


def _caller() -> str:
    import inspect

    return next(f.function for f in inspect.stack() if f.function in WRITES)


@pytest.mark.parametrize("came_through", [False, True])
def test_a_study_is_created_once(
    store: SqlStore, came_through: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuts = _cut_the_next_commit(store, monkeypatch, came_through=came_through)
    store.create_study(record())
    assert cuts == ["create_study"]
    assert list(store.studies()) == [record()]


def test_a_connection_cut_between_two_statements_costs_nothing(store: SqlStore) -> None:
    study = StudyUnderTest(store)
    study.start()
    left = [3]

    @sa.event.listens_for(store.engine, "before_cursor_execute")
    def saboteur(connection: sa.Connection, cursor: Any, statement: str, *_: Any) -> None:
        if left and statement.startswith("INSERT INTO evomerge_scores"):
            left.pop()
            cut(connection)

    study.finish(result=score(0.25))
    assert not left
    assert study.trial().scores["search"] == score(0.25)
    assert len(study.trial().attempts) == 1


def test_a_study_taken_over_meanwhile_is_not_written(
    store: SqlStore, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = StudyUnderTest(store)
    _cut_the_next_commit(store, monkeypatch, came_through=False)
    has_mark = store._has_mark

    def slow(*arguments: Any) -> bool:
        open_store(postgres_url).acquire("s", holder("c2"), now=NOW + 2 * LEASE)
        return has_mark(*arguments)

    monkeypatch.setattr(store, "_has_mark", slow)
    with pytest.raises(StudyBusy, match="another process has taken it over"):
        study.start()
    assert study.trial().attempts == ()


@pytest.mark.parametrize("how", [signal.SIGQUIT, signal.SIGINT], ids=["crash", "orderly"])
def test_a_server_that_restarts_in_mid_search_costs_nothing(
    own_postgres: Postgres, postgres_url: str, how: signal.Signals
) -> None:
    expected, points = uninterrupted(open_store("memory://"))
    store = SqlStore(postgres_url, reconnect_s=120)
    restarts = iter(range(5, points, points // 8))
    following = next(restarts)
    starting: list[threading.Thread] = []

    class Restarting(Fate):
        def pass_point(self) -> None:
            nonlocal following
            if self.points == following:
                following = next(restarts, points)
                own_postgres.stop(how)
                starting.append(threading.Thread(target=own_postgres.start))
                starting[-1].start()
            super().pass_point()

    fate = Restarting()
    executor = SyntheticExecutor(2)
    try:
        assert run(cast(StudyStore, fate.bind(store, WRITES)), executor)
    finally:
        for thread in starting:
            thread.join()
    assert len(starting) >= 6
    assert rows(store, SPEC) == expected
    attempts = [a for t in store.trials(SPEC.name) for a in t.attempts]
    assert all(a.state is State.COMPLETE for a in attempts)
    assert len({(a.trial, a.part) for a in attempts}) == len(attempts)
    store.close()


def test_a_server_that_stays_away_is_one_plain_line(
    own_postgres: Postgres, postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = SqlStore(postgres_url, reconnect_s=0.2)
    study = StudyUnderTest(store)
    own_postgres.stop()
    try:
        with pytest.raises(StoreUnreachable, match="postgresql") as caught:
            study.start()
        with pytest.raises(StoreUnreachable):
            SqlStore(postgres_url)
    finally:
        own_postgres.start()
    assert "\n" not in str(caught.value)
    assert len(caplog.records) == 1
    assert "trying again for up to 0.2 s" in caplog.text
    study.start()
    assert study.trial().state is State.RUNNING


def test_a_reader_sees_one_state_throughout(store: SqlStore) -> None:
    study = StudyUnderTest(store)
    with transaction(store.engine, write=False) as connection:
        count = sa.text("SELECT count(*) FROM evomerge_trials")
        assert connection.execute(count).scalar() == 2
        store.create_trials("s", [new_trial(2)], controller="c1")
        assert connection.execute(count).scalar() == 2
    assert len(study.store.trials("s")) == 3


def test_a_lock_that_another_holds_too_long_is_said_plainly(postgres_url: str) -> None:
    from evomerge.errors import StoreLocked

    StudyUnderTest(open_store(postgres_url))
    impatient = SqlStore(postgres_url, lock_wait_s=0.05)
    other = sa.create_engine(postgres_url)
    with other.begin() as connection:
        connection.exec_driver_sql("SELECT * FROM evomerge_studies FOR UPDATE")
        with pytest.raises(StoreLocked, match="run the same command again"):
            impatient.renew("s", "c1", lease_until=NOW + timedelta(1))
    impatient.renew("s", "c1", lease_until=NOW + timedelta(1))
