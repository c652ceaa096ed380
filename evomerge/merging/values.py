"""How a recipe writes a parameter that varies over a model, and what it is for one tensor.

A value is one of
    0.7                                  the same for every tensor
    [0.2, 0.9, 0.4]                      a gradient: linear in depth between equally spaced knots
    {blocks: [0.2, 0.9]}                 steps: equal runs of depth, one value each
    [{type: mlp, value: V}, {filter: q_proj, value: V}, {value: V}]
                                         the first rule whose tensor type or name part fits
    [{layers: [8, 16], value: V}, {layers: none, value: V}, {value: V}]
                                         and whose layer is one of 8 to 15, or that has none
Rules may hold gradients and blocks, not rules; under `layers: [8, 16]` depth runs from 0 at layer 8
to 1 at layer 15. All of a rule's conditions must fit. Knows nothing of merge methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from evomerge.merging.layout import TENSOR_TYPES, Place

Scalar: TypeAlias = float | bool | str
Value: TypeAlias = Any  # Scalar | list[float] | {"blocks": [...]} | list[rule]; see the docstring


def resolve(value: Value, place: Place) -> Scalar:
    """The scalar a value takes for the tensor at `place`.

    Raises ValueError where the value has no rule for the tensor.
    """
    if isinstance(value, Mapping):
        return _step(value["blocks"], place.depth)
    if isinstance(value, Sequence) and not isinstance(value, str):
        if value and isinstance(value[0], Mapping):
            rule = _matching(value, place)
            return resolve(rule["value"], within(rule, place))
        return _gradient(value, place.depth)
    return value  # type: ignore[no-any-return]


def normalise(value: Value) -> Value:
    """A value in its one canonical form: numbers as floats, -0.0 as 0.0, sequences as lists.

    Raises ValueError that says what is wrong with a malformed value.
    """
    if isinstance(value, bool | str):
        return value
    if isinstance(value, int | float):
        try:
            number = float(value) + 0.0
        except OverflowError:
            raise ValueError(f"{value!r} is too large") from None
        if number != number or number in (float("inf"), float("-inf")):
            raise ValueError(f"{value!r} is not a finite number")
        return number
    if isinstance(value, Mapping):
        steps = value.get("blocks")
        if set(value) != {"blocks"} or not isinstance(steps, Sequence) or not steps:
            raise ValueError(f"{dict(value)!r}: a mapping here is {{blocks: [values]}}")
        return {"blocks": [_number(entry) for entry in steps]}
    if isinstance(value, Sequence) and value:
        if isinstance(value[0], Mapping):
            return [_rule(rule) for rule in value]
        return [_number(entry) for entry in value]
    raise ValueError(f"{value!r} is neither a number, a list of numbers nor a list of rules")


def leaves(value: Value) -> list[Scalar]:
    """Every scalar that occurs in a value, for checking ranges."""
    if isinstance(value, Mapping):
        return list(value["blocks"])
    if isinstance(value, Sequence) and not isinstance(value, str):
        if value and isinstance(value[0], Mapping):
            return [leaf for rule in value for leaf in leaves(rule["value"])]
        return list(value)
    return [value]


def _number(entry: object) -> float:
    number = normalise(entry)
    if not isinstance(number, float):
        raise ValueError(f"{entry!r} is not a number")
    return number


def _rule(rule: object) -> dict[str, Any]:
    if not isinstance(rule, Mapping) or "value" not in rule:
        raise ValueError(f"{rule!r}: a rule is {{type, filter or layers, value}}")
    if set(rule) - {"type", "filter", "layers", "value"}:
        raise ValueError(f"{dict(rule)!r}: a rule is {{type, filter or layers, value}}")
    check_selector(rule)
    inner = normalise(rule["value"])
    if isinstance(inner, list) and inner and isinstance(inner[0], dict):
        raise ValueError("a rule cannot hold rules")
    layers = rule.get("layers")
    ranged = {"layers": list(layers)} if isinstance(layers, tuple) else {}
    return {**rule, **ranged, "value": inner}


def check_selector(selector: Mapping[str, Any]) -> None:
    """Raises ValueError for a malformed `type`, `filter` or `layers`."""
    if "type" in selector and selector["type"] not in TENSOR_TYPES:
        kinds = ", ".join(TENSOR_TYPES)
        raise ValueError(f"unknown tensor type {selector['type']!r}; known: {kinds}")
    if not isinstance(selector.get("filter", ""), str):
        raise ValueError(f"a filter is a part of a tensor's name, not {selector['filter']!r}")
    layers = selector.get("layers", "none")
    if layers != "none" and not is_layer_range(layers):
        raise ValueError(f"layers: expected [first, end] or none, got {layers!r}")


def fits(selector: Mapping[str, Any], place: Place) -> bool:
    """Whether a tensor is of the selector's type, name part and layers, as far as it has them."""
    wanted = selector.get("filter", "*")
    return bool(
        selector.get("type", place.type) == place.type
        and (wanted == "*" or wanted in place.name)
        and _is_in(selector.get("layers"), place.layer)
    )


def within(selector: Mapping[str, Any], place: Place) -> Place:
    """The place as a selector's values see it: its depth is that within the selector's layers."""
    layers = selector.get("layers")
    if layers is None or layers == "none" or place.layer is None:
        return place
    first, end = layers
    return replace(place, depth=(place.layer - first) / max(end - 1 - first, 1))


def is_layer_range(layers: object) -> bool:
    """Whether a value is a run of layers [first, end) that is not empty."""
    if not isinstance(layers, list | tuple) or len(layers) != 2:
        return False
    return all(type(n) is int for n in layers) and 0 <= layers[0] < layers[1]


def _matching(rules: Sequence[Mapping[str, Any]], place: Place) -> Mapping[str, Any]:
    for rule in rules:
        if fits(rule, place):
            return rule
    raise ValueError(f"no rule fits {place.name}; end the list with a rule that has only a value")


def _is_in(layers: Any, layer: int | None) -> bool:
    if layers is None:
        return True
    if layers == "none":
        return layer is None
    return layer is not None and layers[0] <= layer < layers[1]


def _gradient(knots: Sequence[float], depth: float) -> float:
    if len(knots) == 1:
        return knots[0]
    scaled = depth * (len(knots) - 1)
    left = min(int(scaled), len(knots) - 2)
    share = scaled - left
    return knots[left] * (1 - share) + knots[left + 1] * share


def _step(steps: Sequence[float], depth: float) -> float:
    return steps[min(int(depth * len(steps)), len(steps) - 1)]
