"""Parameter values: what each form means at a depth, its one canonical form, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.merging.layout import Place, layout
from evomerge.merging.values import leaves, normalise, resolve

NUMBERS = st.floats(-10, 10)
GRADIENTS = st.lists(NUMBERS, min_size=1, max_size=6)


def _at(depth: float, name: str = "model.layers.0.mlp.up_proj.weight", kind: str = "mlp") -> Place:
    return Place(name, kind, 0, depth)  # type: ignore[arg-type]


@given(GRADIENTS, st.floats(0, 1))
def test_a_gradient_is_linear_interpolation(knots: list[float], depth: float) -> None:
    expected = np.interp(depth, np.linspace(0, 1, len(knots)), knots) if len(knots) > 1 else knots
    assert resolve(knots, _at(depth)) == pytest.approx(float(np.ravel(expected)[0]), abs=1e-12)


def test_a_gradient_worked_by_hand() -> None:
    knots = [0.0, 1.0, 0.5]
    assert [resolve(knots, _at(d)) for d in (0, 0.25, 0.5, 0.75, 1)] == [0, 0.5, 1, 0.75, 0.5]


@pytest.mark.parametrize(("layers", "runs"), [(4, [2, 2]), (6, [2, 2, 2]), (32, [8] * 4)])
def test_blocks_are_equal_runs_of_layers(layers: int, runs: list[int]) -> None:
    steps = {"blocks": [float(index) for index in range(len(runs))]}
    found = [resolve(steps, _at(layer / (layers - 1))) for layer in range(layers)]
    assert found == [float(index) for index, run in enumerate(runs) for _ in range(run)]


def test_the_first_rule_that_fits_wins() -> None:
    rules = [
        {"type": "attention", "value": 1.0},
        {"filter": "up_proj", "value": [0.0, 4.0]},
        {"type": "mlp", "value": {"blocks": [5.0, 6.0]}},
        {"value": 7.0},
    ]
    assert resolve(rules, _at(0.5)) == 2.0
    assert resolve(rules, _at(0.5, "model.layers.0.mlp.down_proj.weight")) == 6.0
    assert resolve(rules, _at(0.5, "model.layers.0.self_attn.q_proj.weight", "attention")) == 1.0
    assert resolve(rules, _at(0.5, "model.norm.weight", "norm")) == 7.0
    assert resolve([{"filter": "*", "value": 3.0}], _at(0)) == 3.0


def test_rules_for_layers() -> None:
    rules = [
        {"layers": [1, 4], "filter": "q_proj", "value": [0.0, 1.0]},
        {"layers": [3, 4], "value": [5.0, 6.0]},
        {"layers": "none", "value": 7.0},
        {"layers": [0, 6], "type": "mlp", "value": [0.0, 10.0]},
        {"value": 9.0},
    ]
    names = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(6)]
    places = layout([*names, "model.layers.2.mlp.up_proj.weight", "model.norm.weight", "model.x"])
    assert [resolve(rules, places[name]) for name in names] == [9, 0, 0.5, 1, 9, 9]
    assert resolve(rules, places["model.layers.2.mlp.up_proj.weight"]) == pytest.approx(4)
    assert resolve(rules, places["model.norm.weight"]) == 7
    assert resolve(rules[1:], places[names[3]]) == 5  # a range of one layer begins there
    assert normalise([{"layers": (0, 2), "value": 1}]) == [{"layers": [0, 2], "value": 1.0}]


def test_no_rule_that_fits() -> None:
    with pytest.raises(ValueError, match=r"no rule fits model\.norm\.weight"):
        resolve([{"type": "mlp", "value": 1.0}], _at(0, "model.norm.weight", "norm"))


@pytest.mark.parametrize("value", [0.5, True, "sum"])
def test_scalars_are_themselves(value: object) -> None:
    assert resolve(value, _at(0.3)) is value
    assert normalise(value) == value


def test_the_canonical_form() -> None:
    assert repr(normalise(1)) == "1.0"
    assert repr(normalise(-0.0)) == "0.0"
    assert normalise(True) is True
    assert normalise((0, 1)) == [0.0, 1.0]
    assert normalise({"blocks": (1, 2)}) == {"blocks": [1.0, 2.0]}
    rules = [{"type": "mlp", "value": (0, 1)}, {"value": 2}]
    assert normalise(rules) == [{"type": "mlp", "value": [0.0, 1.0]}, {"value": 2.0}]


@given(st.one_of(NUMBERS, GRADIENTS, GRADIENTS.map(lambda knots: [{"value": knots}])))
def test_the_canonical_form_is_its_own(value: object) -> None:
    assert normalise(normalise(value)) == normalise(value)
    assert resolve(normalise(value), _at(0.4)) == pytest.approx(resolve(value, _at(0.4)))


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (float("nan"), "not a finite number"),
        (float("inf"), "not a finite number"),
        (10**400, "too large"),
        (None, "neither a number"),
        ([], "neither a number"),
        ([0.1, "x"], "'x' is not a number"),
        ([0.1, True], "True is not a number"),
        ([0.1, [0.2]], "is not a number"),
        ({"blocks": []}, "blocks: [values]"),
        ({"blocks": 3}, "blocks: [values]"),
        ({"block": [1]}, "blocks: [values]"),
        ([{"type": "mlp"}], "a rule is"),
        ([{"layers": [2, 2], "value": 1}], "expected [first, end] or none, got [2, 2]"),
        ([{"layers": [0, 1.5], "value": 1}], "expected [first, end] or none"),
        ([{"layers": "all", "value": 1}], "expected [first, end] or none, got 'all'"),
        ([{"kind": "mlp", "value": 1}], "a rule is"),
        ([{"value": 1}, 2], "a rule is"),
        ([{"type": "mpl", "value": 1}], "unknown tensor type 'mpl'; known: attention"),
        ([{"filter": 3, "value": 1}], "a part of a tensor's name"),
        ([{"value": [{"value": 1}]}], "a rule cannot hold rules"),
    ],
)
def test_malformed_values_are_refused(value: object, problem: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        normalise(value)
    assert problem in str(caught.value)


def test_leaves_are_every_scalar() -> None:
    value = [{"type": "mlp", "value": [1.0, 2.0]}, {"value": {"blocks": [3.0]}}]
    assert leaves(value) == [1.0, 2.0, 3.0]
    assert leaves("sum") == ["sum"]
    assert leaves(0.5) == [0.5]
