"""Does a space fit its merge method and the sources?"""

from __future__ import annotations

import pytest

from evomerge.space import check_space, load_space

WEIGHT = [{"low": 0.0, "high": 1.0, "init": 0.5}]


def faults(document, sources=("a", "b")) -> list[str]:
    return check_space(load_space(document), list(sources))


def test_an_unknown_method_suggests_one():
    assert faults({"method": "tie", "source": {"weight": WEIGHT}}) == [
        "space: unknown merge method 'tie'; did you mean 'ties'?"
    ]


@pytest.mark.parametrize(("names", "found"), [(("a",), "1"), (("a", "b", "c"), "3")])
def test_slerp_has_two_sources(names, found):
    assert faults("slerp_depth", names) == [f"space: slerp merges 2 sources, the study has {found}"]


def test_every_fault_comes_at_once():
    document = {
        "method": "ties",
        "source": {
            "wieght": WEIGHT,
            "density": [{"low": 0.5, "high": 1.5, "init": 0.5}],
            "lambda": 1.0,
        },
        "recipe": {
            "weight": WEIGHT,
            "normalize": [{"low": 0.0, "high": 1.0, "init": 0.5}],
        },
    }
    assert faults(document) == [
        "space: source.wieght: ties has no parameter 'wieght'; did you mean 'weight'?",
        "space: source.density: can rise to 1.5, but must be at most 1",
        "space: source.lambda: lambda belongs to the recipe; move it to `recipe`",
        "space: recipe.weight: weight belongs to each source; move it to `source`",
        "space: recipe.normalize: is no number; search it as {choices: [...], init: ...}, or fix"
        " it",
    ]


def test_a_parameter_of_the_recipe_is_not_searched_per_source():
    per_source = [{**WEIGHT[0], "per": "source"}]
    document = {"method": "ties", "source": {"weight": WEIGHT}, "recipe": {"lambda": per_source}}
    assert faults(document) == [
        "space: recipe.lambda: the recipe has one lambda, so no factor of it is per source"
    ]


def test_products_of_bounds_count():
    factors = [
        {"name": "one", "low": 0.5, "high": 1.0, "init": 0.5},
        {"name": "two", "low": -1.0, "high": 2.0, "init": 0.5},
    ]
    assert faults({"method": "ties", "source": {"weight": WEIGHT, "density": factors}}) == [
        "space: source.density: can fall to -1, but must be at least 0",
        "space: source.density: can rise to 2, but must be at most 1",
    ]


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ("yes", "expected a bool, got 'yes'"),
        (1.0, "expected a bool, got 1.0"),
    ],
)
def test_fixed_values_are_checked(value, fault):
    document = {"method": "ties", "source": {"weight": WEIGHT}, "recipe": {"normalize": value}}
    assert faults(document) == [f"space: recipe.normalize: {fault}"]


def test_fixed_numbers_lie_in_the_parameters_range():
    document = {"method": "ties", "source": {"weight": WEIGHT, "density": 1.5}}
    assert faults(document) == ["space: source.density: 1.5 is not in [0.0, 1.0]"]
