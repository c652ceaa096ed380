"""How a gene in [0, 1] is spread over its bounds: evenly in x, in log x or in logit x, or in equal
cells over levels.

Knows nothing of genes' names or of merges.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

Scale = Literal["linear", "log", "logit"]


def from_unit(u: float, *, low: float, high: float, scale: Scale) -> float:
    """The value in [low, high] at the fraction `u` of the scale; exactly the bounds at 0 and 1.

    f(x) = f(low) + u · (f(high) − f(low)),   f = identity, ln, or ln(x / (1 − x))
    """
    if u == 0 or u == 1:
        return high if u else low
    forward, back = _SCALES[scale]
    a, b = forward(low), forward(high)
    return min(max(back(a + u * (b - a)), low), high)


def to_unit(x: float, *, low: float, high: float, scale: Scale) -> float:
    """The fraction of the scale at which the value `x` of [low, high] lies."""
    forward, _ = _SCALES[scale]
    a, b = forward(low), forward(high)
    return min(max((forward(x) - a) / (b - a), 0.0), 1.0)


def level_of(u: float, levels: int) -> int:
    """Which of a discrete gene's cells, [0, 1/levels) and on, the fraction `u` lies in."""
    return min(int(u * levels), levels - 1)


def middle_of(level: int, levels: int) -> float:
    """The fraction in the middle of a discrete gene's cell; `level_of` it is `level`."""
    return (level + 0.5) / levels


def snapped(u: float, levels: int) -> float:
    """The middle of the cell that `u` lies in; `u` itself for a gene of 0 levels."""
    return middle_of(level_of(u, levels), levels) if levels else u


def bounds_fault(low: float, high: float, scale: Scale) -> str | None:
    """Why these bounds cannot have this scale, if they cannot."""
    if scale == "log" and low <= 0:
        return f"scale log needs low > 0, got low {low:g}"
    if scale == "logit" and not 0 < low < high < 1:
        return f"scale logit needs 0 < low < high < 1, got {low:g} and {high:g}"
    return None


def _same(x: float) -> float:
    return x


def _logit(x: float) -> float:
    return math.log(x) - math.log1p(-x)


def _logistic(y: float) -> float:
    return 1 / (1 + math.exp(-y))


_SCALES: dict[Scale, tuple[Callable[[float], float], Callable[[float], float]]] = {
    "linear": (_same, _same),
    "log": (math.log, math.exp),
    "logit": (_logit, _logistic),
}
