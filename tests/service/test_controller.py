"""The controller's loop, with a scorer that is a pure function of the recipe."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pytest
from run_synthetic import rows, run_synthetic

from evomerge.errors import StudyBusy, StudyChanged, StudyStopped
from evomerge.service.baselines import baselines
from evomerge.service.dispatch import Dispatcher
from evomerge.service.executor import Event, Job, Setup
from evomerge.service.ledger import Ledger
from evomerge.service.study import Models, build_controller, controlling, open_study
from evomerge.store.memory import MemoryStore
from evomerge.testing.synthetic import SyntheticExecutor, synthetic_spec
from evomerge.trial import Failure, State, Trial

BASELINES = 1 + 2 + 1 + 10


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def test_a_study_runs_to_its_end(store: MemoryStore) -> None:
    spec = synthetic_spec()
    assert run_synthetic(spec, store)
    trials = store.trials(spec.name)
    assert [t.kind for t in trials[:5]] == [
        "base",
        "source",
        "source",
        "uniform",
        "task_arithmetic",
    ]
    assert len(trials) == BASELINES + 10
    assert all(t.state is State.COMPLETE for t in trials)
    searched = trials[BASELINES:]
    assert [t.tell_order for t in searched] == list(range(10))
    assert all(t.tell_order is None for t in trials[:BASELINES])


def test_only_baselines_finalists_and_the_winner_leave_the_search_items(store: MemoryStore) -> None:
    spec = synthetic_spec()
    run_synthetic(spec, store)
    trials = store.trials(spec.name)
    searched = trials[BASELINES:]
    assert all("selection" in t.scores for t in trials[:BASELINES])
    assert sum("selection" in t.scores for t in searched) == spec.budget.finalists
    assert sum("report" in t.scores for t in searched) == 1
    assert sum("report" in t.scores for t in trials if t.kind == "task_arithmetic") == 1


@pytest.mark.parametrize("sampler", ["cmaes", "random", "tpe", "nsga2"])
@pytest.mark.parametrize("count", [2, 3, 9])
def test_any_number_of_workers_finds_the_same(sampler: str, count: int) -> None:
    one, many = MemoryStore(), MemoryStore()
    spec = synthetic_spec(sampler={"name": sampler, "population": 4, "seed": 3})
    run_synthetic(spec, one, SyntheticExecutor(1))
    run_synthetic(spec, many, SyntheticExecutor(count, seed=count))
    assert rows(one, spec) == rows(many, spec)


VALUES = (0.1, 0.3, 0.4, 0.5, 0.6, 0.9)
DISCRETE = {
    "method": "task_arithmetic",
    "source": {
        "weight": [
            {"name": "level", "per": "source", "values": VALUES, "init": 0.4},
            {"name": "curve", "knots": 2, "low": 0.9, "high": 1.1, "init": 1.0},
        ]
    },
    "recipe": {"lambda": [{"values": [0.5, 1, 1.5], "init": 1}]},
}


@pytest.mark.parametrize("sampler", ["cmaes", "random", "tpe", "nsga2"])
def test_discrete_genes_are_exact_and_resume_bit_for_bit(sampler: str) -> None:
    spec = synthetic_spec(
        space=DISCRETE,
        sampler={"name": sampler, "population": 4, "seed": 3},
        budget={"trials": 30, "finalists": 2},
    )
    whole, cut = MemoryStore(), MemoryStore()
    run_synthetic(spec, whole, SyntheticExecutor(1))
    for stop_after in (17, 5, 9, 50):
        crash = Crash(3, stop_after, seed=stop_after)
        with contextlib.suppress(KeyboardInterrupt):
            run_synthetic(spec, cut, crash)
    assert rows(cut, spec) == rows(whole, spec)
    searched = whole.trials(spec.name)[BASELINES:]
    assert all(t.recipe["parameters"]["lambda"] in (0.5, 1.0, 1.5) for t in searched)
    # the gene of lambda is the last; all but CMA-ES propose the middles of cells
    proposed = {t.genome[-1] for t in searched if t.genome is not None}
    assert (proposed <= {0.5 / 3, 1.5 / 3, 2.5 / 3}) == (sampler != "cmaes")
    levels = {t.recipe["parameters"]["lambda"] for t in searched}
    assert len(levels) > 1


class Crash(SyntheticExecutor):
    """Ends the controller after so many jobs."""

    def __init__(self, count: int, after: int, *, seed: int) -> None:
        super().__init__(count, seed=seed)
        self._after = after

    def poll(self, timeout_s: float) -> Sequence[Event]:
        if self.ran >= self._after:
            raise KeyboardInterrupt
        return super().poll(timeout_s)


def test_another_seed_finds_other_genomes(store: MemoryStore) -> None:
    spec = synthetic_spec()
    other = synthetic_spec(name="other", sampler={"name": "cmaes", "population": 4, "seed": 8})
    run_synthetic(spec, store)
    run_synthetic(other, store)
    genomes = [[row.genome for row in rows(store, s)[BASELINES:]] for s in (spec, other)]
    assert genomes[0] != genomes[1]


def test_a_lost_worker_costs_one_attempt() -> None:
    lost = Failure("WorkerLost", "killed")
    calm, shaken = MemoryStore(), MemoryStore()
    spec = synthetic_spec()
    run_synthetic(spec, calm)
    executor = SyntheticExecutor(2, fault=lambda job, before: lost if before % 5 == 3 else None)
    run_synthetic(spec, shaken, executor)
    assert rows(calm, spec) == rows(shaken, spec)
    attempts = [a for t in shaken.trials(spec.name) for a in t.attempts]
    failed = [a for a in attempts if a.state is State.FAIL]
    assert failed
    assert all(a.failure == lost for a in failed)


def test_a_bad_candidate_fails_its_trial_and_is_never_told_as_a_number(store: MemoryStore) -> None:
    nan = Failure("NonFiniteModel", "model.norm.weight holds NaN")

    def fault(job: Job, before: int) -> Failure | None:
        return nan if before in (BASELINES + 2, BASELINES + 5) else None

    spec = synthetic_spec()
    assert run_synthetic(spec, store, SyntheticExecutor(fault=fault))
    failed = [t for t in store.trials(spec.name) if t.state is State.FAIL]
    assert len(failed) == 2
    assert all(t.failure == nan and t.values is None for t in failed)
    assert all(len(t.attempts) == 1 for t in failed)
    assert all(t.tell_order is not None for t in failed)


def test_a_trial_that_keeps_failing_where_others_succeed_is_given_up(store: MemoryStore) -> None:
    spec = synthetic_spec()
    poison = BASELINES + 3

    def fault(job: Job, before: int) -> Failure | None:
        number = next(
            t.number for t in store.trials(spec.name) for a in t.attempts if a.token == job.token
        )
        return Failure("RuntimeError", "device-side assert") if number == poison else None

    assert run_synthetic(spec, store, SyntheticExecutor(2, fault=fault))
    trial = store.trial(spec.name, poison)
    assert trial.state is State.FAIL
    assert len(trial.attempts) == spec.workers.max_attempts


def test_a_study_whose_every_attempt_fails_stops_with_its_reason(store: MemoryStore) -> None:
    spec = synthetic_spec()
    broken = SyntheticExecutor(fault=lambda job, before: Failure("OutOfMemory", "no room"))
    with pytest.raises(StudyStopped, match=r"failed 3 times.*OutOfMemory: no room"):
        run_synthetic(spec, store, broken)
    assert all(t.state is State.WAITING for t in store.trials(spec.name))
    assert run_synthetic(spec, store), "once repaired, the same study runs to its end"


def test_a_machine_that_breaks_half_way_stops_the_study_and_spoils_one_trial_at_most(
    store: MemoryStore,
) -> None:
    spec = synthetic_spec(budget={"trials": 20, "finalists": 2})
    gone = Failure("CheckpointError", "stale file handle")
    broken = SyntheticExecutor(2, fault=lambda job, before: gone if before > 20 else None)
    with pytest.raises(StudyStopped, match="CheckpointError: stale file handle"):
        run_synthetic(spec, store, broken)
    failed = [t for t in store.trials(spec.name) if t.state is State.FAIL]
    assert len(failed) <= 1
    assert run_synthetic(spec, store), "once repaired, the same study runs to its end"
    assert [t for t in store.trials(spec.name) if t.state is State.FAIL] == failed


def test_a_hanging_worker_is_ended_when_its_lease_lapses(store: MemoryStore) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)

    def clock() -> datetime:
        nonlocal now
        now += timedelta(seconds=1)
        return now

    hung: list[str] = []

    def fault(job: Job, before: int) -> Failure | None:
        if not hung or job.token in hung:
            hung.append(job.token)
            return Failure("Hangs", "")
        return None

    spec = synthetic_spec(workers={"lease_s": 100})
    executor = SyntheticExecutor(fault=fault)
    record = open_study(spec, store, executor)
    with controlling(record, store) as token:
        assert build_controller(record, store, executor, token, clock=clock).run()
    assert executor.cancelled == [hung[0]]
    attempts = store.trial(spec.name, 0).attempts
    assert [a.state for a in attempts if a.part == "search"] == [State.FAIL, State.COMPLETE]
    assert "lease of 100 s; set a longer `workers.lease_s`" in str(attempts[0].failure)


def test_stopping_waits_for_what_runs_and_resumes_to_the_same_end() -> None:
    whole, stopped = MemoryStore(), MemoryStore()
    spec = synthetic_spec()
    run_synthetic(spec, whole)
    record = open_study(spec, stopped, executor := SyntheticExecutor(3))
    with controlling(record, stopped) as token:
        controller = build_controller(record, stopped, executor, token)
        executor._fault = lambda job, before: controller.stop() if before == 15 else None
        assert not controller.run()
    trials = stopped.trials(spec.name)
    assert not any(t.state is State.RUNNING for t in trials)
    assert executor.ran == 16 + 2, "the two beside the one that stopped it were waited for"
    assert run_synthetic(spec, stopped)
    assert rows(stopped, spec) == rows(whole, spec)


def test_a_longer_budget_goes_on_where_the_search_was() -> None:
    short, whole = MemoryStore(), MemoryStore()
    run_synthetic(synthetic_spec(budget={"trials": 6, "finalists": 2}), short)
    longer = synthetic_spec(budget={"trials": 14, "finalists": 2})
    run_synthetic(longer, short)
    run_synthetic(longer, whole)
    searched = [[(r.genome, r.values) for r in rows(s, longer)] for s in (short, whole)]
    assert searched[0] == searched[1]


def test_a_recipe_that_was_scored_before_is_answered_from_the_store(store: MemoryStore) -> None:
    run_synthetic(synthetic_spec(), store)
    again, executor = synthetic_spec(name="again"), SyntheticExecutor()
    run_synthetic(again, store, executor)
    assert executor.ran == 0
    assert rows(store, again) == rows(store, synthetic_spec())


def test_another_spec_under_the_same_name_is_refused_with_the_difference(
    store: MemoryStore,
) -> None:
    run_synthetic(synthetic_spec(), store)
    other = synthetic_spec(sampler={"name": "cmaes", "population": 4, "seed": 8})
    with pytest.raises(StudyChanged, match=r"sampler\.seed: 7 -> 8"):
        run_synthetic(other, store)


def test_a_second_controller_is_refused_while_the_first_lives(store: MemoryStore) -> None:
    spec = synthetic_spec()
    record = open_study(spec, store, SyntheticExecutor())
    with controlling(record, store), pytest.raises(StudyBusy), controlling(record, store):
        pass


def test_pareto_studies_score_their_whole_front(store: MemoryStore) -> None:
    spec = synthetic_spec(
        objective={"tasks": ["add", "sort"], "aggregate": "pareto"},
        sampler={"name": "nsga2", "population": 4, "seed": 1},
    )
    assert run_synthetic(spec, store)
    trials = [t for t in store.trials(spec.name) if t.kind == "search"]
    assert all(t.values is not None and len(t.values) == 2 for t in trials)
    assert {t.number for t in trials if "selection" in t.scores} == {
        t.number for t in trials if "report" in t.scores
    }


def test_the_mirror_is_shown_trials_as_the_store_has_them(store: MemoryStore) -> None:
    lost = Failure("WorkerLost", "killed")
    shown: dict[int, Trial] = {}

    class Recorder:
        def sync(self, trials: Sequence[Trial]) -> int:
            shown.update({trial.number: trial for trial in trials})
            return len(trials)

    spec = synthetic_spec()
    executor = SyntheticExecutor(2, fault=lambda job, before: lost if before == 3 else None)
    run_synthetic(spec, store, executor, make_mirror=lambda record, genes: Recorder())
    assert [shown[n] for n in sorted(shown)] == list(store.trials(spec.name, outcomes=False))


def test_the_controllers_own_time_is_recorded_and_waiting_is_not(store: MemoryStore) -> None:
    spec = synthetic_spec()
    clock_s = 0.0

    class Slow(SyntheticExecutor):
        def poll(self, timeout_s: float) -> Sequence[Event]:
            nonlocal clock_s
            clock_s += 100.0  # waiting for workers
            return super().poll(timeout_s)

        def submit(self, job: Job) -> None:
            nonlocal clock_s
            clock_s += 1.0  # the controller's own work
            super().submit(job)

    executor = Slow(2)
    record = open_study(spec, store, executor)
    with controlling(record, store) as token:
        ledger = Ledger(store, record, token)
        ledger.create(baselines(Models.of(record).base, {}, None)[:1])
        executor.prepare(Setup(record.spec, record.inspection["digests"], "float32"))
        dispatcher = Dispatcher(spec, ledger, executor, time_s=lambda: clock_s)
        dispatcher.enqueue([(0, "search")])
        while not dispatcher.idle:
            dispatcher.step()
    assert store.trial(spec.name, 0).attempts[0].seconds["controller"] == 1.0
