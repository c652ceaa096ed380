"""A `Program` on a device over operands that lie in host memory: copied in while it computes.

Two stages take turns, so that one chunk is on its way while the chunk before it is merged. What a
chunk's merge is lies in `cuda`. Knows no file: the operands may be memory-mapped, pinned or plain.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from evomerge.merging.kernels.cuda import as_sum, balance, elected, enqueue, located, new_flag
from evomerge.merging.kernels.program import Program

CHUNK = 1 << 23
"""Elements per chunk: 16 MiB of a 16-bit operand, long enough for the bus to run at full rate."""


def stream(
    program: Program,
    base: Tensor | None,
    sources: Sequence[Tensor],
    out: Tensor,
    *,
    start: int = 0,
    chunk: int = CHUNK,
) -> bool:
    """As `cuda.run`, with operands in host memory and `out` on the device.

    Reads each operand that the program uses once, and once before that if the program's tie is
    not known. Operands on the device already are used where
    they are. Holds two chunks of each of the others on the device, and in pinned memory unless
    they are pinned.
    """
    flag = new_flag(out)
    program, base, sources = _used(*as_sum(located(program, base, sources), base, sources))
    vote = program.election
    if vote is not None and vote.rule is not None:
        there = _chunks(base, sources, out, chunk)
        program = elected(program, sum(balance(program, b, s, start + at) for at, b, s in there))
    for begin, near, rows in _chunks(base, sources, out, chunk):
        part = out[begin : begin + chunk]
        enqueue(program, near, rows, part, flag, start + begin)
    return not flag.any()


def _chunks(
    base: Tensor | None, sources: Sequence[Tensor], out: Tensor, chunk: int
) -> Iterator[tuple[int, Tensor | None, list[Tensor]]]:
    """(index of its first element, base, sources) of every chunk, on the device of `out`.

    Valid for what the current stream is given before the next chunk is asked for.
    """
    operands = (*sources, *(() if base is None else (base,)))
    copies = _copy_stream(out)
    stages = [_Stage(operands, min(chunk, len(out)), out.device, copies) for _ in range(2)]
    for turn, begin in enumerate(range(0, len(out), chunk)):
        stage = stages[turn % 2]
        there = stage.fill([operand[begin : begin + chunk] for operand in operands])
        yield begin, None if base is None else there[-1], there[: len(sources)]
        stage.release()


class _Stage:
    """Room on the device for one chunk of every operand, filled by a stream of its own."""

    def __init__(
        self,
        operands: Sequence[Tensor],
        size: int,
        device: torch.device,
        copies: torch.cuda.Stream | None,
    ) -> None:
        self._copies = copies
        self._there = [
            None if operand.is_cuda else torch.empty(size, dtype=operand.dtype, device=device)
            for operand in operands
        ]
        self._pinned = [
            None
            if copies is None or operand.is_cuda or operand.is_pinned()
            else _pinned(operand, size)
            for operand in operands
        ]
        if copies is not None:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._used = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def fill(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The parts on the device, or on their way: later work of the current stream waits."""
        if self._copies is None:
            return [self._copy(place, part) for place, part in enumerate(parts)]
        self._copied.synchronize()  # the pinned memory is free again
        parts = [self._pin(place, part) for place, part in enumerate(parts)]
        self._copies.wait_event(self._used)
        with torch.cuda.stream(self._copies):
            there = [self._copy(place, part) for place, part in enumerate(parts)]
            self._copied.record()
        torch.cuda.current_stream(self._copies.device).wait_event(self._copied)
        return there

    def release(self) -> None:
        """Let the room be filled again once the current stream's work so far is done."""
        if self._copies is not None:
            self._used.record(torch.cuda.current_stream(self._copies.device))

    def _pin(self, place: int, part: Tensor) -> Tensor:
        pinned = self._pinned[place]
        return part if pinned is None else pinned[: len(part)].copy_(part)

    def _copy(self, place: int, part: Tensor) -> Tensor:
        there = self._there[place]
        return part if there is None else there[: len(part)].copy_(part, non_blocking=True)


def _pinned(operand: Tensor, size: int) -> Tensor:
    return torch.empty(size, dtype=operand.dtype, pin_memory=True)


def _copy_stream(out: Tensor) -> torch.cuda.Stream | None:
    """A stream to copy by; None where memory is one, as in Triton's interpreter."""
    if not out.is_cuda:
        return None
    copies = torch.cuda.Stream(out.device)  # type: ignore[no-untyped-call]
    # the stages' memory may still be in use by earlier work
    copies.wait_stream(torch.cuda.current_stream(out.device))
    return copies


def _used(
    program: Program, base: Tensor | None, sources: Sequence[Tensor]
) -> tuple[Program, Tensor | None, list[Tensor]]:
    """The program over only those operands that it reads."""
    used = sorted({row.source for row in program.rows})
    rows = tuple(replace(row, source=used.index(row.source)) for row in program.rows)
    base = base if program.origin == "base" else None
    return replace(program, rows=rows), base, [sources[index] for index in used]
