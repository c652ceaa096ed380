"""The loop that adds up the magnitudes of a task vector and those that draws keep, in float64.

The order is that of `reductions`; see `products`. Knows no method.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from llvmlite import ir

from evomerge.merging.kernels.drawing import drawn
from evomerge.merging.kernels.formats import magnitude, read, real, width
from evomerge.merging.kernels.machine import F64, I32, I64, Kernel, Value, lanes
from evomerge.merging.methods.reductions import LANES, SEGMENT

BASE, SUMS, SOURCE, KEY, LEAST, FIRST = range(6)
"""Places in the table: addresses, the draws' key and threshold, the index of the first element."""

_ROWS = 16


@cache
def norms(source: int, base: int) -> Callable[[int, int, int], int]:
    """Adds |τ| and what is kept of it, of [begin, end), to the sums of their lanes.

    `begin` starts a segment, `end` is a multiple of 512, FIRST is even. Sums are float64 [segments,
    2, 512], lanes in the order that `products.in_order` undoes.
    """
    return _Norms(source, base).compiled()


class _Norms(Kernel):
    def __init__(self, source: int, base: int) -> None:
        super().__init__()
        self._source = source, self.address(SOURCE)
        self._base = base, self.address(BASE)
        self._kind = ir.VectorType(F64, lanes())
        self._key = self.slot(KEY, I64).splat(lanes())
        self._least = self.slot(LEAST, I32).splat(lanes())
        self._first = self.slot(FIRST)
        sums = self.variable(self.address(SUMS))
        with self.loop(self.begin, self.end, SEGMENT) as segment:
            stop = self.least(segment + SEGMENT, self.end)
            with self.loop(segment, stop, _ROWS * LANES) as block:
                last = self.least(block + _ROWS * LANES, stop)
                with self.loop(self.value(I64, 0), self.value(I64, LANES), width()) as lane:
                    self._lanes(lane, block + lane, last, sums.value)
            sums.value = self.at(sums.value, 8 * LANES * 2)
        self.give(self.end)

    def _lanes(self, lane: Value, first: Value, last: Value, sums: Value) -> None:
        """Two vectors of lanes, even and odd elements, over some rows."""
        places = [
            self.at(sums, ((lane + half * lanes()) << 3) + 8 * LANES * kept)
            for half in (0, 1)
            for kept in (0, 1)
        ]
        totals = [self.variable(self.load(self._kind, place)) for place in places]
        with self.loop(first, last, LANES) as index:
            for code, address in (self._source, self._base):
                self.prefetch(address, index + _ROWS * LANES, 2 if code < 2 else 4)
            source, base = read(self, *self._source, index), read(self, *self._base, index)
            draws = drawn(self._key, self._first + index)
            for half in (0, 1):
                size = real(magnitude(source[half] - base[half]))
                kept = (~draws[half].below(self._least)).select(size, 0.0)
                for total, x in zip(totals[2 * half :], (size, kept), strict=False):
                    total.value = total.value + x.widened(self._kind)
        for place, total in zip(places, totals, strict=True):
            self.store(total.value, place)
