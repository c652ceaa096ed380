"""Weighted sums of a block's rows, shared by every method that ends in one.

Knows nothing of what the rows are. Every product and sum is an element-wise float32 operation of
its own: a fused multiply-add is used by some vector loops and not by their tails, so that its
rounding would depend on where a tensor was cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

NO_WEIGHT = 1e-8
"""A sum of weights nearer to 0 than this is no divisor (mergekit's constant)."""


def weighted_sum(rows: Iterable[Tensor], coefficients: Sequence[float]) -> Tensor | None:
    """Σᵢ cᵢ·xᵢ in float32, in the order given; None where every c is 0.

    Shapes: rows s times [n], coefficients [s]; returns [n]. A row of coefficient 0 is not read, so
    a lone coefficient of 1 returns that row's bits, the sign of zero included.
    """
    total: Tensor | None = None
    for row, coefficient in zip(rows, coefficients, strict=True):
        if coefficient == 0:
            continue
        term = row * coefficient
        total = term if total is None else total.add_(term)
    return total


def moved(base: Tensor, tau: Tensor | None) -> Tensor:
    """θ₀ + τ, and a copy of θ₀ where there is no task vector. Shapes: all [n]."""
    return base.clone() if tau is None else base + tau


def sole(coefficients: Sequence[float]) -> int | None:
    """The index of the one coefficient that is exactly 1 while all others are 0, else None.

    θ₀ + 1·(θ₁ − θ₀) can miss θ₁ by a rounding (whenever θ₁ − θ₀ is not a float32), so a merge that
    is one source by its coefficients returns that source instead of computing it.
    """
    active = [index for index, value in enumerate(coefficients) if value != 0]
    return active[0] if len(active) == 1 and coefficients[active[0]] == 1 else None


def normalised(weights: Sequence[float], *, normalize: bool) -> list[float]:
    """Weights divided by their sum if asked to; a sum of (almost) 0 divides by 1 instead."""
    total = sum(weights)
    divisor = total if normalize and abs(total) >= NO_WEIGHT else 1.0
    return [weight / divisor for weight in weights]


def task_vectors(base: Tensor, sources: Tensor) -> Iterator[Tensor]:
    """τᵢ = θᵢ − θ₀ in float32, one at a time. Shapes: base [n], sources [s, n]; yields [n]."""
    return (source - base for source in sources)
