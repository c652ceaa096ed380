"""The store: every study, trial and attempt, kept so that nothing finished is ever lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evomerge.store.base import StudyStore

IN_MEMORY = "memory://"


def open_store(url: str, *, create: bool = True) -> StudyStore:
    """Open the store at a database URL; `memory://` is one that ends with the process.

    An empty database gets its tables. With `create=False` a SQLite file that does not exist is an
    error, as it should be for a command that only reads. Raises StoreError, StoreLocked,
    SchemaTooNew.
    """
    if url == IN_MEMORY:
        from evomerge.store.memory import MemoryStore

        return MemoryStore()
    from evomerge.store.engine import check_exists
    from evomerge.store.sql import SqlStore

    if not create:
        check_exists(url)
    return SqlStore(url)
