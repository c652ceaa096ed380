"""Merged experts: what is scored is what transformers loads, on data that no merge has seen."""

from __future__ import annotations

import importlib
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from scipy import stats

from evomerge.merging.structure.experts.export import ExpertProblem, merge_experts
from evomerge.merging.structure.experts.settings import ExpertSettings

FOLDER = Path(__file__).parents[2] / "benchmarks"
SIZES = {"steps": 8, "batch": 4, "calibration": 6, "selection": 5, "report": 7}


@pytest.fixture(scope="module")
def moe() -> Iterator[ModuleType]:
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("moe")
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def scores(moe: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("moe")
    setup = moe.Setup(**SIZES)
    return moe.MoeScores(moe.trained(setup, 0, folder), moe.parts(setup, 0), 0)


def test_no_sequence_is_in_two_parts(moe: ModuleType) -> None:
    setup = moe.Setup(**SIZES, length=3)  # so short that many are drawn more than once
    found = moe.parts(setup, 3)
    rows = [tuple(row) for tokens in found.values() for row in tokens.tolist()]
    assert len(set(rows)) == len(rows) == 8 * 4 + 6 + 5 + 7
    assert not torch.equal(found["report"], moe.parts(setup, 4)["report"])


def test_a_model_is_trained_once(
    moe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixtral = importlib.import_module("moe_mixtral")
    setup = moe.Setup(**SIZES | {"steps": 2})
    place = moe.trained(setup, 0, tmp_path)
    monkeypatch.setattr(mixtral, "train", lambda setup, seed: pytest.fail("trained again"))
    assert moe.trained(setup, 0, tmp_path) == place


@pytest.mark.parametrize("settings", [{}, {"form": "collapsed", "router": "mean"}])
def test_a_loss_is_that_of_the_checkpoint_in_transformers(
    moe: ModuleType, scores: Any, tmp_path: Path, settings: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    parts = moe.parts(moe.Setup(**SIZES), 0)
    examples = importlib.import_module("moe_mixtral").examples(parts["calibration"])
    chosen = ExpertSettings(keep=4, **settings)
    merge_experts(ExpertProblem(scores.model, examples, chosen), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        wanted = float(model(input_ids=parts["report"], labels=parts["report"]).loss)
    assert scores.merged(chosen).losses["report"] == pytest.approx(wanted, rel=1e-5)


def test_a_plan_scores_as_what_is_written_by_it(scores: Any) -> None:
    settings = ExpertSettings(keep=3)
    planned = scores.planned(scores.plan(settings), settings, ("report",))
    written = scores.merged(settings)
    assert planned.losses["report"] == pytest.approx(written.losses["report"], rel=1e-5)
    assert tuple(planned.experts) == tuple(written.experts)


def test_every_allocation_of_a_size_is_tried(moe: ModuleType) -> None:
    search = importlib.import_module("moe_search")
    found = list(search.allocations(3, 8, 12))
    assert len(set(found)) == len(found)
    # stars and bars, less those where one layer has more than 8
    assert len(found) == math.comb(11, 2) - 3 * math.comb(3, 2)
    assert all(sum(counts) == 12 and min(counts) >= 1 and max(counts) <= 8 for counts in found)


def test_a_change_moves_experts_and_keeps_the_size(moe: ModuleType, scores: Any) -> None:
    search = importlib.import_module("moe_search")
    dice = random.Random(0)
    plans = scores.plan(ExpertSettings(keep=[8, 3, 1]))
    for _ in range(30):
        new = search.changed(plans, scores.usage, dice)
        assert [len(plan.groups.members) for plan in new] == [8, 3, 1]
        for old_plan, plan in zip(plans, new, strict=True):
            for members in plan.groups.members:
                assert sum(plan.weights[expert] for expert in members) == pytest.approx(1)
                assert plan.groups.leaders[members[0]] in members
            same = plan.groups.members == old_plan.groups.members
            assert same or len(plan.groups.members) > 1
        plans = new


def test_a_search_is_no_worse_where_it_chooses(scores: Any) -> None:
    search = importlib.import_module("moe_search")
    found = search.searched(scores, 2, moves=3)
    losses = {arm: one.losses["selection"] for arm, one in found.items()}
    assert losses[search.GROUPS] <= losses[search.COUNTS] <= losses[search.RULE]
    assert losses[search.COUNTS] <= losses[search.UNIFORM]
    assert sum(found[search.COUNTS].experts) == 6


def test_differences_are_paired_by_seed(moe: ModuleType) -> None:
    page = importlib.import_module("moe_page")
    ours, theirs = [1.0, 2.1, 2.9], [1.2, 2.2, 3.3]
    found = page.paired(ours, theirs)
    half = stats.t.ppf(0.975, 2) * 0.15275252316519466 / math.sqrt(3)
    assert found.mean == pytest.approx(-0.7 / 3)
    assert found.low == pytest.approx(-0.7 / 3 - half)
    assert found.high == pytest.approx(-0.7 / 3 + half)
    assert found.p == pytest.approx(stats.ttest_rel(ours, theirs).pvalue)
    assert page.paired(ours, ours).p == 1


def test_forms_weigh_what_they_hold(moe: ModuleType, scores: Any) -> None:
    forms = importlib.import_module("moe_forms")
    found = forms.forms(Path(scores.model.path), rounds=1)
    # 12 of 24 experts of 3 * 32 * 32; as in the specification's toy, 88,032 and 51,168
    assert found["full"].parameters == found["replicated"].parameters == 88_032
    assert found["remapped"].parameters == 51_168
    assert found["collapsed"].parameters == 51_168 - 3 * 4 * 32
    for form in found.values():
        header = form.weights_bytes - 4 * form.parameters
        assert 0 < header < 20_000


def test_every_variant_has_its_row(moe: ModuleType) -> None:
    page = importlib.import_module("moe_page")
    forms = importlib.import_module("moe_forms")
    search = importlib.import_module("moe_search")
    scored = importlib.import_module("moe_scores").Scored
    kept, arms = (4, 4, 4), (search.RULE, search.UNIFORM, search.COUNTS, search.GROUPS)
    found = []
    for seed in (0, 1):
        rows = {name: scored({"report": seed + k}, kept) for k, name in enumerate(moe.VARIANTS)}
        searches = {
            arm: scored({"selection": -k, "report": seed * k}, kept) for k, arm in enumerate(arms)
        }
        found.append(page.Measured(seed, 1.0, [[0.5, 0.5]] * 3, {4: rows}, {4: searches}))
    times = dict.fromkeys(forms.IMPLEMENTATIONS, (1.0, 1.0))
    text = page.page(moe.Setup(), found, {"model": {"full": forms.Form(4, 1, times)}}, 3)
    for name, settings in moe.VARIANTS.items():
        assert f"| {name} | " in text
        ExpertSettings.model_validate({"keep": 4, **settings})
    assert "experts by layer: beats the rule on the selection part, does not beat" in text
