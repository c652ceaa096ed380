"""The few shapes that units take inside an axis, and the binds of whatever tensors are there.

What every family's specification is written with. Knows no architecture.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from evomerge.errors import MergeError
from evomerge.merging.structure.permutations.permutation import Bind, Group

Shapes = Mapping[str, tuple[int, ...]]
Place = tuple[str, int]
"""A tensor and one of its axes."""


def blocks(units: int, width: int = 1, start: int = 0) -> Tensor:
    """Units one after another, each `width` positions: int64 [units, width]."""
    return torch.arange(start, start + units * width).view(units, width)


def bound(
    shapes: Shapes,
    index: Tensor,
    *places: Place,
    compared: bool = True,
    inert: bool = False,
) -> tuple[Bind, ...]:
    """One bind for each (tensor, axis) that the network has."""
    return tuple(
        Bind(param, axis, index, compared=compared, inert=inert)
        for param, axis in places
        if param in shapes
    )


def channels(name: str, places: Iterable[Place], shapes: Shapes, *, role: str = "") -> Group:
    """A group of which every unit is one position of each of these axes; its role is its name
    unless it is given."""
    width = _width(places := list(places), shapes)
    return Group(name, role or name, width, bound(shapes, blocks(width), *places))


def fixed(name: str, places: Iterable[Place], shapes: Shapes) -> Group:
    """One unit with all positions of these axes: it says that they belong together, and that none
    of them may leave its place."""
    width = _width(places := list(places), shapes)
    return Group(name, name, 1, bound(shapes, blocks(1, width), *places))


def _width(places: Iterable[Place], shapes: Shapes) -> int:
    return next(shapes[name][axis] for name, axis in places if name in shapes)


def prefix_of(shapes: Shapes, known: str) -> str:
    """What stands before `known` in the names: "model.", or nothing. Raises MergeError."""
    for name in shapes:
        if name == known or name.endswith(f".{known}"):
            return name.removesuffix(known)
    raise MergeError(f"there is no {known} in this checkpoint, though its config says there is one")


def layers(shapes: Shapes, prefix: str) -> list[str]:
    """`prefix` with the number of each layer and a dot, in their order."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    numbers = {int(found[1]) for name in shapes if (found := pattern.match(name))}
    return [f"{prefix}{number}." for number in sorted(numbers)]
