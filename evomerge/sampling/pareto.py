"""The Pareto front: which points no other point beats.

Knows nothing of trials. All values are maximised.
"""

from __future__ import annotations

from collections.abc import Sequence


def pareto_front(values: Sequence[Sequence[float] | None]) -> list[int]:
    """Indices, ascending, of the points that no other point dominates.

    A point dominates another if it is at least as good in every objective and better in one; so
    equal points stand on the front together. values [n, objectives]; None (a failed candidate)
    and points with NaN are never on it. With one objective: every point that has the maximum.
    """
    points = [
        (index, tuple(point))
        for index, point in enumerate(values)
        if point is not None and all(value == value for value in point)
    ]
    return [
        index for index, point in points if not any(_dominates(other, point) for _, other in points)
    ]


def _dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a >= b for a, b in zip(one, other, strict=True))
