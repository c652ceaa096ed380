"""Karcher mean: the mean of directions on the sphere, at the mean length.

Knows nothing of checkpoints, devices or studies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from evomerge.errors import CandidateError
from evomerge.merging.kernels.program import Program
from evomerge.merging.methods.base import Block, Blocks, Coefficients, MergeMethod, Parameter
from evomerge.merging.methods.combination import NO_WEIGHT, normalised, sole
from evomerge.merging.methods.spheres import (
    NO_DIRECTION,
    ORIGIN,
    Gram,
    combination,
    combined,
    cosines,
    gram_of,
    length_of,
    norms,
)

CONVERGED = 1e-7
"""A step on the sphere shorter than this (in radians) is the last; float32 has 6e-8."""
MOST_STEPS = 200


def karcher(products: Gram, weights: Sequence[float]) -> list[float]:
    """The factors cᵢ of the Karcher mean of vectors.

        u  = argmin Σᵢ wᵢ·arccos²⟨u, uᵢ⟩ over unit vectors        uᵢ = vᵢ/‖vᵢ‖,  vᵢ = θᵢ − o
        θ  = o + Σᵢ wᵢ·‖vᵢ‖ · u = o + Σᵢ cᵢ·vᵢ
        by u ← cos‖T‖·u + sin‖T‖·T/‖T‖,  T = Σᵢ wᵢ·(Ωᵢ/sin Ωᵢ)·(uᵢ − cos Ωᵢ·u),  cos Ωᵢ = ⟨u, uᵢ⟩
        from the normalised Σᵢ wᵢ·uᵢ until ‖T‖ < 1e-7

    Shapes: products ⟨vᵢ, vⱼ⟩ [s][s] of whole tensors, weights [s], summing to 1, none negative;
    returns c [s], all float64. The sum that they are for runs in float32 (`combined`). The mean
    lies in the span of the vectors, so that iterating needs their products and no tensor.
    A vector of length 0 has no direction and adds none. Where ‖Σ wᵢ·uᵢ‖ ≤ 1e-6 the directions
    cancel out and c = w: the plain weighted mean. For two sources u is on their arc, at w₂.

    Source: Karcher 1977, "Riemannian center of mass and mollifier smoothing"; mergekit's `karcher`
    has no weights and stops after `max_iter` (10) steps or at `tol` (1e-5), since each of its steps
    reads every tensor.
    """
    lengths, table = norms(products), cosines(products)
    shares = [w if norm > 0 else 0.0 for w, norm in zip(weights, lengths, strict=True)]
    size = length_of(table, shares)
    if size <= NO_DIRECTION:
        return list(weights)
    mean = [share / size for share in shares]
    for _ in range(MOST_STEPS):
        step = _step(table, shares, mean)
        length = length_of(table, step)
        if length > 0:
            ahead = math.sin(length) / length
            mean = [math.cos(length) * u + ahead * t for u, t in zip(mean, step, strict=True)]
            size = length_of(table, mean)
            if size <= NO_DIRECTION:  # the walk reached the opposite point and cancelled out
                return list(weights)
            mean = [u / size for u in mean]
        if length < CONVERGED:
            break
    scale = sum(weight * norm for weight, norm in zip(weights, lengths, strict=True))
    return [u * scale / norm if norm > 0 else 0.0 for u, norm in zip(mean, lengths, strict=True)]


def _step(table: Gram, shares: Sequence[float], mean: Sequence[float]) -> list[float]:
    """T as coefficients of the unit vectors. Shapes: table [s][s], the others [s]."""
    step = [0.0] * len(mean)
    for i, share in enumerate(shares):
        cosine = sum(u * c for u, c in zip(mean, table[i], strict=True))
        angle = math.acos(max(-1.0, min(1.0, cosine)))
        sine = math.sin(angle)
        factor = share * (angle / sine if sine > 1e-9 else float(cosine > 0))
        step[i] += factor
        step = [t - factor * cosine * u for t, u in zip(step, mean, strict=True)]
    return step


class Karcher(MergeMethod):
    """`karcher` as a plug-in."""

    name = "karcher"
    summary = "mean of directions on the sphere, at the mean length"
    formula = "θ = o + Σᵢ wᵢ·‖vᵢ‖ · argmin_u Σᵢ wᵢ·arccos²⟨u, vᵢ/‖vᵢ‖⟩,  vᵢ = θᵢ − o"
    parameters = (
        Parameter(
            "weight", "source", "float", 1.0, "share of the source, out of their sum", low=0.0
        ),
        ORIGIN,
    )
    needs_base = False
    takes_base = True

    def prepare(self, blocks: Blocks, coefficients: Coefficients, survey: Any) -> list[float]:
        weights = coefficients.floats("weight")
        if sum(weights) < NO_WEIGHT:
            raise CandidateError("karcher: every weight is 0; give one source a weight")
        shares = normalised(weights, normalize=True)
        if sole(shares) is not None:
            return shares
        return karcher(gram_of(blocks, coefficients), shares)

    def program(self, coefficients: Coefficients, prepared: list[float]) -> Program:
        return combination(coefficients, prepared)

    def merge(self, block: Block, coefficients: Coefficients, prepared: list[float]) -> Tensor:
        only = sole(prepared)
        if only is not None:
            return block.sources[only].clone()
        return combined(block, coefficients, prepared)
