"""Multi-SLERP: the direction of a weighted mean of unit vectors, at the weighted mean length.

Knows nothing of checkpoints, devices or studies.
"""

from __future__ import annotations

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


def multislerp(products: Gram, weights: Sequence[float]) -> list[float]:
    """The factors cᵢ of a mean that has the vectors' mean length.

        m = Σᵢ wᵢ·uᵢ            uᵢ = vᵢ/‖vᵢ‖,  vᵢ = θᵢ − o
        θ = o + Σᵢ wᵢ·‖vᵢ‖ · m/‖m‖ = o + Σᵢ cᵢ·vᵢ

    Shapes: products ⟨vᵢ, vⱼ⟩ [s][s] of whole tensors, weights [s]; returns c [s], all float64. The
    sum that they are for runs in float32 (`combined`). o is 0 or the base; with `normalize` the
    weights were divided by their sum. A vector of length 0 has no direction and adds none. Where
    ‖m‖ ≤ 1e-6·Σ|wᵢ| the directions cancel out and c = w: the plain weighted mean.

    Source: mergekit's `multislerp`. It maps to the tangent space at m/‖m‖, averages there and maps
    back; but the average of those tangent vectors, Σ wᵢ·(uᵢ − ⟨uᵢ, m̂⟩·m̂), is m − ‖m‖·m̂ = 0, so that
    the step goes nowhere and is left out here. mergekit refuses vectors that cancel out, except
    two, which it averages.
    """
    lengths, table = norms(products), cosines(products)
    length = length_of(table, weights)
    if length <= NO_DIRECTION * sum(abs(weight) for weight in weights):
        return list(weights)
    scale = sum(weight * norm for weight, norm in zip(weights, lengths, strict=True)) / length
    return [
        weight * scale / norm if norm > 0 else 0.0
        for weight, norm in zip(weights, lengths, strict=True)
    ]


class MultiSlerp(MergeMethod):
    """`multislerp` as a plug-in."""

    name = "multislerp"
    summary = "weighted mean of directions, at the weighted mean length"
    formula = "θ = o + Σᵢ wᵢ·‖vᵢ‖ · m/‖m‖,  m = Σᵢ wᵢ·vᵢ/‖vᵢ‖,  vᵢ = θᵢ − o"
    parameters = (
        Parameter("weight", "source", "float", 1.0, "share of the source's direction and length"),
        Parameter("normalize", "recipe", "bool", True, "divide weights by their sum first"),
        ORIGIN,
    )
    needs_base = False
    takes_base = True

    def prepare(self, blocks: Blocks, coefficients: Coefficients, survey: Any) -> list[float]:
        weights = _weights(coefficients)
        if sole(weights) is not None:
            return weights
        return multislerp(gram_of(blocks, coefficients), weights)

    def program(self, coefficients: Coefficients, prepared: list[float]) -> Program:
        return combination(coefficients, prepared)

    def merge(self, block: Block, coefficients: Coefficients, prepared: list[float]) -> Tensor:
        only = sole(prepared)
        if only is not None:
            return block.sources[only].clone()
        return combined(block, coefficients, prepared)


def _weights(coefficients: Coefficients) -> list[float]:
    weights = coefficients.floats("weight")
    normalize = coefficients.flag("normalize")
    if normalize and abs(sum(weights)) < NO_WEIGHT:
        raise CandidateError(
            f"multislerp: the weights {list(weights)} sum to {sum(weights):g}, which no average can"
            " be divided by; give one source a weight, or set `normalize: false`"
        )
    return normalised(weights, normalize=normalize)
