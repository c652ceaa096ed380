"""Work is queued no deeper than keeps workers busy, seen from the executor and from the store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from run_synthetic import run_synthetic

from evomerge.service.executor import Event, Job
from evomerge.store.memory import MemoryStore
from evomerge.testing.synthetic import SyntheticExecutor, synthetic_spec
from evomerge.trial import State

WORKERS, POPULATION = 3, 4


class Watched(SyntheticExecutor):
    """Notes how many trials are open whenever the controller has done what it could."""

    def __init__(self, store: MemoryStore) -> None:
        super().__init__(WORKERS)
        self._store = store
        self.free_at_submit: list[int] = []
        self.open: list[int] = []
        self.idle: list[int] = []

    def submit(self, job: Job) -> None:
        self.free_at_submit.append(self.free())
        super().submit(job)

    def poll(self, timeout_s: float) -> Sequence[Event]:
        searched = [t for t in self._store.trials("synthetic") if t.kind == "search"]
        if searched:
            self.open.append(sum(not t.state.finished for t in searched))
        if searched and len(searched) < synthetic_spec().budget.trials:
            self.idle.append(self.free())
        return super().poll(timeout_s)


def _watched(schedule: str) -> Watched:
    store = MemoryStore()
    sampler: dict[str, Any] = {"name": "cmaes", "population": POPULATION, "schedule": schedule}
    spec = synthetic_spec(sampler=sampler, budget={"trials": 40, "finalists": 2})
    executor = Watched(store)
    assert run_synthetic(spec, store, executor)
    assert all(t.state is State.COMPLETE for t in store.trials(spec.name))
    return executor


@pytest.mark.parametrize("schedule", ["generational", "pipelined", "asynchronous"])
def test_no_job_queues_behind_another(schedule: str) -> None:
    assert min(_watched(schedule).free_at_submit) == 1


def test_an_asynchronous_search_proposes_only_what_starts_at_once() -> None:
    """A proposal that waits while others finish would not know their results."""
    watched = _watched("asynchronous")
    assert max(watched.open) <= WORKERS
    assert set(watched.idle) == {0}, "and no worker waits for one"


@pytest.mark.parametrize(("schedule", "generations"), [("generational", 1), ("pipelined", 2)])
def test_no_more_than_the_open_generations_are_proposed(schedule: str, generations: int) -> None:
    assert max(_watched(schedule).open) == generations * POPULATION
