"""Refined trials: made once from what is recorded, beside a search that never notices them."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from run_synthetic import run_synthetic

from evomerge.errors import UserError
from evomerge.service.refinement import (
    Refinement,
    descend,
    elite,
    last_gain,
    refinements_of,
    with_refinement,
)
from evomerge.service.refining import read_calibration, refine
from evomerge.service.report import build_report, stored_report
from evomerge.service.study import build_controller, controlling, open_study
from evomerge.service.worker import Worker
from evomerge.spec import StudySpec
from evomerge.store.memory import MemoryStore
from evomerge.testing.synthetic import SyntheticExecutor, synthetic_spec
from evomerge.trial import State

WEIGHTS = {"add": 1.0, "sort": 1.0}
# every source's weight 0.5 in every tensor, where synthetic scores are best
BEST = {"weight.scale[add]": 0.5, "weight.scale[sort]": 0.5}


def study(schedule: str = "generational", trials: int = 12) -> StudySpec:
    sampler = {"name": "cmaes", "population": 4, "seed": 7, "schedule": schedule}
    return synthetic_spec(sampler=sampler, budget={"trials": trials, "finalists": 2})


def refinement(origin: int, genome: Any, **changes: Any) -> Refinement:
    known = Refinement(
        origin=origin,
        value=0.5,
        genome=tuple(genome),
        loss="answers",
        calibration="c0",
        steps=5,
        evaluations=6,
        before=2.0,
        after=1.0,
        seconds=4.0,
        flops=1e9,
        evolution_seconds=5.0,
        evolution_gain=0.05,
    )
    return replace(known, **changes)


def best_genome(spec: StudySpec, store: MemoryStore) -> tuple[float, ...]:
    from evomerge.space import load_space

    space = load_space(store.study(spec.name).spec["space"])
    return space.encode(BEST, list(spec.sources))


def run_refined(
    spec: StudySpec, store: MemoryStore, found: Refinement, *, run: bool = True
) -> None:
    """What `evomerge refine` does once it has computed."""
    executor = SyntheticExecutor()
    record = with_refinement(open_study(spec, store, executor), found)
    with controlling(record, store) as token:
        controller = build_controller(record, store, executor, token)
        if run:
            assert controller.run()


def genomes(store: MemoryStore) -> list[Any]:
    return [t.genome for t in store.trials("synthetic") if t.kind == "search"]


@pytest.mark.parametrize("schedule", ["generational", "pipelined", "asynchronous"])
def test_the_search_goes_on_as_if_nothing_had_been_refined(schedule: str) -> None:
    plain, store = MemoryStore(), MemoryStore()
    # paused twice, in the middle of a generation too
    for trials in (6, 12, 24):
        run_synthetic(study(schedule, trials), plain)
    for number, trials in enumerate((6, 12)):
        run_synthetic(study(schedule, trials), store)
        found = refinement(17 + number, best_genome(study(), store), steps=number)
        run_refined(study(schedule, trials), store, found)
    run_synthetic(study(schedule, 24), store)
    assert genomes(store) == genomes(plain)
    trials = store.trials("synthetic")
    assert [t.number for t in trials] == list(range(len(trials)))
    refined = [t for t in trials if t.kind == "refined"]
    assert len(refined) == 2
    assert [t.number < trials[-1].number for t in refined] == [True, True]
    assert all(t.state is State.COMPLETE and t.tell_order is None for t in refined)
    assert sum(t.tell_order is not None for t in trials) == 24


def test_a_trial_is_made_once_whatever_is_killed(monkeypatch) -> None:
    store, spec = MemoryStore(), study()
    run_synthetic(spec, store)
    found = refinement(17, best_genome(spec, store))
    create = store.create_trials

    def killed(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "create_trials", killed)
    with pytest.raises(KeyboardInterrupt):  # recorded, but its trial is not made
        run_refined(spec, store, found)
    monkeypatch.setattr(store, "create_trials", create)
    assert refinements_of(store.study("synthetic")) == [found]
    record = open_study(spec, store, SyntheticExecutor())
    with controlling(record, store) as token:  # made, but killed before it is scored
        build_controller(record, store, SyntheticExecutor(), token)
    for _ in range(2):
        run_synthetic(spec, store)
        (refined,) = [t for t in store.trials("synthetic") if t.kind == "refined"]
        assert refined.genome == found.genome
        assert refined.label == "refined from trial 17"
        assert {"search", "selection", "report"} <= refined.scores.keys()


def test_a_better_one_wins_and_the_report_says_what_it_bought() -> None:
    store, spec = MemoryStore(), study()
    run_synthetic(spec, store)
    before = stored_report(store.study("synthetic"), store)
    trials = store.trials("synthetic", outcomes=False)
    origin = elite(trials, WEIGHTS)
    assert origin.values == (max(t.values[0] for t in trials if t.kind == "search"),)
    value = origin.values[0]
    run_refined(spec, store, refinement(origin.number, best_genome(spec, store), value=value))
    report = stored_report(store.study("synthetic"), store)
    refined = store.trials("synthetic")[-1]
    assert (
        report.winner.trial.number
        == refined.number
        == elite(store.trials("synthetic"), WEIGHTS).number
    )
    assert report.finished
    assert report.search_counts == before.search_counts
    (gained,) = report.to_json()["refinements"]
    assert gained["gain"] == pytest.approx(refined.values[0] - value)
    assert gained["gain_per_second"] == pytest.approx(gained["gain"] / 4)
    assert gained["evolution_gain_per_second"] == pytest.approx(0.01)
    assert any("refined by 4.0 s of gradient steps, gained +" in note for note in report.notes)
    assert (
        build_report(store.study("synthetic"), store.trials("synthetic")).to_json()
        == report.to_json()
    )


def test_what_evolution_gained_in_the_same_time() -> None:
    store = MemoryStore()
    run_synthetic(study(), store)
    trials = [t for t in store.trials("synthetic") if t.kind == "search"]
    timed = [
        replace(
            t,
            values=(value,),
            attempts=tuple(replace(a, seconds={"score": 2.0}) for a in t.attempts[:1]),
        )
        for t, value in zip(trials, (0.1, 0.4, 0.2, 0.5, 0.3, 0.6), strict=False)
    ]
    assert last_gain(timed, 3.0) == (4.0, pytest.approx(0.1))  # of 0.3 and 0.6
    assert last_gain(timed, 8.0) == (8.0, pytest.approx(0.2))
    assert last_gain(timed, 1e6) == (10.0, pytest.approx(0.5))  # all but the first
    assert last_gain([], 1.0) == (0.0, 0.0)


class Bowl:
    """A convex loss of a genome: what L-BFGS-B must find is known."""

    centre = np.array([0.3, 1.4, -0.2, 0.6])
    scales = np.array([1.0, 30.0, 4.0, 0.2])

    def gradient(self, genome: Any) -> tuple[float, Any]:
        off = np.array(genome) - self.centre
        return float((self.scales * off**2).sum() / 2), self.scales * off


class Itself:
    """Genes that are what the loss is of; the last is discrete."""

    free = (0, 1, 2)

    def chain(self, genome: Any, gradients: Any) -> Any:
        return gradients


def test_steps_go_downhill_within_bounds_and_leave_discrete_genes() -> None:
    start = (0.9, 0.1, 0.8, 0.5)
    itself: Any = Itself()
    itself.free = [0, 1, 2]
    done: list[int] = []
    found, before, after, count = descend(
        start,
        itself,
        Bowl(),
        lambda genome: genome,
        steps=40,
        progress=lambda number, total: done.append(number),
    )
    assert found == pytest.approx((0.3, 1.0, 0.0, 0.5), abs=1e-4)
    assert found[3] == 0.5
    assert after < before
    assert count == len(done) <= 41
    _, before, after, count = descend(start, itself, Bowl(), lambda genome: genome, steps=2)
    assert count <= 3
    assert after <= before


def test_what_has_no_score_is_not_refined() -> None:
    store = MemoryStore()
    run_synthetic(study(), store)
    trials = store.trials("synthetic", outcomes=False)
    assert elite(trials, WEIGHTS, 17).number == 17
    with pytest.raises(UserError, match="trial 0 has no genome"):
        elite(trials, WEIGHTS, 0)
    with pytest.raises(UserError, match="no trial of the search has"):
        elite(trials[:5], WEIGHTS)


class Inspecting(SyntheticExecutor):
    """Inspects in this process."""

    def inspect(self, spec: Any) -> Any:
        return Worker().inspect(spec)


@pytest.fixture
def real(tiny_zoo: Path) -> tuple[StudySpec, MemoryStore]:
    """A study of real models, its scores made up."""
    document = {
        "name": "s",
        "base": str(tiny_zoo / "base"),
        "sources": {name: str(tiny_zoo / name) for name in ("compare", "sort")},
        "objective": {"include_path": str(tiny_zoo / "tasks"), "tasks": ["compare", "sort"]},
        "budget": {"trials": 4, "finalists": 1},
    }
    spec, store = StudySpec.model_validate(document), MemoryStore()
    run_synthetic(spec, store, Inspecting())
    return spec, store


def test_real_models_learn_the_answers_they_are_shown(real, tmp_path) -> None:
    spec, store = real
    entries = {
        n: {"task": n, "include_path": spec.objective.include_path, "count": 8}
        for n in spec.sources
    }
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"calibration": entries}))
    data = read_calibration(tmp_path / "data.yaml", spec)
    trials = store.trials("s", outcomes=False)
    origin = elite(trials, {"compare": 1.0, "sort": 1.0})
    options: dict[str, Any] = {"loss": "answers", "steps": 4, "device": "cpu"}
    found = refine(store.study("s"), origin, trials, data, **options)
    assert found is not None
    assert found.after < found.before
    assert found.evaluations <= 5
    assert found.flops > 0
    assert all(0 <= u <= 1 for u in found.genome)
    again = refine(store.study("s"), origin, trials, data, **options)
    same = ("genome", "before", "after", "calibration")
    assert [asdict(again)[key] for key in same] == [asdict(found)[key] for key in same]


def test_data_that_the_study_is_judged_by_is_left_out(real, tmp_path) -> None:
    from evomerge.scoring.splits import part_of
    from evomerge.scoring.tasks import load_tasks

    spec, _ = real
    # the file is not one that a task names, but its lines are the task's own items
    lines = Path(spec.base).parent / "tasks" / "data" / "compare.jsonl"
    entry = {"jsonl": str(lines), "prompt": "prompt", "answer": "answer", "count": 100000}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"calibration": entry}))
    data = read_calibration(tmp_path / "data.yaml", spec)
    tasks = load_tasks(spec.objective)
    hashes = set(tasks.tasks[0].hashes)
    assert {part_of(item, tasks.split) for item in data.items} == {"search"}
    assert set(data.items) <= hashes
