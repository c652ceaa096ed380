"""Sens-Merging: what is measured against transformers' gradients, what becomes of it by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import small_families
import small_problems
import torch
from small_families import live

from evomerge.merging.fitted import sensitivity
from evomerge.merging.fitted.artifact import open_artifact
from evomerge.merging.fitted.base import fit
from evomerge.merging.fitted.sensitivity import SensitivityFit, SensitivitySettings
from evomerge.merging.merge import open_merge
from evomerge.merging.methods.registry import METHODS
from evomerge.merging.methods.sens_merging import (
    BASE_METHODS,
    alignments,
    balanced_softmax,
    layer_name,
    layer_shares,
    layer_weights,
)
from evomerge.merging.recipe import ModelRef, Recipe, Source
from evomerge.testing.fitted_cases import Learned
from evomerge.testing.merge_laws import TENSOR, coefficients_of, random_case

SETTINGS = SensitivitySettings(batch_size=3)
_KINDS = ("elementwise", "inner", "distances")


def _measured(problem, folder):
    fit(SensitivityFit(), problem, SETTINGS, folder)
    return open_artifact(folder)


def _loss(model, example):
    """In the model's dtype: transformers' own is of float32 logits."""
    tokens = torch.tensor(example.tokens)
    logits = model(tokens[None]).logits[0, example.answer - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, tokens[example.answer :])


def test_sensitivities_are_the_formulas(tmp_path):
    problem = small_problems.problem(small_problems.models(tmp_path, ("a", "b", "c")))
    artifact = _measured(problem, tmp_path / "out")
    layers = artifact.facts["layers"]
    assert set(layers) == {"embedding", "layer 0", "layer 1", "norm", "head"}
    for row, source in enumerate(artifact.facts["sources"]):
        model = live(problem, source, torch.float64)
        wanted = {kind: dict.fromkeys(layers, 0.0) for kind in ("elementwise", "inner")}
        examples = problem.calibration.of(source)
        for example in examples:
            model.zero_grad()
            _loss(model, example).backward()
            for name, parameter in model.named_parameters():
                product = parameter.detach() * parameter.grad
                layer = layer_name(name)
                wanted["elementwise"][layer] += float(product.abs().sum()) / len(examples)
                wanted["inner"][layer] += abs(float(product.sum())) / len(examples)
        for kind, values in wanted.items():
            found = artifact.tensor(kind)[row].tolist()
            assert found == pytest.approx([values[layer] for layer in layers], rel=1e-4)


def test_inner_is_what_the_loss_loses_as_a_tensor_shrinks(tmp_path):
    """S is the first order of zeroing: (L(W) − L((1 − h)·W))/h → Σ W·g."""
    problem = small_problems.problem(small_problems.models(tmp_path, ("a",)), count=1)
    artifact = _measured(problem, tmp_path / "out")
    model, example = live(problem, "a", torch.float64), problem.calibration.of("a")[0]
    column = artifact.facts["layers"].index("norm")
    norm = model.model.norm.weight

    def loss_of(weight):
        with torch.no_grad():
            kept = norm.clone()
            norm.copy_(weight)
            found = float(_loss(model, example))
            norm.copy_(kept)
        return found

    h, whole = 1e-5, norm.detach().clone()
    slope = (loss_of(whole * (1 + h)) - loss_of(whole * (1 - h))) / (2 * h)
    assert float(artifact.tensor("inner")[0, column]) == pytest.approx(abs(slope), rel=1e-3)
    each = 0.0
    for index in range(len(whole)):
        step = torch.zeros_like(whole)
        step[index] = whole[index] * h
        each += abs(loss_of(whole + step) - loss_of(whole - step)) / (2 * h)
    assert float(artifact.tensor("elementwise")[0, column]) == pytest.approx(each, rel=1e-3)


def test_distances_are_those_of_transformers_logits(tmp_path):
    problem = small_problems.problem(small_problems.models(tmp_path, ("a", "b", "c")))
    artifact = _measured(problem, tmp_path / "out")
    models = [live(problem, source, torch.float64) for source in problem.sources]
    for j, expert in enumerate(problem.sources):
        examples = problem.calibration.of(expert)
        for i, model in enumerate(models):
            total = 0.0
            for example in examples:
                tokens = torch.tensor([example.tokens])
                with torch.no_grad():
                    apart = (model(tokens).logits - models[j](tokens).logits)[0].norm(dim=-1)
                total += float(apart[example.answer - 1 : -1].mean()) / len(examples)
            assert float(artifact.tensor("distances")[i, j]) == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "qwen2", "mixtral"])
def test_no_weight_of_any_family_is_left_out_or_counted_twice(family, tmp_path):
    problem = small_families.problem(family, tmp_path, count=4)
    artifact = _measured(problem, tmp_path / "out")
    for row, source in enumerate(problem.sources):
        model, total = live(problem, source), 0.0
        for example in problem.calibration.of(source):
            model.zero_grad()
            _loss(model, example).backward()
            total += sum(float((p.detach() * p.grad).abs().sum()) for p in model.parameters())
        mean = total / len(problem.calibration.of(source))
        assert float(artifact.tensor("elementwise")[row].sum()) == pytest.approx(mean, rel=1e-4)


def test_interrupted_it_goes_on_to_the_same(tmp_path, monkeypatch):
    problem = small_problems.problem(small_problems.models(tmp_path, ("a", "b", "c")))
    whole = _measured(problem, tmp_path / "whole")
    counted, load = [], sensitivity._Run._load

    def interrupted(run, source):
        counted.append(source)
        if len(counted) == 5:
            raise KeyboardInterrupt
        load(run, source)

    monkeypatch.setattr(sensitivity._Run, "_load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _measured(problem, tmp_path / "out")
    assert _measured(problem, tmp_path / "out").digest == whole.digest
    assert counted[:5] == ["a", "b", "c", "a", "b"]
    assert counted[5:7] == ["a", "b"]  # the sensitivities were kept


def test_how_many_logits_are_held_changes_no_bit(tmp_path, monkeypatch):
    problem = small_problems.problem(small_problems.models(tmp_path), count=7)
    whole = _measured(problem, tmp_path / "whole")
    monkeypatch.setattr(sensitivity, "_HELD_BYTES", 1)
    chunked = _measured(problem, tmp_path / "out")
    for kind in _KINDS:
        torch.testing.assert_close(chunked.tensor(kind), whole.tensor(kind), rtol=1e-14, atol=0)


# from measurements to weights


def _weights(facts, tensors, *, names=None, **parameters):
    case = random_case(0, sources=len(facts["sources"]))
    case = case.of(dict(zip(names or facts["sources"], case.sources.values(), strict=True)))
    case = replace(case.given(**parameters), fitted=Learned(facts, tensors))
    return layer_weights(coefficients_of(METHODS["sens_merging"], case))


_FACTS = {"sources": ["a", "b"], "layers": [layer_name(TENSOR), "head"]}
_TENSORS = {
    "elementwise": torch.tensor([[3.0, 4.0], [8.0, 6.0]], dtype=torch.float64),
    "inner": torch.tensor([[4.0, 3.0], [0.0, 1.0]], dtype=torch.float64),
    "distances": torch.tensor([[0.0, 3.0], [1.0, 0.0]], dtype=torch.float64),
}


@pytest.mark.parametrize(
    ("given", "arguments"),
    [
        ({}, (0.6 * 0.75, 0.8 * 0.25)),
        ({"sensitivity": "inner"}, (0.8 * 0.75, 0.0)),
        ({"alignment": "similarity"}, (0.6 * 0.25, 0.8 * 0.75)),
        ({"temperature": 0.1}, (6 * 0.75, 8 * 0.25)),
    ],
)
def test_weights_by_hand(given, arguments):
    wanted = 2 * torch.tensor(arguments, dtype=torch.float64).softmax(0)
    assert _weights(_FACTS, _TENSORS, **given) == pytest.approx(wanted.tolist(), rel=1e-12)


def test_weights_sum_to_the_number_of_sources_at_any_temperature():
    for temperature in (1e-6, 1e-3, 0.1, 1.0, 1e300):
        assert sum(_weights(_FACTS, _TENSORS, temperature=temperature)) == pytest.approx(2)


def test_another_order_of_the_experts_permutes_the_weights():
    turned = {k: t.flip(0) if k != "distances" else t.flip(0, 1) for k, t in _TENSORS.items()}
    facts = {**_FACTS, "sources": ["b", "a"]}
    one, other = _weights(_FACTS, _TENSORS), _weights(facts, turned)
    assert one == pytest.approx(other, rel=1e-15)  # both by sorted names


def test_a_loss_in_other_units_changes_no_share():
    found = layer_shares(_TENSORS["elementwise"])
    torch.testing.assert_close(layer_shares(_TENSORS["elementwise"] * 7.3), found)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2, dtype=torch.float64))


def test_a_layer_without_gradient_has_no_share_and_a_source_without_any_equal_ones():
    found = layer_shares(torch.tensor([[0.0, 2.0], [0.0, 0.0]], dtype=torch.float64))
    assert found.tolist() == [[0.0, 1.0], [0.5, 0.5]]
    none = torch.zeros(2, 2, dtype=torch.float64)
    assert alignments(none, "distance").tolist() == alignments(none, "similarity").tolist()
    assert _weights(_FACTS, {**_TENSORS, "elementwise": none, "distances": none}) == [1.0, 1.0]


def test_who_differs_from_none_is_most_similar():
    distances = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    assert alignments(distances, "similarity").tolist() == [1.0, 0.0]


def test_a_layer_that_was_not_measured_has_weights_of_one():
    assert _weights({**_FACTS, "layers": ["head", "norm"]}, _TENSORS) == [1.0, 1.0]


def test_the_softmax_is_bounded_as_the_magnitude_warning_says():
    """α ≈ 0.17 over 35 layers and τ a third each: weights hardly leave 1 from T = 1 on."""
    arguments = [0.3 * 0.34, 0.05 * 0.33, 0.17 * 0.33]
    spread = {t: balanced_softmax(arguments, t) for t in (6.0, 1.0, 0.01)}
    assert max(spread[6.0]) < 1.02
    assert max(spread[1.0]) < 1.12
    assert max(spread[0.01]) > 2


# merges


def _recipe(folders, method, artifact=None, **parameters):
    sources = [Source(n, ModelRef(p)) for n, p in folders.items() if n != "base"]
    fitted = ModelRef(str(artifact)) if artifact else None
    base = ModelRef(folders["base"])
    return Recipe(method, base, tuple(sources), parameters, seed=3, artifact=fitted)


@pytest.mark.parametrize("name", BASE_METHODS)
def test_at_infinite_temperature_it_is_the_base_method_bit_for_bit(name, tmp_path):
    folders = small_problems.models(tmp_path, ("a", "b", "c"))
    _measured(small_problems.problem(folders), tmp_path / "sens")
    own = {"lambda": 0.4} | ({"density": 0.5} if name != "task_arithmetic" else {})
    hot = _recipe(
        folders,
        "sens_merging",
        tmp_path / "sens",
        **{"density": 0.5, **own, "base_method": name, "temperature": 1e300},
    )
    found, plain = open_merge(hot), open_merge(_recipe(folders, name, **own))
    cold = open_merge(replace(hot, parameters={**hot.parameters, "temperature": 0.01}))
    for tensor in found.names:
        assert torch.equal(found.tensor(tensor), plain.tensor(tensor))
    assert any(not torch.equal(cold.tensor(n), plain.tensor(n)) for n in found.names)


def test_identical_experts_weigh_the_same(tmp_path):
    folders = small_problems.models(tmp_path, ("a",))
    problem = small_problems.problem({**folders, "b": folders["a"]})
    same = problem.calibration.examples["a"]
    data = replace(problem.calibration, examples={"a": same, "b": same})
    artifact = _measured(replace(problem, calibration=data), tmp_path / "out")
    facts = {**artifact.facts, "layers": [layer_name(TENSOR), *artifact.facts["layers"][1:]]}
    tensors = {kind: artifact.tensor(kind) for kind in _KINDS}
    assert _weights(facts, tensors, temperature=1e-6) == [1.0, 1.0]
