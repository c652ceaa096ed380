"""The loop that adds up the inner products of tensors, in lanes of float64.

The order is that of `reductions`: lane l of 512 takes the elements l, l + 512, ... of a segment in
turn. Knows no method.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from evomerge.merging.kernels.formats import read, width
from evomerge.merging.kernels.machine import F64, I64, Kernel, Value, lanes
from evomerge.merging.methods.reductions import LANES, SEGMENT

BASE, SUMS, SOURCES = 0, 1, 2
"""Places in the table: addresses of the base, of the sums and of the sources."""

_ROWS = 16  # rows of 512 elements that are added up before sums go back to memory


@cache
def products(sources: tuple[int, ...], base: int | None) -> Callable[[int, int, int], int]:
    """Adds vᵢ·vⱼ (i ≤ j, by rows) of the elements [begin, end) to the sums of their lanes.

    `begin` starts a segment, `end` is a multiple of 512. Sums are float64 [segments, pairs, 512]
    from the segment of `begin` on, lanes in the order that `in_order` undoes; v is θ, or θ − θ₀
    with a base. A product of two float32 is exact in float64.
    """
    return _Products(sources, base).compiled()


def in_order(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums with their lanes in order. Shapes: [..., 512]."""
    shape = sums.shape
    pairs = sums.reshape(*shape[:-1], LANES // width(), 2, lanes())
    return np.ascontiguousarray(pairs.swapaxes(-1, -2)).reshape(shape)


class _Products(Kernel):
    def __init__(self, sources: tuple[int, ...], base: int | None) -> None:
        super().__init__()
        self._sources = [(code, self.address(SOURCES + i)) for i, code in enumerate(sources)]
        self._base = None if base is None else (base, self.address(BASE))
        self._kind = ir.VectorType(F64, lanes())
        count = len(sources)
        self._pairs = [(i, j) for i in range(count) for j in range(i, count)]
        sums = self.variable(self.address(SUMS))
        with self.loop(self.begin, self.end, SEGMENT) as segment:
            stop = self.least(segment + SEGMENT, self.end)
            with self.loop(segment, stop, _ROWS * LANES) as block:
                last = self.least(block + _ROWS * LANES, stop)
                with self.loop(self.value(I64, 0), self.value(I64, LANES), width()) as lane:
                    for half in (0, 1):
                        self._lanes(half, lane, block + lane, last, sums.value)
            sums.value = self.at(sums.value, 8 * LANES * len(self._pairs))
        self.give(self.end)

    def _lanes(self, half: int, lane: Value, first: Value, last: Value, sums: Value) -> None:
        """One vector of lanes of every pair, over some rows."""
        at = self.at(sums, (lane + half * lanes()) << 3)
        places = [self.at(at, 8 * LANES * pair) for pair in range(len(self._pairs))]
        totals = [self.variable(self.load(self._kind, place)) for place in places]
        with self.loop(first, last, LANES) as index:
            vectors = self._vectors(half, index)
            for (i, j), total in zip(self._pairs, totals, strict=True):
                total.value = vectors[i].fused(vectors[j], total.value)
        for place, total in zip(places, totals, strict=True):
            self.store(total.value, place)

    def _vectors(self, half: int, index: Value) -> list[Value]:
        found = [read(self, code, address, index)[half] for code, address in self._sources]
        if half == 0:
            for code, address in (*self._sources, *([self._base] if self._base else [])):
                self.prefetch(address, index + _ROWS * LANES, 2 if code < 2 else 4)
        if self._base is not None:
            zero = read(self, *self._base, index)[half]
            found = [theta - zero for theta in found]
        return [x.widened(self._kind) for x in found]
