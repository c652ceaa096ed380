"""Gram matrices of a layer's inputs as RegMean and MaTS need them, and the system they make.

Knows how they lie in an artifact, not how they were found. Everything here is float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from evomerge.errors import MergeError
from evomerge.merging.methods.base import Block, Blocks, Coefficients, Fitted, Parameter
from evomerge.merging.methods.linear import shares
from evomerge.merging.methods.matrices import active, gathered

NO_CORRELATION = 1e-5
"""Off-diagonals are shrunk by this share at least. It lifts the smallest eigenvalue of a Gram
matrix, scaled to a unit diagonal, above the rounding of float32 statistics (about 1e-7·√d); what it
changes of a solution lies in directions that hold less than this share of the inputs."""

WEIGHT = Parameter("weight", "source", "float", 1.0, "share of the source's error", low=0.0)


def off_diagonal(default: float) -> Parameter:
    """The factor of the Gram matrices' off-diagonals."""
    return Parameter(
        "off_diagonal",
        "recipe",
        "float",
        default,
        "factor of the off-diagonals of every Gram matrix: 1 is least squares, 0 weighs each input "
        "alone",
        low=0.0,
        high=1.0,
    )


def gram_key(source: str, layer: str) -> str:
    """What the matrix of a source and a layer is called in an artifact."""
    return f"{layer} of {source}"


def packed(matrix: Tensor) -> Tensor:
    """The upper triangle of a symmetric matrix by rows. Shapes: [d, d] -> [d·(d+1)/2] float32."""
    return torch.cat([row[index:] for index, row in enumerate(matrix.float())])


def unpacked(triangle: Tensor, size: int) -> Tensor:
    """The symmetric matrix of a packed triangle. Shapes: [d·(d+1)/2] -> [d, d] float64."""
    matrix = torch.empty(size, size, dtype=torch.float64)
    start = 0
    for index in range(size):
        row = triangle[start : start + size - index]
        matrix[index, index:] = row
        matrix[index:, index] = row
        start += size - index
    return matrix


def is_layer(coefficients: Coefficients) -> bool:
    """Whether every source that has a weight has a Gram matrix for the tensor."""
    inputs = _fitted(coefficients).facts["inputs"]
    names = coefficients.names
    return all(coefficients.tensor in inputs[names[index]] for index in active(coefficients))


@dataclass(frozen=True)
class System:
    """S·Δ = R: what a merged layer W₀ + Δ must solve to be as near as it can be to its sources.

        S = Σᵢ wᵢ·G̃ᵢ,   R = Σᵢ wᵢ·G̃ᵢ·(Wᵢ − W₀),   G̃ᵢ = a·Gᵢ + (1 − a)·diag(Gᵢ)

    Shapes: start W₀ [d, o] (d inputs, o outputs), left S [d, d], right R [d, o].
    """

    start: Tensor
    left: Tensor
    right: Tensor


def system(start: Tensor, blocks: Blocks, coefficients: Coefficients) -> System:
    """The system around W₀ = `start`, in the tensor's stored shape. One source at a time."""
    origin = by_inputs(start, coefficients)
    weights = shares(coefficients.floats("weight"), normalize=True)
    size = origin.shape[0]
    left = torch.zeros(size, size, dtype=torch.float64)
    right = torch.zeros_like(origin)
    for index in active(coefficients):
        gram = _gram(coefficients, index, size) * weights[index]
        right += gram @ (by_inputs(_source(blocks, coefficients, index), coefficients) - origin)
        left += gram
    return System(origin, left, right)


def by_inputs(tensor: Tensor, coefficients: Coefficients) -> Tensor:
    """A layer's weights with its inputs first, or back again: a view."""
    first = coefficients.tensor in _fitted(coefficients).facts["inputs_first"]
    return tensor if first else tensor.T


def average(blocks: Blocks, coefficients: Coefficients) -> Tensor:
    """Σᵢ wᵢ·Wᵢ / Σᵢ wᵢ in the stored shape; exactly W where all sources have the same W."""
    first, *others = active(coefficients)
    weights = shares(coefficients.floats("weight"), normalize=True)

    def row(block: Block) -> Tensor:
        origin = block.sources[first].double()
        total = origin.clone()
        for index in others:
            total += (block.sources[index].double() - origin) * weights[index]
        return total

    return gathered(blocks, coefficients, row)


def _source(blocks: Blocks, coefficients: Coefficients, index: int) -> Tensor:
    def row(block: Block) -> Tensor:
        return block.sources[index]

    return gathered(blocks, coefficients, row)


def _gram(coefficients: Coefficients, index: int, size: int) -> Tensor:
    """G̃ᵢ of one source. Shapes: returns [d, d]."""
    source, fitted = coefficients.names[index], _fitted(coefficients)
    layer = fitted.facts["inputs"][source][coefficients.tensor]
    triangle = fitted.tensor(gram_key(source, layer))
    if len(triangle) != size * (size + 1) // 2:
        raise MergeError(
            f"{coefficients.tensor}: the artifact was fitted on layers of another size than"
            f" {size} inputs; fit it on the models that are merged"
        )
    gram = unpacked(triangle, size)
    diagonal = gram.diagonal().clone()
    gram *= min(coefficients.number("off_diagonal"), 1 - NO_CORRELATION)
    gram.diagonal().copy_(diagonal)
    return gram


def _fitted(coefficients: Coefficients) -> Fitted:
    assert coefficients.fitted is not None
    return coefficients.fitted
