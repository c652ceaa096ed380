"""Whole rows of a tensor, for methods that need a row before they can merge an element of it.

Blocks are cut anywhere; here the same tensor is cut anew into segments of whole rows, just ahead of
the blocks that are merged. Knows nothing of what is worked out for a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from evomerge.merging.methods.base import Block, Blocks, Coefficients
from evomerge.merging.methods.reductions import SEGMENT, segments


def row_length(coefficients: Coefficients) -> int:
    """Elements of a row: the tensor's last axis. A vector is one row, so is a scalar."""
    return coefficients.shape[-1] if coefficients.shape else 1


def row_segments(blocks: Blocks, width: int) -> Iterator[Block]:
    """The tensor in blocks of whole rows, of at most 131,072 elements unless one row has more."""
    return segments(blocks, width * max(SEGMENT // width, 1))


class RowWindow:
    """What `values` says of every element, from the element's whole row.

    `values` maps a block of whole rows to [q, n] for its n elements. One segment of rows is held at
    a time: elements asked for in ascending order cost one more pass over the tensor, in any other
    order one pass each time. How blocks are cut changes nothing.
    """

    def __init__(self, blocks: Blocks, width: int, values: Callable[[Block], Tensor]) -> None:
        self._blocks = blocks
        self._width = width
        self._compute = values
        self._segments = row_segments(blocks, width)
        self._start = 0
        self._values: Tensor | None = None

    def at(self, start: int, count: int) -> Tensor:
        """The values of elements start, ..., start + count − 1. Shapes: [q, count]."""
        end = start + count
        parts = []
        while start < end:
            values = self._holding(start)
            part = values[:, start - self._start : end - self._start]
            parts.append(part)
            start += part.shape[1]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _holding(self, index: int) -> Tensor:
        if index < self._start:
            self._segments = row_segments(self._blocks, self._width)
            self._start, self._values = 0, None
        while self._values is None or index >= self._start + self._values.shape[1]:
            segment = next(self._segments)
            if index < segment.start + segment.sources.shape[1]:
                self._start, self._values = segment.start, self._compute(segment)
        return self._values
