"""Fixtures that every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from filelock import FileLock
from postgres_server import (  # noqa: F401
    empty_postgres_url,
    migrated,
    own_postgres,
    postgres,
    postgres_url,
)


@pytest.fixture(scope="session")
def tiny_zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small zoo (`ZooRecipe.tiny()`, seed 0), built once and shared by all xdist workers.

    Its models have the real files and formats and have learned next to nothing. Read only.
    """
    from evomerge.zoo.build import build_zoo
    from evomerge.zoo.recipe import ZooRecipe

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with FileLock(shared / "tiny_zoo.lock"):
        return build_zoo(shared / "tiny_zoo", recipe=ZooRecipe.tiny(), processes=1).directory
