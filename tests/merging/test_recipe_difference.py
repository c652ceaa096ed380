"""Two recipes compared by what they mean: defaults filled in, models by digest, values resolved."""

from __future__ import annotations

from dataclasses import replace

import pytest

from evomerge.errors import MergeError
from evomerge.merging.methods.registry import METHODS
from evomerge.merging.recipe import Group, ModelRef, Recipe, Source
from evomerge.merging.recipe_difference import Cell, recipe_difference

LAYERS = [
    "model.embed_tokens.weight",
    *(f"model.layers.{n}.self_attn.{p}_proj.weight" for n in range(3) for p in "qk"),
    *(f"model.layers.{n}.mlp.up_proj.weight" for n in range(3)),
    "lm_head.weight",
]
BASE = ModelRef("models/base", "b" * 64)


def recipe(method: str = "task_arithmetic", **weights: object) -> Recipe:
    sources = tuple(
        Source(name, ModelRef(f"models/{name}", name * 64), {"weight": value})
        for name, value in (weights or {"x": 0.5, "y": 0.25}).items()
    )
    return Recipe(method, BASE, sources)


def test_a_recipe_is_itself() -> None:
    assert recipe_difference(recipe(), recipe()).identical


def test_a_weight() -> None:
    found = recipe_difference(recipe(x=0.5, y=0.25), recipe(x=0.5, y=0.75))
    (parameter,) = found.parameters
    assert (parameter.source, parameter.parameter) == ("y", "weight")
    assert (parameter.a, parameter.b) == (0.25, 0.75)
    assert not found.settings
    assert not found.identical


def test_defaults_are_filled_in() -> None:
    written = replace(recipe(), parameters={"lambda": 1.0, "normalize": False})
    assert recipe_difference(recipe(), written).identical
    shared = replace(
        recipe(),
        parameters={"weight": 0.5},
        sources=tuple(replace(s, parameters={}) for s in recipe().sources),
    )
    assert recipe_difference(recipe(x=0.5, y=0.5), shared).identical


def test_a_moved_model_is_the_same_one() -> None:
    moved = recipe().with_digests({})
    moved = moved.located({"x" * 64: "elsewhere/x", BASE.digest or "": "elsewhere/base"})
    assert moved.sources[0].model.path == "elsewhere/x"
    assert recipe_difference(recipe(), moved).identical


def test_another_model_under_the_same_name() -> None:
    other = replace(recipe().sources[0], model=ModelRef("models/x", "f" * 64))
    found = recipe_difference(recipe(), replace(recipe(), sources=(other, recipe().sources[1])))
    assert found.settings == {"sources.x": ("models/x (xxxxxxxxxxxx)", "models/x (ffffffffffff)")}
    assert not found.parameters


def test_paths_count_where_a_digest_is_not_known() -> None:
    bare = replace(recipe(), base=ModelRef("models/base"))
    assert recipe_difference(recipe(), bare).identical
    other = recipe_difference(recipe(), replace(recipe(), base=ModelRef("models/other")))
    assert other.settings == {"base": ("models/base (bbbbbbbbbbbb)", "models/other")}
    none = recipe_difference(recipe(), replace(recipe("linear"), base=None))
    assert none.settings["base"] == ("models/base (bbbbbbbbbbbb)", None)


def test_a_renamed_source_is_paired_by_its_model() -> None:
    renamed = replace(recipe().sources[1], name="z", parameters={"weight": 0.9})
    found = recipe_difference(recipe(), replace(recipe(), sources=(recipe().sources[0], renamed)))
    assert found.settings == {"sources.y.name": ("y", "z")}
    assert [(p.source, p.a, p.b) for p in found.parameters] == [("y", 0.25, 0.9)]
    assert not found.only_a
    assert not found.only_b


def test_one_model_twice_is_paired_by_name() -> None:
    twice = (
        Source("one", ModelRef("models/x", "x" * 64), {"weight": 0.1}),
        Source("two", ModelRef("models/x", "x" * 64), {"weight": 0.2}),
    )
    forth, back = replace(recipe(), sources=twice), replace(recipe(), sources=twice[::-1])
    found = recipe_difference(forth, back)
    assert found.settings == {"order of sources": (["one", "two"], ["two", "one"])}
    assert not found.parameters


def test_sources_of_one_side() -> None:
    found = recipe_difference(recipe(x=1.0, y=1.0), recipe(y=1.0, z=1.0))
    assert (found.only_a, found.only_b) == (("x",), ("z",))
    assert not found.settings
    assert not found.parameters


def test_seed_dtype_and_method() -> None:
    other = replace(recipe("ties"), seed=3, dtype="float32")
    found = recipe_difference(recipe(), other)
    assert found.settings == {
        "method": ("task_arithmetic", "ties"),
        "dtype": (None, "float32"),
        "seed": (0, 3),
    }
    absent = {p.parameter for p in found.parameters if p.a is None}
    names = [{p.name for p in METHODS[method].parameters} for method in ("task_arithmetic", "ties")]
    assert absent == names[1] - names[0]


def test_values_are_resolved_by_type_and_layer() -> None:
    """Gradients over three layers by hand: depths 0, 0.5, 1; embedding at 0, head at 1."""
    rules = [{"filter": "k_proj", "value": 0.9}, {"type": "mlp", "value": 0.5}, {"value": 0.2}]
    found = recipe_difference(recipe(x=[0.0, 1.0]), recipe(x=rules), LAYERS)
    (parameter,) = found.parameters
    assert parameter.cells == (
        Cell("embedding", None, (0.0,), (0.2,)),
        Cell("head", None, (1.0,), (0.2,)),
        Cell("attention", 0, (0.0,), (0.2, 0.9)),
        Cell("mlp", 0, (0.0,), (0.5,)),
        Cell("attention", 1, (0.5,), (0.2, 0.9)),
        Cell("attention", 2, (1.0,), (0.2, 0.9)),
        Cell("mlp", 2, (1.0,), (0.5,)),
    )


def test_what_comes_to_the_same_over_a_model_is_no_difference() -> None:
    one, other = recipe(x=[0.0, 0.5, 1.0]), recipe(x=[0.0, 1.0])
    assert recipe_difference(one, other, LAYERS).identical
    assert not recipe_difference(one, other).identical  # unknown without the model


def test_groups_are_listed_and_their_tensors_left_to_them() -> None:
    grouped = replace(recipe(), groups=(Group({"type": "mlp"}, "ties", {"lambda": 0.5}),))
    other = replace(recipe(x=0.5, y=0.3), groups=(Group({"type": "mlp"}, "ties", {"lambda": 0.7}),))
    found = recipe_difference(grouped, other, LAYERS)
    assert found.settings == {"groups.0.parameters.lambda": (0.5, 0.7)}
    (parameter,) = found.parameters
    assert {cell.type for cell in parameter.cells} == {"embedding", "head", "attention"}


def test_a_value_without_a_rule_for_a_tensor() -> None:
    partial = recipe(x=[{"type": "mlp", "value": 0.5}])
    with pytest.raises(MergeError, match="no rule fits"):
        recipe_difference(recipe(x=0.1), partial, LAYERS)
