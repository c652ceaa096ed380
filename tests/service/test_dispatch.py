"""What the dispatcher counts against a trial, with a scorer that is a pure function."""

from __future__ import annotations

from dataclasses import replace

import pytest
from run_synthetic import rows, run_synthetic

from evomerge.errors import StudyStopped
from evomerge.service.dispatch import _MACHINES_FAILED
from evomerge.service.executor import Event
from evomerge.store.memory import MemoryStore
from evomerge.testing.synthetic import SyntheticExecutor, synthetic_spec
from evomerge.trial import Failure, State

GONE = Failure("NodeLost", "the spot instance was taken")
POISON = 17


def _run(failures: int, failure: Failure = GONE) -> MemoryStore:
    """A study in which the first `failures` attempts at one trial end so."""
    store, spec = MemoryStore(), synthetic_spec()

    def fault(job, before):  # type: ignore[no-untyped-def]
        attempts = store.trial(spec.name, POISON).attempts if before > POISON - 3 else ()
        mine = any(attempt.token == job.token for attempt in attempts)
        return failure if mine and len(attempts) <= failures else None

    assert run_synthetic(spec, store, SyntheticExecutor(2, fault=fault))
    return store


def test_a_trial_whose_machines_went_is_not_given_up() -> None:
    spec, calm = synthetic_spec(), MemoryStore()
    run_synthetic(spec, calm)
    shaken = _run(_MACHINES_FAILED + spec.workers.max_attempts - 1)
    assert rows(shaken, spec) == rows(calm, spec)
    states = [a.state for a in shaken.trial(spec.name, POISON).attempts if a.part == "search"]
    assert states == [State.FAIL] * (_MACHINES_FAILED + 2) + [State.COMPLETE]


def test_not_for_ever() -> None:
    trial = _run(1000).trial("synthetic", POISON)
    assert trial.state is State.FAIL
    assert trial.failure == GONE
    assert len(trial.attempts) == _MACHINES_FAILED + synthetic_spec().workers.max_attempts


def test_a_worker_that_died_counts_at_once() -> None:
    trial = _run(1000, Failure("WorkerLost", "killed")).trial("synthetic", POISON)
    assert len(trial.attempts) == synthetic_spec().workers.max_attempts


def test_where_every_machine_goes_the_study_stops() -> None:
    executor = SyntheticExecutor(fault=lambda job, before: GONE)
    with pytest.raises(StudyStopped, match="NodeLost: the spot instance was taken"):
        run_synthetic(synthetic_spec(), MemoryStore(), executor)


def test_a_machine_with_too_little_memory_is_no_fault_of_the_trial() -> None:
    spec, calm = synthetic_spec(), MemoryStore()
    run_synthetic(spec, calm)
    small = Failure("OutOfMemory", "a batch of 1 does not fit")
    most = _MACHINES_FAILED + spec.workers.max_attempts - 1
    assert rows(_run(most, small), spec) == rows(calm, spec)
    assert _run(1000, small).trial(spec.name, POISON).failure == small


def test_where_memory_is_too_little_everywhere_the_study_stops_soon() -> None:
    small = Failure("OutOfMemory", "a batch of 1 does not fit")
    executor, store = SyntheticExecutor(fault=lambda job, before: small), MemoryStore()
    with pytest.raises(StudyStopped, match="OutOfMemory: a batch of 1"):
        run_synthetic(synthetic_spec(), store, executor)
    attempts = [len(trial.attempts) for trial in store.trials("synthetic")]
    assert max(attempts) == synthetic_spec().workers.max_attempts


def test_what_a_worker_notes_is_said(caplog: pytest.LogCaptureFixture) -> None:
    class Noting(SyntheticExecutor):
        def poll(self, timeout_s: float) -> list[Event]:
            events = super().poll(timeout_s)
            return [replace(e, notes=("a batch of 8 did not fit",)) for e in events]

    run_synthetic(synthetic_spec(), MemoryStore(), Noting())
    assert "worker synthetic-0: a batch of 8 did not fit" in caplog.text
