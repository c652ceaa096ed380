"""The store contract, on every store."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from evomerge.store import open_store
from evomerge.store.base import StudyStore
from evomerge.testing.store_contract import StoreContract


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def store(self) -> StudyStore:
        return open_store("memory://")


class TestSqliteStore(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[StudyStore]:
        store = open_store(f"sqlite:///{tmp_path}/store.db")
        yield store
        store.close()


class TestPostgresqlStore(StoreContract):
    @pytest.fixture
    def store(self, postgres_url: str) -> Iterator[StudyStore]:
        store = open_store(postgres_url)
        yield store
        store.close()
