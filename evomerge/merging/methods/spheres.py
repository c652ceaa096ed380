"""Tensors as vectors on a sphere: inner products, norms and arcs, without ever holding a tensor.

Everything the spherical methods do lies in the span of the vectors they merge, so it needs no more
of a tensor than the inner products. Knows nothing of weights of a recipe or of sources by name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from evomerge.merging.kernels.program import Program, copy_of, weighted
from evomerge.merging.methods.base import Block, Blocks, Coefficients, Parameter, facts_of
from evomerge.merging.methods.combination import moved, sole, weighted_sum
from evomerge.merging.methods.reductions import totals

Gram: TypeAlias = list[list[float]]
"""⟨vᵢ, vⱼ⟩ of whole tensors, float64. [s][s]"""

NO_DIRECTION = 1e-6
"""Unit vectors whose weighted mean is shorter than this (weights summing to 1) cancel out: what is
left of them is mostly rounding."""

ORIGIN = Parameter(
    "origin",
    "recipe",
    "choice",
    "zero",
    "what the vectors start from: zero merges whole models, base their task vectors",
    choices=("zero", "base"),
    base_choices=("base",),
)


def from_base(coefficients: Coefficients) -> bool:
    """Whether the vectors start from the base."""
    return coefficients.choice("origin") == "base"


def vectors(block: Block, coefficients: Coefficients) -> Tensor:
    """The models of a block, or their task vectors if `origin` is the base. Shapes: [s, n]."""
    if coefficients.choice("origin") == "zero":
        return block.sources
    assert block.base is not None
    return block.sources - block.base


def combined(block: Block, coefficients: Coefficients, factors: Sequence[float]) -> Tensor:
    """origin + Σᵢ cᵢ·vᵢ in float32. Shapes: factors c [s]; returns [n]."""
    total = weighted_sum(vectors(block, coefficients), factors)
    if coefficients.choice("origin") == "zero":
        return torch.zeros_like(block.sources[0]) if total is None else total
    assert block.base is not None
    return moved(block.base, total)


def combination(coefficients: Coefficients, factors: Sequence[float]) -> Program:
    """`combined` as data; a lone factor of 1 is that source."""
    only = sole(factors)
    if only is not None:
        return copy_of(only)
    return weighted(factors, "base" if from_base(coefficients) else "zero")


def gram(rows: Tensor) -> Tensor:
    """The products whose sums are the Gram matrix's upper triangle.

    Shapes: rows [s, n] float32; returns [s·(s+1)/2, n] float64.
    """
    double = rows.double()
    count = len(rows)
    return torch.stack([double[i] * double[j] for i in range(count) for j in range(i, count)])


def gram_of(blocks: Blocks, coefficients: Coefficients) -> Gram:
    """The Gram matrix of the whole tensors (see `vectors`), in an order that no cutting changes."""
    return square(triangle_of(blocks, coefficients))


def triangle_of(blocks: Blocks, coefficients: Coefficients) -> list[float]:
    """The upper triangle of the Gram matrix, by rows [s·(s+1)/2]."""
    if (facts := facts_of(blocks)) is not None:
        return facts.gram(from_base=from_base(coefficients))
    return totals(blocks, lambda block: gram(vectors(block, coefficients)))


def square(triangle: Sequence[float]) -> Gram:
    """The symmetric matrix of an upper triangle, by rows. Shapes: [s·(s+1)/2] -> [s][s]."""
    count = (math.isqrt(8 * len(triangle) + 1) - 1) // 2
    matrix = [[0.0] * count for _ in range(count)]
    values = iter(triangle)
    for i in range(count):
        for j in range(i, count):
            matrix[i][j] = matrix[j][i] = next(values)
    return matrix


def norms(products: Gram) -> list[float]:
    """‖vᵢ‖ [s]."""
    return [math.sqrt(products[i][i]) for i in range(len(products))]


def cosines(products: Gram) -> Gram:
    """cos of the angles between the vectors [s][s]; 0 where one has no length."""
    lengths = norms(products)
    return [
        [
            max(-1.0, min(1.0, value / lengths[i] / lengths[j])) if lengths[i] * lengths[j] else 0.0
            for j, value in enumerate(row)
        ]
        for i, row in enumerate(products)
    ]


def length_of(products: Gram, coefficients: Sequence[float]) -> float:
    """‖Σᵢ cᵢ·vᵢ‖."""
    square = sum(
        coefficients[i] * coefficients[j] * product
        for i, row in enumerate(products)
        for j, product in enumerate(row)
    )
    return math.sqrt(max(square, 0.0))
