"""A `Program` carried out on a CUDA device in one fused pass over the operands as they are stored.

Gives the bits of the methods' own torch functions. Imports Triton only to launch a kernel, so a
machine without it can ask `available`. Knows no method, no checkpoint and no live model.
"""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from evomerge.merging.kernels.program import Draw, Program, Row
from evomerge.merging.methods.election import tie_sign
from evomerge.merging.methods.selection import KEEP_ALL, KEEP_NONE, Cut

BLOCK = 1024
"""Elements per program instance: 8 per thread, which are 16 bytes of a 16-bit dtype."""

_LIMITS = {
    torch.bfloat16: float.fromhex("0x1.ffp127"),
    torch.float16: 65520.0,
    torch.float32: float("inf"),
}
"""The least magnitude that rounds to infinity."""

_ROWS_IN_REGISTERS = 8
"""More rows than this and a thread takes half as many elements."""

_SPAN = 1 << 24
"""Elements in which a cut's last element is sought at a time."""

_NO_DRAW = Draw(key=0, threshold=0)


def available() -> bool:
    """Whether this process has a CUDA device and Triton."""
    return torch.cuda.is_available() and importlib.util.find_spec("triton") is not None


def reads(*operands: Tensor | None) -> bool:
    """Whether the kernels can read (or write) these tensors."""
    return available() and all(
        operand.is_cuda and operand.dtype in _LIMITS and operand.is_contiguous()
        for operand in operands
        if operand is not None
    )


def run(
    program: Program,
    base: Tensor | None,
    sources: Sequence[Tensor],
    out: Tensor,
    start: int = 0,
) -> bool:
    """Carry a program out; False if a result is NaN, or infinite once rounded.

    Shapes: base [n] (None where the program does not read it), sources s times [n], contiguous and
    on one device, each float32, float16 or bfloat16; out [n] likewise is written, rounded once, to
    nearest even. `start` is the flat index of the first element. Waits for the device. A program
    that is not settled takes a pass more over the operands for its balance, and several for each
    cut that is not located.
    """
    flag = new_flag(out)
    enqueue(settled(program, base, sources, start), base, sources, out, flag, start)
    return not flag.any()


def new_flag(out: Tensor) -> Tensor:
    """What `enqueue` reports to: [1] int32 on the device of `out`, 0."""
    return torch.zeros(1, dtype=torch.int32, device=out.device)


def enqueue(
    program: Program,
    base: Tensor | None,
    sources: Sequence[Tensor],
    out: Tensor,
    flag: Tensor,
    start: int = 0,
) -> None:
    """As `run`, without waiting: `flag` becomes 1 if a result is not finite, else stays.

    The program must be `settled`.
    """
    if not program.rows and program.copies is None and program.origin == "zero":
        out.zero_()
        return
    if not out.numel():
        return
    program, base, sources = as_sum(program, base, sources)
    from evomerge.merging.kernels import triton_program as kernels

    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
        kernels.merge[_grid(out)](
            out,
            flag,
            *_arguments(program, base, sources, start),
            AGGREGATE=_aggregate(program),
            LIMIT=_LIMITS[out.dtype],
            **_launch(program, start),
        )


def settled(
    program: Program, base: Tensor | None, sources: Sequence[Tensor], start: int = 0
) -> Program:
    """The program with every cut located and the sign at a tie known.

    Reads the operands only for what is missing, which they tell only as a whole tensor.
    """
    program = located(program, base, sources)
    vote = program.election
    if vote is None or vote.rule is None:
        return program
    return elected(program, balance(program, base, sources, start))


def located(program: Program, base: Tensor | None, sources: Sequence[Tensor]) -> Program:
    """The program with the `last` of every cut known. Shapes as in `run`, on any device."""
    against = base if program.origin == "base" else None
    rows = (
        replace(
            row,
            cut=_located(row.cut, sources[row.source], against),
            top=_located(row.top, sources[row.source], against),
        )
        for row in program.rows
    )
    return replace(program, rows=tuple(rows))


def elected(program: Program, balance: int) -> Program:
    """The program with the sign that its rule gives a tie."""
    vote = program.election
    assert vote is not None
    assert vote.rule is not None
    return replace(program, election=replace(vote, tie=tie_sign(vote.rule, balance), rule=None))


def as_sum(
    program: Program, base: Tensor | None, sources: Sequence[Tensor]
) -> tuple[Program, Tensor | None, Sequence[Tensor]]:
    """A copy of a source or of the base, said as a sum of one row: 1·x has the bits of x."""
    if program.copies is not None:
        return Program((Row(program.copies, 1.0),), "zero"), None, sources
    if not program.rows:
        assert base is not None
        return Program((Row(0, 1.0),), "zero"), None, [base]
    return program, base, sources


def balance(
    program: Program, base: Tensor | None, sources: Sequence[Tensor], start: int = 0
) -> int:
    """Σⱼ sign(Σᵢ xᵢⱼ): what `election.balance` gives for the votes x of one tensor's rows.

    Shapes as in `run`. Exact. The program's election plays no part. Waits for the device.
    """
    if not program.rows or not sources[0].numel():
        return 0
    from evomerge.merging.kernels import triton_program as kernels

    grid = _grid(sources[0])
    partial = torch.empty(grid, dtype=torch.int32, device=sources[0].device)
    with torch.cuda.device_of(partial):  # type: ignore[no-untyped-call]
        kernels.balance[grid](
            partial, *_arguments(program, base, sources, start), **_launch(program, start)
        )
    return int(partial.sum(dtype=torch.int64))


def _located(cut: Cut | None, source: Tensor, base: Tensor | None) -> Cut | None:
    """The cut with its `last`, if so far it only says how many equal elements are kept."""
    if cut is None or not cut.equal:
        return cut
    needed = cut.equal
    for begin in range(0, len(source), _SPAN):
        part = slice(begin, begin + _SPAN)
        x = source[part].to(torch.float32, copy=True)
        if base is not None:
            x -= base[part].float()
        equal = x.abs_().view(torch.int32) == cut.pattern
        count = int(equal.sum())
        if count >= needed:
            return Cut(cut.pattern, begin + int(equal.nonzero()[needed - 1]))
        needed -= count
    return Cut(cut.pattern, len(source) - 1)


def _grid(values: Tensor) -> tuple[int]:
    return (-(-values.numel() // BLOCK),)


def _arguments(
    program: Program, base: Tensor | None, sources: Sequence[Tensor], start: int
) -> tuple[Any, ...]:
    """base, one source per row, the table and the size: what both kernels read."""
    read = tuple(sources[row.source] for row in program.rows)
    if program.origin == "zero":
        base = read[0]  # for its type: the kernel does not read it
    assert base is not None
    table = torch.tensor(_table(program, start), dtype=torch.int64)
    return base, read, table.to(base.device, non_blocking=True), base.numel()


def _table(program: Program, start: int) -> list[int]:
    """The numbers of a program in the layout that `triton_program` gives."""
    scale, tie = (program.election.scale, program.election.tie) if program.election else (1.0, 0)
    words = [start, _bits(scale), _bits(tie)]
    for row in program.rows:
        cut, top, draw = row.cut or KEEP_ALL, row.top or KEEP_NONE, row.draw or _NO_DRAW
        words += [_bits(row.factor), _bits(row.weight)]
        words += [cut.pattern, cut.last, top.pattern, top.last, draw.key, draw.threshold]
    return words


def _bits(value: float) -> int:
    """The bit pattern of a number's float32, as an int32."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


def _aggregate(program: Program) -> str:
    if program.election is None:
        return "none"
    averaged = program.election.aggregate == "mean" and not program.election.normalize
    return "sum" if averaged else program.election.aggregate


def _launch(program: Program, start: int) -> dict[str, Any]:
    """What the kernels are compiled for. No fusion: products are rounded before they are added."""
    rows = program.rows
    return {
        "BASE": program.origin == "base",
        "CUTS": any(row.cut is not None for row in rows),
        "TOPS": any(row.top is not None for row in rows),
        "DRAWS": any(row.draw is not None for row in rows),
        "PAIRED": start % 2 == 0,
        "BLOCK": BLOCK,
        "num_warps": 4 if len(rows) <= _ROWS_IN_REGISTERS else 8,
        "enable_fp_fusion": False,
    }
