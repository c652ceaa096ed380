"""Merged networks on digits: what is compared is what is said, on images that no merge has seen."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    sys.path.insert(0, str(FOLDER))
    names = ("pleas_digits", "pleas_merges", "pleas_page")
    yield {name: importlib.import_module(name) for name in names}
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def merges(modules: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Any:
    patch = pytest.MonkeyPatch()
    patch.setattr(modules["pleas_merges"], "CALIBRATION", 20)
    yield modules["pleas_merges"].Merges("ResNet", 0, tmp_path_factory.mktemp("pleas"), epochs=1)
    patch.undo()


def test_no_image_is_in_two_parts(modules: dict[str, ModuleType]) -> None:
    found = modules["pleas_digits"].parts(3)
    rows = [tuple(image.flatten().tolist()) for part in found.values() for image in part.a]
    assert {name: len(part.labels) for name, part in found.items()} == {
        "train": 1000, "selection": 297, "report": 500,
    }  # fmt: skip
    assert len(set(rows)) == len(rows)
    part = found["report"].first(4)
    assert torch.equal(torch.rot90(part.b, -1, (2, 3)), -part.a)
    assert torch.equal(part.both[::2], part.a)


def test_networks_are_trained_once(
    modules: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digits = modules["pleas_digits"]
    one = digits.parents("ViT", 1, tmp_path, 1)
    monkeypatch.setattr(digits, "train", lambda *_: pytest.fail("trained again"))
    two = digits.parents("ViT", 1, tmp_path, 1)
    x = digits.parts(1)["report"].a
    with torch.no_grad():
        assert all(torch.equal(a(x), b(x)) for a, b in zip(one, two, strict=True))
        assert not torch.equal(one[0](x), one[1](x))


def test_a_score_is_the_merged_networks_and_is_kept(
    modules: dict[str, ModuleType], merges: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pleas = modules["pleas_merges"]
    found = merges._score(pleas.PERMUTED, pleas.RESET)
    network = pleas.merged_network(merges.permuted, {}, merges.data(20), pleas.FORMS[pleas.RESET])
    part, right = merges.parts["report"], 0
    with torch.no_grad():
        for images in (part.a, part.b):
            right += int((network.network(images).argmax(1) == part.labels).sum())
    assert found == pytest.approx(100 * right / 1000, abs=1e-9)
    monkeypatch.setattr(pleas, "merged_network", lambda *_: pytest.fail("measured again"))
    assert merges._score(pleas.PERMUTED, pleas.RESET) == found


def test_the_search_chooses_on_selection_and_starts_from_a_rule(
    modules: dict[str, ModuleType], merges: Any
) -> None:
    pleas = modules["pleas_merges"]
    (arms,) = merges.search(2).values()
    for rule in (pleas.UNIFORM, pleas.PROGRAMME):
        assert arms[f"search from {rule}"]["selection"] >= arms[rule]["selection"]
    relative = merges.permuted.costs.relative
    assert all(relative(merges.apart(how, 1.4)) <= 1.4 for how in pleas.ALLOCATIONS)


def test_the_page_shows_means_and_intervals_over_seeds(modules: dict[str, ModuleType]) -> None:
    pleas, page = modules["pleas_merges"], modules["pleas_page"]
    seeds = [_measured(pleas, page, np.random.default_rng(seed)) for seed in range(5)]
    text = page.page({"ResNet": seeds}, 7)
    values = [one.at_one[pleas.PERMUTED][pleas.PUBLISHED] for one in seeds]
    half = stats.sem(values) * stats.t.ppf(0.975, 4)
    row = next(line for line in text.splitlines() if line.startswith(f"| {pleas.PERMUTED} |"))
    assert f"{np.mean(values):.1f} ± {half:.1f}" in row
    less = [one.at_one[pleas.PERMUTED][pleas.RESET] for one in seeds]
    low, high = stats.ttest_rel(values, less).confidence_interval(0.95)
    assert f"less {pleas.PERMUTED}, {pleas.RESET}: {np.mean(values) - np.mean(less):+.1f}" in text
    assert f"[{low:+.1f}, {high:+.1f}]" in text
    assert len(re.findall(r"search from \w+ against \w+: ", text)) == 4
    assert "7 candidates" in text


def _measured(pleas: ModuleType, page: ModuleType, dice: Any) -> Any:
    def some(*names: str) -> dict[str, float]:
        return {name: float(dice.uniform(10, 90)) for name in names}

    budgets = [1.0 + 0.9 * (budget - 1.0) for budget in pleas.BUDGETS]
    curve = {
        form: {
            how: [(cost, float(dice.uniform(10, 90))) for cost in budgets]
            for how in pleas.ALLOCATIONS
        }
        for form in pleas.CURVED
    }
    arms = (*pleas.ALLOCATIONS, *page.STARTED)
    return page.Measured(
        0,
        some("an ensemble"),
        {name: some(*pleas.FORMS) for name in pleas.MATCHINGS},
        curve,
        {form: list(some(*map(str, pleas.SIZES)).values()) for form in pleas.CURVED},
        {name: some(pleas.PUBLISHED, pleas.SEQUENTIAL) for name in pleas.OTHER_DATA},
        {form: {arm: some("selection", "report") for arm in arms} for form in page.SEARCHED},
    )
