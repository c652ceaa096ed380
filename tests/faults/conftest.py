"""Processes that tests of faults start, ended with the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from synthetic_processes import Place, Process


@pytest.fixture
def started() -> Iterator[list[Process]]:
    """Every process that a test starts, to be ended with it."""
    processes: list[Process] = []
    yield processes
    for process in processes:
        process.kill()


@pytest.fixture
def run(started: list[Process]) -> Callable[..., Process]:
    def start(place: Place, **options: Any) -> Process:
        started.append(place.run(**options))
        return started[-1]

    return start
