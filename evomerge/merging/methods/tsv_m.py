"""TSV-Merge: keep each task's strongest singular vectors, and make them orthogonal to each other.

Knows nothing of checkpoints, layers or blocks: whole matrices in, one out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from evomerge.merging.methods.base import Block, Blocks, Coefficients, Parameter
from evomerge.merging.methods.combination import sole
from evomerge.merging.methods.matrices import (
    NO_DIRECTION,
    TOLERANCE,
    MatrixMethod,
    active,
    directions,
    polar,
    task_vector,
)


def tsv_m(
    taus: Iterable[Tensor], *, weights: Sequence[float], tolerance: float = NO_DIRECTION
) -> Tensor:
    """Add the strongest directions of each task vector, decorrelated.

        τᵢ = Uᵢ·diag(σᵢ)·Vᵢ                            (thin SVD, r = min(m, n) directions)
        k  = max(1, ⌊r/N⌋)                             (the first k of each task are kept)
        U* = polar[U₁, ..., U_N],  V* = polar[V₁, ..., V_N]
        θ  = θ₀ + λ·U*·diag(w₁·σ₁, ..., w_N·σ_N)·V*
        θ  = θ₀ + λ·Σᵢ wᵢ·τᵢ / N                       for a tensor that is not a matrix

    Shapes: taus N times [m, n] float64, weights [N]; returns the task vector [m, n] float64, before
    λ. λ is applied in float64 too, then the task vector is rounded to float32 and added to the base
    in float32. Whole matrices are held in memory: about 14 in float64.
    With λ = 0 or without a weight the result is the base bit for bit; a lone source of λ·w = 1 is
    returned bit for bit. If N does not divide r, r mod N directions are lost.

    Source: Gargiulo et al. 2025, arXiv:2412.00081. The authors have no weights, and keep directions
    of σ = 0, which an SVD picks arbitrarily and which bend the others in `polar`: task vectors of
    low rank (LoRA) merge with an error of half their norm. We drop σ ≤ ε·σ₁ (ε is `tolerance`),
    and inside `polar`, so that identical sources merge to their first k directions.
    """
    lefts, spectra, rights = [], [], []
    for tau, weight in zip(taus, weights, strict=True):
        kept = max(1, min(tau.shape) // len(weights))
        u, sigma, v = directions(tau, tolerance)
        lefts.append(u[:, :kept].clone())
        spectra.append(sigma[:kept] * weight)
        rights.append(v[:kept].clone())
    left, strengths, right = torch.cat(lefts, dim=1), torch.cat(spectra), torch.cat(rights)
    if not len(strengths):
        return left.new_zeros(left.shape[0], right.shape[1])
    return (polar(left) * strengths) @ polar(right.mT).mT


class TsvM(MatrixMethod):
    """`tsv_m` as a plug-in."""

    name = "tsv_m"
    summary = "each task's strongest singular vectors, made orthogonal to those of the others"
    formula = "θ = θ₀ + λ·polar[Uᵢ]·diag(wᵢ·σᵢ)·polar[Vᵢ],  τᵢ ≈ Uᵢ·diag(σᵢ)·Vᵢ of rank ⌊r/N⌋"
    parameters = (
        Parameter("weight", "source", "float", 1.0, "factor of the source's singular values"),
        Parameter("lambda", "recipe", "float", 1.0, "factor of the merged task vector"),
        TOLERANCE,
    )

    def prepare(self, blocks: Blocks, coefficients: Coefficients, survey: Any) -> Tensor | None:
        if _lone(coefficients) is not None:
            return None
        return super().prepare(blocks, coefficients, survey)

    def merge(self, block: Block, coefficients: Coefficients, prepared: Tensor | None) -> Tensor:
        only = _lone(coefficients)
        if only is not None:
            return block.sources[only].clone()
        return super().merge(block, coefficients, prepared)

    def merged(self, blocks: Blocks, coefficients: Coefficients) -> Tensor:
        weights = coefficients.floats("weight")
        chosen = active(coefficients)
        taus = (task_vector(blocks, coefficients, index) for index in chosen)
        return tsv_m(
            taus,
            weights=[weights[index] for index in chosen],
            tolerance=coefficients.number("tolerance"),
        )


def _lone(coefficients: Coefficients) -> int | None:
    scale = coefficients.number("lambda")
    return sole([scale * weight for weight in coefficients.floats("weight")])
