"""A `Program` as Triton kernels: one fused pass from operands as they are stored to the result.

Each product and sum is rounded on its own, so launch with `enable_fp_fusion=False`; then every
device, and Triton's interpreter, gives the bits of the methods' own torch functions. Knows nothing
of methods and allocates nothing: `cuda` prepares the arguments. Importing this needs Triton.

A row is ROW_WORDS integers of the `table`, after HEAD_WORDS that hold for all rows. A table rather
than arguments, because Triton compiles a kernel again for many a new integer argument.
"""

# Triton's language only looks like Python: no annotations but constexpr, no unpacking.
# mypy: ignore-errors
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

HEAD_WORDS = tl.constexpr(3)
_START = tl.constexpr(0)  # flat index of the first element
_SCALE = tl.constexpr(1)  # float32 bits
_TIE = tl.constexpr(2)  # float32 bits

ROW_WORDS = tl.constexpr(8)
_FACTOR = tl.constexpr(0)  # float32 bits
_WEIGHT = tl.constexpr(1)  # float32 bits
_CUT = tl.constexpr(2)  # pattern, then last
_TOP = tl.constexpr(4)  # pattern, then last
_KEY = tl.constexpr(6)
_THRESHOLD = tl.constexpr(7)

_NO_WEIGHT = tl.constexpr(1e-8)  # combination.NO_WEIGHT


@triton.jit
def merge(
    out,
    flag,
    base,
    sources,
    table,
    size,
    BASE: tl.constexpr,
    CUTS: tl.constexpr,
    TOPS: tl.constexpr,
    DRAWS: tl.constexpr,
    PAIRED: tl.constexpr,
    AGGREGATE: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """θ of BLOCK elements into `out`; `flag` becomes 1 where one is no finite number of its dtype.

    `sources` holds one pointer per row; AGGREGATE is "none" without an election. The least float32
    magnitude that rounds to infinity is LIMIT. `base` is not read unless BASE.
    PAIRED is as in `draws`.
    """
    place = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = place + lane < size
    origin = _loaded(base + place, lane, inside) if BASE else 0.0
    rows = _rows(sources, origin, place, lane, inside, BASE)
    first = tl.load(table + _START) + place
    # Two copies of the code. All blocks but one per cut lie on one side of its `last`, and sparing
    # them the comparison of every index is a tenth of the instructions of TIES.
    if _holds_end(table, first, len(sources), CUTS, TOPS, BLOCK):
        parts = _parts(rows, table, first, lane, CUTS, TOPS, DRAWS, PAIRED, True, BLOCK)
        merged = _merged(parts, origin, table, BASE, AGGREGATE)
    else:
        parts = _parts(rows, table, first, lane, CUTS, TOPS, DRAWS, PAIRED, False, BLOCK)
        merged = _merged(parts, origin, table, BASE, AGGREGATE)
    _store(out + place, merged, lane, inside)
    # NaN is not below it either; lanes outside hold 0
    bad = ((tl.abs(merged) < LIMIT) == 0).to(tl.int32)
    # a thread's elements first: one store each, and no barrier
    bad = tl.max(tl.reshape(bad, (BLOCK // 8, 8)), axis=1)
    tl.store(flag + tl.arange(0, BLOCK // 8) * 0, 1, mask=bad > 0)


@triton.jit
def balance(
    out,
    base,
    sources,
    table,
    size,
    BASE: tl.constexpr,
    CUTS: tl.constexpr,
    TOPS: tl.constexpr,
    DRAWS: tl.constexpr,
    PAIRED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Σⱼ sign(Σᵢ xᵢⱼ) over each run of BLOCK elements, one int32 of `out` for each."""
    place = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = place + lane < size
    origin = _loaded(base + place, lane, inside) if BASE else 0.0
    rows = _rows(sources, origin, place, lane, inside, BASE)
    first = tl.load(table + _START) + place
    total = _total(_parts(rows, table, first, lane, CUTS, TOPS, DRAWS, PAIRED, True, BLOCK))
    elected = (total > 0).to(tl.int32) - (total < 0).to(tl.int32)
    tl.store(out + tl.program_id(0), tl.sum(tl.where(inside, elected, 0), axis=0))


@triton.jit
def draws(key, first, BLOCK: tl.constexpr, PAIRED: tl.constexpr):
    """`masks.draws`: the uniform integers in [0, 2³²) of the BLOCK indices from `first` on.

    Shapes: returns [BLOCK] int64. PAIRED if `first` is even: a word is then computed once for the
    two elements that share it.
    """
    if PAIRED:
        words = _words(key, (first >> 1) + tl.arange(0, BLOCK // 2))
        drawn = tl.interleave(words & 0xFFFFFFFF, words >> 32)
    else:
        index = first + tl.arange(0, BLOCK)
        words = _words(key, index >> 1)
        drawn = tl.where((index & 1) == 1, words >> 32, words & 0xFFFFFFFF)
    return drawn.to(tl.int64, bitcast=True)


@triton.jit
def _words(key, index):
    """The outputs of SplitMix64 of these indices."""
    x = (index + 1).to(tl.uint64, bitcast=True) * 0x9E3779B97F4A7C15
    x += key.to(tl.uint64, bitcast=True)
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _holds_end(
    table, first, ROWS: tl.constexpr, CUTS: tl.constexpr, TOPS: tl.constexpr, BLOCK: tl.constexpr
):
    """Whether a cut's `last` lies in the block, other than as its last element."""
    holds = first < first
    for row in tl.static_range(ROWS):
        words = table + (HEAD_WORDS + row * ROW_WORDS)
        if CUTS:
            last = tl.load(words + _CUT + 1) - first
            holds = holds | ((last >= 0) & (last < BLOCK - 1))
        if TOPS:
            last = tl.load(words + _TOP + 1) - first
            holds = holds | ((last >= 0) & (last < BLOCK - 1))
    return holds


@triton.jit
def _rows(sources, origin, place, lane, inside, BASE: tl.constexpr):
    """θᵢ, or τᵢ = θᵢ − θ₀ with a base. Shapes: a tuple of [BLOCK] float32."""
    rows = ()
    for row in tl.static_range(len(sources)):
        x = _loaded(sources[row] + place, lane, inside)
        rows = rows + (x - origin if BASE else x,)
    return rows


@triton.jit
def _parts(
    rows,
    table,
    first,
    lane,
    CUTS: tl.constexpr,
    TOPS: tl.constexpr,
    DRAWS: tl.constexpr,
    PAIRED: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """factor·(kept entries) of every row. Shapes: a tuple of [BLOCK] float32.

    `first` is the flat index of the block's first element. EXACT must be set where a cut's `last`
    lies in the block.
    """
    parts = ()
    for row in tl.static_range(len(rows)):
        words = table + (HEAD_WORDS + row * ROW_WORDS)
        factor = _float(words, _FACTOR)
        if CUTS or TOPS or DRAWS:
            kept = _kept(rows[row], words, first, lane, CUTS, TOPS, DRAWS, PAIRED, EXACT, BLOCK)
            # what is left out keeps its sign, and NaN stays NaN
            factor = tl.where(kept, factor, factor * 0.0)
        parts = parts + (rows[row] * factor,)
    return parts


@triton.jit
def _kept(
    x,
    words,
    first,
    lane,
    CUTS: tl.constexpr,
    TOPS: tl.constexpr,
    DRAWS: tl.constexpr,
    PAIRED: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    kept = lane >= 0
    if CUTS:
        kept = kept & _within(x, words + _CUT, first, lane, EXACT)
    if TOPS:
        kept = kept & (_within(x, words + _TOP, first, lane, EXACT) == 0)
    if DRAWS:
        drawn = draws(tl.load(words + _KEY), first, BLOCK, PAIRED)
        kept = kept & (drawn >= tl.load(words + _THRESHOLD))
    return kept


@triton.jit
def _within(x, cut, first, lane, EXACT: tl.constexpr):
    """`Cut.mask`."""
    pattern = tl.load(cut).to(tl.int32)
    # relative to the block: 32 bits do
    last = tl.minimum(tl.maximum(tl.load(cut + 1) - first, -1), 1 << 30).to(tl.int32)
    reached = lane <= last if EXACT else last >= 0
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return magnitude > tl.where(reached, pattern - 1, pattern)


@triton.jit
def _merged(parts, origin, table, BASE: tl.constexpr, AGGREGATE: tl.constexpr):
    if AGGREGATE == "none":
        merged = _total(parts)
    else:
        merged = _consensus(parts, table, AGGREGATE) * _float(table, _SCALE)
    if BASE:
        merged = origin + merged
    return merged


@triton.jit
def _consensus(votes, table, AGGREGATE: tl.constexpr):
    """`election.consensus`, operation by operation."""
    total = _total(votes)
    elected = tl.where(total > 0, 1.0, tl.where(total < 0, -1.0, _float(table, _TIE)))
    result = tl.zeros_like(total)
    divisor = tl.zeros_like(total)
    for row in tl.static_range(len(votes)):
        magnitude = votes[row] * elected
        agrees = (magnitude <= 0) == 0  # NaN does
        if AGGREGATE == "max":
            larger = (magnitude > result) | (magnitude != magnitude)
            result = tl.where(larger, magnitude, result)
        else:
            result = tl.where(agrees, result + magnitude, result)
        if AGGREGATE == "mean":
            weight = _float(table + (HEAD_WORDS + row * ROW_WORDS), _WEIGHT)
            divisor = tl.where(agrees, divisor + weight, divisor)
    result = result * elected + 0.0  # no −0, which would tell how a tie was decided
    if AGGREGATE == "mean":
        result = tl.div_rn(result, tl.where(tl.abs(divisor) < _NO_WEIGHT, 1.0, divisor))
    return result


@triton.jit
def _total(parts):
    # from the first part, not from 0: 0 + -0 would lose a sign
    total = parts[0]
    for row in tl.static_range(1, len(parts)):
        total = total + parts[row]
    return total


@triton.jit
def _float(words, word: tl.constexpr):
    return tl.load(words + word).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _loaded(pointer, lane, inside):
    stored = tl.load(pointer + lane, mask=inside, other=0.0)
    if stored.dtype == tl.bfloat16:
        # the interpreter's own conversions from and to bfloat16 are not exact
        bits = stored.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        values = bits.to(tl.float32, bitcast=True)
    else:
        values = stored.to(tl.float32)
    return values


@triton.jit
def _store(pointer, values, lane, inside):
    """Rounds to nearest even. NaN may become another value: `merge` tells of it."""
    if pointer.dtype.element_ty == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = upper.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        rounded = values.to(pointer.dtype.element_ty)
    tl.store(pointer + lane, rounded, mask=inside)
