"""NuSLERP: spherical interpolation by weights, of models or task vectors, whole or by row.

Knows nothing of checkpoints, devices or studies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from evomerge.merging.kernels.program import Program, Row, copy_of
from evomerge.merging.methods.base import Block, Blocks, Coefficients, MergeMethod, Parameter
from evomerge.merging.methods.reductions import pairwise_sum
from evomerge.merging.methods.rows import RowWindow, row_length, row_segments
from evomerge.merging.methods.spheres import ORIGIN, from_base, gram, triangle_of, vectors

PARALLEL = 1e-12
"""Vectors with sin² Ω up to this are taken for parallel or opposite: the arc is a line, or none."""

Factors: TypeAlias = Callable[[int, int], tuple[Tensor | float, Tensor | float]]
"""(start, n) -> what the two vectors are multiplied by, for each of the n elements or for all."""


def nuslerp(first: Tensor, second: Tensor, near: Tensor | float, far: Tensor | float) -> Tensor:
    """Interpolate on the arc between two vectors, at the place that two weights say.

        θ = o + [sin((1−t)·Ω)·v₁ + sin(t·Ω)·v₂] / sin Ω      t = w₂/(w₁+w₂), vᵢ = θᵢ − o
        θ = o + (1−t)·v₁ + t·v₂                              where sin² Ω ≤ 1e-12

    Shapes: first v₁ and second v₂, [n] float32; near and far the two factors (`arcs`), one for all
    elements or [n]; returns the sum without o, [n] float32. o is 0 or the base, and Ω the angle of
    whole tensors or of each row or column. Factors are computed in float64, products and sums in
    float32. |w₁+w₂| < 1e-6 gives t = ½; t = 0 and t = 1 are the sources, bit for bit; a vector of
    length 0 counts as orthogonal to all others.

    Source: mergekit's `nuslerp`, on Shoemake 1985, "Animating rotation with quaternion curves".
    It takes the line only for sin² Ω ≤ 1e-16, which rounding alone exceeds where two vectors are
    opposite, and then multiplies by up to 1e8.
    """
    return first * near + second * far


def arcs(t: float, products: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of v₁ and v₂ at the place t of their arcs, for q pairs of vectors.

    Shapes: products ⟨v₁,v₁⟩, ⟨v₁,v₂⟩, ⟨v₂,v₂⟩ [3, q] float64; returns twice [q] float64.
    """
    lengths = products[0].sqrt() * products[2].sqrt()
    cosine = torch.where(lengths > 0, products[1] / lengths.clamp(min=1e-300), 0.0).clamp(-1, 1)
    line = 1 - cosine.square() <= PARALLEL
    angle = torch.where(line, 0.0, cosine).acos()
    sine = angle.sin()
    near = torch.where(line, 1 - t, ((1 - t) * angle).sin() / sine)
    return near, torch.where(line, t, (t * angle).sin() / sine)


class NuSlerp(MergeMethod):
    """`nuslerp` as a plug-in."""

    name = "nuslerp"
    summary = "spherical interpolation of two models or task vectors, by their weights"
    formula = "θ = o + [sin((1−t)·Ω)·v₁ + sin(t·Ω)·v₂] / sin Ω,  vᵢ = θᵢ − o,  t = w₂/(w₁+w₂)"
    parameters = (
        Parameter("weight", "source", "float", 1.0, "share of the source on the arc"),
        ORIGIN,
        Parameter(
            "vectors",
            "recipe",
            "choice",
            "tensor",
            "what an angle is measured between: whole tensors, their rows (last axis) or their "
            "columns (first axis)",
            choices=("tensor", "row", "column"),
        ),
    )
    needs_base = False
    takes_base = True
    min_sources = 2
    max_sources = 2

    def prepare(self, blocks: Blocks, coefficients: Coefficients, survey: Any) -> Factors:
        rule = coefficients.choice("vectors")
        t = place(coefficients.floats("weight"))
        if t in (0, 1):
            return lambda start, count: (1 - t, t)  # an end of the arc, whatever the angle
        if rule == "tensor" or len(coefficients.shape) < 2:
            return _whole(blocks, coefficients, t)
        return (_by_row if rule == "row" else _by_column)(blocks, coefficients, t)

    def program(self, coefficients: Coefficients, prepared: Factors) -> Program | None:
        t = place(coefficients.floats("weight"))
        if t in (0, 1):
            return copy_of(int(t))
        if coefficients.choice("vectors") != "tensor" and len(coefficients.shape) >= 2:
            return None
        near, far = (float(factor) for factor in prepared(0, 1))
        rows = (Row(0, near), Row(1, far))
        return Program(rows, "base" if from_base(coefficients) else "zero")

    def merge(self, block: Block, coefficients: Coefficients, prepared: Factors) -> Tensor:
        t = place(coefficients.floats("weight"))
        if t in (0, 1):
            return block.sources[int(t)].clone()
        near, far = prepared(block.start, block.sources.shape[1])
        first, second = vectors(block, coefficients)
        arc = nuslerp(first, second, near, far)
        if coefficients.choice("origin") == "zero":
            return arc
        assert block.base is not None
        return arc.add_(block.base)


def place(weights: Sequence[float]) -> float:
    """t = w₂/(w₁+w₂), and ½ where the weights cancel out."""
    total = sum(weights)
    return 0.5 if abs(total) < 1e-6 else weights[1] / total


def _whole(blocks: Blocks, coefficients: Coefficients, t: float) -> Factors:
    sums = triangle_of(blocks, coefficients)
    near, far = arcs(t, torch.tensor(sums, dtype=torch.float64)[:, None])
    return lambda start, count: (near.item(), far.item())


def _by_row(blocks: Blocks, coefficients: Coefficients, t: float) -> Factors:
    width = row_length(coefficients)

    def factors(rows: Block) -> Tensor:
        products = gram(vectors(rows, coefficients)).view(3, -1, width)
        near, far = arcs(t, pairwise_sum(products))
        return torch.stack([near, far]).float().repeat_interleave(width, dim=1)

    window = RowWindow(blocks, width, factors)

    def at(start: int, count: int) -> tuple[Tensor, Tensor]:
        near, far = window.at(start, count)
        return near, far

    return at


def _by_column(blocks: Blocks, coefficients: Coefficients, t: float) -> Factors:
    """Columns run along the first axis; all other axes count columns."""
    width = math.prod(coefficients.shape[1:])
    sums: Tensor | float = 0.0
    for rows in row_segments(blocks, width):
        products = gram(vectors(rows, coefficients)).view(3, -1, width)
        sums = pairwise_sum(products.transpose(1, 2)) + sums
    assert isinstance(sums, Tensor)
    factors = torch.stack(arcs(t, sums)).float()

    def at(start: int, count: int) -> tuple[Tensor, Tensor]:
        columns = torch.arange(start, start + count, device=factors.device).remainder_(width)
        near, far = factors[:, columns]
        return near, far

    return at
