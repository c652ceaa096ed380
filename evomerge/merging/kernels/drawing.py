"""The draws of `masks.draws` while a loop is written: a pair of vectors, even and odd elements.

Knows no method.
"""

from __future__ import annotations

from llvmlite import ir

from evomerge.merging.kernels.formats import Pair
from evomerge.merging.kernels.machine import I32, I64, Value, lanes

_GOLD = 0x9E3779B97F4A7C15 - 2**64


def drawn(key: Value, element: Value) -> Pair:
    """The draws of `width()` elements from an even one on; `key` is in every lane."""
    kind = ir.VectorType(I64, lanes())
    steps = [(lane * _GOLD + 2**63) % 2**64 - 2**63 for lane in range(lanes())]
    first = ((element >> 1) + 1) * _GOLD
    z = first.splat(lanes()) + steps + key
    z = (z ^ (z >> 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    z = (z ^ (z >> 27)) * (0x94D049BB133111EB - 2**64)
    z = z ^ (z >> 31)
    assert z.type == kind
    words = z.cast(ir.VectorType(I32, 2 * lanes()))
    places = list(range(0, 2 * lanes(), 2))
    return words.shuffled(words, places), words.shuffled(words, [p + 1 for p in places])
