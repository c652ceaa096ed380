"""The study spec: defaults, paths, and every problem of a document in one go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.errors import SpecError
from evomerge.spec import StudySpec, locate, nearest

GOOD: dict[str, Any] = {
    "name": "zoo-ties",
    "base": "zoo/base",
    "sources": {"add": "zoo/add"},
    "objective": {"tasks": ["add"]},
    "budget": {"trials": 3},
}


@pytest.fixture
def examine(tmp_path: Path) -> Any:
    def examine(changes: dict[str, Any] | None = None, *, without: str = "") -> Any:
        document = {**GOOD, **(changes or {})}
        document.pop(without, None)
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(document))
        return StudySpec.examine(path)

    return examine


def test_a_short_spec_takes_the_defaults_of_the_design(examine: Any) -> None:
    spec, faults = examine()
    assert faults == []
    assert spec.space == "source_depth"
    assert spec.objective.tasks[0].model_dump() == {"task": "add", "metric": None, "weight": 1.0}
    assert spec.objective.split.model_dump() == {"search": 0.4, "selection": 0.2, "report": 0.4}
    assert (spec.sampler.name, spec.sampler.schedule) == ("cmaes", "generational")
    assert (spec.sampler.sigma0, spec.sampler.population) == (0.1667, "auto")


def test_the_example_of_the_design_is_a_spec(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("""
name: zoo-ties
base: zoo/base
sources: {add: zoo/add, reverse: zoo/reverse, sort: zoo/sort}
space: source_depth
objective:
  include_path: zoo/tasks
  tasks:
    - {task: add, metric: exact_match, weight: 1.0}
    - {task: sort, metric: acc, weight: 1.0}
  split: {search: 0.4, selection: 0.2, report: 0.4}
sampler: {name: cmaes, population: auto, sigma0: 0.1667, seed: 7, schedule: generational}
budget: {trials: 200}
evaluation: {dtype: bfloat16, batch_size: auto, device: auto}
""")
    assert StudySpec.load(path).sampler.seed == 7


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"bse": 1}, "unknown key 'bse'; did you mean 'base'?"),
        ({"sampler": {"sede": 1}}, "unknown key 'sampler.sede'; did you mean 'seed'?"),
        (
            {"objective": {"tasks": [{"task": "a", "wieght": 1}]}},
            "unknown key 'objective.tasks.0.wieght'; did you mean 'weight'?",
        ),
        ({"workers": {"zzz": 1}}, "unknown key 'workers.zzz'; known: count, lease_s, "
         "max_attempts, num_cpus, num_gpus, priority"),
        ({"budget": {"trials": 0}}, "budget.trials: expected a number greater than or equal to 1"
         ", got 0"),
        ({"budget": {"trials": "x"}}, "budget.trials: expected a whole number, got 'x'"),
        ({"base": 5}, "base: expected a string, got 5"),
        ({"name": "a b"}, "name: expected letters, digits, '.', '_' and '-', a letter or digit "
         "first, got 'a b'"),
        ({"sources": {"a b": "x", "c": "y"}}, "sources.a b: expected letters, digits, '.', '_' "
         "and '-', a letter or digit first, got 'a b'"),
        ({"sources": {}}, "sources: expected at least one entry, got {}"),
        ({"sources": ["x"]}, "sources: expected a mapping, got ['x']"),
        ({"evaluation": {"batch_size": 0}}, "evaluation.batch_size: expected 'auto' or a number "
         "greater than or equal to 1, got 0"),
        ({"evaluation": {"share_context": "never"}}, "evaluation.share_context: expected 'auto' "
         "or true or false, got 'never'"),
        ({"sampler": {"sigma0": float("nan")}}, "sampler.sigma0: expected a finite number, "
         "got nan"),
        ({"sampler": {"schedule": "async"}}, "sampler.schedule: expected 'generational', "
         "'pipelined' or 'asynchronous', got 'async'"),
        ({"sampler": {"restarts": False}}, "sampler.restarts: expected 'ipop', 'bipop' or 'same', "
         "got False"),
        ({"sampler": {"warm_start": "a b"}}, "sampler.warm_start: expected letters, digits, '.', "
         "'_' and '-', a letter or digit first, got 'a b'"),
        ({"sampler": {"name": "tpe", "schedule": "asynchronous"}}, "sampler.schedule: 'tpe' is "
         "generational only; 'asynchronous' is for cmaes"),
        ({"sampler": {"name": "tpe", "start": "a"}}, "sampler.start: is for cmaes, not for 'tpe'"),
        ({"sampler": {"start": "a", "warm_start": "b"}}, "sampler: starts from `warm_start` or "
         "from `start`; give one of them"),
        ({"sampler": {"name": "random", "warm_start": "a"}}, "sampler.warm_start: is for cmaes, "
         "not for 'random'"),
        ({"space": 4}, "space: expected a string or a mapping, got 4"),
        ({"objective": {"tasks": ["a", "a"]}}, "objective.tasks: task 'a' is listed twice; give "
         "it one entry and a weight"),
        ({"objective": {"tasks": ["a"], "split": {"search": 0.9}}}, "objective.split: search + "
         "selection + report must be 1, not 1.5"),
    ],
)  # fmt: skip
def test_one_fault_is_one_line(examine: Any, changes: dict[str, Any], fault: str) -> None:
    assert examine(changes)[1] == [fault]


@pytest.mark.parametrize("key", GOOD)
def test_a_missing_key(examine: Any, key: str) -> None:
    assert examine(without=key) == (None, [f"missing key {key!r}"])


def test_all_faults_are_told_and_the_rest_is_kept(examine: Any) -> None:
    spec, faults = examine(
        {
            "soures": {},
            "sampler": {"seed": -1, "sigma": 2},
            "objective": {
                "tasks": ["a", {"task": "b", "weight": 0}, 3, "d"],
                "aggregate": "pareto",
            },
            "evaluation": {"dtype": "int8"},
        }
    )
    assert len(faults) == 7
    assert faults[-1].startswith("sampler.name: 'cmaes' has one objective only")
    assert [task.task for task in spec.objective.tasks] == ["a", "b", "d"]
    assert (spec.sampler.seed, spec.evaluation.dtype) == (0, "auto")


def test_load_raises_what_examine_tells(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**GOOD, "bse": 1, "workers": {"count": 0}}))
    with pytest.raises(SpecError) as caught:
        StudySpec.load(path)
    assert caught.value.subject == str(path)
    assert caught.value.problems == StudySpec.examine(path)[1]
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("sampler", ["cmaes", "gp"])
def test_pareto_needs_a_sampler_of_many_objectives(examine: Any, sampler: str) -> None:
    objective = {"tasks": ["a", "b"], "aggregate": "pareto"}
    fault = f"sampler.name: {sampler!r} has one objective only; use nsga2, tpe or random with "
    assert examine({"objective": objective, "sampler": {"name": sampler}})[1] == [
        f"{fault}`aggregate: pareto`"
    ]


@pytest.mark.parametrize("sampler", ["nsga2", "tpe", "random"])
def test_pareto_with_such_a_sampler(examine: Any, sampler: str) -> None:
    objective = {"tasks": ["a", "b"], "aggregate": "pareto"}
    spec, faults = examine({"objective": objective, "sampler": {"name": sampler}})
    assert faults == []
    assert spec.objective.aggregate == "pareto"


def test_paths_are_taken_from_the_folder_of_the_spec(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    for folder in (home / "zoo/base", home / "tasks", elsewhere / "zoo/add"):
        folder.mkdir(parents=True)
    (home / "mine.yaml").touch()
    changes = {"space": "mine.yaml", "objective": {"tasks": ["a"], "include_path": "tasks"}}
    sources = {"add": "zoo/add", "hub": "meta-llama/Llama-3.2-1B"}
    (home / "study.yaml").write_text(yaml.safe_dump({**GOOD, **changes, "sources": sources}))
    monkeypatch.chdir(elsewhere)
    spec = StudySpec.load(home / "study.yaml")
    assert spec.base == str(home / "zoo/base")
    assert spec.sources == {"add": str(elsewhere / "zoo/add"), "hub": "meta-llama/Llama-3.2-1B"}
    assert spec.objective.include_path == str(home / "tasks")
    assert spec.space == str(home / "mine.yaml")
    assert locate(None, home) is None


def test_budget_and_workers_are_no_part_of_the_identity(examine: Any) -> None:
    spec, more = examine()[0], examine({"budget": {"trials": 9}, "workers": {"count": 4}})[0]
    other = examine({"sampler": {"seed": 1}})[0]
    assert spec.identity() == more.identity()
    assert spec.identity() != other.identity()


def test_nearest() -> None:
    assert nearest("soures", ["sources", "space"]) == "; did you mean 'sources'?"
    assert nearest("zzz", ["b", "a"]) == "; known: a, b"
