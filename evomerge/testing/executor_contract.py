"""What every executor must do, as tests to inherit from.

A subclass gives a module-scoped `executor` fixture (two workers, prepared with `setup`), a `setup`
fixture and a `lose_a_worker` function that ends the worker of a running job from outside.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from evomerge.errors import InfrastructureError, SpecError
from evomerge.merging.recipe import Recipe
from evomerge.service.baselines import baselines
from evomerge.service.executor import Event, Executor, Job, Setup
from evomerge.service.study import Models
from evomerge.spec import StudySpec
from evomerge.store.base import StudyRecord

DEADLINE_S = 300.0  # nothing is timed: this ends a test that hangs


def collect(executor: Executor, count: int) -> dict[str, Event]:
    """The next `count` events by token."""
    events: dict[str, Event] = {}
    deadline = time.monotonic() + DEADLINE_S
    while len(events) < count:
        assert time.monotonic() < deadline, f"{len(events)} of {count} events came"
        for event in executor.poll(1.0):
            assert event.token not in events, "one event for each job"
            events[event.token] = event
    return events


def wait_for_room(executor: Executor, count: int) -> None:
    """Until `count` jobs fit: a cluster takes its time to place workers."""
    deadline = time.monotonic() + DEADLINE_S
    while executor.free() < count:
        assert time.monotonic() < deadline, f"no room for {count} jobs"
        executor.poll(0.5)


def jobs(record: StudyRecord, count: int) -> list[Job]:
    """Jobs for the first baselines of a study."""
    models = Models.of(record)
    trials = baselines(models.base, models.sources, models.dtype)[:count]
    return [Job(uuid.uuid4().hex, trial.recipe, "selection") for trial in trials]


class ExecutorContract:
    """See the module."""

    lose_a_worker: Callable[[Executor], None]

    def test_a_bad_spec_is_refused_with_every_problem(
        self, executor: Executor, setup: Setup
    ) -> None:
        spec = StudySpec.model_validate(setup.spec)
        tasks = [{"task": "compare", "metric": "nonsense"}, {"task": "unheard_of"}]
        objective = {**spec.objective.model_dump(mode="json"), "tasks": tasks}
        with pytest.raises(SpecError) as caught:
            executor.inspect({**setup.spec, "objective": objective})
        assert "nonsense" in str(caught.value)
        assert "unheard_of" in str(caught.value)

    def test_jobs_come_back_once_and_equal_recipes_score_equally(
        self, executor: Executor, record: StudyRecord
    ) -> None:
        wait_for_room(executor, 2)
        first, again = jobs(record, 1)[0], jobs(record, 1)[0]
        executor.submit(first)
        executor.submit(again)
        assert executor.free() == 0
        events = collect(executor, 2)
        assert executor.free() == 2
        assert events[first.token].score == events[again.token].score
        assert events[first.token].score is not None
        assert set(events[first.token].seconds) == {"load", "materialise", "score"}
        assert not executor.poll(0.0)

    def test_a_bad_candidate_is_told_from_a_broken_worker(
        self, executor: Executor, record: StudyRecord
    ) -> None:
        good = jobs(record, 1)[0]
        wait_for_room(executor, 1)
        huge = _overflowing(good.recipe)
        executor.submit(Job("huge", huge, "selection"))
        event = collect(executor, 1)["huge"]
        assert event.candidate
        assert event.failure is not None
        assert event.failure.error == "NonFiniteModel"
        executor.submit(good)
        assert collect(executor, 1)[good.token].score is not None, "the worker is sound after it"

    def test_a_cancelled_job_gives_no_event(self, executor: Executor, record: StudyRecord) -> None:
        one, other = jobs(record, 2)
        wait_for_room(executor, 2)
        executor.submit(one)
        executor.submit(other)
        executor.cancel(one.token)
        executor.cancel("never heard of")
        assert set(collect(executor, 1)) == {other.token}
        assert not executor.poll(0.5)
        wait_for_room(executor, 2)

    def test_a_worker_above_the_limit_goes_when_its_job_ends(
        self, executor: Executor, record: StudyRecord
    ) -> None:
        wait_for_room(executor, 2)
        for job in jobs(record, 2):
            executor.submit(job)
        executor.limit(1)
        assert executor.free() == 0
        assert all(event.score is not None for event in collect(executor, 2).values())
        assert executor.free() == 1
        executor.limit(0)
        assert executor.free() == 0
        executor.limit(None)
        wait_for_room(executor, 2)
        good = jobs(record, 1)[0]
        executor.submit(good)
        assert collect(executor, 1)[good.token].score is not None

    def test_a_pool_holds_the_workers_it_says_it_does(self, executor: Executor) -> None:
        pool = executor.pool()
        if pool is None:
            return
        assert pool.name
        assert any(pool.worker.values())
        for resource, amount in pool.worker.items():
            assert pool.resources[resource] >= pool.capacity * amount

    def test_a_lost_worker_is_one_failed_attempt(
        self, executor: Executor, record: StudyRecord
    ) -> None:
        lost = jobs(record, 1)[0]
        wait_for_room(executor, 1)
        executor.submit(lost)
        type(self).lose_a_worker(executor)
        event = collect(executor, 1)[lost.token]
        assert event.failure is not None
        assert event.failure.error == "WorkerLost"
        assert not event.candidate
        wait_for_room(executor, 2)
        for job in jobs(record, 2):
            executor.submit(job)
        assert all(event.score is not None for event in collect(executor, 2).values())

    def test_a_worker_with_other_versions_refuses_and_says_which(
        self, executor: Executor, record: StudyRecord, setup: Setup
    ) -> None:
        fingerprint = record.inspection["fingerprint"]
        other = {**fingerprint, "packages": {**fingerprint["packages"], "torch": "1.0"}}
        here = fingerprint["packages"]["torch"]
        executor.prepare(replace(setup, fingerprint=other))
        for message in _refusals(executor, jobs(record, 2)):
            assert f"torch is {here} here and 1.0 in the study" in message
        executor.prepare(replace(setup, fingerprint=fingerprint))
        wait_for_room(executor, 2)
        good = jobs(record, 1)[0]
        executor.submit(good)
        assert collect(executor, 1)[good.token].score is not None


def _refusals(executor: Executor, refused: list[Job]) -> list[str]:
    """Why these jobs, or all jobs, cannot be run."""
    try:
        wait_for_room(executor, len(refused))
        for job in refused:
            executor.submit(job)
        events = collect(executor, len(refused)).values()
    except InfrastructureError as error:
        return [str(error)]
    return [event.failure.message if event.failure else "no refusal" for event in events]


def _overflowing(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Task arithmetic whose every task vector is multiplied by more than float32 holds."""
    assert Recipe.from_json(recipe).method == "task_arithmetic"
    return {**recipe, "parameters": {**recipe["parameters"], "weight": 1e38, "lambda": 1e38}}
