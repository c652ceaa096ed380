"""Schedules on the controller: what each promises for any number of workers and any crash."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
from run_synthetic import rows, run_synthetic

from evomerge.errors import SpecError
from evomerge.service.executor import Job
from evomerge.service.report import stored_report
from evomerge.spec import StudySpec
from evomerge.store.base import StudyStore
from evomerge.store.memory import MemoryStore
from evomerge.testing.replay import asked_at, proposed_again
from evomerge.testing.synthetic import SyntheticExecutor, synthetic_spec, table
from evomerge.trial import Failure, State, Trial

TRIALS = 30
NAN = Failure("NonFiniteModel", "model.norm.weight holds NaN")


def study(schedule: str, **changes: object) -> StudySpec:
    sampler = {"name": "cmaes", "population": 4, "seed": 3, "schedule": schedule}
    budget = {"trials": TRIALS, "finalists": 2}
    return synthetic_spec(**{"sampler": sampler, "budget": budget, **changes})


def searched(store: StudyStore, spec: StudySpec) -> list[Trial]:
    return [trial for trial in store.trials(spec.name) if trial.kind == "search"]


def bad(job: Job) -> Failure | None:
    """A property of the candidate alone, whoever runs it when."""
    weight = job.recipe["sources"][0]["parameters"].get("weight", 1.0)
    searched = job.part == "search" and not isinstance(weight, float)
    return NAN if searched and sum(str(weight).encode()) % 4 == 0 else None


def crashing_run(spec: StudySpec, store: MemoryStore) -> int:
    """Run to the end with crashes, each life with another number of workers; how many lives."""
    for life in range(100):

        def fault(job: Job, before: int, life: int = life) -> Failure | None:
            if before == 3 + life % 5:
                raise ConnectionError("the power went")
            return bad(job)

        try:
            run_synthetic(spec, store, SyntheticExecutor(1 + life % 6, seed=life, fault=fault))
        except ConnectionError:
            continue
        return life + 1
    raise AssertionError("no end")


@pytest.mark.parametrize("schedule", ["generational", "pipelined"])
@pytest.mark.parametrize("count", [2, 5, 16])
def test_in_order_any_number_of_workers_finds_the_same(schedule: str, count: int) -> None:
    one, many = MemoryStore(), MemoryStore()
    run_synthetic(study(schedule), one, SyntheticExecutor(1, fault=lambda job, _: bad(job)))
    run_synthetic(
        study(schedule), many, SyntheticExecutor(count, seed=count, fault=lambda job, _: bad(job))
    )
    assert rows(one, study(schedule)) == rows(many, study(schedule))


@pytest.mark.parametrize("schedule", ["generational", "pipelined"])
def test_in_order_crashes_change_nothing(schedule: str) -> None:
    calm, shaken = MemoryStore(), MemoryStore()
    run_synthetic(study(schedule), calm, SyntheticExecutor(3, fault=lambda job, _: bad(job)))
    assert crashing_run(study(schedule), shaken) > 5
    assert rows(calm, study(schedule)) == rows(shaken, study(schedule))


def replays(store: StudyStore, spec: StudySpec) -> int:
    """Ask again for each recorded genome in the state that the recorded orders say; how many were
    asked for in a state that some later genome of the trial table was not.
    """
    trials = searched(store, spec)
    assert proposed_again(spec, trials) == [trial.genome for trial in trials]
    assert asked_at(trials) == sorted(asked_at(trials))
    return len(set(asked_at(trials)))


@pytest.mark.parametrize("count", [1, 2, 8, 50])
def test_asynchronous_is_replayed_from_what_is_recorded(count: int) -> None:
    store, spec = MemoryStore(), study("asynchronous")
    executor = SyntheticExecutor(count, seed=count, fault=lambda job, _: bad(job))
    assert run_synthetic(spec, store, executor)
    trials = searched(store, spec)
    assert len(trials) == TRIALS
    assert {trial.state for trial in trials} == {State.COMPLETE, State.FAIL}
    assert all(trial.tell_order is not None for trial in trials)
    assert replays(store, spec) == max(1, TRIALS - count + 1)


def test_asynchronous_crashes_lose_and_change_no_genome() -> None:
    spec = study("asynchronous")
    seen: dict[int, object] = {}

    class Watching(MemoryStore):
        def create_trials(self, study, trials, *, controller):  # type: ignore[no-untyped-def]
            super().create_trials(study, trials, controller=controller)
            assert not seen.keys() & {trial.number for trial in trials}
            seen.update({trial.number: trial.genome for trial in trials})

    store = Watching()
    assert crashing_run(spec, store) > 5
    trials = searched(store, spec)
    assert len(trials) == TRIALS
    assert all(trial.genome == seen[trial.number] for trial in trials)
    assert len({trial.tell_order for trial in trials}) == TRIALS
    again = [t for t in trials if sum(a.part == "search" for a in t.attempts) > 1]
    assert again, "what was in flight was dispatched again"
    replays(store, spec)


class PowerCut:
    """A store in front of another, until the power goes before or after write number `at`."""

    WRITES = frozenset(
        ("create_trials", "start_attempt", "finish", "fail_attempt", "reuse", "mark_told")
    )

    def __init__(self, store: MemoryStore, at: int, *, after: bool) -> None:
        self._store, self._left, self._after = store, at, after

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        return self._cut(method) if name in self.WRITES else method

    def _cut(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def write(*args: Any, **options: Any) -> Any:
            self._left -= 1
            if self._left < 0 and not self._after:
                raise ConnectionError("the power went")
            result = method(*args, **options)
            if self._left < 0:
                raise ConnectionError("the power went")
            return result

        return write


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("schedule", ["pipelined", "asynchronous"])
def test_cut_off_at_any_write_nothing_is_lost(schedule: str, after: bool) -> None:
    spec = study(schedule, budget={"trials": 8, "finalists": 1})
    whole = MemoryStore()
    run_synthetic(spec, whole, SyntheticExecutor(3))
    for at in range(10_000):
        store = MemoryStore()
        cut = cast(StudyStore, PowerCut(store, at, after=after))
        try:
            run_synthetic(spec, cut, SyntheticExecutor(3, seed=at))
        except ConnectionError:
            run_synthetic(spec, store, SyntheticExecutor(2, seed=at))
        else:
            break
        trials = searched(store, spec)
        assert [t.state for t in trials] == [State.COMPLETE] * 8
        assert all(t.tell_order is not None for t in trials)
        if schedule == "asynchronous":
            replays(store, spec)
        else:
            assert rows(store, spec) == rows(whole, spec)
    assert at > 60


def test_asynchronous_tells_out_of_order_and_never_waits() -> None:
    store, spec = MemoryStore(), study("asynchronous")
    executor = SyntheticExecutor(8, seed=1)
    free: list[int] = []

    def watch(job: Job, before: int) -> Failure | None:
        free.append(executor.free())
        return None

    executor._fault = watch
    run_synthetic(spec, store, executor)
    order = sorted(searched(store, spec), key=lambda t: t.tell_order or 0)
    assert [t.number for t in order] != sorted(t.number for t in order)
    baselines = len(store.trials(spec.name)) - TRIALS
    # one worker is free when its own job is being finished; the last jobs have none behind them
    assert set(free[: baselines + TRIALS - 8]) == {1}


def test_a_warm_start_is_written_into_the_study_and_outlives_the_earlier_one() -> None:
    store = MemoryStore()
    run_synthetic(study("generational"), store)
    sampler = {"population": 4, "seed": 3, "warm_start": "synthetic"}
    warm = study("", name="warm", sampler=sampler, budget={"trials": 8})
    run_synthetic(warm, store)
    best = sorted(searched(store, study("generational")), key=lambda t: -(t.values or (0,))[0])
    pinned = store.study("warm").inspection["warm_start"]
    assert [tuple(genome) for genome in pinned] == [t.genome for t in best[: TRIALS // 10]]
    before = [t.genome for t in searched(store, warm)]
    assert before != [t.genome for t in searched(store, study("generational"))[:8]]

    run_synthetic(study("generational", budget={"trials": 90, "finalists": 2}), store)
    longer = warm.model_copy(update={"budget": warm.budget.model_copy(update={"trials": 16})})
    run_synthetic(longer, store)
    whole = MemoryStore()
    run_synthetic(study("generational"), whole)
    run_synthetic(longer, whole)
    assert store.study("warm").inspection["warm_start"] == pinned
    genomes = [[t.genome for t in searched(s, longer)] for s in (store, whole)]
    assert genomes[0] == genomes[1]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"sampler": {"warm_start": "synthetik"}}, "did you mean 'synthetic'?"),
        ({"sampler": {"warm_start": "synthetic"}}, "has 4 results, at least 10 are needed"),
        (
            {"sampler": {"warm_start": "synthetic"}, "space": "source_scalar"},
            "has other genes; space and sources must be the same",
        ),
    ],
)
def test_an_earlier_study_that_does_not_fit_is_refused(changes, fault: str) -> None:
    store = MemoryStore()
    run_synthetic(study("generational", budget={"trials": 4}), store)
    with pytest.raises(SpecError, match=fault.replace("?", r"\?")):
        run_synthetic(study("", name="new", **changes), store)
    assert [record.name for record in store.studies()] == ["synthetic"]


@pytest.mark.parametrize(
    ("schedule", "count", "said"),
    [
        ("generational", 4, []),
        ("generational", 5, ["no more than 4 of 5 workers will be busy"]),
        ("pipelined", 8, []),
        ("pipelined", 9, ["no more than 8 of 9 workers will be busy"]),
        ("asynchronous", 1000, []),
    ],
)
def test_workers_that_a_schedule_never_uses_are_named(
    schedule: str, count: int, said: list[str]
) -> None:
    spec = study(schedule, workers={"count": count})
    notes: list[str] = []
    assert run_synthetic(spec, MemoryStore(), SyntheticExecutor(count), note=notes.append)
    assert len(notes) == len(said)
    assert all(words in note for words, note in zip(said, notes, strict=True))


@pytest.mark.parametrize(
    ("factors", "said"),
    [
        (
            [{"values": [0.2, 0.4, 0.6], "init": 0.4}],
            ["the space has 3 candidates, fewer than the 30 trials"],
        ),
        ([{"per": "source", "values": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], "init": 0.3}], []),
        ([{"low": 0.0, "high": 1.0, "init": 0.5}], []),
    ],
    ids=["3", "36", "endless"],
)
def test_a_space_of_fewer_candidates_than_trials_is_named(
    factors: list[dict[str, Any]], said: list[str]
) -> None:
    space = {"method": "task_arithmetic", "source": {"weight": factors}}
    spec = study("generational", space=space)
    notes: list[str] = []
    store = MemoryStore()
    assert run_synthetic(spec, store, note=notes.append)
    assert len(notes) == len(said)
    assert all(words in note for words, note in zip(said, notes, strict=True))
    if said:
        cost = stored_report(store.study(spec.name), store).cost
        assert cost.reused >= 27
        scores = sum(len(trial.scores) for trial in store.trials(spec.name))
        assert cost.attempts + cost.reused == scores


def test_another_version_of_the_sampler_is_said_at_each_resume(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec, store = synthetic_spec(), MemoryStore()
    notes: list[str] = []
    assert run_synthetic(spec, store, note=notes.append)
    assert not any("the sampler is not the one" in note for note in notes)
    before = table(store.trials(spec.name))
    monkeypatch.setattr("evomerge.sampling._OURS", "999")
    for _ in range(2):
        notes.clear()
        assert run_synthetic(spec, store, note=notes.append)
        (said,) = [note for note in notes if "the sampler is not the one" in note]
        assert "evomerge.sampling 2 -> 999" in said
    assert table(store.trials(spec.name)) == before
