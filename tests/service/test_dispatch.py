"""What the dispatcher counts against a trial, with a scorer that is a pure function."""

from __future__ import annotations

import pytest
from run_synthetic import rows, run_synthetic

from evomerge.errors import StudyStopped
from evomerge.service.dispatch import _NODES_LOST
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
    shaken = _run(_NODES_LOST + spec.workers.max_attempts - 1)
    assert rows(shaken, spec) == rows(calm, spec)
    states = [a.state for a in shaken.trial(spec.name, POISON).attempts if a.part == "search"]
    assert states == [State.FAIL] * (_NODES_LOST + 2) + [State.COMPLETE]


def test_not_for_ever() -> None:
    trial = _run(1000).trial("synthetic", POISON)
    assert trial.state is State.FAIL
    assert trial.failure == GONE
    assert len(trial.attempts) == _NODES_LOST + synthetic_spec().workers.max_attempts


def test_a_worker_that_died_counts_at_once() -> None:
    trial = _run(1000, Failure("WorkerLost", "killed")).trial("synthetic", POISON)
    assert len(trial.attempts) == synthetic_spec().workers.max_attempts


def test_where_every_machine_goes_the_study_stops() -> None:
    executor = SyntheticExecutor(fault=lambda job, before: GONE)
    with pytest.raises(StudyStopped, match="NodeLost: the spot instance was taken"):
        run_synthetic(synthetic_spec(), MemoryStore(), executor)
