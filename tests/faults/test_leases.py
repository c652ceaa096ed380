"""Leases by an injected clock: renewed, lapsed, taken over; a clock that jumps; stray results."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from kill_points import SPEC, WORKERS_BEFORE, later, run, uninterrupted
from run_synthetic import rows

from evomerge.errors import StudyBusy
from evomerge.service.dispatch import Dispatcher
from evomerge.service.executor import Event
from evomerge.service.ledger import Ledger
from evomerge.service.liveness import Leases
from evomerge.service.study import build_controller, controlling, open_study
from evomerge.store import open_store
from evomerge.store.base import StudyStore
from evomerge.testing.store_builders import NOW
from evomerge.testing.synthetic import SyntheticExecutor, synthetic_spec
from evomerge.trial import Attempt, State

LEASE_S = 100.0
BROKEN_BY_FAR = timedelta(days=400)


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now

    def pass_s(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StudyStore]:
    urls: dict[str, Callable[[], str]] = {
        "memory": lambda: "memory://",
        "sqlite": lambda: f"sqlite:///{tmp_path}/store.db",
        "postgresql": lambda: request.getfixturevalue("postgres_url"),
    }
    store = open_store(urls[request.param]())
    yield store
    store.close()


class TestOfOneLease:
    """Leases."""

    @pytest.fixture
    def leases(self, clock: Clock) -> Leases:
        leases = Leases(clock)
        leases.start("t1", LEASE_S)
        return leases

    def look_every_s(self, leases: Leases, clock: Clock, seconds: float, until_s: float) -> float:
        """When the lease was found lapsed, looking every so many seconds."""
        passed = 0.0
        while passed < until_s and not leases.lapsed():
            clock.pass_s(seconds)
            passed += seconds
        return passed

    def test_it_lapses_when_it_is_over(self, leases: Leases, clock: Clock) -> None:
        assert self.look_every_s(leases, clock, 1, 1000) == LEASE_S + 1

    def test_a_sign_of_life_starts_it_anew(self, leases: Leases, clock: Clock) -> None:
        for _ in range(30):
            assert self.look_every_s(leases, clock, 5, 90) == 90
            leases.renew(["t1"], LEASE_S)
        assert self.look_every_s(leases, clock, 1, 1000) == LEASE_S + 1

    def test_a_third_is_spent_before_the_store_hears_of_it(
        self, leases: Leases, clock: Clock
    ) -> None:
        due = []
        for _ in range(20):
            clock.pass_s(10)
            due.append(leases.renew(["t1"], LEASE_S) == ["t1"])
        assert due == ([False] * 3 + [True]) * 5

    @pytest.mark.parametrize("jump", [BROKEN_BY_FAR, -BROKEN_BY_FAR])
    def test_a_jump_neither_ends_it_nor_keeps_it(
        self, leases: Leases, clock: Clock, jump: timedelta
    ) -> None:
        assert self.look_every_s(leases, clock, 1, 10) == 10
        assert leases.lapsed() == []
        clock.now += jump
        assert leases.lapsed() == []
        left_s = self.look_every_s(leases, clock, 1, 1000)
        assert left_s == LEASE_S - 10 + 1 - (LEASE_S / 4 if jump > timedelta(0) else 0)

    def test_a_lease_is_charged_with_no_time_before_it_began(
        self, leases: Leases, clock: Clock
    ) -> None:
        clock.pass_s(20)
        leases.start("t2", LEASE_S)
        self.look_every_s(leases, clock, 1, 1000)
        assert leases.lapsed() == ["t1"]

    def test_what_ended_does_not_lapse(self, leases: Leases, clock: Clock) -> None:
        leases.end("t1")
        assert self.look_every_s(leases, clock, 10, 1000) == 1000


class Scripted(SyntheticExecutor):
    """Every job takes `polls` polls, each of them `poll_s` seconds by the clock."""

    def __init__(self, clock: Clock, polls: int, poll_s: float, *, signs: bool) -> None:
        super().__init__(WORKERS_BEFORE)
        self._clock, self._polls, self._poll_s, self._signs = clock, polls, poll_s, signs
        self._polled = 0

    def poll(self, timeout_s: float) -> Sequence[Event]:
        self._clock.pass_s(self._poll_s)
        self._polled += 1
        return super().poll(timeout_s) if self._polled % self._polls == 0 else []

    def alive(self) -> Collection[str]:
        return [job.token for job in self._jobs] if self._signs else ()


def test_an_attempt_that_shows_signs_of_life_outlasts_its_lease(
    store: StudyStore, clock: Clock
) -> None:
    spec = SPEC.model_copy(update={"workers": SPEC.workers.model_copy(update={"lease_s": 100.0})})
    executor = Scripted(clock, polls=50, poll_s=7, signs=True)
    record = open_study(spec, store, executor, clock=clock)
    with controlling(record, store, clock) as token:
        assert build_controller(record, store, executor, token, clock=clock).run()
    attempts = [a for t in store.trials(spec.name) for a in t.attempts]
    assert all(a.state is State.COMPLETE for a in attempts)
    assert min(a.finished_at - a.started_at for a in attempts if a.finished_at) > timedelta(
        seconds=3 * LEASE_S
    )
    # the store knew: no lease had lapsed there either when the result came
    assert all(a.finished_at is not None and a.lease_until >= a.finished_at for a in attempts)
    assert rows(store, spec) == uninterrupted(open_store("memory://"))[0]


def test_an_attempt_without_a_sign_is_lost_when_its_lease_lapses(clock: Clock) -> None:
    store = open_store("memory://")
    spec = SPEC.model_copy(update={"workers": SPEC.workers.model_copy(update={"lease_s": 100.0})})
    executor = Scripted(clock, polls=50, poll_s=7, signs=False)
    ledger, dispatcher = dispatched(spec, store, executor, clock)
    dispatcher.enqueue([(0, "search")])
    while not executor.cancelled:
        dispatcher.step()
    lost = ledger[0].attempts[0]
    assert lost.failure is not None
    assert "no result or sign of life within the lease of 100 s" in lost.failure.message


def dispatched(
    spec: Any, store: StudyStore, executor: SyntheticExecutor, clock: Callable[[], datetime]
) -> tuple[Ledger, Dispatcher]:
    """A study's ledger with its baselines, and a dispatcher on it."""
    record = open_study(spec, store, executor, clock=clock)
    with controlling(record, store, clock) as token:
        build_controller(record, store, executor, token, clock=clock)
    holding = controlling(record, store, clock)
    ledger = Ledger(store, record, holding.__enter__(), clock=clock)
    ledger.__dict__["holding"] = holding  # or it is let go of
    return ledger, Dispatcher(spec, ledger, executor)


class Careless(SyntheticExecutor):
    """Delivers what a broken transport might: late, again, and what nobody asked for."""

    def __init__(self) -> None:
        super().__init__(WORKERS_BEFORE)
        self._last: list[Event] = []
        self.sent = 0

    def poll(self, timeout_s: float) -> Sequence[Event]:
        events = list(super().poll(timeout_s))
        again, self._last = self._last, events
        stray = [Event("nobody", "w", score=e.score) for e in events]
        self.sent += len(again)
        return [*again, *events, *stray]


def test_repeated_and_stray_results_are_refused_and_counted(store: StudyStore) -> None:
    executor = Careless()
    assert run(store, executor)
    assert rows(store, SPEC) == uninterrupted(open_store("memory://"))[0]
    results = sum(len(t.attempts) for t in store.trials(SPEC.name))
    assert executor.sent == results - 1  # the last one is never sent again
    assert store.refusals(SPEC.name) == {"repeated": results - 1, "stray": results}


def test_a_late_result_is_refused_and_counted(store: StudyStore, clock: Clock) -> None:
    spec = synthetic_spec()
    executor = Scripted(clock, polls=1000, poll_s=1000, signs=False)
    _ledger, dispatcher = dispatched(spec, store, executor, clock)
    dispatcher.enqueue([(0, "search")])
    while not executor.cancelled:
        dispatcher.step()
    late = Event(executor.cancelled[0], "w", score={"tasks": {}})
    executor.poll = lambda timeout_s: [late]  # type: ignore[method-assign]
    before = store.trial(spec.name, 0).scores
    dispatcher.step()
    assert store.refusals(spec.name) == {"late": 1}
    assert store.trial(spec.name, 0).scores == before == {}


def test_a_second_controller_takes_over_when_the_lease_lapsed_and_the_first_writes_no_more(
    store: StudyStore,
) -> None:
    expected, _ = uninterrupted(open_store("memory://"))

    class Overtaken(SyntheticExecutor):
        """In the middle of the first one's search a second one, its lease lapsed, runs it all."""

        def poll(self, timeout_s: float) -> Sequence[Event]:
            if self.ran == 9:
                with pytest.raises(StudyBusy, match=r"being run by process \d+ on .* is free in"):
                    run(store, SyntheticExecutor(2))
                assert run(store, SyntheticExecutor(2), later)
                before.append(store.trials(SPEC.name))
            return super().poll(timeout_s)

    before: list[Sequence[Any]] = []
    with pytest.raises(StudyBusy, match="this process no longer runs study") as caught:
        run(store, Overtaken(WORKERS_BEFORE))
    assert "\n" not in str(caught.value)
    assert len(before) == 1
    assert store.trials(SPEC.name) == before[0]
    assert rows(store, SPEC) == expected
    lost: list[Attempt] = [
        a for t in store.trials(SPEC.name) for a in t.attempts if a.state is State.FAIL
    ]
    assert 0 < len(lost) <= WORKERS_BEFORE


@pytest.mark.parametrize("jump", [BROKEN_BY_FAR, -BROKEN_BY_FAR])
def test_a_clock_that_jumps_in_mid_search_costs_nothing(
    store: StudyStore, clock: Clock, jump: timedelta
) -> None:
    class Jumping(SyntheticExecutor):
        def poll(self, timeout_s: float) -> Sequence[Event]:
            clock.pass_s(1)
            if self.ran == 9 and self.free() == 0:
                clock.now += jump
            return super().poll(timeout_s)

    assert run(store, Jumping(WORKERS_BEFORE), clock)
    assert abs(clock.now - NOW) > BROKEN_BY_FAR / 2
    assert rows(store, SPEC) == uninterrupted(open_store("memory://"))[0]
    attempts = [a for t in store.trials(SPEC.name) for a in t.attempts]
    assert all(a.state is State.COMPLETE for a in attempts)


def test_a_restart_with_an_earlier_clock_goes_on(store: StudyStore, clock: Clock) -> None:
    """The clock was a year ahead and is right again; the study was released in order."""
    from evomerge.testing.faults import CALLS, Fate, Killed

    def a_year_ahead() -> datetime:
        return NOW + timedelta(days=365)

    executor: Any = Fate(150).bind(SyntheticExecutor(WORKERS_BEFORE), CALLS)
    with pytest.raises(Killed):
        run(store, executor, a_year_ahead)
    assert run(store, SyntheticExecutor(3), clock)
    assert rows(store, SPEC) == uninterrupted(open_store("memory://"))[0]
