"""Values that are equal nearly everywhere: margins lead the search, through any crash."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from run_synthetic import rows, run_synthetic

from evomerge.merging.recipe import Recipe
from evomerge.merging.values import leaves
from evomerge.sampling import Told
from evomerge.service.executor import Job
from evomerge.service.study import build_controller, controlling, open_study
from evomerge.service.verdict import winner
from evomerge.spec import StudySpec
from evomerge.store import open_store
from evomerge.store.base import StudyStore
from evomerge.store.memory import MemoryStore
from evomerge.testing.synthetic import SyntheticExecutor, synthetic_spec
from evomerge.trial import Failure, Part, Score, State, TaskScore, Trial, tiebreak

TASKS = ("add", "sort")
WEIGHTS = {"add": 3.0, "sort": 1.0}
SCHEDULES = ["generational", "pipelined", "asynchronous"]


def study(schedule: str = "generational", **changes: Any) -> StudySpec:
    tasks = [{"task": task, "weight": weight} for task, weight in WEIGHTS.items()]
    sampler = {"name": "cmaes", "population": 12, "seed": 3, "schedule": schedule}
    budget = {"trials": 360, "finalists": 2}
    document = {"objective": {"tasks": tasks}, "sampler": sampler, "budget": budget}
    return synthetic_spec(**{**document, **changes})


def distance(recipe: Recipe) -> float:
    """Of all weights from 0.5, as a root mean square."""
    weights = [float(w) for s in recipe.sources for w in leaves(s.parameters.get("weight", 1.0))]
    return math.sqrt(math.fsum((w - 0.5) ** 2 for w in weights) / len(weights))


def step(recipe: Recipe, part: Part, tasks: Sequence[str]) -> Score:
    """No item is right but close to the optimum, and there every one is."""
    right = float(distance(recipe) < 0.06)
    return Score({task: TaskScore("acc", right, None, 4, True, (right,) * 4) for task in tasks})


def with_margins(recipe: Recipe, part: Part, tasks: Sequence[str]) -> Score:
    """The same values; the margin grows towards the optimum."""
    scores = step(recipe, part, tasks).tasks.items()
    bent = {"add": 1.0, "sort": 2.0}
    return Score(
        {
            name: TaskScore(
                "acc", s.value, None, 4, True, s.outcomes, -bent[name] * distance(recipe)
            )
            for name, s in scores
        }
    )


def searched(store: StudyStore) -> list[Trial]:
    return [trial for trial in store.trials("synthetic") if trial.kind == "search"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_margins_find_a_step_that_values_alone_do_not(schedule: str) -> None:
    found = {}
    for score in (step, with_margins):
        store = MemoryStore()
        assert run_synthetic(study(schedule), store, SyntheticExecutor(4, score=score))
        trials = searched(store)
        assert [t.state for t in trials] == [State.COMPLETE] * 360, "no plateau ends a search"
        found[score] = [t.values for t in trials].count((1.0,))
    assert found[step] == 0
    assert found[with_margins] > 10


def crashing_run(spec: StudySpec, url: str) -> int:
    """Run to the end with crashes, each life with its own store; how many lives."""
    for life in range(100):

        def fault(job: Job, before: int, life: int = life) -> Failure | None:
            if before == 5 + 3 * life:
                raise ConnectionError("the power went")
            return None

        count = 1 if spec.sampler.schedule == "asynchronous" else 1 + life % 5
        executor = SyntheticExecutor(count, seed=life, fault=fault, score=with_margins)
        store = open_store(url)
        try:
            run_synthetic(spec, store, executor)
        except ConnectionError:
            continue
        finally:
            store.close()
        return life + 1
    raise AssertionError("no end")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_killed_and_resumed_with_ties_the_trajectory_is_the_same(
    schedule: str, tmp_path: Path
) -> None:
    """Under the asynchronous schedule with one worker: there the order of results is given."""
    spec = study(schedule, budget={"trials": 72, "finalists": 3})
    calm, blind = MemoryStore(), MemoryStore()
    run_synthetic(spec, calm, SyntheticExecutor(1, score=with_margins))
    run_synthetic(spec, blind, SyntheticExecutor(1, score=step))
    url = f"sqlite:///{tmp_path}/store.db"
    assert crashing_run(spec, url) > 4
    assert rows(open_store(url), spec) == rows(calm, spec)
    genomes = [[trial.genome for trial in searched(store)] for store in (calm, blind)]
    assert genomes[0][:12] == genomes[1][:12], "of the first generation nothing is told yet"
    assert not set(genomes[0][36:]) & set(genomes[1][36:]), "margins lead the search"


def tells(spec: StudySpec, store: StudyStore, executor: SyntheticExecutor) -> list[Told]:
    """What the sampler is told by a controller that runs the study now."""
    told: list[Told] = []
    record = open_study(spec, store, executor)
    with controlling(record, store) as token:
        controller = build_controller(record, store, executor, token)
        tell = controller._sampler.tell

        def watched(result: Told) -> None:
            told.append(result)
            tell(result)

        controller._sampler.tell = watched  # type: ignore[method-assign]
        assert controller.run()
    return told


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_replay_tells_what_was_told(schedule: str, tmp_path: Path) -> None:
    spec = study(schedule, budget={"trials": 40, "finalists": 1})
    store = open_store(f"sqlite:///{tmp_path}/store.db")
    live = tells(spec, store, SyntheticExecutor(5, score=with_margins))
    again = tells(spec, store, SyntheticExecutor(5, score=with_margins))
    assert live == again
    assert len({told.tiebreak for told in live}) == 40
    by_index = {told.index: told.tiebreak for told in live}
    for index, trial in enumerate(searched(store)):
        mean = -(3 * 1.0 + 1 * 2.0) / 4 * distance(Recipe.from_json(trial.recipe))
        assert by_index[index] == pytest.approx(mean, rel=1e-12)
    store.close()


def test_a_score_from_the_store_is_told_with_its_margin() -> None:
    spec, store = study(budget={"trials": 30, "finalists": 1}), MemoryStore()
    first = tells(spec, store, SyntheticExecutor(score=with_margins))
    executor = SyntheticExecutor(score=with_margins)
    assert tells(spec.model_copy(update={"name": "again"}), store, executor) == first
    assert executor.ran == 0


def test_of_several_objectives_no_margin_decides() -> None:
    objective = {"tasks": list(TASKS), "aggregate": "pareto"}
    sampler = {"name": "nsga2", "population": 8, "seed": 3}
    spec = study(objective=objective, sampler=sampler, budget={"trials": 20, "finalists": 1})
    told = tells(spec, MemoryStore(), SyntheticExecutor(score=with_margins))
    assert len(told) == 20
    assert all(len(t.values or ()) == 2 and t.tiebreak is None for t in told)


def test_one_task_without_a_margin_leaves_ties_alone() -> None:
    def half(recipe: Recipe, part: Part, tasks: Sequence[str]) -> Score:
        known, bare = with_margins(recipe, part, tasks).tasks, step(recipe, part, tasks).tasks
        return Score({"add": known["add"], "sort": bare["sort"]})

    spec = study(budget={"trials": 24, "finalists": 1})
    told = tells(spec, MemoryStore(), SyntheticExecutor(score=half))
    assert [t.tiebreak for t in told] == [None] * 24


def test_the_mean_of_margins() -> None:
    assert tiebreak({"add": -1.0, "sort": 3.0, "other": 9.0}, WEIGHTS) == 0.0
    assert tiebreak({"add": -1.0}, WEIGHTS) is None
    for odd in (math.nan, math.inf, -math.inf):
        assert tiebreak({"add": odd, "sort": -odd}, WEIGHTS) is None


def test_among_equals_the_margin_decides_who_is_scored_again_and_who_wins() -> None:
    spec, store = study(budget={"trials": 48, "finalists": 3}), MemoryStore()
    assert run_synthetic(spec, store, SyntheticExecutor(4, score=with_margins))
    trials = searched(store)
    best = max(trial.values or () for trial in trials)
    equals = [t for t in trials if t.values == best]
    nearest = sorted(equals, key=lambda t: distance(Recipe.from_json(t.recipe)))
    assert len(equals) > 10
    assert {t.number for t in trials if "selection" in t.scores} == {t.number for t in nearest[:3]}
    assert winner(store.trials("synthetic"), WEIGHTS) == nearest[0] != equals[0]


def test_a_score_from_before_there_were_margins_has_none() -> None:
    document = with_margins_of_one().to_json()
    assert Score.from_json(document) == with_margins_of_one()
    del document["tasks"]["add"]["margin"]
    assert Score.from_json(document).tasks["add"].margin is None


def with_margins_of_one() -> Score:
    return Score({"add": TaskScore("acc", 0.5, 0.1, 2, True, (0.0, 1.0), -0.25)})
