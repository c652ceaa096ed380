"""Shares of a pool: worked by hand, as laws, and by three controllers in virtual time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_synthetic import rows, run_synthetic

from evomerge.service.executor import Pool
from evomerge.service.shares import PoolShare, shares
from evomerge.spec import Workers
from evomerge.store.base import Claim
from evomerge.store.memory import MemoryStore
from evomerge.testing.synthetic import SyntheticExecutor, synthetic_spec

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LATER = NOW + timedelta(hours=1)


def claim(study: str, wanted: int, *, priority: int = 0, **worker: float) -> Claim:
    return Claim(study, "t", "pool", priority, wanted, 0, worker or {"GPU": 1.0}, NOW, LATER)


def of(claims: Sequence[Claim], **pool: float) -> list[int]:
    found = shares(claims, pool)
    return [found[claim.study] for claim in claims]


def test_the_example_of_the_paper() -> None:
    # Ghodsi et al. 2011, section 4.1: 9 CPUs and 18 GB, tasks of (1, 4) and (3, 1)
    tasks = [claim("A", 99, CPU=1, RAM=4), claim("B", 99, CPU=3, RAM=1)]
    assert of(tasks, CPU=9, RAM=18) == [3, 2]


@pytest.mark.parametrize(
    ("wanted", "pool", "expected"),
    [
        # 10 = 2 + 8 / 3 each of the rest: two whole ones each, and one more for the two elder
        ([2, 3, 4, 5], 10, [2, 3, 3, 2]),
        ([1, 9, 9], 8, [1, 4, 3]),
        ([9, 9], 8, [4, 4]),
        ([3, 2], 8, [3, 2]),
        ([5, 5, 5], 2, [1, 1, 0]),
        ([5], 0, [0]),
        ([], 4, []),
    ],
)
def test_equal_workers_by_hand(wanted: list[int], pool: int, expected: list[int]) -> None:
    assert of([claim(str(n), w) for n, w in enumerate(wanted)], GPU=pool) == expected


def test_a_higher_priority_is_served_in_full_first() -> None:
    claims = [claim("old", 8), claim("urgent", 5, priority=2), claim("batch", 8, priority=-1)]
    assert of(claims, GPU=8) == [3, 5, 0]
    assert of(claims, GPU=20) == [8, 5, 7]


def test_a_worker_that_fits_nowhere_leaves_room_for_a_smaller_one() -> None:
    large, small = claim("large", 4, priority=1, GPU=2), claim("small", 4, GPU=0.5)
    assert of([large, small], GPU=3) == [1, 2]


def test_tenths_of_a_gpu_add_up() -> None:
    assert of([claim("a", 20, GPU=0.1)], GPU=1) == [10]
    assert of([claim("a", 20, GPU=0.1), claim("b", 20, GPU=0.3)], GPU=1) == [4, 2]


def test_studies_of_other_resources_do_not_meet() -> None:
    claims = [claim("gpu", 9, GPU=1, CPU=1), claim("cpu", 9, CPU=2)]
    assert of(claims, GPU=2, CPU=12) == [2, 5]


sizes = st.fixed_dictionaries({}, optional={"GPU": st.sampled_from([0.25, 0.1, 1, 2]),
                                            "CPU": st.integers(1, 4)})  # fmt: skip
several = st.lists(st.tuples(st.integers(0, 12), st.integers(-2, 2), sizes), max_size=6).map(
    lambda drawn: [Claim(str(n), "t", "pool", p, w, 0, size, NOW, LATER)
                   for n, (w, p, size) in enumerate(drawn)])  # fmt: skip
alike = several.map(lambda claims: [replace(c, worker={"GPU": 1.0}) for c in claims])
equals = alike.map(lambda claims: [replace(c, priority=0) for c in claims])
pools = st.fixed_dictionaries({"GPU": st.integers(0, 9), "CPU": st.integers(0, 24)})


def left(claims: Sequence[Claim], held: dict[str, int], pool: dict[str, float]) -> dict[str, float]:
    used = {r: sum(held[c.study] * c.worker.get(r, 0) for c in claims) for r in pool}
    return {resource: amount - used[resource] for resource, amount in pool.items()}


@given(several, pools)
def test_no_more_than_there_is_and_no_more_than_wanted(claims: Any, pool: Any) -> None:
    held = shares(claims, pool)
    assert held.keys() == {c.study for c in claims}
    assert all(0 <= held[c.study] <= c.wanted for c in claims)
    assert all(amount > -1e-9 for amount in left(claims, held, pool).values())


@given(several, pools)
def test_nothing_that_is_wanted_lies_idle(claims: Any, pool: Any) -> None:
    held = shares(claims, pool)
    rest = left(claims, held, pool)
    for c in claims:
        fits = all(rest[r] + 1e-9 > amount for r, amount in c.worker.items())
        assert held[c.study] == c.wanted or not fits


@given(several, pools, st.integers(-2, 2))
def test_who_comes_later_takes_nothing(claims: Any, pool: Any, priority: int) -> None:
    held = shares(claims, pool)
    above = [c for c in claims if c.priority > priority]
    assert shares(above, pool) == {c.study: held[c.study] for c in above}


@given(equals, st.integers(0, 40))
def test_equals_differ_by_one_worker_at_most_and_the_elder_has_it(claims: Any, gpus: int) -> None:
    held = shares(claims, {"GPU": gpus})
    hungry = [held[c.study] for c in claims if held[c.study] < c.wanted]
    assert hungry == sorted(hungry, reverse=True)
    for share in hungry:
        assert max(held.values()) <= share + 1


@given(alike, st.integers(0, 40), st.integers(0, 5))
def test_a_larger_pool_takes_from_nobody(claims: Any, gpus: int, more: int) -> None:
    small, large = shares(claims, {"GPU": gpus}), shares(claims, {"GPU": gpus + more})
    assert all(small[study] <= large[study] for study in small)


@given(alike.filter(bool), st.integers(0, 40), st.integers(1, 5))
def test_to_want_more_is_to_have_no_less_and_gives_nobody_else_more(
    claims: Any, gpus: int, more: int
) -> None:
    before = shares(claims, {"GPU": gpus})
    first, *others = claims
    after = shares([replace(first, wanted=first.wanted + more), *others], {"GPU": gpus})
    assert after[first.study] >= before[first.study]
    assert all(after[c.study] <= before[c.study] for c in others)


class Limited(SyntheticExecutor):
    """Draws on a pool of that name and notes its limits."""

    def __init__(self, name: str = "here", capacity: int = 8) -> None:
        super().__init__()
        self._pool = Pool(name, {"CPU": 8.0}, {"CPU": 1.0}, capacity)
        self.limits: list[int | None] = []

    def pool(self) -> Pool:
        return self._pool

    def limit(self, count: int | None) -> None:
        self.limits.append(count)


def sharer(store: MemoryStore, executor: Limited, study: str, **workers: int) -> PoolShare:
    spec = Workers.model_validate({"count": 20, **workers})
    return PoolShare(store, executor, study, spec, token=study, clock=lambda: NOW)


def test_who_is_alone_is_not_limited_and_other_pools_do_not_count() -> None:
    store, mine = MemoryStore(), Limited()
    sharer(store, Limited("elsewhere"), "far").renew(9, 0, 30)
    idle = sharer(store, Limited(), "idle")
    idle.renew(0, 0, 30)
    share = sharer(store, mine, "s")
    share.renew(9, 0, 30)
    idle.renew(3, 0, 30)
    share.renew(9, 0, 30)
    sharer(store, Limited(), "lapsed", priority=5).renew(9, 0, 0)
    share.renew(9, 0, 30)
    assert mine.limits == [None, 5, 5]
    assert {c.study: c.wanted for c in store.claims(now=NOW)} == {"far": 8, "idle": 3, "s": 8}


def test_what_fits_no_node_keeps_nobody_waiting() -> None:
    store, mine = MemoryStore(), Limited()
    sharer(store, Limited(capacity=0), "huge", priority=9).renew(9, 0, 30)
    sharer(store, mine, "s").renew(9, 0, 30)
    assert mine.limits == [None]


def test_an_inspection_has_a_worker_before_everybody_and_gives_it_back() -> None:
    store, mine = MemoryStore(), Limited()
    running = sharer(store, mine, "running", priority=7)
    with sharer(store, Limited(), "new", priority=-7).inspecting():
        running.renew(8, 0, 30)
        with sharer(store, Limited(), "running").inspecting():  # a second start, to be refused
            running.renew(8, 0, 30)
    running.renew(8, 0, 30)
    assert mine.limits == [7, 6, None]


def test_a_study_that_is_left_with_none_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    store, mine = MemoryStore(), Limited()
    share, urgent = sharer(store, mine, "s"), sharer(store, Limited(), "urgent", priority=1)
    for wanted in (8, 8, 5, 8):
        urgent.renew(wanted, 0, 30)
        share.renew(9, 0, 30)
    assert mine.limits == [0, 0, 3, 0]
    assert [record.getMessage()[:13] for record in caplog.records] == ["study s waits"] * 2


def test_a_study_leaves_no_claim_and_ends_as_it_would_alone() -> None:
    store, spec, alone = MemoryStore(), synthetic_spec(), MemoryStore()
    executor = Limited()
    assert run_synthetic(spec, store, executor)
    assert store.claims(now=NOW - timedelta(days=9000)) == []
    run_synthetic(spec, alone)
    assert rows(store, spec) == rows(alone, spec)
