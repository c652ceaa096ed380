"""A study whose spec, or what it names, changed since: what may, what may not, and how it is said.

Models and tasks are real files of a tiny zoo, inspected as a worker does.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_synthetic import rows, run_synthetic
from safetensors.torch import load_file, save_file

from evomerge.cli.running import run_study
from evomerge.errors import SpecError, StudyBusy, StudyChanged
from evomerge.service.executor import Executor
from evomerge.service.study import controlling, open_study, refuse_early
from evomerge.service.worker import Worker
from evomerge.spec import StudySpec
from evomerge.store import IN_MEMORY
from evomerge.store.base import StudyRecord
from evomerge.store.memory import MemoryStore
from evomerge.testing.synthetic import SyntheticExecutor, synthetic_inspection, synthetic_spec
from evomerge.trial import State

SPACE = {
    "method": "task_arithmetic",
    "source": {"weight": [{"low": 0.0, "high": 1.0, "init": 0.5, "per": ["source"]}]},
    "recipe": {"lambda": 1.0},
}


class Inspecting(SyntheticExecutor):
    """Inspects in this process."""

    def inspect(self, spec: Mapping[str, Any]) -> Mapping[str, Any]:
        return Worker().inspect(spec)


@pytest.fixture
def folder(tiny_zoo: Path, tmp_path: Path) -> Path:
    """A folder with a zoo, a spec and a space file, whose files may be changed."""
    for name in ("base", "compare", "sort", "tasks"):
        shutil.copytree(tiny_zoo / name, tmp_path / "at" / name)
    for file in (tmp_path / "at" / "tasks").glob("*.yaml"):
        file.write_text(file.read_text().replace(str(tiny_zoo), str(tmp_path / "at")))
    (tmp_path / "at" / "space.yaml").write_text(yaml.safe_dump(SPACE))
    spec = {
        "name": "s",
        "base": "base",
        "sources": {"compare": "compare", "sort": "sort"},
        "space": "space.yaml",
        "objective": {"include_path": "tasks", "tasks": ["compare", "sort"]},
        "sampler": {"name": "random", "seed": 1},
        "budget": {"trials": 4},
    }
    (tmp_path / "at" / "study.yaml").write_text(yaml.safe_dump(spec))
    return tmp_path / "at"


@pytest.fixture
def store(folder: Path) -> MemoryStore:
    """A store with the study in it."""
    store = MemoryStore()
    opened(folder, store)
    return store


def opened(folder: Path, store: MemoryStore) -> StudyRecord:
    executor: Executor = Inspecting()
    return open_study(StudySpec.load(folder / "study.yaml"), store, executor)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = yaml.safe_load(path.read_text())
    change(document)
    path.write_text(yaml.safe_dump(document, sort_keys=False))


def spec(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "study.yaml", change)


def space(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "space.yaml", change)


def trained_on(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        weights = load_file(folder / name / "model.safetensors")
        weights["model.norm.weight"][0] += 1
        save_file(weights, folder / name / "model.safetensors", metadata={"format": "pt"})

    return change


def task(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "tasks" / "compare.yaml", change)


def data(folder: Path) -> None:
    file = folder / "tasks" / "data" / "compare.jsonl"
    first, *rest = file.read_text().splitlines()
    document = json.loads(first)
    document["prompt"] += " "
    file.write_text("\n".join([json.dumps(document), *rest]) + "\n")


REFUSED: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "seed": (spec(lambda s: s["sampler"].update(seed=2)), ["sampler.seed: 1 -> 2"]),
    "several keys": (
        spec(lambda s: s.update(sampler={"name": "tpe", "population": 4})),
        [
            "sampler.name: 'random' -> 'tpe'",
            "sampler.population: 'auto' -> 4",
            "sampler.seed: 1 -> 0",
        ],
    ),
    "weight of a task": (
        spec(lambda s: s["objective"].update(tasks=["compare", {"task": "sort", "weight": 2.0}])),
        ["objective.tasks[1].weight: 1.0 -> 2.0"],
    ),
    "one task less": (
        spec(lambda s: s["objective"].update(tasks=["compare"])),
        ["objective.tasks[1]: {'task': 'sort', 'metric': None, 'weight': 1.0} -> absent"],
    ),
    "split": (
        spec(lambda s: s["objective"].update(split={"search": 0.5, "report": 0.3})),
        ["objective.split.report: 0.4 -> 0.3", "objective.split.search: 0.4 -> 0.5"],
    ),
    "batch size": (
        spec(lambda s: s.update(evaluation={"batch_size": 4})),
        ["evaluation.batch_size: 'auto' -> 4"],
    ),
    "threads": (
        spec(lambda s: s.update(workers={"num_cpus": 2})),
        ["workers.num_cpus: 1 -> 2"],
    ),
    "bound of a gene": (
        space(lambda s: s["source"]["weight"][0].update(high=2.0)),
        ["space.source.weight[0].high: 1.0 -> 2.0"],
    ),
    "fixed parameter": (
        space(lambda s: s["recipe"].update({"lambda": 0.5})),
        ["space.recipe.lambda: 1.0 -> 0.5"],
    ),
    "merge method": (
        space(lambda s: s.update(method="linear", recipe={})),
        ["space.method: 'task_arithmetic' -> 'linear'", "space.recipe: {'lambda': 1.0} -> absent"],
    ),
    "another space": (
        spec(lambda s: s.update(space="source_scalar")),
        ["space.source.weight"],
    ),
    "order of sources": (
        spec(lambda s: s.update(sources={"sort": "sort", "compare": "compare"})),
        ["sources, in this order: compare, sort -> sort, compare"],
    ),
    "one source less": (
        spec(lambda s: s["sources"].pop("sort")),
        ["/sort (contents ", ") -> absent"],
    ),
    "a source trained on": (trained_on("sort"), ["sources.sort: ", "/sort (contents "]),
    "another base": (trained_on("base"), ["base: ", "/base (contents "]),
    "yaml of a task": (
        task(lambda t: t.update(description="Think.")),
        ["tasks.compare.yaml (sha256): "],
    ),
    "data of a task": (data, ["tasks.compare.items and prompts (sha256): "]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_may_not_change_is_refused_with_every_difference(
    folder: Path, store: MemoryStore, name: str
) -> None:
    change, expected = REFUSED[name]
    change(folder)
    before = store.study("s")
    with pytest.raises(StudyChanged) as refusal:
        opened(folder, store)
    heading, *lines = str(refusal.value).splitlines()
    assert "study 's' exists with another spec; only budget and workers (not workers." in heading
    assert "another name, or put back" in heading
    for said in expected:
        assert any(said in line for line in lines), lines
    assert len(lines) <= max(2, len(expected)) or name == "another space", lines
    assert not any(len(line) > 400 for line in lines), "no digest or document in full"
    assert store.study("s") == before


IN_FILES = ("a source trained on", "another base", "yaml of a task", "data of a task")


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_text_tells_is_refused_before_any_model_is_opened(
    folder: Path, store: MemoryStore, name: str
) -> None:
    change, expected = REFUSED[name]
    change(folder)
    shutil.rmtree(folder / "base")
    changed = StudySpec.load(folder / "study.yaml")
    if name in IN_FILES:
        refuse_early(changed, store)
        return
    with pytest.raises(StudyChanged) as refusal:
        refuse_early(changed, store)
    for said in expected:
        assert said.replace(" (contents ", "").replace(") ->", " ->") in str(refusal.value)


def test_a_study_that_runs_is_refused_before_any_worker_starts() -> None:
    store, spec = MemoryStore(), synthetic_spec()
    refuse_early(spec, store)
    record = open_study(spec, store, SyntheticExecutor())
    with controlling(record, store), pytest.raises(StudyBusy, match=f"process {os.getpid()} on "):
        refuse_early(spec, store)
    refuse_early(spec, store)


def test_a_misspelt_space_is_refused_before_the_executor_is_looked_for() -> None:
    with pytest.raises(SpecError, match="'source_dept'; did you mean 'source_depth'"):
        run_study(synthetic_spec(space="source_dept"), IN_MEMORY, "no such executor")


ALLOWED: dict[str, Callable[[Path], None]] = {
    "nothing": lambda folder: None,
    "budget": spec(lambda s: s.update(budget={"trials": 9, "finalists": 2})),
    "workers": spec(
        lambda s: s.update(workers={"count": 5, "lease_s": 9, "max_attempts": 1, "num_gpus": 1})
    ),
    "words about the space": space(lambda s: s.update(about="the same")),
    "the space written out": spec(lambda s: s.update(space=SPACE)),
    "order of keys": lambda folder: edit(
        folder / "study.yaml", lambda s: s.update(budget=s.pop("budget"), name=s.pop("name"))
    ),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_may_change(folder: Path, store: MemoryStore, name: str) -> None:
    ALLOWED[name](folder)
    created_at = store.study("s").created_at
    refuse_early(StudySpec.load(folder / "study.yaml"), store)
    assert opened(folder, store).created_at == created_at


def test_files_that_moved_and_are_the_same(folder: Path, store: MemoryStore) -> None:
    moved = folder.rename(folder.with_name("elsewhere"))
    for path in ("sort", "tasks"):
        (moved / path).rename(moved / f"my-{path}")
    for file in (moved / "my-tasks").glob("*.yaml"):
        file.write_text(file.read_text().replace(f"{folder}/tasks", f"{moved}/my-tasks"))
    edit(moved / "study.yaml", lambda s: s["sources"].update(sort="my-sort"))
    edit(moved / "study.yaml", lambda s: s["objective"].update(include_path="my-tasks"))
    refuse_early(StudySpec.load(moved / "study.yaml"), store)
    record = opened(moved, store)
    assert record.spec["sources"]["sort"] == str(moved / "my-sort")


VERSIONS = {"packages": {"torch": "2.12.0"}, "python": "3.11", "scorer": 1}


def test_other_versions_are_named() -> None:
    class Upgraded(SyntheticExecutor):
        def inspect(self, spec: Mapping[str, Any]) -> Mapping[str, Any]:
            found = synthetic_inspection(StudySpec.model_validate(spec))
            new = {"packages": {"torch": "2.13.0"}, "python": "3.13", "scorer": 2}
            return {**found, "fingerprint": new if self.ran else VERSIONS}

    store, executor = MemoryStore(), Upgraded()
    open_study(synthetic_spec(), store, executor)
    executor.ran = 1
    with pytest.raises(StudyChanged) as refusal:
        open_study(synthetic_spec(), store, executor)
    assert str(refusal.value).splitlines()[1:] == [
        "  - installed.torch: '2.12.0' -> '2.13.0'",
        "  - installed.evomerge (its scorer): 1 -> 2",
        "  - installed.python: '3.11' -> '3.13'",
    ]


def test_a_smaller_budget_ends_the_search_where_it_is() -> None:
    store, executor = MemoryStore(), SyntheticExecutor(3)
    whole = synthetic_spec()

    class Stopped(Exception):
        pass

    def stop(job: object, before: int) -> None:
        if before == 16:
            raise Stopped

    with pytest.raises(Stopped):
        run_synthetic(whole, store, SyntheticExecutor(3, fault=stop))
    proposed = [t for t in store.trials(whole.name) if t.kind == "search"]
    assert 2 < len(proposed) < 10
    smaller = synthetic_spec(budget={"trials": 2, "finalists": 2})
    assert run_synthetic(smaller, store, executor)
    after = [t for t in store.trials(whole.name) if t.kind == "search"]
    assert [t.genome for t in after] == [t.genome for t in proposed], "nothing more is proposed"
    assert all(t.state is State.COMPLETE for t in after), "what was proposed is scored"
    assert sum("report" in t.scores for t in after) == 1, "and a winner found"
    assert run_synthetic(whole, store, executor)
    uninterrupted = MemoryStore()
    run_synthetic(whole, uninterrupted)
    assert [(r.genome, r.values) for r in rows(store, whole)] == [
        (r.genome, r.values) for r in rows(uninterrupted, whole)
    ], "the whole budget after all: the same search"


def test_more_finalists_are_scored_when_asked_for() -> None:
    store = MemoryStore()
    run_synthetic(synthetic_spec(), store)
    more = synthetic_spec(budget={"trials": 10, "finalists": 5})
    assert run_synthetic(more, store)
    whole = MemoryStore()
    run_synthetic(more, whole)

    def selected(store: MemoryStore) -> set[int]:
        return {t.number for t in store.trials(more.name) if "selection" in t.scores}

    assert selected(store) >= selected(whole)
    assert run_synthetic(synthetic_spec(), store, executor := SyntheticExecutor())
    assert executor.ran == 0, "fewer finalists: nothing to do"
