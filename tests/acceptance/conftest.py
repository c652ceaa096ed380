"""The demo's own zoo, built once for all acceptance tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from filelock import FileLock

from evomerge.zoo.build import build_zoo


@pytest.fixture(scope="session")
def real_zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The zoo of seed 0 as `evomerge zoo build` makes it. Read only: copy it."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with FileLock(shared / "real_zoo.lock"):
        return build_zoo(shared / "real_zoo").directory
