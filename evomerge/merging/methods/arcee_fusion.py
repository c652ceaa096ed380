"""Arcee fusion: take the source's weights where they matter most, the base's elsewhere.

Knows nothing of checkpoints, devices or studies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evomerge.merging.methods.base import Block, Blocks, Coefficients, MergeMethod, Parameter
from evomerge.merging.methods.reductions import pairwise_sum
from evomerge.merging.methods.rows import RowWindow, row_length, row_segments
from evomerge.merging.methods.selection import order_statistics

_LARGEST = torch.finfo(torch.float32).max


def arcee_fusion(base: Tensor, source: Tensor, importance: Tensor, *, threshold: float) -> Tensor:
    """Take from the source what is important.

        I = |θ₁ − θ₀| · KL(softmax(θ₁ row) ‖ softmax(θ₀ row))
        θ = θ₁ where I ≥ median(I) + k·(Q₃(I) − Q₁(I)), else θ₀

    Shapes: base, source and importance I [n] float32; returns [n] float32. Quartiles are those of
    the whole tensor, exact, interpolated linearly between neighbours; rows run along the last axis.
    I is computed in float64 and rounded to float32 (at most its largest number); the result is
    always one input or the other, bit for bit. Where more than three quarters of I are 0 the
    threshold is 0, and the source is taken whole.

    Source: mergekit's `arcee_fusion` (k = 1.5), which takes the quartiles of tensors of over a
    million elements from a random sample, so that its result depends on a seed.
    """
    return torch.where(importance >= threshold, source, base)


class Prepared(NamedTuple):
    """What `merge` must know of a whole tensor: its importance, row by row, and the threshold."""

    importance: RowWindow
    threshold: float


class ArceeFusion(MergeMethod):
    """`arcee_fusion` as a plug-in."""

    name = "arcee_fusion"
    summary = "takes the source's weights where they are important, the base's elsewhere"
    formula = "θ = θ₁ where I ≥ median + k·(Q₃ − Q₁) of I,  I = |θ₁−θ₀|·KL(softmax θ₁ ‖ softmax θ₀)"
    parameters = (
        Parameter(
            "iqr_factor",
            "recipe",
            "float",
            1.5,
            "k: how many interquartile ranges above the median importance begins",
        ),
    )
    max_sources = 1

    def prepare(self, blocks: Blocks, coefficients: Coefficients, survey: Any) -> Prepared:
        width = row_length(coefficients)
        window = RowWindow(blocks, width, lambda rows: importance(rows, width))

        def stream() -> Iterator[Tensor]:
            return (importance(rows, width)[0] for rows in row_segments(blocks, width))

        places = [share * (coefficients.size - 1) for share in (0.25, 0.5, 0.75)]
        ranks = [rank for place in places for rank in (math.floor(place), math.ceil(place))]
        found = order_statistics(stream, ranks)
        first, median, third = (
            low + (high - low) * (place - math.floor(place))
            for place, low, high in zip(places, found[::2], found[1::2], strict=True)
        )
        return Prepared(window, median + coefficients.number("iqr_factor") * (third - first))

    def merge(self, block: Block, coefficients: Coefficients, prepared: Prepared) -> Tensor:
        assert block.base is not None
        (source,) = block.sources
        known = prepared.importance.at(block.start, source.numel())[0]
        return arcee_fusion(block.base, source, known, threshold=prepared.threshold)


def importance(rows: Block, width: int) -> Tensor:
    """I of every element of a block of whole rows. Shapes: returns [1, n] float32."""
    assert rows.base is not None
    source, base = (_log_softmax(x.view(-1, width)) for x in (rows.sources[0], rows.base))
    divergence = pairwise_sum(source.exp() * (source - base)).clamp_(min=0)
    change = (rows.sources[0] - rows.base).double().abs_().view(-1, width)
    return (change * divergence[:, None]).clamp_(max=_LARGEST).float().view(1, -1)


def _log_softmax(rows: Tensor) -> Tensor:
    """Of every row, float64, by sums whose order is fixed. Shapes: [rows, n]."""
    shifted = rows.double()
    shifted -= shifted.amax(1, keepdim=True)
    return shifted - pairwise_sum(shifted.exp())[:, None].log()
