"""Alembic's entry point: evomerge's tables only, with a version table of their own.

Optuna's tables may live in the same database; without the filter, autogenerate would drop them.
"""

import os
from typing import Any

import sqlalchemy as sa
from alembic import context

from evomerge.store.engine import make_engine, transaction
from evomerge.store.migrations import VERSION_TABLE
from evomerge.store.tables import metadata

PREFIX = "evomerge_"


def include_object(thing: Any, name: str | None, type_: str, *_: Any) -> bool:
    """Whether a table, or a thing that belongs to a table, is evomerge's."""
    if type_ == "table":
        return (name or "").startswith(PREFIX)
    table = getattr(thing, "table", None)
    return table is None or table.name.startswith(PREFIX)


def run(connection: sa.Connection) -> None:
    """Run the migrations inside the caller's transaction."""
    context.configure(
        connection=connection,
        target_metadata=metadata,
        version_table=VERSION_TABLE,
        include_object=include_object,
        render_as_batch=connection.dialect.name == "sqlite",
    )
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    run(given)
else:
    with transaction(
        make_engine(os.environ.get("EVOMERGE_STORE", "sqlite:///evomerge.db")), write=True
    ) as connection:
        run(connection)
