"""A study read in pages says what one read whole does, and keeps few of its trials."""

from __future__ import annotations

import json
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_study import START
from run_synthetic import run_synthetic

from evomerge.service.counts import Counts
from evomerge.service.executor import Event, Job
from evomerge.service.history import MOST_RUNS
from evomerge.service.report import build_report, stored_report
from evomerge.service.report_page import render
from evomerge.service.standing import standing
from evomerge.service.survey import Survey
from evomerge.spec import StudySpec
from evomerge.store.base import Controller, StudyStore
from evomerge.store.memory import MemoryStore
from evomerge.store.sql import SqlStore
from evomerge.testing.synthetic import SyntheticExecutor, synthetic_spec
from evomerge.trial import Failure, Score, TaskScore


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> StudyStore:
    if request.param == "memory":
        return MemoryStore()
    return SqlStore(f"sqlite:///{tmp_path}/store.db")


def study(**changes: Any) -> StudySpec:
    sampler = {"name": "cmaes", "population": 4, "seed": 7}
    budget = {"trials": 40, "finalists": 3}
    return synthetic_spec(**{"sampler": sampler, "budget": budget, **changes})


def test_progress_names_tasks_in_the_specs_order(store: StudyStore) -> None:
    spec = study(objective={"tasks": ["sort", "add"]}, budget={"trials": 8, "finalists": 2})
    run(spec, store)
    survey = Survey.read(store.study(spec.name), store, whole=False)
    best = standing(spec, survey.kept, counts=survey.counts).best
    assert best is not None
    assert list(best.tasks) == ["sort", "add"]


def run(spec: StudySpec, store: StudyStore, **options: Any) -> None:
    """Every seventh recipe fails, some of them otherwise than the rest."""

    def fault(job: Any, before: int) -> Failure | None:
        digest = zlib.crc32(json.dumps(job.recipe).encode())
        bad = job.part == "search" and digest % 7 == 0 and before >= 17  # past the baselines
        return Failure("NonFiniteModel", f"layer {digest % 2} is NaN") if bad else None

    run_synthetic(spec, store, SyntheticExecutor(3, fault=fault), **options)


PARETO = {
    "objective": {"tasks": ["add", "sort"], "aggregate": "pareto"},
    "sampler": {"name": "random", "seed": 3},
}


@pytest.mark.parametrize("page", [1, 7, 1000])
@pytest.mark.parametrize("changes", [{}, PARETO], ids=["mean", "pareto"])
def test_a_report_in_pages_is_the_report_of_all_trials(
    store: StudyStore, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], page: int
) -> None:
    monkeypatch.setattr("evomerge.service.survey._PAGE", page)
    spec = study(**changes)
    run(spec, store)
    record = store.study(spec.name)
    streamed, whole = stored_report(record, store), build_report(record, store.trials(spec.name))
    assert json.dumps(streamed.to_json()) == json.dumps(whole.to_json())
    assert render(streamed, record) == render(whole, record)
    assert streamed.search_counts["failed"] > 0
    assert streamed.winner is not None


@pytest.mark.parametrize("trials", [0, 5, 41])
def test_a_report_of_an_unfinished_study_in_pages(store: StudyStore, trials: int) -> None:
    spec = study()
    with pytest.raises(KeyboardInterrupt):
        run_synthetic(spec, store, Ending(trials))
    record = store.study(spec.name)
    streamed, whole = stored_report(record, store), build_report(record, store.trials(spec.name))
    assert json.dumps(streamed.to_json()) == json.dumps(whole.to_json())
    assert render(streamed, record) == render(whole, record)


def test_where_a_study_stands_is_known_from_outlines(
    store: StudyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evomerge.service.survey._PAGE", 7)
    spec = study()
    run(spec, store)
    survey = Survey.read(store.study(spec.name), store, whole=False)
    every = store.trials(spec.name, outcomes=False)
    assert standing(spec, survey.kept, counts=survey.counts) == standing(spec, every)
    assert survey.counts == Counts.of(every)
    assert sum(survey.states.values()) == len(every)


def test_no_more_is_kept_of_a_long_study_than_of_a_short_one() -> None:
    spec, store = study(), MemoryStore()
    run(spec, store)
    outlines = store.outlines(spec.name, numbers=range(100))
    assert not any(trial.recipe or trial.genome or trial.attempts for trial in outlines)
    survey = Survey(store.study(spec.name))
    survey._put(outlines)
    before = len(survey.kept)
    # as many again and again, none of them scored beyond the search items
    for number in range(len(outlines), 5000):
        like = outlines[14 + number % 40]
        scores = {part: score for part, score in like.scores.items() if part == "search"}
        survey._put([replace(like, number=number, recipe_digest=str(number), scores=scores)])
        assert len(survey.kept) <= before + spec.budget.finalists
    assert survey.counts.trials == 5000
    assert len(survey.history.dots()) <= 3 * MOST_RUNS


RESTARTING = {
    "space": {"method": "task_arithmetic", "recipe": {"lambda": [
        {"low": 0.0, "high": 2.0, "init": 0.3}]}},
    "budget": {"trials": 200, "finalists": 2},
}  # fmt: skip


class Ending(SyntheticExecutor):
    """Ends the controller after so many jobs."""

    def __init__(self, after: int = sys.maxsize) -> None:
        super().__init__(3)
        self._after = after

    def poll(self, timeout_s: float) -> Any:
        if self.ran >= self._after:
            raise KeyboardInterrupt
        return super().poll(timeout_s)


class Flat(Ending):
    """Scores every candidate alike."""

    def _event(self, job: Job, failure: Failure | None) -> Event:
        event = super()._event(job, failure)
        tasks = {name: TaskScore("acc", 0.5, None, 4) for name in ("add", "sort")}
        return replace(event, score=Score(tasks).to_json())


def test_restarts_are_kept_with_their_reasons_and_found_again_by_a_replay() -> None:
    spec, whole, store = study(**RESTARTING), MemoryStore(), MemoryStore()
    notes: list[str] = []
    run_synthetic(spec, whole, Flat(), note=notes.append)
    found = whole.study(spec.name).inspection["restarts"]
    # 10 + ⌈30n/λ⌉ generations of λ, for one gene
    assert [(r["trials"], r["population_before"], r["population_after"]) for r in found] == [
        (18 * 4, 4, 8),
        (18 * 4 + 14 * 8, 8, 16),
    ]
    assert found[0]["reason"] == "the best of a generation has not changed in 18 generations"
    assert [note.partition(": restart ")[2].split()[0] for note in notes] == [
        str(number) for number in range(1, len(found) + 1)
    ]
    assert f"after {found[0]['trials']} trials, population 4 to 8: {found[0]['reason']}" in notes[0]
    # cut off at any place, and found again; each is noted once
    cut_notes: list[str] = []
    for after in (120, 40, sys.maxsize):
        try:
            run_synthetic(spec, store, Flat(after), note=cut_notes.append)
        except KeyboardInterrupt:
            continue
    assert store.study(spec.name).inspection["restarts"] == found
    assert cut_notes == notes
    # a controller that was killed before it wrote them down leaves them to the next one
    record, nobody = store.study(spec.name), Controller("c", "host", 1, 1.0, START)
    store.acquire(spec.name, nobody, now=START)
    bare = {key: value for key, value in record.inspection.items() if key != "restarts"}
    store.update_study(spec.name, record.spec, bare, controller="c")
    store.release(spec.name, "c")
    run_synthetic(spec, store, Flat(), note=cut_notes.append)
    assert store.study(spec.name).inspection["restarts"] == found
    assert cut_notes == 2 * notes
