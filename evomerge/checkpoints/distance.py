"""How far apart two tensors lie, and what two task vectors have in common, summed in float64.

One pass over the entries in blocks of one size, so memory is bounded and the sums are the same
however the tensors are stored. Sums of tensors add up to those of a group. Knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from evomerge.checkpoints.checkpoint import is_finite

BLOCK_SIZE = 1 << 16
"""Entries per block: a handful of float64 blocks stays in a core's cache."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Distance:
    """Sums over the entries of two tensors A and B, or of many pairs; `+` joins them.

    `changed` counts the entries whose bits differ (whose values differ, where the dtypes do).
    Entries that are NaN or infinite in A or B are counted there, and left out of all sums.
    """

    entries: int = 0
    changed: int = 0
    non_finite_a: int = 0
    non_finite_b: int = 0
    square_a: float = 0.0
    square_b: float = 0.0
    product: float = 0.0
    square: float = 0.0
    largest: float = 0.0

    def __add__(self, other: Distance) -> Distance:
        return Distance(
            self.entries + other.entries,
            self.changed + other.changed,
            self.non_finite_a + other.non_finite_a,
            self.non_finite_b + other.non_finite_b,
            self.square_a + other.square_a,
            self.square_b + other.square_b,
            self.product + other.product,
            self.square + other.square,
            max(self.largest, other.largest),
        )

    @property
    def relative_norm(self) -> float | None:
        """|B - A| / |A|; None where A is zero and B is not."""
        return relative(self.square, self.square_a)

    @property
    def cosine(self) -> float | None:
        """A·B / |A||B|; None where A or B is zero."""
        return cosine(self.product, self.square_a, self.square_b)

    @property
    def changed_share(self) -> float:
        """Share of the entries that changed at all."""
        return self.changed / self.entries if self.entries else 0.0


@dataclass(frozen=True)
class Interference:
    """Sums over the task vectors a = A - base and b = B - base; `+` joins them.

    `both` counts the entries that A and B both moved, `agreeing` those moved the same way. Entries
    that are NaN or infinite in any of the three count as not moved.
    """

    square_base: float = 0.0
    square_a: float = 0.0
    square_b: float = 0.0
    product: float = 0.0
    entries: int = 0
    both: int = 0
    agreeing: int = 0

    def __add__(self, other: Interference) -> Interference:
        return Interference(
            self.square_base + other.square_base,
            self.square_a + other.square_a,
            self.square_b + other.square_b,
            self.product + other.product,
            self.entries + other.entries,
            self.both + other.both,
            self.agreeing + other.agreeing,
        )

    @property
    def relative_norms(self) -> tuple[float | None, float | None]:
        """|a| / |base| and |b| / |base|."""
        return relative(self.square_a, self.square_base), relative(self.square_b, self.square_base)

    @property
    def cosine(self) -> float | None:
        """a·b / |a||b|; None where A or B is the base."""
        return cosine(self.product, self.square_a, self.square_b)

    @property
    def both_share(self) -> float:
        """Share of the entries that A and B both moved."""
        return self.both / self.entries if self.entries else 0.0

    @property
    def sign_agreement(self) -> float | None:
        """Share of the entries that both moved where they moved the same way; None if no entry."""
        return self.agreeing / self.both if self.both else None


def distance(a: Tensor, b: Tensor) -> Distance:
    """Compare two tensors of one shape."""
    total = Distance()
    for first, second in zip(_blocks(a), _blocks(b), strict=True):
        total += _distance(first, second)
    return total


def interference(base: Tensor, a: Tensor, b: Tensor) -> Interference:
    """Compare the task vectors of two tensors; all three of one shape."""
    total = Interference()
    for origin, first, second in zip(_blocks(base), _blocks(a), _blocks(b), strict=True):
        total += _interference(origin, first, second)
    return total


def relative(square: float, square_of: float) -> float | None:
    """√square / √square_of; 0 for 0 / 0, None for a number / 0."""
    if square == 0.0:
        return 0.0
    return math.sqrt(square) / math.sqrt(square_of) if square_of else None


def cosine(product: float, square_a: float, square_b: float) -> float | None:
    """A·B / |A||B| within [-1, 1], whatever the rounding; None where A or B is zero."""
    if not square_a or not square_b:
        return None
    if square_a == product == square_b:  # equal vectors, exactly 1
        return 1.0
    return min(1.0, max(-1.0, product / math.sqrt(square_a) / math.sqrt(square_b)))


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    flat = tensor.reshape(-1)
    return (flat[start : start + BLOCK_SIZE] for start in range(0, len(flat), BLOCK_SIZE))


def _distance(a: Tensor, b: Tensor) -> Distance:
    changed = _changed(a, b)
    x = a.double()
    y = b.double() if changed else x
    bad_a = bad_b = 0
    if not (is_finite(x) and is_finite(y)):
        bad_a, bad_b = (_count(~torch.isfinite(values)) for values in (x, y))
        x, y = _where_all_finite(x, y)
    if not changed:
        square = float(x @ x)
        return Distance(len(a), 0, bad_a, bad_b, square, square, square)
    gap = y - x
    low, high = torch.aminmax(gap)
    return Distance(
        entries=len(a),
        changed=changed,
        non_finite_a=bad_a,
        non_finite_b=bad_b,
        square_a=float(x @ x),
        square_b=float(y @ y),
        product=float(x @ y),
        square=float(gap @ gap),
        largest=max(abs(float(low)), abs(float(high))),
    )


def _interference(base: Tensor, a: Tensor, b: Tensor) -> Interference:
    origin, x, y = base.double(), a.double(), b.double()
    if not all(is_finite(values) for values in (origin, x, y)):
        origin, x, y = _where_all_finite(origin, x, y)
    x, y = x - origin, y - origin
    sides = x * y  # of numbers stored in 32 bits or fewer, it cannot underflow
    return Interference(
        square_base=float(origin @ origin),
        square_a=float(x @ x),
        square_b=float(y @ y),
        product=float(x @ y),
        entries=len(x),
        both=_count(sides),
        agreeing=_count(sides > 0),
    )


def _changed(a: Tensor, b: Tensor) -> int:
    if a.dtype != b.dtype:
        return _count(a.double() != b.double())
    bits = _BITS[a.dtype.itemsize]
    return _count(a.view(bits) != b.view(bits))


def _where_all_finite(*tensors: Tensor) -> list[Tensor]:
    """The tensors with 0 wherever one of them is NaN or infinite."""
    finite = torch.stack([torch.isfinite(tensor) for tensor in tensors]).all(dim=0)
    return [torch.where(finite, tensor, 0.0) for tensor in tensors]


def _count(flags: Tensor) -> int:
    return int(torch.count_nonzero(flags))
