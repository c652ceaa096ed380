"""The compiled loops of the CPU kernels: one pass over raw tensors, a cache-sized chunk at a time.

Every product and sum is an IEEE operation of its own, in the order of the methods' torch functions
(no fast-math, no contraction), so that bits agree whatever the vector width, chunk or thread.
Knows no program and no torch: addresses, codes of dtypes and numbers come in.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-call, misc, assignment, import-untyped"

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

BF16, FP16, FP32 = 0, 1, 2
SUM, CONSENSUS = 0, 1
MEAN, TOTAL, LARGEST = 0, 1, 2
PLAIN, TAU = 0, 1

CHUNK = 512
"""Elements per chunk: four rows, the base and the sums of one chunk lie in a core's first cache."""
PIECE = 1024
"""Elements per piece of what is merged in registers: four rows' draws lie in the first cache."""
_STRIDE = CHUNK + 16  # rows whose addresses agree in their low bits would evict each other

_SIGN = np.uint32(0x80000000)
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_NO_WEIGHT = np.float32(1e-8)
_NO_TOP = 2**31 - 1


def _compiled(function: Callable[..., Any]) -> Any:
    """Part of a kernel: compiled with it, and not to be called from Python."""
    return numba.njit(
        nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True
    )(function)


def _kernel(function: Callable[..., Any]) -> Any:
    """A kernel, cached on disk: beside the package, for the user, or in a folder of temporary
    files where neither can be written."""
    try:
        return numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # numba: no locator available
        folder = Path(tempfile.gettempdir()) / f"evomerge-numba-{os.getuid()}"
        numba.config.CACHE_DIR = str(folder)
        return numba.njit(nogil=True, cache=True, error_model="numpy")(function)


@intrinsic
def _words(context: Any, address: Any) -> Any:
    """An address as a pointer to uint16."""
    return types.CPointer(types.uint16)(types.int64), _to_pointer


@intrinsic
def _floats(context: Any, address: Any) -> Any:
    """An address as a pointer to float32."""
    return types.CPointer(types.float32)(types.int64), _to_pointer


@intrinsic
def _bits(context: Any, value: Any) -> Any:
    """The pattern of a float32."""
    return types.uint32(types.float32), _same_bits


@intrinsic
def _real(context: Any, value: Any) -> Any:
    """The float32 of a pattern."""
    return types.float32(types.uint32), _same_bits


@intrinsic
def _count(context: Any, total: Any, more: Any, fewer: Any) -> Any:
    """total + more − fewer of an int32 and two booleans, in 32 bits: numba's own would take 64."""

    def counted(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = context.get_value_type(types.int32)
        flags = [builder.trunc(flag, ir.IntType(1)) for flag in arguments[1:]]
        up, down = (builder.zext(flag, word) for flag in flags)
        return builder.sub(builder.add(arguments[0], up), down)

    return types.int32(types.int32, types.boolean, types.boolean), counted


def _same_bits(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    return builder.bitcast(arguments[0], context.get_value_type(signature.return_type))


def _to_pointer(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))


@intrinsic
def _wide(context: Any, value: Any) -> Any:
    """bfloat16 bits, or a float32 as it is, as float32."""

    def widened(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if isinstance(value, types.Float):
            return arguments[0]
        word = builder.zext(arguments[0], context.get_value_type(types.uint32))
        shifted = builder.shl(word, word.type(16))
        return builder.bitcast(shifted, context.get_value_type(types.float32))

    return types.float32(value), widened


@_compiled
def _flipped(x, sign):  # type: ignore[no-untyped-def]
    return _real(np.uint32(_bits(x) ^ np.uint32(sign)))


@_compiled
def _widen_half(source, out):  # type: ignore[no-untyped-def]
    """float16 bits to float32, exactly; subnormals by a product that is exact."""
    scale = np.float32(2.0**112)
    for i in range(out.size):
        word = np.uint32(source[i])
        small = _real((word & np.uint32(0x7FFF)) << np.uint32(13)) * scale
        bits = _bits(small)
        if (word & np.uint32(0x7C00)) == np.uint32(0x7C00):
            bits = np.uint32(bits | np.uint32(0x7F800000))
        sign = np.uint32((word & np.uint32(0x8000)) << np.uint32(16))
        out[i] = _real(bits | sign)


@_compiled
def _widen(source, out):  # type: ignore[no-untyped-def]
    for i in range(out.size):
        out[i] = _wide(source[i])


@_compiled
def _row_plain(source, factor, out):  # type: ignore[no-untyped-def]
    for i in range(out.size):
        out[i] = _wide(source[i]) * factor


@_compiled
def _row_tau(source, base, factor, out):  # type: ignore[no-untyped-def]
    for i in range(out.size):
        out[i] = (_wide(source[i]) - _wide(base[i])) * factor


@_compiled
def _row_cut(source, base, factor, above, upto, out):  # type: ignore[no-untyped-def]
    """Entries whose pattern p has above < p ≤ upto are kept; the others keep a sign, or NaN."""
    nothing = np.float32(0.0) * factor
    for i in range(out.size):
        tau = _wide(source[i]) - _wide(base[i])
        pattern = np.int32(_bits(tau) & _MAGNITUDE)
        out[i] = tau * (factor if (pattern > above) & (pattern <= upto) else nothing)


@_compiled
def _equals(source, base, wanted):  # type: ignore[no-untyped-def]
    count = np.int32(0)
    for i in range(source.size):
        tau = _wide(source[i]) - _wide(base[i])
        count = _count(count, np.int32(_bits(tau) & _MAGNITUDE) == wanted, False)
    return count


@_compiled
def _place_of(source, base, wanted, needed):  # type: ignore[no-untyped-def]
    """Where the needed-th element equal to the pattern is."""
    for i in range(source.size):
        tau = _wide(source[i]) - _wide(base[i])
        if np.int32(_bits(tau) & _MAGNITUDE) == wanted:
            needed -= 1
            if needed == 0:
                return i
    return base.size


@_compiled
def _last(source, base, row, numbers, place):  # type: ignore[no-untyped-def]
    """Up to where entries equal to the row's cut are kept, as far as this chunk can tell."""
    needed = numbers[row, 4]
    if needed > 0:
        pattern = np.int32(numbers[row, 0])
        count = np.int64(_equals(source, base, pattern))
        if count < needed:
            numbers[row, 4] = needed - count
            return place + source.size
        numbers[row, 1] = place + _place_of(source, base, pattern, needed)
        numbers[row, 4] = 0
    return numbers[row, 1]


@_compiled
def _row_draw(source, base, factor, draws, least, out):  # type: ignore[no-untyped-def]
    nothing = np.float32(0.0) * factor
    for i in range(out.size):
        tau = _wide(source[i]) - _wide(base[i])
        out[i] = tau * (factor if draws[i] > least else nothing)


@_compiled
def _drop_undrawn(draws, least, out):  # type: ignore[no-untyped-def]
    for i in range(out.size):
        out[i] *= np.float32(1.0) if draws[i] > least else np.float32(0.0)


@_compiled
def _draw(key, word, out):  # type: ignore[no-untyped-def]
    """The generator's outputs of index word, word + 1, ..."""
    state = np.uint64(key) + np.uint64(word) * np.uint64(0x9E3779B97F4A7C15)
    for i in range(out.size):
        z = state + np.uint64(i + 1) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        out[i] = z ^ (z >> np.uint64(31))


@_compiled
def _thinned(source, base, row, numbers, factor, place, draws, out):  # type: ignore[no-untyped-def]
    """One row of which entries are left out; `place` is the flat index of its first element."""
    pattern, top, top_last, draw = (
        numbers[row, 0],
        numbers[row, 2],
        numbers[row, 3],
        numbers[row, 5],
    )
    size = out.size
    if pattern < 0 and top == _NO_TOP:
        _row_draw(source, base, factor, draws, np.uint32(draw - 1), out)
        return
    last = _last(source, base, row, numbers, place)
    first = 0
    while first < size:
        stop = size
        above, upto = pattern, top
        if place + first <= last:
            above -= 1
            stop = min(stop, last + 1 - place)
        if place + first <= top_last:
            upto -= 1
            stop = min(stop, top_last + 1 - place)
        _row_cut(
            source[first:stop],
            base[first:stop],
            factor,
            np.int32(above),
            np.int32(upto),
            out[first:stop],
        )
        first = stop
    if draw > 0:
        _drop_undrawn(draws, np.uint32(draw - 1), out)


@_compiled
def _whole(numbers, row):  # type: ignore[no-untyped-def]
    return numbers[row, 0] < 0 and numbers[row, 2] == _NO_TOP and numbers[row, 5] == 0


@_compiled
def _row(source, base, tau, row, numbers, factor, place, draws, out):  # type: ignore[no-untyped-def]
    if not _whole(numbers, row):
        _thinned(source, base, row, numbers, factor, place, draws, out)
    elif tau == PLAIN:
        _row_plain(source, factor, out)
    else:
        _row_tau(source, base, factor, out)


@_compiled
def _add_four(a, b, c, d, out):  # type: ignore[no-untyped-def]
    for i in range(out.size):
        out[i] = out[i] + a[i] + b[i] + c[i] + d[i]


@_compiled
def _add(a, out):  # type: ignore[no-untyped-def]
    for i in range(out.size):
        out[i] += a[i]


@_compiled
def _sum(rows, first, size, out):  # type: ignore[no-untyped-def]
    """Adds the rows from `first` on."""
    count = rows.shape[0]
    fours = first + (count - first) // 4 * 4
    for r in range(first, fours, 4):
        _add_four(rows[r, :size], rows[r + 1, :size], rows[r + 2, :size], rows[r + 3, :size], out)
    for r in range(fours, count):
        _add(rows[r, :size], out)


@_compiled
def _gather(vote, weight, elected, total, divisor):  # type: ignore[no-untyped-def]
    """One vote into Σ_A |v| and Σ_A w."""
    for i in range(total.size):
        agreeing = vote[i] * elected[i]
        agreeing = agreeing if agreeing > 0 else np.float32(0.0)
        total[i] += agreeing
        divisor[i] += weight if agreeing > 0 else np.float32(0.0)


@_compiled
def _gather_four(a, b, c, d, weights, elected, total, divisor):  # type: ignore[no-untyped-def]
    nothing = np.float32(0.0)
    wa, wb, wc, wd = weights[0], weights[1], weights[2], weights[3]
    for i in range(total.size):
        gamma = elected[i]
        x, y, z, u = a[i] * gamma, b[i] * gamma, c[i] * gamma, d[i] * gamma
        x = x if x > 0 else nothing
        y = y if y > 0 else nothing
        z = z if z > 0 else nothing
        u = u if u > 0 else nothing
        total[i] = total[i] + x + y + z + u
        s = divisor[i]
        s += wa if x > 0 else nothing
        s += wb if y > 0 else nothing
        s += wc if z > 0 else nothing
        s += wd if u > 0 else nothing
        divisor[i] = s


@_compiled
def _gather_largest(vote, elected, total):  # type: ignore[no-untyped-def]
    for i in range(total.size):
        agreeing = vote[i] * elected[i]
        total[i] = agreeing if agreeing > total[i] else total[i]


@_compiled
def _elect(total, tie, elected):  # type: ignore[no-untyped-def]
    """γ into `elected`; returns Σ sign(total)."""
    sum_ = np.int32(0)
    for i in range(total.size):
        x = total[i]
        sum_ = _count(sum_, x > 0, x < 0)
        gamma = np.float32(1.0) if x > 0 else tie
        elected[i] = np.float32(-1.0) if x < 0 else gamma
    return sum_


@_compiled
def _real_ties(rows, size, total):  # type: ignore[no-untyped-def]
    """How many sums are 0 though there are votes."""
    zeros = np.int32(0)
    for i in range(size):
        zeros = _count(zeros, total[i] == 0, False)
    if zeros == 0:
        return 0
    count = 0
    for i in range(size):
        if total[i] == 0:
            for r in range(rows.shape[0]):
                if rows[r, i] != 0:
                    count += 1
                    break
    return count


@_compiled
def _decided(sums, total, divisor, elected, mean, scale):  # type: ignore[no-untyped-def]
    """λ·γ·Σ_A|v| (÷ Σ_A w) into `total`; a sum of votes that is NaN stays one."""
    one = np.float32(1.0)
    for i in range(total.size):
        by = divisor[i]
        by = one if (not mean) | (abs(by) < _NO_WEIGHT) else by
        total[i] = (total[i] * elected[i] + (sums[i] - sums[i])) / by * scale


@_compiled
def _consensus(  # type: ignore[no-untyped-def]
    rows, weights, size, aggregate, tie, scale, work, counts, out
):
    sums, elected, divisor = work[0, :size], work[1, :size], work[2, :size]
    sums[:] = np.float32(-0.0)  # −0 + x is x, whatever the sign of a zero
    _sum(rows, 0, size, sums)
    counts[0] += _elect(sums, tie, elected)
    counts[1] += _real_ties(rows, size, sums)
    out[:] = np.float32(0.0)
    divisor[:] = np.float32(0.0)
    count = rows.shape[0]
    if aggregate == LARGEST:
        for r in range(count):
            _gather_largest(rows[r, :size], elected, out)
    else:
        fours = count // 4 * 4
        for r in range(0, fours, 4):
            a, b, c, d = rows[r, :size], rows[r + 1, :size], rows[r + 2, :size], rows[r + 3, :size]
            _gather_four(a, b, c, d, weights[r : r + 4], elected, out, divisor)
        for r in range(fours, count):
            _gather(rows[r, :size], weights[r], elected, out, divisor)
    _decided(sums, out, divisor, elected, aggregate == MEAN, scale)


@_compiled
def _elected(x, y, z, u, weights, mean, tie, scale):  # type: ignore[no-untyped-def]
    """`_consensus` of four votes, a mean if `mean` is not None; NaN where their sum is not finite.

    Zero votes of either sign are no votes, so their sign is free. Returns the sum too, and whether
    votes cancelled out.
    """
    one = np.float32(1.0)
    total = x + y + z + u
    leaning = tie if total == 0 else total
    flip = _bits(leaning) & _SIGN
    x, y, z, u = _flipped(x, flip), _flipped(y, flip), _flipped(z, flip), _flipped(u, flip)
    agreed, by = np.float32(0.0), np.float32(0.0)
    agreed = agreed + x if x > 0 else agreed
    by = by + weights[0] if x > 0 else by
    agreed = agreed + y if y > 0 else agreed
    by = by + weights[1] if y > 0 else by
    agreed = agreed + z if z > 0 else agreed
    by = by + weights[2] if z > 0 else by
    agreed = agreed + u if u > 0 else agreed
    by = by + weights[3] if u > 0 else by
    tied = (total == 0) & (agreed > 0)
    agreed = np.float32(0.0) if leaning == 0 else agreed
    agreed = _flipped(agreed, flip) + (total - total)
    if mean is not None:
        by = one if abs(by) < _NO_WEIGHT else by
        agreed = agreed / by
    return agreed * scale, total, tied


@_compiled
def _cut(word, base, above, factor):  # type: ignore[no-untyped-def]
    tau = _wide(word) - base
    pattern = np.int32(_bits(tau) & _MAGNITUDE)
    return tau * (factor if pattern > above else np.float32(0.0))


@_compiled
def _drawn(word, base, draw, least, factor):  # type: ignore[no-untyped-def]
    return (_wide(word) - base) * (factor if draw >= least else factor * np.float32(0.0))


@_compiled
def _narrowed(x):  # type: ignore[no-untyped-def]
    """bfloat16 bits of a finite float32, to nearest even."""
    bits = _bits(x)
    odd = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
    rounded = np.uint32(bits + np.uint32(0x7FFF) + odd)
    return np.uint16(rounded >> np.uint32(16))


@_compiled
def _larger(largest, x):  # type: ignore[no-untyped-def]
    """The larger of two magnitudes' patterns."""
    return max(largest, np.uint32(_bits(x) & _MAGNITUDE))


@_compiled
def _round_bfloat(x, out):  # type: ignore[no-untyped-def]
    """Returns the largest magnitude's pattern."""
    largest = np.uint32(0)
    for i in range(out.size):
        largest = _larger(largest, x[i])
        out[i] = _narrowed(x[i])
    return largest


@_compiled
def _round_half(x, out):  # type: ignore[no-untyped-def]
    """To nearest even, of finite values; returns the largest magnitude's pattern."""
    largest = np.uint32(0)
    half = np.float32(0.5)  # its unit in the last place is float16's smallest number
    magic = np.uint32(0x3F000000)
    for i in range(out.size):
        bits = _bits(x[i])
        size = np.uint32(bits & _MAGNITUDE)
        largest = max(largest, size)
        small = np.uint32(_bits(_real(size) + half) - magic)
        odd = np.uint32((size >> np.uint32(13)) & np.uint32(1))
        shifted = np.uint32(size - np.uint32(0x38000000) + np.uint32(0xFFF) + odd)
        normal = np.uint32(shifted >> np.uint32(13))
        word = small if size < np.uint32(0x38800000) else normal
        out[i] = np.uint16(word | ((bits & _SIGN) >> np.uint32(16)))
    return largest


@_compiled
def _copy(x, out):  # type: ignore[no-untyped-def]
    largest = np.uint32(0)
    for i in range(out.size):
        out[i] = x[i]
        largest = max(largest, np.uint32(_bits(x[i]) & _MAGNITUDE))
    return largest


@_compiled
def _store(x, address, code, place):  # type: ignore[no-untyped-def]
    """Rounds a chunk into a tensor; whether all of it is finite there."""
    if code == BF16:
        largest = _round_bfloat(x, numba.carray(_words(address + 2 * place), x.size))
        return largest < np.uint32(0x7F7F8000)
    if code == FP16:
        largest = _round_half(x, numba.carray(_words(address + 2 * place), x.size))
        return largest < np.uint32(0x477FF000)
    largest = _copy(x, numba.carray(_floats(address + 4 * place), x.size))
    return largest < np.uint32(0x7F800000)


@_compiled
def _loaded(address, code, place, buffer):  # type: ignore[no-untyped-def]
    """A chunk as float32: its own memory, or widened into the buffer."""
    if code == FP32:
        return numba.carray(_floats(address + 4 * place), buffer.size)
    words = numba.carray(_words(address + 2 * place), buffer.size)
    if code == FP16:
        _widen_half(words, buffer)
    else:
        _widen(words, buffer)
    return buffer


@_compiled
def _view(address, place, size):  # type: ignore[no-untyped-def]
    return numba.carray(_words(address + 2 * place), size)


# Up to four rows of bfloat16, merged in registers from what is stored into what is stored. Rows
# that are missing are the first one again: `third` and `fourth` say whether there are so many, and
# in an election rows that keep nothing do not vote. Flags that are None or not choose what is
# compiled: a branch in a loop would keep its division from being vectorised. All return the largest
# magnitude's pattern.


@_compiled
def _sum_plain(rows, third, fourth, factors, out):  # type: ignore[no-untyped-def]
    a, b, c, d = rows
    fa, fb, fc, fd = factors
    nothing, largest = np.float32(-0.0), np.uint32(0)  # −0 + x is x, whatever the sign of a zero
    for i in range(out.size):
        total = _wide(a[i]) * fa + _wide(b[i]) * fb
        total += _wide(c[i]) * fc if third else nothing
        total += _wide(d[i]) * fd if fourth else nothing
        largest = _larger(largest, total)
        out[i] = _narrowed(total)
    return largest


@_compiled
def _sum_taus(rows, base, third, fourth, factors, out):  # type: ignore[no-untyped-def]
    a, b, c, d = rows
    fa, fb, fc, fd = factors
    nothing, largest = np.float32(-0.0), np.uint32(0)
    for i in range(out.size):
        zero = _wide(base[i])
        total = (_wide(a[i]) - zero) * fa + (_wide(b[i]) - zero) * fb
        total += (_wide(c[i]) - zero) * fc if third else nothing
        total += (_wide(d[i]) - zero) * fd if fourth else nothing
        merged = zero + total
        largest = _larger(largest, merged)
        out[i] = _narrowed(merged)
    return largest


@_compiled
def _sum_drawn(rows, base, draws, least, third, fourth, factors, out):  # type: ignore[no-untyped-def]
    a, b, c, d = rows
    fa, fb, fc, fd = factors
    la, lb, lc, ld = least
    da, db, dc, dd = draws
    nothing, largest = np.float32(-0.0), np.uint32(0)
    for i in range(out.size):
        zero = _wide(base[i])
        total = _drawn(a[i], zero, da[i], la, fa) + _drawn(b[i], zero, db[i], lb, fb)
        total += _drawn(c[i], zero, dc[i], lc, fc) if third else nothing
        total += _drawn(d[i], zero, dd[i], ld, fd) if fourth else nothing
        merged = zero + total
        largest = _larger(largest, merged)
        out[i] = _narrowed(merged)
    return largest


@_compiled
def _vote_cut(  # type: ignore[no-untyped-def]
    rows, base, above, factors, weights, mean, tie, scale, counting, counts, out
):
    a, b, c, d = rows
    fa, fb, fc, fd = factors
    la, lb, lc, ld = above
    largest, balance, ties = np.uint32(0), np.int32(0), np.int32(0)
    for i in range(out.size):
        zero = _wide(base[i])
        x, y = _cut(a[i], zero, la, fa), _cut(b[i], zero, lb, fb)
        z, u = _cut(c[i], zero, lc, fc), _cut(d[i], zero, ld, fd)
        tau, total, tied = _elected(x, y, z, u, weights, mean, tie, scale)
        ties = _count(ties, tied, False)
        if counting is not None:
            balance = _count(balance, total > 0, total < 0)
        merged = zero + tau
        largest = _larger(largest, merged)
        out[i] = _narrowed(merged)
    counts[0] += balance
    counts[1] += ties
    return largest


@_compiled
def _vote_drawn(  # type: ignore[no-untyped-def]
    rows, base, draws, least, factors, weights, mean, tie, scale, counting, counts, out
):
    a, b, c, d = rows
    fa, fb, fc, fd = factors
    la, lb, lc, ld = least
    da, db, dc, dd = draws
    largest, balance, ties = np.uint32(0), np.int32(0), np.int32(0)
    for i in range(out.size):
        zero = _wide(base[i])
        x, y = _drawn(a[i], zero, da[i], la, fa), _drawn(b[i], zero, db[i], lb, fb)
        z, u = _drawn(c[i], zero, dc[i], lc, fc), _drawn(d[i], zero, dd[i], ld, fd)
        tau, total, tied = _elected(x, y, z, u, weights, mean, tie, scale)
        ties = _count(ties, tied, False)
        if counting is not None:
            balance = _count(balance, total > 0, total < 0)
        merged = zero + tau
        largest = _larger(largest, merged)
        out[i] = _narrowed(merged)
    counts[0] += balance
    counts[1] += ties
    return largest


@_compiled
def _parts(rows, first, stop):  # type: ignore[no-untyped-def]
    a, b, c, d = rows
    return a[first:stop], b[first:stop], c[first:stop], d[first:stop]


@_compiled
def _above(numbers, row, last, place):  # type: ignore[no-untyped-def]
    """The pattern that entries from `place` on must exceed; no entry of a missing row does."""
    if row >= numbers.shape[0]:
        return np.int32(_NO_TOP)
    return np.int32(numbers[row, 0] - 1 if place <= last else numbers[row, 0])


@_compiled
def _vote_on_cuts(  # type: ignore[no-untyped-def]
    rows, base, place, numbers, factors, weights, mean, tie, scale, counting, counts, out
):
    """A piece of trimmed rows, cut where a row's equal entries stop being kept."""
    size, count = out.size, numbers.shape[0]
    a, b, c, d = rows
    la = _last(a, base, 0, numbers, place)
    lb = _last(b, base, 1, numbers, place) if count > 1 else -1
    lc = _last(c, base, 2, numbers, place) if count > 2 else -1
    ld = _last(d, base, 3, numbers, place) if count > 3 else -1
    first, largest = 0, np.uint32(0)
    while first < size:
        stop, here = size, place + first
        for last in (la, lb, lc, ld):
            if last >= here:
                stop = min(stop, last + 1 - place)
        above = (
            _above(numbers, 0, la, here),
            _above(numbers, 1, lb, here),
            _above(numbers, 2, lc, here),
            _above(numbers, 3, ld, here),
        )
        part, target = _parts(rows, first, stop), out[first:stop]
        zero = base[first:stop]
        if mean and counting:
            found = _vote_cut(
                part, zero, above, factors, weights, True, tie, scale, True, counts, target
            )
        elif mean:
            found = _vote_cut(
                part, zero, above, factors, weights, True, tie, scale, None, counts, target
            )
        elif counting:
            found = _vote_cut(
                part, zero, above, factors, weights, None, tie, scale, True, counts, target
            )
        else:
            found = _vote_cut(
                part, zero, above, factors, weights, None, tie, scale, None, counts, target
            )
        largest, first = max(largest, found), stop
    return largest


@_compiled
def _vote_on_draws(  # type: ignore[no-untyped-def]
    rows, base, draws, least, factors, weights, mean, tie, scale, counting, counts, out
):
    """A piece of randomly thinned rows."""
    if mean and counting:
        return _vote_drawn(
            rows, base, draws, least, factors, weights, True, tie, scale, True, counts, out
        )
    if mean:
        return _vote_drawn(
            rows, base, draws, least, factors, weights, True, tie, scale, None, counts, out
        )
    if counting:
        return _vote_drawn(
            rows, base, draws, least, factors, weights, None, tie, scale, True, counts, out
        )
    return _vote_drawn(
        rows, base, draws, least, factors, weights, None, tie, scale, None, counts, out
    )


@_compiled
def _drawn_words(numbers, place, size, words):  # type: ignore[no-untyped-def]
    """Every row's draws for a piece. Shapes: words [4, n/2] uint64; returns 4 times [n] uint32."""
    odd = place & 1
    for r in range(numbers.shape[0]):
        if numbers[r, 5] > 0:
            _draw(numbers[r, 6], place >> 1, words[r, : (size + odd + 1) >> 1])
    draws = words.view(np.uint32)
    return (
        draws[0, odd : odd + size],
        draws[1, odd : odd + size],
        draws[2, odd : odd + size],
        draws[3, odd : odd + size],
    )


@_compiled
def _least(numbers, row):  # type: ignore[no-untyped-def]
    return np.uint32(numbers[row, 5]) if row < numbers.shape[0] else np.uint32(0)


@_compiled
def _four(values, count):  # type: ignore[no-untyped-def]
    """Up to four numbers as a tuple of four, 0 for those missing."""
    nothing = np.float32(0.0)
    return (
        values[0],
        values[1] if count > 1 else nothing,
        values[2] if count > 2 else nothing,
        values[3] if count > 3 else nothing,
    )


@_compiled
def _is_raw(kind, codes, numbers, origin, base_code, aggregate, out_code):  # type: ignore[no-untyped-def]
    """Whether the loops above can do it: 1 rows are whole or trimmed, 2 drawn, 0 neither."""
    count, cuts, draws = codes.size, 0, 0
    if count > 4 or out_code != BF16 or (origin == TAU and base_code != BF16):
        return 0
    if kind == SUM and count < 2:
        return 0
    if kind == CONSENSUS and (aggregate == LARGEST or origin != TAU):
        return 0
    for r in range(count):
        if codes[r] != BF16 or numbers[r, 2] != _NO_TOP or numbers[r, 5] > 0xFFFFFFFF:
            return 0
        cuts += np.int64(numbers[r, 0] >= 0)
        draws += np.int64(numbers[r, 5] > 0)
    if draws > 0:
        return 2 if cuts == 0 and origin == TAU else 0
    return 0 if kind == SUM and cuts > 0 else 1


@_compiled
def _raw(  # type: ignore[no-untyped-def]
    variety,
    kind,
    addresses,
    factors,
    weights,
    numbers,
    origin,
    base_address,
    mean,
    tie,
    scale,
    counting,
    out_address,
    place,
    size,
    words,
    counts,
):
    """One piece by the loops above; whether all of it is finite."""
    count = numbers.shape[0]
    third, fourth = count > 2, count > 3
    rows = (
        _view(addresses[0], place, size),
        _view(addresses[1], place, size),
        _view(addresses[2 if third else 0], place, size),
        _view(addresses[3 if fourth else 0], place, size),
    )
    out = _view(out_address, place, size)
    base = _view(base_address if origin == TAU else addresses[0], place, size)
    least = _least(numbers, 0), _least(numbers, 1), _least(numbers, 2), _least(numbers, 3)
    if variety == 2:
        draws = _drawn_words(numbers, place, size, words)
        if kind == SUM:
            largest = _sum_drawn(rows, base, draws, least, third, fourth, factors, out)
        else:
            largest = _vote_on_draws(
                rows,
                base,
                draws,
                least,
                factors,
                weights,
                mean,
                tie,
                scale,
                counting,
                counts,
                out,
            )
    elif kind == CONSENSUS:
        largest = _vote_on_cuts(
            rows, base, place, numbers, factors, weights, mean, tie, scale, counting, counts, out
        )
    elif origin == TAU:
        largest = _sum_taus(rows, base, third, fourth, factors, out)
    else:
        largest = _sum_plain(rows, third, fourth, factors, out)
    return largest < np.uint32(0x7F7F8000)


@_kernel
def fuse(  # type: ignore[no-untyped-def]
    kind,
    addresses,
    codes,
    factors,
    weights,
    numbers,
    origin,
    base_address,
    base_code,
    aggregate,
    tie,
    scale,
    counting,
    out_address,
    out_code,
    start,
    stop,
    counts,
):
    """Merge the elements [start, stop) of one tensor; the end of what is finite.

    Per row: address, code of the dtype, factor, weight, and numbers (cut's pattern and last, top's
    pattern and last, how many equal to the cut are still to be kept, draw's threshold, its key).
    Rows are at least one. Adds Σ sign of the votes, if `counting`, and the number of tied votes to
    `counts`. A negative code of `out` writes nothing.
    """
    count = addresses.size
    rows = np.empty((count, _STRIDE), np.float32)
    work = np.zeros((6, _STRIDE), np.float32)  # θ − 0 is θ, where the origin is 0
    words = np.empty((4, PIECE // 2 + 8), np.uint64)
    variety = _is_raw(kind, codes, numbers, origin, base_code, aggregate, out_code)
    several = np.full(4, addresses[0])
    several[: min(count, 4)] = addresses[:4]
    four_factors, four_weights = _four(factors, count), _four(weights, count)
    step = PIECE if variety > 0 else CHUNK
    for place in range(start, stop, step):
        size = min(step, stop - place)
        if variety > 0:
            finite = _raw(
                variety,
                kind,
                several,
                four_factors,
                four_weights,
                numbers,
                origin,
                base_address,
                aggregate == MEAN,
                tie,
                scale,
                counting,
                out_address,
                place,
                size,
                words,
                counts,
            )
        else:
            out = work[4, :size]
            _by_rows(
                kind,
                addresses,
                codes,
                factors,
                weights,
                numbers,
                origin,
                base_address,
                base_code,
                aggregate,
                tie,
                scale,
                place,
                rows,
                work,
                words,
                counts,
                out,
            )
            finite = out_code < 0 or _store(out, out_address, out_code, place)
        if not finite:
            return place
    return stop


@_compiled
def _by_rows(  # type: ignore[no-untyped-def]
    kind,
    addresses,
    codes,
    factors,
    weights,
    numbers,
    origin,
    base_address,
    base_code,
    aggregate,
    tie,
    scale,
    place,
    rows,
    work,
    words,
    counts,
    out,
):
    """One chunk of any rows: each is thinned on its own, then all are merged."""
    size, count, odd = out.size, addresses.size, place & 1
    base = work[3, :size]
    if origin == TAU:
        base = _loaded(base_address, base_code, place, base)
    for r in range(count):
        if numbers[r, 5] > 0:
            _draw(numbers[r, 6], place >> 1, words[0, : (size + odd + 1) >> 1])
        drawn, row = words.view(np.uint32)[0, odd : odd + size], rows[r, :size]
        if codes[r] == BF16:
            source = _view(addresses[r], place, size)
            _row(source, base, origin, r, numbers, factors[r], place, drawn, row)
        else:
            wide = _loaded(addresses[r], codes[r], place, work[5, :size])
            _row(wide, base, origin, r, numbers, factors[r], place, drawn, row)
    if kind == SUM:
        out[:] = np.float32(-0.0)  # −0 + x is x, whatever the sign of a zero
        _sum(rows, 0, size, out)
    else:
        _consensus(rows, weights, size, aggregate, tie, scale, work, counts, out)
    if origin == TAU:
        _add(base, out)


@_compiled
def _patterns(address, code, base_address, base_code, place, work, out):  # type: ignore[no-untyped-def]
    """|θᵢ − θ₀| of a chunk as integers in the same order."""
    size = out.size
    if code == BF16 and base_code == BF16:
        _patterns_of(_view(address, place, size), _view(base_address, place, size), out)
        return
    source = _loaded(address, code, place, work[0, :size])
    base = _loaded(base_address, base_code, place, work[1, :size])
    _patterns_of(source, base, out)


@_compiled
def _patterns_of(source, base, out):  # type: ignore[no-untyped-def]
    for i in range(out.size):
        out[i] = np.uint32(_bits(_wide(source[i]) - _wide(base[i])) & _MAGNITUDE)


@_kernel
def histogram(address, code, base_address, base_code, size, bins):  # type: ignore[no-untyped-def]
    """Counts the upper 16 bits of magnitudes. Shapes: bins [4, 65536] int32, to be added up: four
    neighbours never wait for one another's count."""
    work = np.empty((2, _STRIDE), np.float32)
    patterns = np.empty(CHUNK, np.uint32)
    for place in range(0, size, CHUNK):
        count = min(CHUNK, size - place)
        found = patterns[:count]
        _patterns(address, code, base_address, base_code, place, work, found)
        fours = count // 4 * 4
        for i in range(0, fours, 4):
            bins[0, found[i] >> np.uint32(15)] += 1
            bins[1, found[i + 1] >> np.uint32(15)] += 1
            bins[2, found[i + 2] >> np.uint32(15)] += 1
            bins[3, found[i + 3] >> np.uint32(15)] += 1
        for i in range(fours, count):
            bins[0, found[i] >> np.uint32(15)] += 1


@_compiled
def _any_in(patterns, upper):  # type: ignore[no-untyped-def]
    count = np.int32(0)
    for i in range(patterns.size):
        count = _count(count, (patterns[i] >> np.uint32(15)) == upper, False)
    return count


@_kernel
def within_bin(  # type: ignore[no-untyped-def]
    address, code, base_address, base_code, size, upper, bins
):
    """Counts the lower 15 bits of the magnitudes of one bin. Shapes: bins [32768] int64."""
    work = np.empty((2, _STRIDE), np.float32)
    patterns = np.empty(CHUNK, np.uint32)
    for place in range(0, size, CHUNK):
        found = patterns[: min(CHUNK, size - place)]
        _patterns(address, code, base_address, base_code, place, work, found)
        if _any_in(found, np.uint32(upper)) == 0:
            continue
        for pattern in found:
            if (pattern >> np.uint32(15)) == upper:
                bins[pattern & np.uint32(0x7FFF)] += 1


@_kernel
def locate(address, code, base_address, base_code, size, pattern, needed):  # type: ignore[no-untyped-def]
    """The flat index of the needed-th magnitude that equals the pattern; −1 if there is none."""
    work = np.empty((2, _STRIDE), np.float32)
    patterns = np.empty(CHUNK, np.uint32)
    for place in range(0, size, CHUNK):
        found = patterns[: min(CHUNK, size - place)]
        _patterns(address, code, base_address, base_code, place, work, found)
        count = np.int32(0)
        for i in range(found.size):
            count = _count(count, found[i] == np.uint32(pattern), False)
        if count < needed:
            needed -= count
            continue
        for i in range(found.size):
            if found[i] == np.uint32(pattern):
                needed -= 1
                if needed == 0:
                    return place + i
    return -1


@_kernel
def tabulate(address, code, base_address, base_code, size, keys, counts):  # type: ignore[no-untyped-def]
    """Counts equal magnitudes. Shapes: keys and counts [2^b] int64, keys −1 where empty; open
    addressing. False if half of the places do not suffice."""
    work = np.empty((2, _STRIDE), np.float32)
    patterns = np.empty(CHUNK, np.uint32)
    places, distinct = keys.size, 0
    shift = np.uint32(32)
    while places > 1:
        places >>= 1
        shift = np.uint32(shift - np.uint32(1))
    mask, limit = keys.size - 1, keys.size // 2
    for place in range(0, size, CHUNK):
        found = patterns[: min(CHUNK, size - place)]
        _patterns(address, code, base_address, base_code, place, work, found)
        for pattern in found:
            slot = np.int64(np.uint32(pattern * np.uint32(0x9E3779B1)) >> shift)
            while keys[slot] != pattern:
                if keys[slot] < 0:
                    keys[slot] = pattern
                    distinct += 1
                    break
                slot = (slot + 1) & mask
            counts[slot] += 1
        if distinct + CHUNK > limit:
            return False
    return True


@_compiled
def _lanes(a, b, out):  # type: ignore[no-untyped-def]
    for i in range(out.size):
        out[i] += np.float64(_wide(a[i])) * np.float64(_wide(b[i]))


@_compiled
def _difference(source, base, out):  # type: ignore[no-untyped-def]
    for i in range(out.size):
        out[i] = _wide(source[i]) - _wide(base[i])


@_kernel
def products(addresses, codes, base_address, base_code, tau, start, stop, sums):  # type: ignore[no-untyped-def]
    """Σ vᵢ·vⱼ of [start, stop) by lanes. Shapes: sums [s·(s+1)/2, 512] float64, added to; lane l
    takes the elements start + l, start + l + 512, ... in turn."""
    count = addresses.size
    rows = np.empty((count + 1, _STRIDE), np.float32)
    for place in range(start, stop, CHUNK):
        size = min(CHUNK, stop - place)
        for r in range(count):
            row = rows[r, :size]
            if tau:
                base = _loaded(base_address, base_code, place, rows[count, :size])
                if codes[r] == BF16:
                    _difference(_view(addresses[r], place, size), base, row)
                else:
                    _difference(_loaded(addresses[r], codes[r], place, row), base, row)
            elif codes[r] == FP32:
                row[:] = numba.carray(_floats(addresses[r] + 4 * place), size)
            else:
                _loaded(addresses[r], codes[r], place, row)
        pair = 0
        for r in range(count):
            for q in range(r, count):
                _lanes(rows[r, :size], rows[q, :size], sums[pair, :size])
                pair += 1
