"""Reading and rounding tensors of every dtype, two vectors at a time: the elements of even place
and those of odd place.

So a 32-bit word of a 16-bit dtype is a shift or a mask away from its two numbers. Knows no merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from llvmlite import ir

from evomerge.merging.kernels.machine import F32, I1, I32, Kernel, Value, constant, lanes

BF16, FP16, FP32 = 0, 1, 2
SIZES = {BF16: 2, FP16: 2, FP32: 4}
"""Bytes of an element."""

Pair: TypeAlias = tuple[Value, Value]
"""The elements of even place and those of odd place."""

MAGNITUDE = 0x7FFFFFFF
SIGN = -(2**31)
_LIMIT = 0x477FF000  # the least float32 that rounds to infinity in float16


def floats() -> ir.VectorType:
    """A vector of float32."""
    return ir.VectorType(F32, lanes())


def integers() -> ir.VectorType:
    """A vector of int32."""
    return ir.VectorType(I32, lanes())


def masks() -> ir.VectorType:
    """A vector of booleans."""
    return ir.VectorType(I1, lanes())


def joined(pair: Sequence[Value]) -> Value:
    """The lanes of one after those of the other."""
    even, odd = pair
    return even.shuffled(odd, list(range(width())))


def width() -> int:
    """Elements of a pair."""
    return 2 * lanes()


def real(bits: Value) -> Value:
    """The float32 of a pattern."""
    return bits.cast(floats())


def pattern(x: Value) -> Value:
    """The bits of a float32."""
    return x.cast(integers())


def magnitude(x: Value) -> Value:
    """|x| as an integer, in the same order."""
    return pattern(x) & MAGNITUDE


def read(kernel: Kernel, code: int, pointer: Value, index: Value) -> Pair:
    """The elements from `index` on, exactly, as float32."""
    place = kernel.at(pointer, index * SIZES[code])
    if code == FP32:
        first = kernel.load(floats(), place)
        second = kernel.load(floats(), place, 4 * lanes())
        even = list(range(0, width(), 2))
        return first.shuffled(second, even), first.shuffled(second, [i + 1 for i in even])
    words = kernel.load(integers(), place)
    if code == BF16:
        return real(words << 16), real(words & -0x10000)
    return _from_half(words & 0xFFFF), _from_half(words >> 16)


def _from_half(word: Value) -> Value:
    """Subnormals by a product that is exact."""
    small = real((word & 0x7FFF) << 13) * 2.0**112
    special = (word & 0x7C00).equals(0x7C00)
    bits = pattern(small) | special.select(_like(word, 0x7F800000), 0)
    return real(bits | ((word & 0x8000) << 16))


def write(kernel: Kernel, code: int, x: Pair, pointer: Value, index: Value) -> Pair:
    """Rounds to nearest even. Returns what is not finite wherever the rounded number is not."""
    place = kernel.at(pointer, index * SIZES[code])
    if code == FP32:
        low, high = list(range(lanes())), list(range(lanes(), 2 * lanes()))
        kernel.store(x[0].shuffled(x[1], _zipped(low, high)[: lanes()]), place)
        kernel.store(x[0].shuffled(x[1], _zipped(low, high)[lanes() :]), place, 4 * lanes())
        return x
    if code == FP16:
        even, odd = _to_half(x[0]), _to_half(x[1])
        kernel.store(even | (odd << 16), place)
        return _overflow(x[0]), _overflow(x[1])
    even, odd = _to_bfloat(x[0]), _to_bfloat(x[1])
    kernel.store((even >> 16) | (odd & -0x10000), place)
    return real(even), real(odd)


def _zipped(low: list[int], high: list[int]) -> list[int]:
    return [place for both in zip(low, high, strict=True) for place in both]


def _to_bfloat(x: Value) -> Value:
    """The rounded number in the upper half."""
    bits = pattern(x)
    odd = ~(bits & 0x10000).equals(0)
    return odd.select(bits + 0x8000, bits + 0x7FFF)


def _to_half(x: Value) -> Value:
    size = magnitude(x)
    # the unit in the last place of a half is float16's smallest number
    small = pattern(real(size) + 0.5) - 0x3F000000
    normal = (size - 0x38000000 + 0xFFF + ((size >> 13) & 1)) >> 13
    word = (size < 0x38800000).select(small, normal)
    return word | ((pattern(x) & SIGN) >> 16)


def _overflow(x: Value) -> Value:
    """x; infinity where it rounds to that."""
    return (magnitude(x) < _LIMIT).select(x, float("inf"))


def _like(value: Value, number: int) -> Value:
    return Value(value.builder, constant(value.type, number))
