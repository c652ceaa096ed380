"""What a reshape does to the axes of a tensor: whose places a unit has before and after.

Knows no operation but this one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from evomerge.merging.structure.tracing.traced_axes import Axes, Axis, Places

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Split:
    """An axis that a reshape took apart into `factors`; its units became those of one of them, by
    the choice made under `key`."""

    key: str
    axis: Axis
    factors: int


class Reshapes:
    """The reshapes of a network.

    Where an axis is taken apart, as (heads · width) into (heads, width), blocks of its units move
    together from then on: those of the factor that keeps most of them apart if it keeps all, else
    of the first that counts more than one. `choices` names another factor by the split's key.
    """

    def __init__(self, axes: Axes, choices: Mapping[str, int]) -> None:
        self.splits: list[Split] = []
        self._axes, self._choices = axes, choices

    def apply(
        self, shape: Shape, axes: tuple[Axis | None, ...], to: Shape, key: str
    ) -> tuple[Axis | None, ...]:
        """The axes of a tensor that is given the shape `to`. Of several axes that become one,
        only one can be rearranged; else all are fixed."""
        out: list[Axis | None] = [None] * len(to)
        for number, (before, after) in enumerate(_parts(shape, to)):
            free = [i for i in before if axes[i] is not None]
            if len(before) == len(after) == 1:
                out[after[0]] = axes[before[0]]
            elif len(free) == 1 and (axis := axes[free[0]]) is not None:
                units = _coordinate([shape[i] for i in before], before.index(free[0]))
                sizes = [to[i] for i in after]
                chosen = self._chosen(axis, units, sizes, f"{key}/{number}")
                out[after[chosen]] = self._linked(axis, units, sizes, chosen)
            else:
                self._axes.fix(*(axes[i] for i in free))
        return tuple(out)

    def lost(self) -> dict[str, int]:
        """Another choice for every split that left its axis nothing to rearrange, while there is
        one."""
        tried = ((split, self._choices.get(split.key, 0) + 1) for split in self.splits)
        left = [(split, choice) for split, choice in tried if choice < split.factors]
        return {s.key: choice for s, choice in left if self._axes.are_fixed(s.axis)}

    def _linked(self, axis: Axis, units: Places, sizes: list[int], chosen: int) -> Axis | None:
        new = self._axes.new(sizes[chosen])
        assert new is not None  # no factor is 1
        places = _coordinate(sizes, chosen)
        # where inside its unit an element lies, before and after
        inside = _others(units) * len(units) + _others(places)
        self._axes.link(axis.places[units], new.places[places], inside)
        return new

    def _chosen(self, axis: Axis, units: Places, sizes: list[int], key: str) -> int:
        if len(sizes) == 1:
            return 0
        known: Places = np.unique(self._axes.units()[axis.places], return_inverse=True)[1]
        kept = [_pieces(known[units], _coordinate(sizes, i)) for i in range(len(sizes))]
        order = sorted(range(len(sizes)), key=lambda i: kept[i] <= known.max())  # stable
        self.splits.append(Split(key, axis, len(sizes)))
        return order[min(self._choices.get(key, 0), len(sizes) - 1)]


def _parts(shape: Shape, to: Shape) -> Iterator[tuple[list[int], list[int]]]:
    """The smallest runs of dimensions whose sizes have one product; those of size 1 are in none."""
    left = [i for i, size in enumerate(shape) if size != 1]
    right = [i for i, size in enumerate(to) if size != 1]
    while left:
        before, after = [left.pop(0)], [right.pop(0)]
        while (excess := _product(shape, before) - _product(to, after)) != 0:
            if excess < 0:
                before.append(left.pop(0))
            else:
                after.append(right.pop(0))
        yield before, after


def _product(shape: Shape, dims: list[int]) -> int:
    return math.prod(shape[i] for i in dims)


def _coordinate(sizes: list[int], dim: int) -> Places:
    """The position on one dimension of every element, in row-major order."""
    elements = np.arange(math.prod(sizes))
    return elements // math.prod(sizes[dim + 1 :]) % sizes[dim]


def _others(positions: Places) -> Places:
    """A number for the rest of each element's coordinates: how many of its position came before."""
    order = np.argsort(positions, kind="stable")
    numbers = np.arange(len(positions))
    found = np.empty_like(positions)
    found[order] = numbers - np.searchsorted(positions[order], positions[order])
    return found


def _pieces(units: Places, places: Places) -> int:
    """How many units there are left when those that share a place are one."""
    size = int(units.max()) + int(places.max()) + 2
    edges = coo_matrix((np.ones(len(units)), (units, units.max() + 1 + places)), shape=(size, size))
    return int(connected_components(edges, directed=False)[0])
