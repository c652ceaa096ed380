"""Experts merged by a recipe: the same tensors as `evomerge merge` writes, live and on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_experts
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from evomerge.checkpoints.adapted import open_model, open_models
from evomerge.errors import MergeError, SpecError
from evomerge.merging.export import export
from evomerge.merging.fitted.artifact import open_artifact
from evomerge.merging.fitted.base import Problem, fit
from evomerge.merging.fitted.calibration import Calibration
from evomerge.merging.materialise import Materialiser, load_model
from evomerge.merging.merge import Merge, open_merge
from evomerge.merging.methods.m_smoe import MSmoe
from evomerge.merging.recipe import Group, ModelRef, Recipe, Source
from evomerge.merging.structure.experts.export import ExpertProblem, merge_experts
from evomerge.merging.structure.experts.model import shared_out
from evomerge.merging.structure.experts.routing_fit import (
    RoutingFit,
    RoutingSettings,
    read_statistics,
)
from evomerge.merging.structure.experts.settings import ExpertSettings

EXPERTS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_experts.folder("mixtral", tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="module")
def artifact(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fits") / "routing"
    fit(RoutingFit(), _problem(folder), RoutingSettings(gradients=True), path)
    return path


def _problem(folder: Path | str, sources: Sequence[str] = ("mixtral",)) -> Problem:
    model = open_model(str(folder))
    data = {name: tuple(small_experts.examples()) for name in sources}
    calibration = Calibration(data, dict.fromkeys(sources, "random tokens"))
    digests = {model.path: model.scan().digest}
    return Problem(None, dict.fromkeys(sources, model), digests, calibration)


def _recipe(folder: Path, artifact: Path, **parameters: Any) -> Recipe:
    model = ModelRef(str(folder))
    reference = ModelRef(str(artifact))
    sources = (Source("mixtral", model),)
    return Recipe("m_smoe", model, sources, parameters, artifact=reference)


def _merge(recipe: Recipe) -> Merge:
    return Merge(recipe, open_models(model.path for model in recipe.models))


@pytest.mark.parametrize("similarity", MSmoe().parameters[4].choices)
def test_every_base_is_that_of_a_merge_of_experts(folder, artifact, similarity, tmp_path):
    settings = ExpertSettings(keep=2, allocation="uniform", similarity=similarity)
    problem = ExpertProblem(open_model(str(folder)), small_experts.examples(), settings)
    wanted = merge_experts(problem, tmp_path / "experts")
    plans = _plans(folder, artifact, keep=2.0, allocation="shares", similarity=similarity)
    assert [plan.groups for plan in plans] == [plan.groups for plan in wanted]


@pytest.mark.parametrize(
    ("parameters", "settings"),
    [
        ({"keep": 2.0}, {"keep": 2}),
        ({"keep": 2.0, "allocation": "shares"}, {"keep": 2, "allocation": "uniform"}),
        ({"keep": 3.0, "groups": "clusters", "similarity": "outputs", "alignment": "none",
          "allocation": "shares"}, {"keep": 3, "method": "hc_smoe"}),
        ({"keep": 2.0, "groups": "prune", "alignment": "none"}, {"keep": 2, "method": "prune"}),
        ({"keep": 2.0, "alignment": "dominant", "exponent": 0.5, "usage": "gate_mass"},
         {"keep": 2, "alignment": "dominant", "exponent": 0.5, "usage": "gate_mass"}),
    ],
)  # fmt: skip
def test_it_is_what_a_merge_of_experts_writes(folder, artifact, tmp_path, parameters, settings):
    model = open_model(str(folder))
    chosen = ExpertSettings(form="replicated", **settings)
    merge_experts(ExpertProblem(model, small_experts.examples(), chosen), tmp_path / "experts")
    wanted = load_file(tmp_path / "experts" / "model.safetensors")
    merge = _merge(_recipe(folder, artifact, **parameters))
    assert set(merge.names) == set(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(merge.tensor(name), tensor), name
    assert any(not torch.equal(wanted[n], model.tensor(n)) for n in wanted)


def test_layers_keep_experts_in_proportion_to_their_shares(folder, artifact):
    layers = len(_plans(folder, artifact, keep=2.0))
    shares = [3.0] + [1.0] * (layers - 1)
    plans = _plans(folder, artifact, keep=2.0, allocation="shares", share={"blocks": shares})
    kept = [len(plan.groups.members) for plan in plans]
    assert sum(kept) == 2 * layers
    assert kept[0] > kept[1]


def _plans(folder: Path, artifact: Path, **parameters: Any) -> Any:
    return _merge(_recipe(folder, artifact, **parameters)).anchor.plans


def test_as_published_it_keeps_whole_numbers(folder, artifact):
    """Where a search begins, an average need not be one."""
    published = MSmoe().published(_recipe(folder, artifact, keep=2.6, allocation="shares"))
    assert published.parameters == {"keep": 3.0}
    assert len(_merge(published).anchor.plans) > 0


def test_numbers_that_are_shared_out():
    assert shared_out(6, [1.0, 1.0, 1.0], 4) == (2, 2, 2)
    assert shared_out(6, [1.0, 2.0, 3.0], 4) == (1, 2, 3)
    assert shared_out(7, [1.0, 100.0], 4) == (3, 4)
    assert shared_out(2, [1.0, 100.0], 4) == (1, 1)
    assert shared_out(8, [0.001, 1.0], 4) == (4, 4)


def test_all_experts_kept_is_the_model_itself(folder, artifact):
    merge = _merge(_recipe(folder, artifact, keep=float(EXPERTS)))
    model = open_model(str(folder))
    for name in model.names:
        assert torch.equal(merge.tensor(name), model.tensor(name)), name


def test_a_live_model_is_what_is_exported_whatever_was_written_before(folder, artifact, tmp_path):
    recipes = [
        _recipe(folder, artifact, keep=2.0, allocation="shares", share={"blocks": [1.0, 2.0]}),
        _recipe(folder, artifact, keep=3.0),
        Recipe("linear", ModelRef(str(folder)), (Source("mixtral", ModelRef(str(folder))),),
               {"weight": 1.0}),
        _recipe(folder, artifact, keep=2.0, allocation="shares", share={"blocks": [2.0, 1.0]}),
    ]  # fmt: skip
    models = open_models([str(folder)])
    live, _ = load_model(models[str(folder)])
    materialiser = Materialiser(live, models)
    for number, recipe in enumerate(recipes):
        materialiser.write(recipe)
        export(recipe, tmp_path / str(number))
        written = AutoModelForCausalLM.from_pretrained(tmp_path / str(number)).state_dict()
        for name, tensor in live.state_dict().items():
            assert torch.equal(tensor, written[name]), (number, name)


def test_a_fit_of_the_same_is_the_same(folder, artifact, tmp_path):
    fit(RoutingFit(), _problem(folder), RoutingSettings(gradients=True), tmp_path / "again")
    first, again = (Path(p) / "artifact.json" for p in (artifact, tmp_path / "again"))
    assert '"digest"' in first.read_text()
    digests = {json.loads(path.read_text())["digest"] for path in (first, again)}
    assert len(digests) == 1


def test_a_model_behind_an_adapter_is_the_one_that_is_watched(folder, tmp_path):
    """Against the same model with the adapter merged into it by peft."""
    small_adapters = pytest.importorskip("small_adapters")
    adapter = small_adapters.train(folder, tmp_path / "adapter", target_modules=["q_proj"], r=4)
    small_adapters.merged(folder, adapter, tmp_path / "whole")
    small_experts.small_llama.tokenizer().save_pretrained(tmp_path / "whole")
    seen = []
    for number, path in enumerate((f"{folder}+{adapter}", tmp_path / "whole")):
        place = tmp_path / str(number)
        fit(RoutingFit(), _problem(path), RoutingSettings(outputs=False), place)
        seen.append(read_statistics(open_artifact(place)))
    for one, two in zip(*seen, strict=True):
        torch.testing.assert_close(one.logits, two.logits, rtol=1e-4, atol=1e-6)


def test_what_does_not_fit_is_refused_in_one_line(folder, artifact, tmp_path):
    with pytest.raises(MergeError, match=r"^keep: 5 experts of each layer; there are 1 to 4$"):
        _merge(_recipe(folder, artifact, keep=5.0))
    with pytest.raises(MergeError, match=r"keep: 2\.5; the adaptive rule takes a whole number"):
        _merge(_recipe(folder, artifact, keep=2.5))
    with pytest.raises(MergeError, match="exponent: differs between layers"):
        _merge(_recipe(folder, artifact, keep=2.0, exponent={"blocks": [0.0, 1.0]}))
    recipe = replace(
        _recipe(folder, artifact, keep=2.0), groups=(Group({"type": "mlp"}, "linear"),)
    )
    with pytest.raises(SpecError, match="m_smoe changes the structure of whole models"):
        open_merge(recipe)
    with pytest.raises(MergeError, match="watches one model"):
        fit(RoutingFit(), _problem(folder, ("a", "b")), RoutingSettings(), tmp_path / "two")
    other = small_experts.folder("qwen2_moe", tmp_path / "qwen")
    with pytest.raises(MergeError, match="was another model when it was fitted"):
        open_merge(_recipe(other, artifact, keep=2.0))


def test_it_says_how_many_experts_are_kept(folder, artifact):
    merge = _merge(
        _recipe(folder, artifact, keep=2.0, allocation="shares", share={"blocks": [1.0, 9.0]})
    )
    assert merge.structure == "experts kept in each layer: 1, 3 of 4, written in all places"


def test_ranks_are_shared_out_at_one_size_and_matrices_cut_to_them(folder, artifact):
    whole = _merge(_recipe(folder, artifact, keep=2.0, allocation="shares"))
    cut = _merge(
        _recipe(folder, artifact, keep=2.0, allocation="shares", rank=4.0, density=0.25,
                rank_share={"blocks": [1.0, 3.0]})
    )  # fmt: skip
    model = cut.anchor
    assert model.structure.endswith("; matrices of rank 2, 6 and 25% of rows")
    for name in whole.names:
        before, after = whole.tensor(name), cut.tensor(name)
        if ".experts." not in name:
            assert torch.equal(before, after), name
            continue
        rank = 2 if ".layers.0." in name else 6
        q, sigma, r = torch.linalg.svd(before.double(), full_matrices=False)
        product = (q[:, :rank] * sigma[:rank]) @ r[:rank]
        rest = before.double() - product
        rows = rest.norm(dim=1).argsort(descending=True)[: round(0.25 * len(rest))]
        product[rows] += rest[rows]
        assert torch.allclose(after.double(), product, atol=1e-6), name
    assert cut.fingerprint(whole.names[0]) == whole.fingerprint(whole.names[0])


def test_a_rank_beyond_a_matrix_leaves_it_whole_and_lists_are_compressed(
    folder, artifact, tmp_path
):
    whole = _merge(_recipe(folder, artifact, keep=2.0))
    same = _merge(_recipe(folder, artifact, keep=2.0, rank=500.0))
    assert all(torch.equal(whole.tensor(n), same.tensor(n)) for n in whole.names)
    compress = {"rank": [2, 6], "density": 0.0}
    settings = ExpertSettings(keep=2, allocation="uniform", compress=compress)
    problem = ExpertProblem(open_model(str(folder)), small_experts.examples(), settings)
    merge_experts(problem, tmp_path / "experts")
    found = load_file(tmp_path / "experts" / "model.safetensors")
    for name, tensor in found.items():
        if ".experts." in name:
            rank = 2 if ".layers.0." in name else 6
            assert torch.linalg.matrix_rank(tensor.double(), rtol=1e-5) == rank, name
    settings = ExpertSettings(keep=2, allocation="uniform", compress={"rank": [2, 6, 6]})
    with pytest.raises(MergeError, match="rank: lists 3, expected one for each of 2 layers"):
        merge_experts(replace(problem, settings=settings), tmp_path / "three")
