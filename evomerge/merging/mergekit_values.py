"""mergekit's settings as values of ours, with mergekit's meaning of depth.

Depth runs from 0 to 1 within each slice; tensors before the layers have depth 0 of the first slice,
those after them depth 0 of the last. Knows no file and no method.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evomerge.merging.mergekit_stack import Layers, Rules
from evomerge.merging.values import Value


def joined(ranges: Sequence[Layers | None], per_slice: Sequence[Rules], *, alone: bool) -> Value:
    """One value for slices of a stack: `ranges` are their layers, None those of the models.

    `alone` says that there is one slice in all, so that depth within it is depth.
    """
    first, last = per_slice[0], per_slice[-1]
    varies = any(isinstance(value, list) for _, value in first)
    if alone or (not varies and all(rules == first for rules in per_slice)):
        return _whole(first, ranges[0])
    value = [_rule(wanted, _at_start(v), type="embedding", layers="none") for wanted, v in first]
    for layers, rules in zip(ranges, per_slice, strict=True):
        assert layers is not None
        value += [_rule(wanted, v, layers=list(layers)) for wanted, v in _inside(rules, layers)]
    return value + [_rule(wanted, _at_start(v)) for wanted, v in last]


def _whole(rules: Rules, layers: Layers | None) -> Value:
    if all(not isinstance(value, list) for _, value in rules):
        return rules[0][1] if len(rules) == 1 else [_rule(wanted, v) for wanted, v in rules]
    outside = [_rule(wanted, _at_start(value), layers="none") for wanted, value in rules]
    return outside + [_rule(wanted, value) for wanted, value in _inside(rules, layers)]


def _inside(rules: Rules, layers: Layers | None) -> Rules:
    """The rules within the layers; mergekit's depth of an only layer is 1, ours 0."""
    if layers is None or layers[1] - layers[0] > 1:
        return rules
    return [(wanted, v[-1] if isinstance(v, list) else v) for wanted, v in rules]


def _at_start(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value


def _rule(wanted: str | None, value: Any, **conditions: Any) -> dict[str, Any]:
    return {**conditions, **({} if wanted is None else {"filter": wanted}), "value": value}
