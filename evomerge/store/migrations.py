"""The schema's version: what a store has, what this evomerge needs, and the way between them.

Looks at the version by plain SQL, because importing alembic takes longer than answering
`evomerge status`; alembic is imported only to create or upgrade a store.
"""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from evomerge.errors import SchemaTooNew, StoreError
from evomerge.resources import migrations_directory
from evomerge.store.engine import make_engine, transaction

VERSION_TABLE = "evomerge_alembic_version"
REVISIONS = ("0001", "0002", "0003", "0004")
"""Every revision in `alembic/versions`, oldest first."""


def script_location() -> Path:
    """Alembic's folder: `env.py` and `versions/`."""
    return migrations_directory()


def version(connection: sa.Connection) -> str | None:
    """The revision that a store is at; None if it is empty."""
    if not sa.inspect(connection).has_table(VERSION_TABLE):
        return None
    row = connection.exec_driver_sql(f"SELECT version_num FROM {VERSION_TABLE}").first()
    return str(row[0]) if row else None


def prepare(engine: sa.Engine) -> None:
    """See that a store can be used: create its tables if it is empty, refuse another version.

    Any number of processes may do this at once. Raises StoreError for an older schema and
    SchemaTooNew for a newer one.
    """
    with transaction(engine, write=False) as connection:
        found = version(connection)
    if found is None:
        _upgrade(engine)
    elif found != REVISIONS[-1]:
        _refuse_newer(engine, found)
        raise StoreError(
            f"{_shown(engine)} has schema {found}, this evomerge needs {REVISIONS[-1]}; "
            "copy the database to be safe, then run `evomerge db upgrade`"
        )


def upgrade(url: str) -> str:
    """Bring a store to the newest schema; returns its revision. Raises SchemaTooNew, StoreError."""
    engine = make_engine(url)
    try:
        _upgrade(engine)
    finally:
        engine.dispose()
    return REVISIONS[-1]


def _upgrade(engine: sa.Engine) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(script_location()).replace("%", "%%"))
    with transaction(engine, write=True) as connection:
        if connection.dialect.name == "postgresql":
            # one upgrade at a time; SQLite's write lock does this by itself
            connection.execute(sa.func.pg_advisory_xact_lock(0x65766F6D).select())
        found = version(connection)
        if found is not None:
            _refuse_newer(engine, found)
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _refuse_newer(engine: sa.Engine, found: str) -> None:
    if found not in REVISIONS:
        raise SchemaTooNew(
            f"{_shown(engine)} has schema {found}, which is newer than this evomerge knows "
            f"({REVISIONS[-1]}); upgrade evomerge"
        )


def _shown(engine: sa.Engine) -> str:
    return engine.url.render_as_string(hide_password=True)
