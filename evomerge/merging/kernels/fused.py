"""Writes the loop that merges any number of rows in registers, from what is stored into what is
stored, for one shape of a program.

The numbers of the program come in a table when it runs; its signs, dtypes and rules are compiled
in. Knows no tensors of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from llvmlite import ir

from evomerge.merging.kernels.drawing import drawn
from evomerge.merging.kernels.formats import (
    FP32,
    SIGN,
    SIZES,
    Pair,
    floats,
    integers,
    joined,
    magnitude,
    masks,
    pattern,
    read,
    real,
    write,
)
from evomerge.merging.kernels.machine import F32, I1, I8, I32, I64, Kernel, Value, lanes
from evomerge.merging.kernels.walking import AHEAD, walk

PIECE = 2048
"""Elements between two looks at what was counted."""

BASE, OUT, SCALE, BALANCE, BAD, TIED, ROWS = range(7)
"""Places in the table; TIED is the address of a byte per piece of the tensor."""
SOURCE, FACTOR, WEIGHT, PATTERN, LEFT, UPTO, KEY, LEAST = range(8)
"""Places of a row in the table, which starts at ROWS + 8·r. A row keeps patterns above PATTERN, and
LEFT of those equal to it; not those above UPTO; and elements whose draw is LEAST or more."""

MANY = 1 << 62
"""What LEFT is where all equals are kept."""

_NO_WEIGHT = 1e-8


@dataclass(frozen=True)
class Shape:
    """What is compiled in. `sources`, `base` and `out` are codes of dtypes; no base is no origin,
    no `out` writes nothing.

    `careful` keeps the sign of zeros and NaN among what is left out. `counts` counts what equals a
    cut, `open` the balance of the votes and where they tie, which must be taken for positive then.
    `positive` says that no weights can add up to less than a divisor may be.
    """

    sources: tuple[int, ...]
    base: int | None
    out: int | None
    vote: Literal["none", "mean", "sum", "max"] = "none"
    cuts: bool = False
    tops: bool = False
    draws: bool = False
    scaled: bool = True
    careful: bool = True
    counts: bool = False
    open: bool = False
    tie: int = 0
    positive: bool = False


@cache
def compiled(shape: Shape) -> Callable[[int, int, int], int]:
    """Merges the elements [begin, end) of a tensor; where it stopped: at `end`, or where no row has
    equals to count any more."""
    return _Merge(shape).compiled()


def slot(row: int, name: int) -> int:
    """The place of a row's number in the table."""
    return ROWS + 8 * row + name


class _Merge(Kernel):
    """The loop while it is written."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.rows = range(len(shape.sources))
        self.factors = [self._everywhere(slot(r, FACTOR), F32) for r in self.rows]
        self.nothings = [factor * 0.0 for factor in self.factors]
        self.weights = [self._everywhere(slot(r, WEIGHT), F32) for r in self.rows]
        self.uptos = [self._everywhere(slot(r, UPTO), I32) for r in self.rows]
        self.leasts = [self._everywhere(slot(r, LEAST), I32) for r in self.rows]
        self.patterns = [self._everywhere(slot(r, PATTERN), I32) for r in self.rows]
        self.keys = [self._everywhere(slot(r, KEY), I64) for r in self.rows]
        self.scale = self._everywhere(SCALE, F32)
        operands = [(code, self.address(slot(r, SOURCE))) for r, code in enumerate(shape.sources)]
        if shape.base is not None:
            operands.append((shape.base, self.address(BASE)))
        self.operands = operands
        self.out = (shape.out, self.address(OUT)) if shape.out is not None else None
        self._pieces()
        self.give(self.end)

    def _everywhere(self, index: int, kind: ir.Type) -> Value:
        return self.slot(index, kind).splat(lanes())

    def _pieces(self) -> None:
        nothing = self.value(I64, 0)
        self.balance = self.variable(nothing)
        self.equals = [self.variable(nothing) for _ in self.rows]
        self.bad = self.variable(self.value(floats(), 0.0))
        self.tied = self.variable(self.value(masks(), 0))
        place, step = self.variable(self.begin), self.variable(self.value(I64, PIECE))
        with self.repeat(lambda: place.value < self.end):
            here = place.value
            stop = self.least(self.least((here & -PIECE) + PIECE, here + step.value), self.end)
            self._piece(here, stop)
            if self.shape.counts:
                over = self._overdrawn()
                with self.builder.if_else(over.raw) as (then, otherwise):
                    with then:  # the piece is done again, up to nearer where a row runs out
                        step.value = (stop - here) >> 1
                    with otherwise:
                        self._settle(here)
                        step.value = self._drawn(step.value)
                        place.value = stop
                        with self.when(~self._open()):
                            self.give(stop)
            else:
                self._settle(here)
                place.value = stop

    def _left(self, r: int) -> Value:
        return self.slot(slot(r, LEFT))

    def _overdrawn(self) -> Value:
        """Whether a row has more equals in this piece than are left to be kept."""
        over = self.value(I1, 0)
        for r in self.rows:
            over = over | ((self._left(r) > 0) & (self.equals[r].value > self._left(r)))
        return over

    def _drawn(self, step: Value) -> Value:
        """Takes the piece's equals from what is left. The next step: a whole piece where a row is
        through with it."""
        for r in self.rows:
            left = self._left(r)
            rest = (left > 0).select(left - self.equals[r].value, left)
            through = (left > 0) & rest.equals(0)
            step = through.select(self.value(I64, PIECE), step)
            self.set_slot(slot(r, LEFT), rest)
        return step

    def _open(self) -> Value:
        """Whether a row still counts."""
        found = self.value(I1, 0)
        for r in self.rows:
            found = found | ((self._left(r) > 0) & (self._left(r) < MANY // 2))
        return found

    def _piece(self, here: Value, stop: Value) -> None:
        nothing = self.value(I64, 0)
        for cell in (self.balance, *self.equals):
            cell.value = nothing
        self.tied.value = self.value(masks(), 0)
        self.bad.value = self.value(floats(), 0.0)
        self.aboves = [
            (self.slot(slot(r, PATTERN)) - (self._left(r) > 0).widened(I64)).cut(I32).splat(lanes())
            for r in self.rows
        ]
        walk(self, self.operands, self.out, here, stop, self._body, even=self.shape.draws)

    def _settle(self, here: Value) -> None:
        """Takes down what was seen in a piece."""
        with self.when(self.bad.value.is_nan().any()):
            self.set_slot(BAD, self.value(I64, 1))
        if self.shape.open:
            self.set_slot(BALANCE, self.slot(BALANCE) + self.balance.value)
            with self.when(self.tied.value.any()):
                flags = self.address(TIED)
                self.store(self.value(I8, 1), flags, here >> (PIECE.bit_length() - 1))

    def _body(
        self, parts: Sequence[Value], target: Value | None, index: Value, first: Value
    ) -> None:
        for (code, _), part in zip(self.operands, parts, strict=True):
            self.prefetch(part, index + AHEAD, SIZES[code])
        pairs = [
            read(self, code, part, index)
            for (code, _), part in zip(self.operands, parts, strict=True)
        ]
        drawn = self._draws(index + first) if self.shape.draws else None
        base = pairs[-1] if self.shape.base is not None else None
        self.seen: list[list[Value]] = [[] for _ in self.rows]
        even, odd = (
            self._merged(
                [pairs[r][half] for r in self.rows],
                base[half] if base else None,
                [words[half] for words in drawn] if drawn else None,
            )
            for half in (0, 1)
        )
        for cell, seen in zip(self.equals, self.seen, strict=True):
            if seen:
                cell.value = cell.value + joined(seen).ones()
        if self.shape.out is None:
            return
        assert target is not None
        rounded = write(self, self.shape.out, (even, odd), target, index)
        self._look(rounded)
        if FP32 in (*self.shape.sources, self.shape.base):
            self._look((even, odd))  # NaN may be rounded to what is finite

    def _look(self, pair: Pair) -> None:
        """Whether all is finite: 0·x adds NaN if x is not."""
        for x in pair:
            self.bad.value = x.fused(0.0, self.bad.value)

    def _draws(self, element: Value) -> list[Pair]:
        """Every row's draws."""
        return [drawn(key, element) for key in self.keys]

    def _merged(
        self, sources: Sequence[Value], base: Value | None, draws: Sequence[Value] | None
    ) -> Value:
        """One vector of the result."""
        rows = [
            self._row(r, source if base is None else source - base, draws)
            for r, source in enumerate(sources)
        ]
        total = rows[0]
        for row in rows[1:]:
            total = total + row
        merged = total if self.shape.vote == "none" else self._consensus(rows, total)
        return merged if base is None else base + merged

    def _row(self, r: int, x: Value, draws: Sequence[Value] | None) -> Value:
        kept = self._kept(r, x, draws)
        if kept is None:
            return x * self.factors[r]
        if self.shape.careful:
            return x * kept.select(self.factors[r], self.nothings[r])
        return kept.select(x * self.factors[r], 0.0)

    def _kept(self, r: int, x: Value, draws: Sequence[Value] | None) -> Value | None:
        rules = []
        if self.shape.cuts:
            size = magnitude(x)
            rules.append(size > self.aboves[r])
            if self.shape.counts:
                self.seen[r].append(size.equals(self.patterns[r]))
        if self.shape.tops:
            rules.append(magnitude(x) <= self.uptos[r])
        if draws is not None:
            rules.append(~draws[r].below(self.leasts[r]))
        kept = None
        for rule in rules:
            kept = rule if kept is None else kept & rule
        return kept

    def _consensus(self, votes: Sequence[Value], total: Value) -> Value:
        """λ·consensus, as in `election.consensus`. A vote of 0 has either sign: it is none."""
        flip = pattern(total) & SIGN  # only where there is no vote can a total be −0
        if self.shape.tie < 0:
            flip = total.equals(0.0).select(self.value(integers(), SIGN), flip)
        turned = [real(pattern(vote) ^ flip) for vote in votes]
        agree = [x.above_or_nan(0.0) for x in turned]  # NaN shows in what is merged
        if self.shape.tie == 0:
            agree = [mask & ~total.equals(0.0) for mask in agree]
        if self.shape.vote == "max":
            merged = self._largest(turned, agree, flip)
            for vote in votes:
                self.bad.value = vote.fused(0.0, self.bad.value)
        else:
            merged = self._agreed(votes, agree)
        if self.shape.open:
            self._ballot(total, merged)
        if self.shape.vote == "mean":
            merged = merged / self._divisor(agree)
        return merged * self.scale if self.shape.scaled else merged

    def _ballot(self, total: Value, merged: Value) -> None:
        """The balance: all lanes but the zeros are negative, or positive, which weighs twice."""
        zero = total.equals(0.0)
        positive = (total > 0.0).ones()
        self.balance.value = self.balance.value + (positive << 1) + zero.ones() - lanes()
        self.tied.value = self.tied.value | (zero & (merged > 0.0))

    def _agreed(self, votes: Sequence[Value], agree: Sequence[Value]) -> Value:
        merged = agree[0].select(votes[0], 0.0)
        for vote, mask in zip(votes[1:], agree[1:], strict=True):
            merged = mask.select(merged + vote, merged)
        return merged

    def _largest(self, turned: Sequence[Value], agree: Sequence[Value], flip: Value) -> Value:
        best = agree[0].select(turned[0], 0.0)
        for x, mask in zip(turned[1:], agree[1:], strict=True):
            best = (mask & (x > best)).select(x, best)
        return real(pattern(best) ^ flip) + 0.0

    def _divisor(self, agree: Sequence[Value]) -> Value:
        weights = self.weights
        by = agree[0].select(weights[0], 0.0)
        for weight, mask in zip(weights[1:], agree[1:], strict=True):
            by = mask.select(by + weight, by)
        if self.shape.positive:  # below it is only the 0 of no vote: 0 / x is 0
            return (by > _NO_WEIGHT).select(by, _NO_WEIGHT)
        size = real(magnitude(by))
        return (size < _NO_WEIGHT).select(self.value(floats(), 1.0), by)
