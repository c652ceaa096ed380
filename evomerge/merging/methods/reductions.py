"""Sums over a whole tensor that do not depend on how it is cut, on threads or on the device.

A tensor is cut anew into segments of a fixed size. In a segment each of 512 lanes adds up every
512th term, in turn and in float64; a fixed tree adds the lanes (no vendor reduction, whose order
varies), and the segments are added in turn. `kernels.facts` keeps to the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from evomerge.merging.methods.base import Block, Blocks

SEGMENT = 1 << 17
LANES = 512


def segments(blocks: Blocks, size: int = SEGMENT) -> Iterator[Block]:
    """The same tensor in blocks of exactly `size` elements (the last may be shorter)."""
    parts: list[Block] = []
    held = 0
    for block in blocks():
        length = block.sources.shape[1]
        taken = 0
        while taken < length:
            step = min(size - held, length - taken)
            parts.append(_part(block, taken, taken + step))
            held, taken = held + step, taken + step
            if held == size:
                yield _joined(parts)
                parts, held = [], 0
    if parts:
        yield _joined(parts)


def totals(blocks: Blocks, terms: Callable[[Block], Tensor]) -> list[float]:
    """Σⱼ terms(block)[q, j] over the whole tensor, for every q.

    Shapes: `terms` maps a block of n elements to [q, n] float64; returns q floats (none at all
    for a tensor without elements).
    """
    sums = [pairwise_sum(_by_lanes(terms(segment))) for segment in segments(blocks)]
    return added(torch.stack(sums)) if sums else []


def added(sums: Tensor) -> list[float]:
    """The segments' sums, added in turn. Shapes: [segments, q] float64; returns q floats."""
    rows: list[list[float]] = sums.tolist()
    return [sum(column) for column in zip(*rows, strict=True)]


def _by_lanes(terms: Tensor) -> Tensor:
    """Every 512th term added up. Shapes: [q, n] -> [q, 512]."""
    lanes = terms.new_zeros(len(terms), LANES)
    for start in range(0, terms.shape[1], LANES):
        part = terms[:, start : start + LANES]
        lanes[:, : part.shape[1]] += part
    return lanes


def pairwise_sum(x: Tensor) -> Tensor:
    """Sum of the last axis by halving. Shapes: x [q, n]; returns [q]."""
    width = 1 << max(x.shape[-1] - 1, 0).bit_length()
    x = torch.nn.functional.pad(x, (0, width - x.shape[-1]))
    while width > 1:
        width //= 2
        x = x[..., :width] + x[..., width:]
    return x[..., 0]


def _part(block: Block, begin: int, end: int) -> Block:
    base = None if block.base is None else block.base[begin:end]
    return Block(base, block.sources[:, begin:end], block.start + begin)


def _joined(parts: list[Block]) -> Block:
    if len(parts) == 1:
        return parts[0]
    bases = [part.base for part in parts if part.base is not None]
    return Block(
        torch.cat(bases) if bases else None,
        torch.cat([part.sources for part in parts], dim=1),
        parts[0].start,
    )
