"""What is done to one tensor, as data: the element-wise part of a merge, every number known.

A method that can says its merge as a Program; a kernel carries it out in one pass over the stored
tensors. Knows no method, no device and no checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from evomerge.merging.methods.selection import Cut


@dataclass(frozen=True)
class Draw:
    """Keeps element j where `masks.draws(key, j)` ≥ threshold."""

    key: int
    threshold: int


@dataclass(frozen=True)
class Row:
    """One source's part: xᵢ = factor·(kept entries of θᵢ, or of τᵢ = θᵢ − θ₀).

    `source` is the index into the operands' sources. An entry is kept if it is within `cut`, not
    within `top` (the largest ones, which breadcrumbs leaves out) and drawn by `draw`; None always
    keeps. `weight` is what the row counts in a divisor.
    """

    source: int
    factor: float
    weight: float = 1.0
    cut: Cut | None = None
    top: Cut | None = None
    draw: Draw | None = None


@dataclass(frozen=True)
class Election:
    """Rows are votes: only those of the elected sign count. As in `election.consensus`.

    With a `rule` ("majority" or "authors") `tie` is not known yet: it is `election.tie_sign` of the
    rule and the balance of the whole tensor. It matters only where votes sum to exactly 0.
    """

    tie: int
    aggregate: Literal["mean", "sum", "max"]
    normalize: bool
    scale: float
    rule: str | None = None


@dataclass(frozen=True)
class Program:
    """θ = o + Σᵢ xᵢ, or θ = o + λ·consensus(x) with an election. o is θ₀ or 0.

    Products and sums run in float32, each rounded on its own, rows in the order given: a kernel
    gives the bits that the methods' own functions give. No rows: θ = o. `copies` names the one
    source whose bits are the result.
    """

    rows: tuple[Row, ...]
    origin: Literal["zero", "base"]
    election: Election | None = None
    copies: int | None = None


def weighted(factors: Sequence[float], origin: Literal["zero", "base"]) -> Program:
    """θ = o + Σᵢ cᵢ·vᵢ; a source of factor 0 is not read."""
    rows = (Row(index, factor) for index, factor in enumerate(factors) if factor != 0)
    return Program(tuple(rows), origin)


def copy_of(source: int) -> Program:
    """θ = θᵢ, bit for bit."""
    return Program((), "zero", copies=source)


BASE = Program((), "base")
"""θ = θ₀, bit for bit."""
