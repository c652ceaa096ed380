"""A `Program` carried out on the CPU in one fused pass over the operands as they are stored.

Gives the bits of the methods' own torch functions. Imports numba only to run a kernel. Knows no
method, no checkpoint and no live model.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from evomerge.merging.kernels.program import Election, Program, Row
from evomerge.merging.methods.election import tie_sign
from evomerge.merging.methods.selection import KEEP_ALL, KEEP_NONE

CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_NO_WRITE = -1
_AGGREGATES = {"mean": 0, "sum": 1, "max": 2}
_PROBE = 1 << 16
"""Elements by which the balance of a tensor is guessed."""


@cache
def available() -> bool:
    """Whether numba is installed."""
    return importlib.util.find_spec("numba") is not None


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
    guessed; the pass is run again if votes tied and the guess was wrong.
    """
    if not out.numel():
        return True
    program, base, sources = _as_sum(program, base, sources)
    if not program.rows:
        out.zero_()
        return True
    election = program.election
    if election is None or election.rule is None:
        return _pass(program, base, sources, out)[0]
    _, (leaning, tied) = _pass(program, base, sources, out, stop=_PROBE, write=False, counting=True)
    guess = tie_sign(election.rule, leaning)
    guessed = _settled(program, election, guess)
    finite, (total, ties) = _pass(guessed, base, sources, out, counting=tied > 0)
    if finite and ties:
        if not tied:  # the probe met none, so the balance was not counted
            assert base is not None
            total = balance(program, base, sources)
        right = tie_sign(election.rule, total)
        if right != guess:
            finite, _ = _pass(_settled(program, election, right), base, sources, out)
    return finite


def balance(program: Program, base: Tensor, sources: Sequence[Tensor]) -> int:
    """Σⱼ sign(Σᵢ vᵢⱼ) of an election's votes. Shapes as in `run`."""
    if not program.rows or not base.numel():
        return 0
    _, (total, _) = _pass(program, base, sources, base, write=False, counting=True)
    return total


def _settled(program: Program, election: Election, tie: int) -> Program:
    return replace(program, election=replace(election, tie=tie))


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


def _pass(
    program: Program,
    base: Tensor | None,
    sources: Sequence[Tensor],
    out: Tensor,
    *,
    stop: int | None = None,
    write: bool = True,
    counting: bool = False,
) -> tuple[bool, tuple[int, int]]:
    """One pass, up to `stop`: whether all is finite, the balance of the votes if `counting`, and
    how many of them tied."""
    from evomerge.merging.kernels import loops

    read = [sources[row.source] for row in program.rows]
    election = program.election or Election(0, "mean", False, 1.0)
    aggregate = election.aggregate
    if aggregate == "mean" and not election.normalize:
        aggregate = "sum"
    end = out.numel() if stop is None else min(stop, out.numel())
    counts = np.zeros(2, np.int64)
    with np.errstate(over="ignore"):
        reached = loops.fuse(
            loops.CONSENSUS if program.election else loops.SUM,
            np.array([tensor.data_ptr() for tensor in read], np.int64),
            np.array([CODES[tensor.dtype] for tensor in read], np.int64),
            np.array([row.factor for row in program.rows], np.float64).astype(np.float32),
            np.array([row.weight for row in program.rows], np.float64).astype(np.float32),
            np.array([_numbers(row) for row in program.rows], np.int64),
            loops.TAU if program.origin == "base" else loops.PLAIN,
            base.data_ptr() if base is not None else 0,
            CODES[base.dtype] if base is not None else 0,
            _AGGREGATES[aggregate],
            np.float32(election.tie),
            np.float32(election.scale),
            counting,
            out.data_ptr(),
            CODES[out.dtype] if write else _NO_WRITE,
            0,
            end,
            counts,
        )
    return bool(reached == end), (int(counts[0]), int(counts[1]))


def _numbers(row: Row) -> tuple[int, ...]:
    """The cut's pattern and last, the top's, how many equal to the cut, the draw's two numbers."""
    cut, top = row.cut or KEEP_ALL, row.top or KEEP_NONE
    threshold, key = (row.draw.threshold, row.draw.key) if row.draw else (0, 0)
    return (cut.pattern, cut.last, top.pattern, top.last, cut.equal, threshold, key)
