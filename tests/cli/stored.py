"""A finished study in a store, made of numbers, for tests of what the read commands print."""

from __future__ import annotations

from collections.abc import Sequence

from service import fake_study as fake

from evomerge.store.base import Controller, StudyRecord, StudyStore
from evomerge.trial import Attempt, NewTrial, State, Trial


def store_study(
    store: StudyStore,
    *,
    name: str = "zoo-ties",
    trials: int = 6,
    tasks: Sequence[str] = ("add", "reverse", "sort"),
) -> StudyRecord:
    """Record a study of that name, every third trial failed, through the store's own protocol."""
    study = fake.record(tasks, name=name, trials=trials)
    rows = fake.finished(study, fail_every=3)
    until = fake.START.replace(year=2036)
    store.create_study(study)
    store.acquire(name, Controller("c", "host", 1, 1.0, until), now=fake.START)
    new = [NewTrial(t.number, t.kind, t.label, t.genome, t.recipe, t.recipe_digest) for t in rows]
    store.create_trials(name, new, controller="c")
    for trial in rows:
        for attempt in trial.attempts:
            _replay(store, name, trial, attempt)
        if trial.failure is not None:
            _fail(store, name, trial)
    store.release(name, "c")
    return study


def _replay(store: StudyStore, study: str, trial: Trial, attempt: Attempt) -> None:
    assert attempt.finished_at is not None
    assert attempt.worker is not None
    store.start_attempt(
        study,
        trial.number,
        attempt.part,
        token=attempt.token,
        worker=attempt.worker,
        now=attempt.started_at,
        lease_until=attempt.lease_until,
        controller="c",
    )
    store.finish(
        study,
        attempt.token,
        trial.scores[attempt.part],
        trial.values or (),
        worker=attempt.worker,
        seconds=attempt.seconds,
        now=attempt.finished_at,
        controller="c",
    )


def _fail(store: StudyStore, study: str, trial: Trial) -> None:
    assert trial.failure is not None
    token = f"{trial.number}-failed"
    store.start_attempt(
        study,
        trial.number,
        "search",
        token=token,
        worker="worker-0",
        now=fake.START,
        lease_until=fake.START,
        controller="c",
    )
    store.fail_attempt(
        study,
        token,
        trial.failure,
        trial_state=State.FAIL,
        worker=None,
        seconds={},
        now=fake.START,
        controller="c",
    )
