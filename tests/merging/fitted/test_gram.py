"""RegMean and MaTS against least squares on the raw inputs of layers, in float64."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import pytest
import small_families
import tiny_models
import torch
from small_families import FAMILIES
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from evomerge.errors import CandidateError, MergeError, UserError
from evomerge.merging.fitted import gram
from evomerge.merging.fitted.artifact import open_artifact
from evomerge.merging.fitted.base import Problem, fit
from evomerge.merging.fitted.gram import GramFit, GramSettings
from evomerge.merging.merge import Merge, open_merge
from evomerge.merging.methods.gram import gram_key, packed, unpacked
from evomerge.merging.methods.registry import check
from evomerge.merging.methods.regmean import RegMean
from evomerge.merging.recipe import ModelRef, Recipe, Source
from evomerge.testing.fitted_cases import Learned
from evomerge.testing.merge_laws import TENSOR, Case, merged

SMALL = GramSettings(batch_size=3)


@pytest.fixture(scope="module", params=[*FAMILIES, "falcon"])
def fitted(request, tmp_path_factory):
    """A family's problem, its artifact, and the raw inputs of each layer by source."""
    root = tmp_path_factory.mktemp(request.param)
    found = small_families.problem(request.param, root)
    fit(GramFit(), found, SMALL, root / "gram")
    return found, root / "gram", {name: _inputs(found, name) for name in found.sources}


def _inputs(found: Problem, source: str) -> dict[str, Tensor]:
    """What each linear layer is given, row by row, one example at a time. Float64 [n, d]."""
    model, seen = small_families.live(found, source), defaultdict(list)
    tied = model.get_input_embeddings().weight
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module.weight is not tied:
            module.register_forward_hook(
                lambda m, x, y, name=f"{path}.weight": seen[name].append(x[0].double())
            )
    with torch.no_grad():
        for example in found.calibration.of(source):
            model(torch.tensor([example.tokens]))
    return {name: torch.cat([x.flatten(0, -2) for x in rows]) for name, rows in seen.items()}


def _weights(found: Problem, source: str, name: str, inputs: int) -> Tensor:
    """One layer's weights, inputs first: only those of Conv1D are stored so."""
    weight = found.sources[source].tensor(name).double()
    return weight if ".c_" in name else weight.T


def _merged(found: Problem, merge: Merge, name: str) -> Tensor:
    weight = merge.tensor(name).double()
    return weight if ".c_" in name else weight.T


def _stacked(found: Problem, inputs, name: str) -> tuple[Tensor, Tensor]:
    """X/√n of all sources over each other, and what each computes of its own."""
    rows, targets = [], []
    for source, seen in inputs.items():
        x = seen[name] / len(seen[name]) ** 0.5
        rows.append(x)
        targets.append(x @ _weights(found, source, name, x.shape[1]))
    return torch.cat(rows), torch.cat(targets)


def test_every_linear_layer_has_the_inner_products_of_its_inputs(fitted):
    _, folder, inputs = fitted
    artifact = open_artifact(folder)
    for source, seen in inputs.items():
        known = artifact.facts["inputs"][source]
        assert set(known) == set(seen)
        for name, rows in seen.items():
            size = rows.shape[1]
            matrix = unpacked(artifact.tensor(gram_key(source, known[name])), size)
            wanted = rows.T @ rows / len(rows)
            scale = wanted.diagonal().sqrt()
            error = (matrix - wanted) / (scale * scale[:, None])
            assert float(error.abs().max()) < 1e-6, name


def test_layers_with_one_input_share_a_matrix(fitted):
    _, folder, inputs = fitted
    artifact = open_artifact(folder)
    seen = inputs["a"]
    alike = {name: [n for n in seen if torch.equal(seen[n], seen[name])] for name in seen}
    assert len({known for known in artifact.facts["inputs"]["a"].values()}) == len(
        {tuple(names) for names in alike.values()}
    )


def test_regmean_minimises_what_the_paper_says(fitted):
    found, folder, inputs = fitted
    merge = open_merge(small_families.recipe(found, "regmean", folder, off_diagonal=1.0))
    mean = open_merge(small_families.recipe(found, "linear", folder))
    for name in inputs["a"]:
        x, y = _stacked(found, inputs, name)
        best = torch.linalg.lstsq(x, y, driver="gelsd").solution
        least = float((x @ best - y).square().sum())
        got = float((x @ _merged(found, merge, name) - y).square().sum())
        averaged = float((x @ _merged(found, mean, name) - y).square().sum())
        assert least - 1e-9 <= got <= least + 1e-5 * (averaged - least), name


@pytest.mark.parametrize("a", [0.9, 0.5])
def test_regmean_solves_its_system(fitted, a):
    found, folder, inputs = fitted
    merge = open_merge(small_families.recipe(found, "regmean", folder, off_diagonal=a))
    for name in inputs["a"]:
        left, right = 0.0, 0.0
        for source, seen in inputs.items():
            gram = seen[name].T @ seen[name] / len(seen[name])
            gram = a * gram + (1 - a) * gram.diagonal().diag()
            left = left + gram
            right = right + gram @ _weights(found, source, name, len(gram))
        wanted = torch.linalg.lstsq(left, right).solution
        torch.testing.assert_close(_merged(found, merge, name), wanted, rtol=1e-5, atol=1e-5)


def test_what_has_no_inner_products_is_averaged(fitted):
    found, folder, inputs = fitted
    merge = open_merge(small_families.recipe(found, "regmean", folder))
    others = [name for name in merge.names if name not in inputs["a"]]
    assert any("embed" in name or "wte" in name for name in others)
    for name in others:
        mean = sum(model.tensor(name).double() for model in found.sources.values()) / 2
        torch.testing.assert_close(merge.tensor(name).double(), mean, rtol=1e-6, atol=1e-7)


def test_without_off_diagonals_each_weight_is_a_mean(fitted):
    """a = 0: W[j] = Σᵢ Gᵢ[j, j]·Wᵢ[j] / Σᵢ Gᵢ[j, j]"""
    found, folder, inputs = fitted
    merge = open_merge(small_families.recipe(found, "regmean", folder, off_diagonal=0.0))
    for name in inputs["a"]:
        squares = {s: x[name].square().mean(0)[:, None] for s, x in inputs.items()}
        size = len(squares["a"])
        total = sum(squares[s] * _weights(found, s, name, size) for s in squares)
        wanted = total / sum(squares.values())
        torch.testing.assert_close(_merged(found, merge, name), wanted, rtol=1e-5, atol=1e-6)


def test_mats_falls_to_regmean(fitted):
    found, folder, inputs = fitted
    regmean = open_merge(small_families.recipe(found, "regmean", folder, off_diagonal=0.9))
    name = next(n for n in inputs["a"] if "mlp" in n or "self_attn" in n)
    steps = [
        open_merge(
            small_families.recipe(
                found, "mats", folder, off_diagonal=0.9, iterations=k, init="task_arithmetic"
            )
        )
        for k in (0, 1, 2, 4, 8, 16, 200)
    ]
    goal = _merged(found, regmean, name)
    gram = sum(x[name].T @ x[name] / len(x[name]) for x in inputs.values())
    gram = 0.9 * gram + 0.1 * gram.diagonal().diag()
    left = [_merged(found, step, name) - goal for step in steps]
    errors = [float((delta * (gram @ delta)).sum()) for delta in left]
    assert all(one > other for one, other in pairwise(errors[:-1]))
    torch.testing.assert_close(_merged(found, steps[-1], name), goal, rtol=1e-4, atol=1e-5)
    start = open_merge(small_families.recipe(found, "task_arithmetic", folder, **{"lambda": 0.3}))
    for other in steps[0].names:
        assert torch.equal(steps[0].tensor(other), start.tensor(other))


def test_mats_from_the_average_begins_with_the_average(fitted):
    found, folder, _ = fitted
    mean = open_merge(small_families.recipe(found, "linear", folder))
    merge = open_merge(small_families.recipe(found, "mats", folder, iterations=0))
    for name in merge.names:
        assert torch.equal(merge.tensor(name), mean.tensor(name))


def test_identical_sources_are_their_merge(tmp_path):
    found = small_families.problem("llama", tmp_path)
    found = replace(found, sources=dict.fromkeys("ab", found.sources["a"]))
    fit(GramFit(), found, SMALL, tmp_path / "gram")
    for method, given in (("regmean", {"off_diagonal": 1.0}), ("mats", {})):
        merge = open_merge(small_families.recipe(found, method, tmp_path / "gram", **given))
        for name in merge.names:
            own = found.sources["a"].tensor(name)
            torch.testing.assert_close(merge.tensor(name), own, rtol=1e-6, atol=1e-7)


def test_fewer_tokens_than_inputs_are_enough(tmp_path):
    """Singular: 16 inputs, five tokens for each source, so the merge does as both sources do."""
    found = small_families.problem("llama", tmp_path, count=1)
    fit(GramFit(), found, SMALL, tmp_path / "gram")
    inputs = {source: _inputs(found, source) for source in found.sources}
    given = {"off_diagonal": 1.0}
    merge = open_merge(small_families.recipe(found, "regmean", tmp_path / "gram", **given))
    mean = open_merge(small_families.recipe(found, "linear", tmp_path / "gram"))
    for name in ("model.layers.1.self_attn.v_proj.weight", "model.layers.1.mlp.up_proj.weight"):
        x, y = _stacked(found, inputs, name)
        assert len(x) <= x.shape[1]
        off = [float((x @ _merged(found, m, name) - y).norm()) for m in (merge, mean)]
        assert off[0] < 0.01 * off[1]


def test_by_hand():
    """Two inputs, one output; the second is dead in all data and keeps the average."""
    grams = {"a": [[4.0, 0.0], [0.0, 0.0]], "b": [[1.0, 0.0], [0.0, 0.0]]}
    tensors = {gram_key(n, TENSOR): packed(torch.tensor(g)) for n, g in grams.items()}
    facts = {"inputs": {n: {TENSOR: TENSOR} for n in grams}, "inputs_first": []}
    sources = {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([6.0, 5.0])}
    case = Case(torch.zeros(2), sources, {}, shape=(1, 2), fitted=Learned(facts, tensors))
    assert merged(RegMean(), case).tolist() == [2.0, 4.0]  # (4·1 + 1·6)/5, (3 + 5)/2
    twice = replace(case, own={"b": {"weight": 4.0}})
    assert merged(RegMean(), twice).tolist() == pytest.approx([3.5, 4.6])  # (4 + 24)/8, 23/5


def test_a_matrix_that_is_no_gram_matrix_is_one_line():
    wrong = {gram_key(n, TENSOR): torch.tensor([1.0, 9.0, 1.0]) for n in "ab"}
    facts = {"inputs": {n: {TENSOR: TENSOR} for n in "ab"}, "inputs_first": []}
    sources = {"a": torch.ones(2), "b": torch.zeros(2)}
    case = Case(torch.zeros(2), sources, {}, shape=(1, 2), fitted=Learned(facts, wrong))
    with pytest.raises(CandidateError, match="singular; lower off_diagonal"):
        merged(RegMean(), case)
    with pytest.raises(MergeError, match="layers of another size"):
        merged(RegMean(), replace(case, shape=(2, 1)))


def test_interrupted_it_goes_on_to_the_same(tmp_path, monkeypatch):
    found = small_families.problem("llama", tmp_path)
    fit(GramFit(), found, SMALL, tmp_path / "whole")
    counted, add = [], gram.Grams.add

    def interrupted(self, examples):
        counted.append(examples)
        if len(counted) == 9:  # in the second source
            raise KeyboardInterrupt
        add(self, examples)

    monkeypatch.setattr(gram.Grams, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(GramFit(), found, SMALL, tmp_path / "gram")
    fit(GramFit(), found, SMALL, tmp_path / "gram")
    assert open_artifact(tmp_path / "whole").digest == open_artifact(tmp_path / "gram").digest
    assert len(counted) == 9 + 6  # the first source is not computed again


def test_activations_that_are_no_numbers_are_one_line(tmp_path):
    folders = small_families.folders("llama", tmp_path)
    model = tiny_models.causal("llama", dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(1e30)
        model.model.layers[0].mlp.gate_proj.weight.fill_(1e30)
    model.save_pretrained(folders["b"])
    found = small_families.opened(folders)
    with pytest.raises(MergeError, match=r"b: the input of .* is NaN or infinite"):
        fit(GramFit(), found, SMALL, tmp_path / "gram")
    assert not (tmp_path / "gram").exists()


def test_without_data_it_is_refused(tmp_path):
    found = small_families.problem("llama", tmp_path, count=0)
    with pytest.raises(UserError, match="source 'a': 0 examples"):
        fit(GramFit(), found, SMALL, tmp_path / "gram")


class _Same(nn.Linear):
    def forward(self, rows):
        return rows @ self.weight.T + self.bias


class _Squashed(nn.Linear):
    def forward(self, rows):
        return super().forward(rows).tanh()


class _Other(nn.Linear):
    def forward(self, rows, experts):
        return super().forward(rows)[experts]


def test_a_subclass_counts_if_it_computes_the_same():
    """As Falcon's layers do; a router's scores are something else."""
    assert [gram._is_linear(kind(4, 3)) for kind in (_Same, _Squashed, _Other)] == [True, 0, 0]


def test_layers_that_are_stacked_anew_are_refused():
    """A layer's matrix would be looked up under the place that the layer has in the stack."""
    sources = tuple(Source(name, ModelRef(name)) for name in "ab")
    slices = ({"a": (1, 2), "b": (0, 1)}, {"a": (0, 1), "b": (1, 2)})
    recipe = Recipe("regmean", None, sources, slices=slices, artifact=ModelRef("gram"))
    assert "name the folder" in check(replace(recipe, artifact=None))[0]
    (fault,) = check(recipe)
    assert fault.startswith("slices: what a fit learned is of layers in their own places")


def test_triangles_hold_a_matrix():
    matrix = torch.randn(7, 7)
    matrix = matrix + matrix.T
    assert torch.equal(unpacked(packed(matrix), 7).float(), matrix)
