"""Which places of which axes hold the same unit, learned link by link, and which units are alike.

A place is one position of one axis. Places that are linked, over whatever way, are one unit; units
may change places with each other if every link of one has its like among the links of the other.
Knows no operation, no network and no names.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

Places = NDArray[np.int64]

_FIXED = 0  # a place of its own: what is linked to it stays where it is


@dataclass(frozen=True, eq=False)
class Axis:
    """An axis whose `places`, int64 [n], are numbered among those of all axes. In the stead of an
    axis that cannot be rearranged at all there stands None."""

    places: Places


class Axes:
    """All axes of a network, and what links them."""

    def __init__(self) -> None:
        self._axes = [Axis(np.array([_FIXED]))]
        self._count = 1
        self._links: list[tuple[Places, Places, Places]] = []

    def new(self, size: int) -> Axis | None:
        """An axis that nothing is linked to; none where there is nothing to rearrange."""
        if size < 2:
            return None
        self._axes.append(Axis(np.arange(self._count, self._count + size)))
        self._count += size
        return self._axes[-1]

    def link(self, left: Places, right: Places, tags: Places | None = None) -> None:
        """left[i] and right[i] hold the same unit.

        Units are alike only if those of their places that are alike are linked with the same tag.
        """
        self._links.append((left, right, np.zeros_like(left) if tags is None else tags))

    def same(self, *axes: Axis | None) -> Axis | None:
        """The one axis that these, of one size, are from now on."""
        there = [axis for axis in axes if axis is not None]
        if len(there) < len(axes):
            self.fix(*there)
            return None
        for axis in there[1:]:
            if axis is not there[0]:
                self.link(there[0].places, axis.places)
        return there[0]

    def fix(self, *axes: Axis | None) -> None:
        """Nothing of these may be rearranged."""
        for axis in axes:
            if axis is not None:
                self.fix_places(axis.places)

    def fix_places(self, places: Places) -> None:
        """Nothing at these places may be rearranged."""
        self.link(places, np.full_like(places, _FIXED))

    def units(self) -> Places:
        """The unit at every place, by number [places]."""
        left = np.concatenate([left for left, _, _ in self._links] or [np.empty(0, np.int64)])
        right = np.concatenate([right for _, right, _ in self._links] or [np.empty(0, np.int64)])
        edges = coo_matrix((np.ones(len(left)), (left, right)), shape=2 * [self._count])
        return np.asarray(connected_components(edges, directed=False)[1], dtype=np.int64)

    def are_fixed(self, axis: Axis) -> bool:
        """Whether no place of the axis can be rearranged."""
        units = self.units()
        return bool((units[axis.places] == units[_FIXED]).all())

    def kinds(self) -> tuple[Places, Places]:
        """The unit at every place and its kind, both [places]; kind −1 is what is fixed.

        Units are of one kind if the i-th place of one, on any axis, is linked with the j-th of
        another axis wherever that of the other is. Exchanging them then exchanges the same places
        on both sides of every link.
        """
        units = self.units()
        owners = np.repeat(np.arange(len(self._axes)), [len(a.places) for a in self._axes])
        ranks = _ranks(owners, units)
        # every place says on which axis it is; every link, what it links
        rows = [np.stack([units, owners, ranks, ranks, ranks * 0])]
        for number, (left, right, tags) in enumerate(self._links, len(self._axes)):
            link = np.full_like(left, number)
            rows.append(np.stack([units[left], link, ranks[left], ranks[right], tags]))
        kinds = _kinds(np.concatenate(rows, 1), int(units.max()) + 1)
        kinds[units[_FIXED]] = -1
        return units, kinds[units]


def _ranks(owners: Places, units: Places) -> Places:
    """How many places of the same unit stand before each on its axis."""
    order = np.lexsort((np.arange(len(units)), units, owners))
    pairs = np.stack([owners[order], units[order]])
    begins = np.append(True, (pairs[:, 1:] != pairs[:, :-1]).any(0))
    numbers = np.arange(len(order))
    ranks = np.empty_like(units)
    ranks[order] = numbers - np.maximum.accumulate(np.where(begins, numbers, 0))
    return ranks


def _kinds(rows: Places, units: int) -> Places:
    """A number for each unit, the same for those that have the same rows [5, r] but for the unit's
    own in the first."""
    rows = rows[:, np.lexsort(rows[::-1])]
    bounds = np.searchsorted(rows[0], np.arange(units + 1))
    known: dict[bytes, int] = {}
    found = [
        known.setdefault(rows[1:, start:end].tobytes(), len(known))
        for start, end in pairwise(bounds)
    ]
    return np.array(found, dtype=np.int64)
