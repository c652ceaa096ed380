"""Iso-C: give the summed task vector the same strength in every direction.

Knows nothing of checkpoints, layers or blocks: one whole matrix in, one out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evomerge.merging.methods.base import Blocks, Coefficients, Parameter
from evomerge.merging.methods.matrices import (
    NO_DIRECTION,
    TOLERANCE,
    MatrixMethod,
    directions,
    weighted_task_vectors,
)

ISO_PARAMETERS = (
    Parameter("weight", "source", "float", 1.0, "factor of the source's task vector"),
    Parameter("lambda", "recipe", "float", 1.0, "factor of the merged task vector"),
)


def iso_c(total: Tensor, *, tolerance: float = NO_DIRECTION) -> Tensor:
    """Flatten the spectrum of a summed task vector.

        Δ  = Σᵢ wᵢ·τᵢ = U·diag(σ)·V         τᵢ = θᵢ − θ₀   (thin SVD)
        σ̄  = Σₖ σₖ / r                      r directions with σₖ > ε·σ₁
        θ  = θ₀ + λ·σ̄·U·V
        θ  = θ₀ + λ·Σᵢ wᵢ·τᵢ / N            for a tensor that is not a matrix

    Shapes: total Δ [m, n] float64; ε is `tolerance`; returns σ̄·U·V [m, n] float64. λ is applied in
    float64 too, then the task vector is rounded to float32 and added to the base in float32. The
    whole matrix is held in memory: about seven copies of it in float64.
    With λ = 0 or without a weight the result is the base bit for bit. A single source is not its
    own merge: its spectrum is flattened as well. The nuclear norm of λ·Δ is kept.

    Source: Marczak et al. 2025, arXiv:2502.04959, sec. 4.1. The authors have no weights, and give
    directions of σ = 0, which an SVD picks arbitrarily, the mean strength as well; we none.
    """
    u, sigma, v = directions(total, tolerance)
    return torch.zeros_like(total) if not len(sigma) else (u * sigma.mean()) @ v


class IsoC(MatrixMethod):
    """`iso_c` as a plug-in."""

    name = "iso_c"
    summary = "the sum of task vectors with all its singular values made equal"
    formula = "θ = θ₀ + λ·σ̄·U·V,  Σᵢ wᵢ·τᵢ = U·diag(σ)·V  (vectors: λ·Σᵢ wᵢ·τᵢ / N)"
    parameters = (*ISO_PARAMETERS, TOLERANCE)

    def merged(self, blocks: Blocks, coefficients: Coefficients) -> Tensor:
        return iso_c(summed(blocks, coefficients), tolerance=coefficients.number("tolerance"))


def summed(blocks: Blocks, coefficients: Coefficients) -> Tensor:
    """Δ = Σᵢ wᵢ·τᵢ of a whole matrix. Shapes: returns [m, n] float64."""
    taus = weighted_task_vectors(blocks, coefficients)
    total = next(taus)
    for tau in taus:
        total += tau
    return total
