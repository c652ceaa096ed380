"""Connections and transactions: their settings, and database errors in one plain line.

Knows no table; what is repeated when a connection breaks is `reconnecting`'s and `sql`'s to say.
On SQLite a transaction that will write takes the write lock at its start (BEGIN IMMEDIATE): it
waits its turn there and cannot fail half way for a lock.

`synchronous=NORMAL` in WAL mode: what was committed survives the death of any process. A power cut
may take the last commits with it, never a part of one: what is left is an earlier state of the
study, which a resume continues identically. FULL would add a disk flush to every commit to save
a few evaluations after a power cut.

On PostgreSQL a read sees one state of the store throughout (REPEATABLE READ), as it does on SQLite.
A writer that stops inside a transaction, its process frozen or its network gone, loses its
connection after a while, so that it does not hold its study's row against the next controller.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

from evomerge.errors import StoreError, StoreLocked, StoreUnreachable

LOCK_WAIT_S = 30.0
_SILENCE_S = 60  # an open transaction whose client says nothing for so long is undone
_REACH_S = 10  # for one attempt to connect


class CommitUnknown(StoreError):
    """The connection broke during a commit, which may have come through or not."""


def make_engine(url: str, *, lock_wait_s: float = LOCK_WAIT_S) -> sa.Engine:
    """An engine for a database URL; connects to nothing yet. Raises StoreError."""
    try:
        parsed = sa.make_url(url)
        if parsed.get_backend_name() == "sqlite":
            return _sqlite_engine(parsed, lock_wait_s)
        if parsed.get_backend_name() == "postgresql":
            return _postgresql_engine(parsed, lock_wait_s)
        return sa.create_engine(parsed)
    except (NoSuchModuleError, ModuleNotFoundError) as error:
        raise StoreError(f"{_shown(sa.make_url(url))}: {error}; install its driver") from None
    except ArgumentError:
        raise StoreError(
            f"{url!r} is not a store URL; expected one such as sqlite:///evomerge.db or "
            "postgresql+psycopg://user@host/database"
        ) from None


def check_exists(url: str) -> None:
    """Refuse a SQLite URL whose file does not exist: reading must not leave an empty one behind."""
    parsed = make_engine(url).url
    if parsed.get_backend_name() == "sqlite" and not Path(parsed.database or "").exists():
        raise StoreError(f"no store at {url}; `evomerge run` creates one, --store names another")


@contextmanager
def transaction(engine: sa.Engine, *, write: bool) -> Iterator[sa.Connection]:
    """One transaction: committed at the end, undone on any error.

    Raises StoreLocked after waiting for another writer; StoreUnreachable where there is no
    connection, or it broke with nothing kept; CommitUnknown where it broke in the commit;
    StoreError for what else the database says. An IntegrityError passes: what it means is the
    caller's to say.
    """
    with _connect(engine, write=write) as connection:
        try:
            begun = connection.begin()
            try:
                yield connection
            except BaseException:
                begun.rollback()
                raise
        except sa.exc.IntegrityError:
            raise
        except DBAPIError as error:
            raise store_error(engine, error) from error
        try:
            begun.commit()
        except DBAPIError as error:
            if write and error.connection_invalidated:
                raise CommitUnknown(f"{_shown(engine.url)}: {_reason(error)}") from error
            raise store_error(engine, error) from error


def _connect(engine: sa.Engine, *, write: bool) -> sa.Connection:
    options: dict[str, Any] = {"evomerge_write": write}
    if not write and engine.dialect.name == "postgresql":
        options["isolation_level"] = "REPEATABLE READ"
    try:
        return engine.connect().execution_options(**options)
    except DBAPIError as error:
        raise store_error(engine, error, connected=False) from error


def _postgresql_engine(url: sa.URL, lock_wait_s: float) -> sa.Engine:
    """Works with every driver that passes libpq's settings on: psycopg and psycopg2."""
    settings = {"connect_timeout": _REACH_S, "keepalives_idle": 30, "tcp_user_timeout": 30_000}
    engine = sa.create_engine(url, connect_args={**settings, **url.query})

    @sa.event.listens_for(engine, "connect")
    def configure(connection: Any, _record: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute(f"SET lock_timeout = {round(lock_wait_s * 1000)}")
            cursor.execute(f"SET idle_in_transaction_session_timeout = '{_SILENCE_S}s'")
        connection.commit()

    return engine


def _sqlite_engine(url: sa.URL, lock_wait_s: float) -> sa.Engine:
    if not url.database or url.database == ":memory:":
        raise StoreError(
            f"{url}: an in-memory SQLite database is gone at once; use memory:// or a file, "
            "such as sqlite:///evomerge.db"
        )
    engine = sa.create_engine(url, connect_args={"timeout": lock_wait_s})

    @sa.event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, _record: Any) -> None:
        connection.isolation_level = None  # Python's own implicit BEGIN would come too late
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute("PRAGMA synchronous=NORMAL")
        _use_wal(connection, lock_wait_s)

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        write = connection.get_execution_options().get("evomerge_write")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine


def _use_wal(connection: sqlite3.Connection, lock_wait_s: float) -> None:
    # SQLite does not wait for a lock in this one switch, so two processes that meet a new file
    # at once would see "database is locked"
    deadline = time.monotonic() + lock_wait_s
    while connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def store_error(engine: sa.Engine, error: DBAPIError, *, connected: bool = True) -> StoreError:
    """What a database says, in one line with the way out."""
    reason, shown = _reason(error), _shown(engine.url)
    if "locked" in reason or "busy" in reason or "lock timeout" in reason:
        return StoreLocked(
            f"{shown}: the database stayed locked by another process; "
            "end what holds it (a backup, a database browser) and run the same command again"
        )
    broken = error.connection_invalidated or not connected
    kind = StoreUnreachable if broken and engine.dialect.name != "sqlite" else StoreError
    return kind(f"{shown}: {reason}{_hint(reason)}")


def _reason(error: DBAPIError) -> str:
    return " ".join(str(error.orig).split())


def _hint(reason: str) -> str:
    hints = {
        "unable to open": "; does the folder exist, and may you write to it?",
        "readonly": "; a store must be writable, and its folder too",
        "not a database": "; name another file, or move this one away",
        "disk is full": "; free some space and run the same command again",
        "No space left": "; free some space there and run the same command again",
        "disk I/O error": "; is the disk full, over its quota or broken? Mend it and run the same "
        "command again",
    }
    return next((hint for words, hint in hints.items() if words in reason), "")


def _shown(url: sa.URL) -> str:
    return url.render_as_string(hide_password=True)
