"""A death at every point of a short study, on SQLite and in memory; resume; compare.

Afterwards the final table must be the uninterrupted run's, bit for bit, and nothing may have been
evaluated twice but what was cut off. Most deaths are exceptions, so that hundreds of kill points
take a minute and not an hour; a sample are real SIGKILLs.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from kill_points import SPEC, die_here, die_in_a_fork, resume_and_compare, uninterrupted
from run_synthetic import rows

from evomerge.store import open_store
from evomerge.store.base import StudyStore
from evomerge.testing.synthetic import Row

CHUNKS = 4
BY_SIGNAL = 12


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with nothing in it, to be copied: to make one takes longer than a run."""
    file = tmp_path_factory.mktemp("empty") / "store.db"
    open_store(f"sqlite:///{file}").close()
    return file


@pytest.fixture
def new_url(empty: Path, tmp_path: Path) -> Callable[[], str]:
    """Makes the URLs of new stores, one after another in one place."""

    def make() -> str:
        for old in tmp_path.glob("study.db*"):
            old.unlink()
        shutil.copy(empty, tmp_path / "study.db")
        return f"sqlite:///{tmp_path / 'study.db'}"

    return make


@pytest.fixture
def whole(new_url: Callable[[], str]) -> tuple[list[Row], int]:
    return uninterrupted(open_store(new_url()))


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_killed_anywhere_and_resumed_the_study_ends_the_same(
    whole: tuple[list[Row], int], new_url: Callable[[], str], chunk: int
) -> None:
    expected, points = whole
    assert points > 400
    for point in range(2 * chunk, points, 2 * CHUNKS):  # PostgreSQL takes odd ones
        store = open_store(new_url())
        die_here(store, point)
        store.close()
        store = open_store(str(store.engine.url))  # type: ignore[attr-defined]
        resume_and_compare(store, expected, point)
        store.close()


def test_so_it_does_in_memory() -> None:
    expected, points = uninterrupted(open_store("memory://"))
    assert points > 300
    for point in range(0, points, 3):
        store: StudyStore = open_store("memory://")
        die_here(store, point)
        resume_and_compare(store, expected, point)


@pytest.mark.slow
def test_so_it_does_after_a_real_sigkill(
    whole: tuple[list[Row], int], new_url: Callable[[], str]
) -> None:
    expected, points = whole
    for point in range(7, points, points // BY_SIGNAL):
        url = new_url()
        die_in_a_fork(url, point)
        resume_and_compare(open_store(url), expected, point)


def test_killed_again_and_again_the_study_still_ends_the_same(
    whole: tuple[list[Row], int], new_url: Callable[[], str]
) -> None:
    expected, points = whole
    url = new_url()
    deaths = 0
    while die_in_a_fork(url, 40, or_finish=True):
        deaths += 1
        assert deaths < points, "it gets on each time"
    assert deaths > 8
    assert rows(open_store(url), SPEC) == expected
