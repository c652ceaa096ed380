"""Walking over tensors of any length with whole vectors: what is left over goes through memory of
its own, filled up with zeros.

Knows no merge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from evomerge.merging.kernels.formats import SIZES, width
from evomerge.merging.kernels.machine import I8, I64, Kernel, Value

AHEAD = 1024
"""Elements by which a walk fetches ahead: past the lines that the processor fetches itself."""

Body = Callable[[Sequence[Value], Value | None, Value, Value], None]
"""Given addresses of the operands' and the result's part, an index into it, and the tensor's index
of the part's first element."""


def walk(
    kernel: Kernel,
    operands: Sequence[tuple[int, Value]],
    out: tuple[int, Value] | None,
    begin: Value,
    end: Value,
    body: Body,
    *,
    even: bool,
) -> None:
    """Runs `body` over all elements of [begin, end), `width()` of them at a time.

    Operands and `out` are codes of dtypes and addresses. With `even` vectors start at even indices.
    """
    spare = [_spare(kernel, code) for code, _ in operands]
    spare_out = _spare(kernel, out[0]) if out else None
    place = kernel.variable(begin)
    with kernel.repeat(lambda: place.value < end):
        here = place.value
        room = end - here
        shift = here & 1 if even else kernel.value(I64, 0)
        few = (room < width()) | shift.equals(1)
        taken = few.select(kernel.least(room, kernel.value(I64, width()) - shift), room & -width())
        with kernel.when(few):
            for (code, address), part in zip(operands, spare, strict=True):
                kernel.clear(part, width() * SIZES[code])
                source = kernel.at(address, here * SIZES[code])
                kernel.copy(kernel.at(part, shift * SIZES[code]), source, taken * SIZES[code])
        parts = [
            few.select(part, kernel.at(address, here * SIZES[code]))
            for (code, address), part in zip(operands, spare, strict=True)
        ]
        target = None
        if out and spare_out:
            target = few.select(spare_out, kernel.at(out[1], here * SIZES[out[0]]))
        with kernel.loop(kernel.value(I64, 0), shift + taken, width()) as index:
            body(parts, target, index, here - shift)
        if out and spare_out:
            with kernel.when(few):
                to = kernel.at(out[1], here * SIZES[out[0]])
                rounded = kernel.at(spare_out, shift * SIZES[out[0]])
                kernel.copy(to, rounded, taken * SIZES[out[0]])
        place.value = here + taken


def _spare(kernel: Kernel, code: int) -> Value:
    return kernel.room(I8, width() * SIZES[code])
