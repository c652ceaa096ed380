"""The same deaths on PostgreSQL, at other points; see `test_kill_points`."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from kill_points import die_here, die_in_a_fork, resume_and_compare, uninterrupted

from evomerge.store import open_store
from evomerge.store.sql import SqlStore
from evomerge.store.tables import metadata

CHUNKS = 4
BY_SIGNAL = 12

pytestmark = pytest.mark.slow


def emptied(url: str) -> SqlStore:
    """The store, with nothing in it."""
    store = SqlStore(url)
    with store.engine.begin() as connection:
        for table in reversed(metadata.sorted_tables):
            connection.execute(table.delete())
    return store


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_killed_anywhere_and_resumed_the_study_ends_the_same(postgres_url: str, chunk: int) -> None:
    expected, points = uninterrupted(open_store(postgres_url))
    assert points > 400
    for point in range(6 * chunk + 1, points, 6 * CHUNKS):
        store = emptied(postgres_url)
        die_here(store, point)
        store.close()
        store = SqlStore(postgres_url)
        resume_and_compare(store, expected, point)
        store.close()


def test_so_it_does_after_a_real_sigkill(postgres_url: str) -> None:
    expected, points = uninterrupted(open_store(postgres_url))
    for point in range(8, points, points // BY_SIGNAL):
        emptied(postgres_url).close()
        die_in_a_fork(postgres_url, point)
        resume_and_compare(open_store(postgres_url), expected, point)


def test_a_writer_that_dies_in_its_transaction_holds_nobody_up(postgres_url: str) -> None:
    store = SqlStore(postgres_url)
    with store.engine.connect() as connection:
        settings = {
            name: connection.execute(sa.text(f"SHOW {name}")).scalar()
            for name in ("lock_timeout", "idle_in_transaction_session_timeout")
        }
    assert settings == {"lock_timeout": "30s", "idle_in_transaction_session_timeout": "1min"}
