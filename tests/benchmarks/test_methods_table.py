"""The table of all methods: none is left out in silence, and no setting is chosen on what it is
judged by."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from evomerge.merging.fitted.registry import FITTERS
from evomerge.merging.methods.registry import METHODS, check
from evomerge.merging.recipe import ModelRef, Recipe, Source
from evomerge.scoring.splits import part_of

FOLDER = Path(__file__).parents[2] / "benchmarks"
SOURCES = tuple(Source(name, ModelRef(name)) for name in "abcd")


@pytest.fixture
def grids(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("method_grids")


def test_every_method_has_a_grid_or_a_reason_why_not(grids: ModuleType) -> None:
    assert grids.GRIDS.keys() | grids.LEFT_OUT.keys() == METHODS.keys()
    assert not grids.GRIDS.keys() & grids.LEFT_OUT.keys()
    for name in grids.LEFT_OUT:
        most = METHODS[name].max_sources
        assert name == "passthrough" or (most is not None and most < len(SOURCES))


def test_every_row_has_a_name_of_its_own(grids: ModuleType) -> None:
    for name, rows in grids.GRIDS.items():
        labels = [grid.label for grid in rows]
        assert len(set(labels)) == len(labels), name


def test_every_setting_is_one_that_the_method_takes(grids: ModuleType) -> None:
    for name, rows in grids.GRIDS.items():
        kind = METHODS[name].artifact
        artifact = ModelRef("artifact") if kind else None
        for grid in rows:
            for fit, parameters in grid.settings():
                recipe = Recipe(name, ModelRef("base"), SOURCES, parameters, artifact=artifact)
                assert not check(recipe)
                assert not fit or FITTERS[kind].settings.model_validate(fit)


def test_settings_are_chosen_on_items_that_neither_a_fit_nor_the_report_has_seen(
    tiny_zoo: Path, grids: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo_scores = importlib.import_module("zoo_scores")
    monkeypatch.setattr(zoo_scores, "EXAMPLES", 5)
    scores = zoo_scores.ZooScores(tiny_zoo, tmp_path)
    seen = set(scores.fitted("greedy_soup", {}).provenance.items)
    uniform = scores.recipe("linear", {})

    outcomes = {}
    for task, hashes in scores.items().items():
        outcomes[task] = []
        for part in ("search", "selection"):
            own = [h for h in hashes if part_of(h, scores.objective.split) == part]
            found = scores.score(uniform, part).tasks[task].outcomes
            outcomes[task] += [x for h, x in zip(own, found, strict=True) if h not in seen]
    assert len(seen) == 20
    assert scores.chosen_on == sum(map(len, outcomes.values()))
    means = [sum(found) / len(found) for found in outcomes.values()]
    assert scores.merit(uniform) == pytest.approx(sum(means) / 4)


def test_what_is_kept_is_not_made_again(
    grids: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo_scores = importlib.import_module("zoo_scores")
    kept = zoo_scores.Kept(tmp_path / "kept.jsonl")
    assert kept.get("a", lambda: {"x": 0.1}) == {"x": 0.1}
    again = zoo_scores.Kept(tmp_path / "kept.jsonl")
    assert again.get("a", pytest.fail) == {"x": 0.1}
