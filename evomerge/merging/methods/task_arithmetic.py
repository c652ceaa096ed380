"""Task arithmetic: add a weighted sum of task vectors to the base.

Knows nothing of checkpoints, layers or blocks beyond the elements it is handed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from evomerge.merging.kernels.program import Program, copy_of, weighted
from evomerge.merging.methods.base import Block, Coefficients, MergeMethod, Parameter
from evomerge.merging.methods.combination import (
    moved,
    normalised,
    sole,
    task_vectors,
    weighted_sum,
)


def task_arithmetic(
    base: Tensor,
    sources: Tensor,
    *,
    weights: Sequence[float],
    scale: float = 1.0,
    normalize: bool = False,
) -> Tensor:
    """Move the base along a weighted sum of task vectors.

        τᵢ = θᵢ − θ₀
        θ  = θ₀ + λ·Σᵢ wᵢ·τᵢ            (normalize: wᵢ/Σw in place of wᵢ)

    Shapes: base [n], sources [s, n] float32, weights [s]; returns [n] float32. The coefficients
    λ·wᵢ are computed in float64, τ, products and sums in float32 in the order given.
    With every λ·wᵢ = 0 the result is the base bit for bit; with one of them 1 and the others 0 it
    is that source bit for bit; where all sources equal the base it equals the base. |Σw| < 1e-8
    normalises by 1.

    Source: Ilharco et al. 2023, arXiv:2212.04089, one λ for a plain sum. Weights and `normalize`
    are mergekit's, which computes in the dtype of the checkpoints unless told otherwise.
    """
    shares = shares_of(weights, scale=scale, normalize=normalize)
    only = sole(shares)
    if only is not None:
        return sources[only].clone()
    return moved(base, weighted_sum(task_vectors(base, sources), shares))


def shares_of(weights: Sequence[float], *, scale: float, normalize: bool) -> list[float]:
    """λ·wᵢ, or λ·wᵢ/Σw with `normalize`."""
    return [scale * weight for weight in normalised(weights, normalize=normalize)]


class TaskArithmetic(MergeMethod):
    """`task_arithmetic` as a plug-in."""

    name = "task_arithmetic"
    summary = "the base plus a weighted sum of task vectors"
    formula = "θ = θ₀ + λ·Σᵢ wᵢ·(θᵢ − θ₀)"
    parameters = (
        Parameter("weight", "source", "float", 1.0, "factor of the source's task vector"),
        Parameter("normalize", "recipe", "bool", False, "divide by the sum of the weights"),
        Parameter("lambda", "recipe", "float", 1.0, "factor of the summed task vectors"),
    )

    def program(self, coefficients: Coefficients, prepared: Any) -> Program:
        shares = shares_of(
            coefficients.floats("weight"),
            scale=coefficients.number("lambda"),
            normalize=coefficients.flag("normalize"),
        )
        only = sole(shares)
        return weighted(shares, "base") if only is None else copy_of(only)

    def merge(self, block: Block, coefficients: Coefficients, prepared: Any) -> Tensor:
        assert block.base is not None
        return task_arithmetic(
            block.base,
            block.sources,
            weights=coefficients.floats("weight"),
            scale=coefficients.number("lambda"),
            normalize=coefficients.flag("normalize"),
        )
