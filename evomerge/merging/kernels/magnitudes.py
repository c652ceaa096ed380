"""Loops over the magnitudes |θᵢ − θ₀| of one tensor: counting, looking for one, listing all.

Magnitudes are float32 patterns, which are ordered as they are. Knows no method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from evomerge.merging.kernels.formats import Pair, integers, joined, magnitude, read, width
from evomerge.merging.kernels.machine import I8, I32, I64, Kernel, Value, lanes
from evomerge.merging.kernels.walking import AHEAD, walk

SOURCE, BASE = 0, 1
"""Places in every table: addresses of the operands."""
LOW, SPAN, SHIFT, BINS, ABOVE, BITS = range(2, 8)
PATTERN, NEEDED = 2, 3
KEYS, COUNTS, DISTINCT = 2, 3, 4

PLACES_BITS = 18
"""Log2 of the places in `tabulate`'s table, half of which may be taken."""

Code = Callable[[int, int, int], int]


@cache
def count(source: int, base: int) -> Code:
    """Counts the magnitudes p of [begin, end): BINS[(p − LOW) >> SHIFT] where LOW ≤ p < LOW + SPAN,
    ABOVE where p is more. BITS become those that are set in a p − LOW that is counted. Bins are
    int64. An end that is no multiple of `width` counts zeros."""
    return _Count(source, base).compiled()


@cache
def locate(source: int, base: int) -> Code:
    """Where the NEEDED-th of [begin, end) that equals PATTERN is: the index of a vector's first
    element; NEEDED becomes its rank among those of the vector. `end` if there is none."""
    return _Locate(source, base).compiled()


@cache
def tabulate(source: int, base: int) -> Code:
    """Counts equal magnitudes of [begin, end): KEYS and COUNTS int64 [2^18], keys −1 where empty;
    open addressing. `end`, or −1 if half of the places do not suffice. Zeros as in `count`."""
    return _Tabulate(source, base).compiled()


class _Magnitudes(Kernel):
    """A walk over the magnitudes of a tensor."""

    def __init__(self, source: int, base: int) -> None:
        super().__init__()
        self._buffer = self.room(I8, 4 * width())
        self._start()
        operands = [(source, self.address(SOURCE)), (base, self.address(BASE))]

        def body(parts: Sequence[Value], target: Value | None, index: Value, first: Value) -> None:
            there, origin = parts
            for part in (there, origin):
                self.prefetch(part, index + AHEAD, 2)
            theta, zero = read(self, source, there, index), read(self, base, origin, index)
            self._vector(
                (magnitude(theta[0] - zero[0]), magnitude(theta[1] - zero[1])), index + first
            )

        walk(self, operands, None, self.begin, self.end, body, even=False)
        self._finish()
        self.give(self.end)

    def _start(self) -> None:
        """Before the walk."""

    def _finish(self) -> None:
        """After it."""

    def _vector(self, sizes: Pair, element: Value) -> None:
        raise NotImplementedError

    def _keep(self, sizes: Pair) -> None:
        """Puts a pair where it can be read one by one: those of even place, then the others."""
        self.store(sizes[0], self._buffer)
        self.store(sizes[1], self._buffer, 4 * lanes())

    def _kept(self, index: Value) -> Value:
        return self.load(I32, self._buffer, index << 2).widened(I64)


class _Count(_Magnitudes):
    def _start(self) -> None:
        self._low = self.slot(LOW).cut(I32).splat(lanes())
        self._span = self.slot(SPAN).cut(I32).splat(lanes())
        self._last = (self.slot(LOW) + self.slot(SPAN) - 1).cut(I32).splat(lanes())
        self._shift = self.slot(SHIFT).cut(I32).splat(lanes())
        self._bits = self.variable(self.value(integers(), 0))
        self._bins, self._above = self.address(BINS), self.variable(self.value(I64, 0))

    def _vector(self, sizes: Pair, element: Value) -> None:
        offsets = [size - self._low for size in sizes]
        within = [offset.below(self._span) for offset in offsets]
        for offset, mask in zip(offsets, within, strict=True):
            self._bits.value = mask.select(self._bits.value | offset, self._bits.value)
        inside = joined(within)
        above = joined([size > self._last for size in sizes])
        self._above.value = self._above.value + above.ones()
        with self.when(inside.any()):
            self._keep((offsets[0] >> self._shift, offsets[1] >> self._shift))
            rest = self.variable(inside.word())
            with self.repeat(lambda: ~rest.value.equals(0)):
                self.increment(self._bins, self._kept(rest.value.lowest()))
                rest.value = rest.value & (rest.value - 1)

    def _finish(self) -> None:
        self.set_slot(ABOVE, self._above.value)
        self.store(self._bits.value, self._buffer)
        bits = self.variable(self.value(I64, 0))
        with self.loop(self.value(I64, 0), self.value(I64, lanes())) as lane:
            bits.value = bits.value | self._kept(lane)
        self.set_slot(BITS, bits.value)


class _Locate(_Magnitudes):
    def _start(self) -> None:
        self._pattern = self.slot(PATTERN).cut(I32).splat(lanes())
        self._needed = self.variable(self.slot(NEEDED))

    def _vector(self, sizes: Pair, element: Value) -> None:
        found = joined([size.equals(self._pattern) for size in sizes]).ones()
        with self.when(found >= self._needed.value):
            self.set_slot(NEEDED, self._needed.value)
            self.give(element)
        self._needed.value = self._needed.value - found


class _Tabulate(_Magnitudes):
    def _start(self) -> None:
        self._keys, self._counts = self.address(KEYS), self.address(COUNTS)
        self._distinct = self.variable(self.value(I64, 0))

    def _vector(self, sizes: Pair, element: Value) -> None:
        self._keep(sizes)
        with self.loop(self.value(I64, 0), self.value(I64, width())) as index:
            self._add(self._kept(index))
        with self.when(self._distinct.value > (1 << PLACES_BITS - 1) - width()):
            self.give(self.value(I64, -1))

    def _add(self, key: Value) -> None:
        hashed = (key * 0x9E3779B1) & 0xFFFFFFFF
        place = self.variable(hashed >> (32 - PLACES_BITS))
        found = self.variable(self.load(I64, self._keys, place.value << 3))
        with self.repeat(lambda: ~found.value.equals(key) & (found.value >= 0)):
            place.value = (place.value + 1) & ((1 << PLACES_BITS) - 1)
            found.value = self.load(I64, self._keys, place.value << 3)
        with self.when(found.value < 0):
            self.store(key, self._keys, place.value << 3)
            self._distinct.value = self._distinct.value + 1
        self.increment(self._counts, place.value)
