"""Several controllers on one cluster, in virtual time: who runs how much, and what they find."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, cast

import pytest
from run_synthetic import rows

from evomerge.service.study import build_controller, controlling, open_study
from evomerge.spec import StudySpec
from evomerge.store.base import StudyStore
from evomerge.store.memory import MemoryStore
from evomerge.testing.faults import Killed
from evomerge.testing.synthetic import synthetic_spec
from evomerge.testing.virtual_cluster import ClusterExecutor, VirtualCluster

ATTEMPT_S = 40.0  # the longest
TICK_S = 10.5  # a claim is renewed every 10 s, at the next poll
LEASE_S = 30.0


class Mortal:
    """A store that a dead executor's process cannot write any more."""

    def __init__(self, store: StudyStore, executor: ClusterExecutor) -> None:
        self._store, self._executor = store, executor

    def __getattr__(self, name: str) -> Any:
        if self._executor.dead:
            raise Killed
        return getattr(self._store, name)


def spec(name: str, *, trials: int, schedule: str = "asynchronous", **workers: int) -> StudySpec:
    sampler = {"name": "cmaes", "population": 8, "seed": len(name), "schedule": schedule}
    budget = {"trials": trials, "finalists": 2}
    return synthetic_spec(name=name, sampler=sampler, budget=budget, workers=workers)


class Shared:
    """Studies on one cluster of 12 places and in one store."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.cluster = VirtualCluster(12)
        self._studies: dict[ClusterExecutor, Callable[[], object]] = {}

    def add(self, study: StudySpec, **life: float) -> None:
        draws = random.Random(study.name)
        executor = ClusterExecutor(
            self.cluster, study.workers.count, lambda: draws.uniform(20, ATTEMPT_S), **life
        )
        store, clock = cast(StudyStore, Mortal(self.store, executor)), self.cluster.clock

        def run() -> None:
            record = open_study(study, store, executor, clock=clock)
            with controlling(record, store, clock) as token:
                time_s = lambda: self.cluster.now_s  # noqa: E731
                build_controller(record, store, executor, token, clock=clock, time_s=time_s).run()

        self._studies[executor] = run

    def run(self) -> None:
        self.start = self.cluster.clock()
        self.cluster.run(self._studies)

    def busy(self, at_s: float, *studies: str) -> list[int]:
        """How many attempts each of the studies had under way at that second."""
        at = self.start + timedelta(seconds=at_s)
        return [sum(started <= at < ended for started, ended in self.spans(s)) for s in studies]

    @functools.cache  # noqa: B019  lives as long as the test
    def spans(self, study: str) -> list[tuple[datetime, datetime]]:
        attempts = [a for trial in self.store.trials(study) for a in trial.attempts]
        end = self.cluster.clock()
        return [(a.started_at, a.finished_at or end) for a in attempts]


def test_shares_converge_within_one_attempt_of_every_change() -> None:
    shared = Shared()
    shared.add(spec("first", trials=300, count=12), dies_s=900.0)
    shared.add(spec("second", trials=170, count=12), starts_s=200.0)
    shared.add(spec("urgent", trials=36, count=6, priority=5), starts_s=400.0)
    shared.run()
    everyone = ("first", "second", "urgent")
    assert shared.busy(199, *everyone[:2]) == [12, 0], "alone, it has all"
    change = TICK_S + ATTEMPT_S
    for at in (200 + change, 300, 399):
        assert shared.busy(at, *everyone) == [6, 6, 0]
    for at in (400 + change, 540):
        assert shared.busy(at, *everyone) == [3, 3, 6]
    ended = max(ended for _, ended in shared.spans("urgent"))
    after = (ended - shared.start).total_seconds()
    assert after < 880 - change
    assert shared.busy(after + TICK_S, *everyone) == [6, 6, 0]
    # the dead one's workers are gone at once, its claim when its lease has lapsed
    assert shared.busy(901, "second") == [6]
    assert shared.busy(901 + LEASE_S + TICK_S, "second") == [12]
    for at in range(0, 900, 7):
        assert sum(shared.busy(at, *everyone)) <= 12


def test_nobody_starves_but_behind_a_higher_priority() -> None:
    shared = Shared()
    shared.add(spec("low", trials=30, count=12, priority=-1))
    shared.add(spec("high", trials=120, count=12), starts_s=50.0)
    shared.run()
    assert shared.busy(50 + TICK_S + ATTEMPT_S, "low", "high") == [0, 12]
    assert all(t.state.finished for s in ("low", "high") for t in shared.store.trials(s))
    last = max(ended for _, ended in shared.spans("high"))
    latest = max(started for started, _ in shared.spans("low"))
    assert latest > last - timedelta(seconds=2 * ATTEMPT_S)


@pytest.mark.parametrize("schedule", ["generational", "pipelined"])
def test_a_study_finds_among_others_what_it_finds_alone(schedule: str) -> None:
    shared, studies = Shared(), []
    for place, name in enumerate(("a", "bb", "ccc")):
        study = spec(name, trials=40, schedule=schedule, count=12, priority=place % 2)
        shared.add(study, starts_s=60.0 * place)
        studies.append(study)
    shared.run()
    for study in studies:
        alone = MemoryStore()
        lone = Shared()
        lone.store = alone
        lone.add(study)
        lone.run()
        assert rows(shared.store, study) == rows(alone, study)
    assert not shared.store.claims(now=shared.start)
