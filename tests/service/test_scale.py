"""What a study costs does not grow with its trials or workers: counted in calls, never in time."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_synthetic import run_synthetic

from evomerge.service.counts import Counts
from evomerge.service.executor import Event
from evomerge.service.ledger import Ledger
from evomerge.service.liveness import Leases
from evomerge.service.standing import standing
from evomerge.service.study import build_controller, controlling, open_study
from evomerge.service.verdict import contenders, to_score, winner
from evomerge.spec import StudySpec
from evomerge.store.base import StudyStore
from evomerge.store.memory import MemoryStore
from evomerge.store.sql import SqlStore
from evomerge.testing.synthetic import SyntheticExecutor, synthetic_spec
from evomerge.testing.virtual_time import VirtualExecutor
from evomerge.trial import Kind, Part, Score, State, TaskScore, Trial

WEIGHTS = {"add": 1.0, "sort": 1.0}


def study(trials: int, *, schedule: str = "asynchronous", population: int = 8) -> StudySpec:
    sampler = {"name": "cmaes", "population": population, "seed": 1, "schedule": schedule}
    return synthetic_spec(sampler=sampler, budget={"trials": trials, "finalists": 3})


class Counted(VirtualExecutor):
    """Counts the Python calls that a controller makes until so many results are in."""

    def __init__(self, workers: int, marks: Collection[int]) -> None:
        durations = random.Random(0)
        super().__init__(
            workers, lambda: durations.lognormvariate(0.0, 0.7), items=4, spent_s=lambda: 0.0
        )
        self._marks = marks
        self._calls = 0
        self.calls: dict[int, int] = {}

    def count(self, frame: Any, event: str, argument: Any) -> None:
        self._calls += event == "call"

    def poll(self, timeout_s: float) -> Sequence[Event]:
        events = super().poll(timeout_s)
        if self.finished in self._marks:
            self.calls[self.finished] = self._calls
        return events


def calls_each(store: StudyStore, executor: Counted, trials: int) -> list[float]:
    """Calls for each evaluation between one mark and the next."""
    spec = study(trials)
    record = open_study(spec, store, executor, clock=executor.clock)
    with controlling(record, store, executor.clock) as token:
        controller = build_controller(record, store, executor, token, clock=executor.clock)
        before = sys.getprofile()
        sys.setprofile(executor.count)
        try:
            controller.run()
        finally:
            sys.setprofile(before)
    at = sorted(executor.calls)
    return [(executor.calls[b] - executor.calls[a]) / (b - a) for a, b in pairwise(at)]


@pytest.mark.slow
def test_a_late_trial_costs_no_more_than_an_early_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evomerge.service.controller._WATCH_EVERY_S", 0.0)
    store = SqlStore(f"sqlite:///{tmp_path}/store.db")
    # as many trials as are let go of at once lie between two marks
    early, late = calls_each(store, Counted(16, (50, 306, 562)), 620)
    assert late < 1.1 * early


def test_a_trial_costs_the_same_with_many_workers() -> None:
    (few,) = calls_each(MemoryStore(), Counted(8, (300, 400)), 700)
    (many,) = calls_each(MemoryStore(), Counted(200, (300, 400)), 700)
    assert many < 1.2 * few


@pytest.mark.parametrize("schedule", ["asynchronous", "generational"])
def test_a_ledger_keeps_what_matters_and_knows_the_rest(schedule: str) -> None:
    spec, store = study(700, schedule=schedule), MemoryStore()
    assert run_synthetic(spec, store, SyntheticExecutor(5))
    record, every = store.study(spec.name), store.trials(spec.name, outcomes=False)
    with controlling(record, store) as token:
        seen: list[Trial] = []
        ledger = Ledger(store, record, token, show=seen.extend)
    assert len(ledger) == len(every) == len(seen)
    assert len(ledger.trials) < 300
    assert ledger.counts == ledger.counts_before == Counts.of(every)
    assert standing(spec, ledger.trials, counts=ledger.counts) == standing(spec, every)
    assert winner(ledger.trials, WEIGHTS) == winner(every, WEIGHTS)
    told = sorted((t for t in every if t.tell_order is not None), key=lambda t: t.tell_order or 0)
    assert [(t.order, t.number, t.values) for t in ledger.tells()] == [
        (t.tell_order, t.number, t.values) for t in told
    ]


def test_a_running_controller_lets_go_of_what_it_told() -> None:
    spec, store, kept = study(700), MemoryStore(), []
    executor = VirtualExecutor(20, lambda: 1.0, items=4, spent_s=lambda: 0.0)
    record = open_study(spec, store, executor)
    with controlling(record, store) as token:
        controller = build_controller(record, store, executor, token)
        ledger = controller._ledger
        poll = executor.poll

        def watched(timeout_s: float) -> Sequence[Event]:
            kept.append(len(ledger.trials))
            return poll(timeout_s)

        executor.poll = watched  # type: ignore[method-assign]
        assert controller.run()
    assert max(kept) < 14 + 3 + 256 + 2 * 20
    assert ledger.counts == Counts.of(store.trials(spec.name))


def trial(
    number: int, value: int | None, margin: int | None, parts: Collection[Part], kind: Kind
) -> Trial:
    task = TaskScore("acc", float(value or 0), None, 4, margin=margin)
    scores = {part: Score({"add": task, "sort": task}) for part in ("search", *parts)}
    done = value is not None
    return Trial(
        number=number, kind=kind, label="", genome=None, recipe={}, recipe_digest=str(number),
        state=State.COMPLETE if done else State.FAIL,
        values=(float(value or 0),) if done else None, scores=scores if done else {},
    )  # fmt: skip


made = st.tuples(
    st.one_of(st.none(), st.integers(0, 4)),
    st.one_of(st.none(), st.integers(-1, 1)),
    st.sampled_from([(), (), ("selection",), ("selection", "report")]),
    st.sampled_from(["search", "search", "search", "uniform"]),
)


@given(st.lists(made, max_size=40), st.integers(1, 5), st.integers(1, 7))
def test_contenders_decide_what_all_trials_would(drawn: Any, count: int, step: int) -> None:
    every = [trial(number, *drawn[number]) for number in range(len(drawn))]
    kept: list[Trial] = []
    for start in range(0, len(every), step):
        met = [*kept, *every[start : start + step]]
        chosen = contenders(met, count, WEIGHTS)
        kept = [t for t in met if t.kind != "search" or t in chosen]
    assert to_score(kept, count, WEIGHTS) == to_score(every, count, WEIGHTS)
    assert winner(kept, WEIGHTS) == winner(every, WEIGHTS)


class Naive:
    """Leases one by one: what is left of each goes down at every look."""

    def __init__(self) -> None:
        self.left: dict[str, list[float]] = {}

    def look(self, passed: float) -> None:
        for lease in self.left.values():
            step = min(max(passed, 0.0), lease[0] / 4)
            lease[1] -= step
            lease[2] -= step

    def renew(self, tokens: Collection[str], length: float) -> set[str]:
        due = set()
        for token in tokens:
            lease = self.left[token]
            lease[0] = lease[1] = length
            if lease[2] < length * 2 / 3:
                lease[2] = length
                due.add(token)
        return due


acts = st.tuples(
    st.sampled_from(["start", "renew", "end", "look"]),
    st.integers(0, 5),
    st.sampled_from([8, 8, 8, 16]),
    st.integers(-3, 9),
)


@settings(max_examples=200)
@given(st.lists(acts, max_size=60))
def test_leases_are_what_they_would_be_one_by_one(drawn: Any) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    clock: Callable[[], datetime] = lambda: now  # noqa: E731
    leases, naive = Leases(clock), Naive()
    for act, name, length, passed in drawn:
        token = str(name)
        now += timedelta(seconds=passed)
        naive.look(passed)
        if act == "start" and token not in naive.left:
            leases.start(token, length)
            naive.left[token] = [length, length, length]
        elif act == "renew" and token in naive.left:
            assert set(leases.renew([token], length)) == naive.renew([token], length)
        elif act == "end" and token in naive.left:
            leases.end(token)
            del naive.left[token]
        lapsed = {token for token, lease in naive.left.items() if lease[1] < 0}
        assert set(leases.lapsed()) == lapsed


def busy(schedule: str, population: int) -> float:
    durations = random.Random(0)
    executor = VirtualExecutor(
        20, lambda: durations.lognormvariate(0.0, 0.7), items=4, spent_s=lambda: 0.0
    )
    assert run_synthetic(
        study(300, schedule=schedule, population=population), MemoryStore(), executor
    )  # type: ignore[arg-type]
    return executor.searched_busy_s / (20 * executor.searched_s)


def test_the_asynchronous_schedule_keeps_workers_busy() -> None:
    assert busy("asynchronous", 10) > 0.95
    assert 0.2 < busy("generational", 20) < 0.6
