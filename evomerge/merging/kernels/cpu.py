"""A `Program` carried out on the CPU in one fused pass over the operands as they are stored.

Gives the bits of the methods' own torch functions. Imports LLVM only to run a kernel. Knows no
method, no checkpoint and no live model.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evomerge.merging.kernels.program import Election, Program, Row
from evomerge.merging.methods.election import tie_sign
from evomerge.merging.methods.selection import KEEP_ALL, KEEP_NONE, Cut

CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_NEVER = 1 << 32  # no draw is as large
_NO_WEIGHT = np.float32(1e-8)


@cache
def available() -> bool:
    """Whether LLVM is installed."""
    return importlib.util.find_spec("llvmlite") is not None


def can_read(*tensors: Tensor | None) -> bool:
    """Whether the kernels can read and write these tensors."""
    return available() and all(
        tensor.device.type == "cpu" and tensor.dtype in CODES and tensor.is_contiguous()
        for tensor in tensors
        if tensor is not None
    )


def run(program: Program, base: Tensor | None, sources: Sequence[Tensor], out: Tensor) -> bool:
    """Carry a program out; False if a result is NaN, or infinite once rounded.

    Shapes: base [n] (None where the program does not read it), sources s times [n], out [n]: what
    `can_read` accepts. `out` is rounded once, to nearest even. A tie whose sign is not known is
    taken for positive; where votes tied and that was wrong, it is done again.
    """
    if not out.numel():
        return True
    program, base, sources = _as_sum(program, base, sources)
    if not program.rows:
        out.zero_()
        return True
    election = program.election
    rule = election.rule if election else None
    if rule is None:
        return _Pass(program, base, sources, out).over(0, out.numel())
    guess = _settled(program, 1)
    first = _Pass(guess, base, sources, out, counting=True)
    finite = first.over(0, out.numel())
    right = tie_sign(rule, first.balance)
    if right != 1 and finite and first.tied():
        again = _Pass(_settled(program, right), base, sources, out)
        for begin, end in first.tied():
            finite = again.over(begin, end) and finite
    return finite


def balance(program: Program, base: Tensor, sources: Sequence[Tensor]) -> int:
    """Σⱼ sign(Σᵢ vᵢⱼ) of an election's votes. Shapes as in `run`."""
    if not program.rows or not base.numel():
        return 0
    votes = _Pass(_settled(program, 1), base, sources, None, counting=True)
    votes.over(0, base.numel())
    return votes.balance


def _settled(program: Program, tie: int) -> Program:
    assert program.election is not None
    return replace(program, election=replace(program.election, tie=tie))


def _as_sum(
    program: Program, base: Tensor | None, sources: Sequence[Tensor]
) -> tuple[Program, Tensor | None, Sequence[Tensor]]:
    """A copy as a sum of one row, 1·x: x bit for bit."""
    copied = None if program.copies is None else sources[program.copies]
    if copied is None and not program.rows and program.origin == "base":
        copied = base
    if copied is None:
        return program, base, sources
    return Program((Row(0, 1.0),), "zero"), None, (copied,)


class _Pass:
    """A program over a tensor: what is compiled for it, and its table of numbers.

    With `counting` the balance of the votes is counted, and where they tied. Parts must be asked
    for in ascending order, as rows count what equals their cuts.
    """

    def __init__(
        self,
        program: Program,
        base: Tensor | None,
        sources: Sequence[Tensor],
        out: Tensor | None,
        *,
        counting: bool = False,
    ) -> None:
        from evomerge.merging.kernels import fused

        self._fused = fused
        self._rows = program.rows
        self._read = [sources[row.source] for row in program.rows]
        self._base = base if program.origin == "base" else None
        self._out = out
        self._size = len(self._read[0])
        self._shape = _shape(program, self._read, self._base, out, counting=counting)
        self._flags = np.zeros(-(-self._size // fused.PIECE) if counting else 0, np.uint8)
        self._table = self._numbers(program.election)

    def over(self, begin: int, end: int) -> bool:
        """Merges the elements [begin, end); whether all is finite so far."""
        turns = sorted({p for row in self._rows for p in _turns(row) if begin < p < end})
        for start, stop in zip([begin, *turns], [*turns, end], strict=True):
            self._place(start)
            self._between(start, stop)
        return not self._table[self._fused.BAD]

    @property
    def balance(self) -> int:
        """Σ sign of the votes so far."""
        return int(self._table[self._fused.BALANCE])

    def tied(self) -> list[tuple[int, int]]:
        """The pieces in which votes tied, as runs of elements."""
        edges = np.flatnonzero(np.diff(np.concatenate([[0], self._flags, [0]]).astype(np.int8)))
        runs = np.minimum(edges * self._fused.PIECE, self._size).reshape(-1, 2)
        return [(int(begin), int(end)) for begin, end in runs]

    def _between(self, begin: int, end: int) -> None:
        table = self._table.ctypes.data
        if self._open():
            begin = self._fused.compiled(replace(self._shape, counts=True))(table, begin, end)
        if begin < end:
            self._fused.compiled(self._shape)(table, begin, end)

    def _open(self) -> bool:
        """Whether a row has equals to count."""
        left = self._table[self._fused.slot(0, self._fused.LEFT) :: 8].tolist()
        return any(0 < count < self._fused.MANY // 2 for count in left)

    def _place(self, begin: int) -> None:
        """What rows whose cuts are located keep from here on."""
        for r, row in enumerate(self._rows):
            at = self._fused.slot(r, 0)
            if row.cut is not None and not _counted(row.cut):
                self._table[at + self._fused.LEFT] = (
                    self._fused.MANY if row.cut.last >= begin else 0
                )
            if row.top is not None:
                upto = row.top.pattern - (row.top.last >= begin)
                self._table[at + self._fused.UPTO] = upto

    def _numbers(self, election: Election | None) -> NDArray[np.int64]:
        fused, out = self._fused, self._out
        table = np.zeros(fused.slot(len(self._rows), 0), np.int64)
        real = table.view(np.float32)[::2]  # the low half of a word
        table[fused.BASE] = 0 if self._base is None else self._base.data_ptr()
        table[fused.OUT] = 0 if out is None else out.data_ptr()
        table[fused.TIED] = self._flags.ctypes.data
        if election is not None:
            real[fused.SCALE] = election.scale
        for r, (row, tensor) in enumerate(zip(self._rows, self._read, strict=True)):
            at = fused.slot(r, 0)
            cut, top = row.cut or KEEP_ALL, row.top or KEEP_NONE
            table[at + fused.SOURCE] = tensor.data_ptr()
            real[at + fused.FACTOR], real[at + fused.WEIGHT] = _factor(row), row.weight
            table[at + fused.PATTERN], table[at + fused.UPTO] = cut.pattern, top.pattern
            table[at + fused.LEFT] = cut.equal if _counted(cut) else 0
            if row.draw is not None:
                table[at + fused.KEY] = row.draw.key
                table[at + fused.LEAST] = row.draw.threshold % _NEVER
        return table


def _counted(cut: Cut) -> bool:
    """Whether what equals the cut is counted; of zeros it does not matter which are kept."""
    return cut.equal > 0 and cut.pattern > 0


def _turns(row: Row) -> list[int]:
    """Where a row starts to keep something else."""
    cuts = [cut for cut in (row.cut, row.top) if cut is not None and not _counted(cut)]
    return [cut.last + 1 for cut in cuts]


def _factor(row: Row) -> np.float32:
    """Of a row that draws nothing, what 0 times its factor is."""
    with np.errstate(over="ignore", under="ignore"):
        factor = np.float32(row.factor)
        never = row.draw is not None and row.draw.threshold >= _NEVER
        return factor * np.float32(0) if never else factor


def _shape(
    program: Program,
    read: Sequence[Tensor],
    base: Tensor | None,
    out: Tensor | None,
    *,
    counting: bool,
) -> Any:
    from evomerge.merging.kernels.fused import Shape

    rows, vote = program.rows, program.election
    cuts = any(row.cut is not None for row in rows)
    tops = any(row.top is not None for row in rows)
    draws = any(row.draw is not None for row in rows)
    never = any(row.cut is not None and row.cut.pattern == KEEP_NONE.pattern for row in rows)
    shape = Shape(
        tuple(CODES[tensor.dtype] for tensor in read),
        None if base is None else CODES[base.dtype],
        None if out is None else CODES[out.dtype],
        cuts=cuts,
        tops=tops,
        draws=draws,
        careful=vote is None or tops or draws or never,
    )
    if vote is None:
        return shape
    aggregate = "sum" if vote.aggregate == "mean" and not vote.normalize else vote.aggregate
    return replace(
        shape,
        vote=aggregate,
        scaled=vote.scale != 1,
        open=counting,
        tie=vote.tie,
        positive=all(np.float32(row.weight) >= _NO_WEIGHT for row in rows),
    )
