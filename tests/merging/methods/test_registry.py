"""Recipes checked against the methods' declarations, and parameters resolved for one tensor."""

from __future__ import annotations

from typing import Any

import pytest

from evomerge.errors import MergeError
from evomerge.merging.layout import layout
from evomerge.merging.methods import registry
from evomerge.merging.recipe import ModelRef, Recipe, Source

PLACES = layout(["model.layers.0.mlp.w", "model.layers.1.mlp.w", "model.norm.weight"])


def recipe(method: str = "ties", *, base: str | None = "base", **keys: Any) -> Recipe:
    sources = keys.pop("sources", {"math": {}, "code": {}})
    return Recipe(
        method,
        ModelRef(base) if base else None,
        tuple(Source(name, ModelRef(name), own) for name, own in sources.items()),
        keys.pop("parameters", {}),
        **keys,
    )


def test_get() -> None:
    assert registry.get("slerp").name == "slerp"
    with pytest.raises(MergeError, match="unknown merge method 'tise'; did you mean 'ties'"):
        registry.get("tise")


@pytest.mark.parametrize("name", registry.METHODS)
def test_a_recipe_without_parameters_is_fine(name: str) -> None:
    plain = recipe(name, sources=some_sources(name), artifact=an_artifact(name))
    assert registry.check(plain) == []


@pytest.mark.parametrize("name", registry.METHODS)
def test_defaults_are_valid(name: str) -> None:
    method = registry.get(name)
    defaults = {parameter.name: parameter.default for parameter in method.parameters}
    given = {"sources": some_sources(name), "parameters": defaults}
    assert registry.check(recipe(name, artifact=an_artifact(name), **given)) == []


def test_a_method_that_applies_an_artifact_needs_one() -> None:
    assert registry.check(recipe("greedy_soup")) == [
        "greedy_soup applies what a fit has learned: fit it (`evomerge fit`), and name the folder"
        " as `artifact`"
    ]


def an_artifact(name: str) -> ModelRef | None:
    return ModelRef("fitted") if registry.get(name).artifact else None


def some_sources(name: str) -> dict[str, dict[str, Any]]:
    most = registry.get(name).max_sources or 2
    return {source: {} for source in ("math", "code")[:most]}


@pytest.mark.parametrize(
    ("faulty", "problem"),
    [
        (recipe("tise"), "unknown merge method 'tise'; did you mean 'ties'?"),
        (recipe(base=None), "ties merges task vectors and needs a `base`"),
        (recipe("slerp", sources={"a": {}}), "slerp merges exactly 2 sources, the recipe has 1"),
        (
            recipe("slerp", sources={"a": {}, "b": {}, "c": {}}),
            "slerp merges exactly 2 sources, the recipe has 3",
        ),
        (
            recipe("nuslerp", base=None, parameters={"origin": "base"}),
            "parameters.origin: 'base' needs a `base`",
        ),
        (recipe("linear", sources={}), "linear merges at least 1 source, the recipe has 0"),
        (
            recipe(parameters={"densty": 0.5}),
            "parameters.densty: ties has no parameter 'densty'; did you mean 'density'?",
        ),
        (
            recipe(sources={"math": {"wieght": 0.5}}),
            "sources.math.wieght: ties has no parameter 'wieght'; did you mean 'weight'?",
        ),
        (
            recipe(sources={"math": {"lambda": 0.5}}),
            "sources.math.lambda: 'lambda' belongs to the recipe; put it under `parameters`",
        ),
        (recipe(parameters={"density": 1.5}), "parameters.density: 1.5 is outside [0, 1]"),
        (
            recipe(sources={"math": {"density": [0.5, -0.1]}}),
            "sources.math.density: -0.1 is outside [0, 1]",
        ),
        (
            recipe(parameters={"density": [{"type": "mlp", "value": 2}, {"value": 1}]}),
            "parameters.density: 2 is outside [0, 1]",
        ),
        (recipe(parameters={"weight": True}), "parameters.weight: expected a number, got True"),
        (recipe(parameters={"weight": "1"}), "parameters.weight: expected a number, got '1'"),
        (
            recipe(parameters={"normalize": 1}),
            "parameters.normalize: expected true or false, got 1.0",
        ),
        (
            recipe(parameters={"scope": "layer"}),
            "parameters.scope: expected one of tensor, global, got 'layer'",
        ),
        (
            recipe(parameters={"weight": float("nan")}),
            "parameters.weight: nan is not a finite number",
        ),
    ],
)
def test_check_names_the_problem(faulty: Recipe, problem: str) -> None:
    assert registry.check(faulty) == [problem]


def test_check_reports_every_problem_at_once() -> None:
    faulty = recipe(
        base=None,
        parameters={"density": 7, "rescale": "l1"},
        sources={"math": {"weight": "much"}, "code": {"t": 0.5}},
    )
    assert len(registry.check(faulty)) == 5


def test_a_source_listed_twice() -> None:
    twice = Recipe("linear", None, (Source("a", ModelRef("x")), Source("a", ModelRef("y"))))
    assert registry.check(twice) == [
        "source 'a' is listed twice; give each source a name of its own"
    ]


def test_coefficients_resolve_every_parameter() -> None:
    made = recipe(
        sources={"math": {"weight": [0.0, 1.0]}, "code": {}},
        parameters={"weight": 0.25, "lambda": {"blocks": [2.0, 3.0]}},
        seed=9,
    )
    first = registry.coefficients(made, PLACES["model.layers.0.mlp.w"], (4, 2))
    last = registry.coefficients(made, PLACES["model.layers.1.mlp.w"], (4, 2))
    assert first.names == ("code", "math")
    assert first.order == (1, 0)
    assert (first.tensor, first.size, first.seed) == ("model.layers.0.mlp.w", 8, 9)
    assert first.floats("weight") == (0.25, 0.0)
    assert last.floats("weight") == (0.25, 1.0)
    assert (first.number("lambda"), last.number("lambda")) == (2.0, 3.0)
    assert first.floats("density") == (1.0, 1.0)
    assert first.choice("scope") == "tensor"
    assert first.flag("normalize") is True


def test_a_tensor_that_no_rule_fits() -> None:
    made = recipe(parameters={"weight": [{"type": "mlp", "value": 1.0}]})
    with pytest.raises(MergeError, match=r"parameter 'weight': no rule fits model\.norm\.weight"):
        registry.coefficients(made, PLACES["model.norm.weight"], (4,))
