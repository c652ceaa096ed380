"""Linear merging: a weighted average of whole models (a "model soup").

Knows nothing of checkpoints, layers or blocks beyond the elements it is handed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from evomerge.errors import CandidateError
from evomerge.merging.kernels.program import Program, weighted
from evomerge.merging.methods.base import Block, Coefficients, MergeMethod, Parameter
from evomerge.merging.methods.combination import NO_WEIGHT, weighted_sum


def linear(sources: Tensor, weights: Sequence[float], *, normalize: bool = True) -> Tensor:
    """Average models, each with its weight.

        θ = Σᵢ wᵢ·θᵢ / Σᵢ wᵢ        (normalize; without it, θ = Σᵢ wᵢ·θᵢ)

    Shapes: sources [s, n] float32, weights [s]; returns [n] float32. The coefficients wᵢ/Σw are
    computed in float64, products and sums in float32 in the order given.
    With `normalize` and |Σw| < 1e-8 there is no average: CandidateError. A source of coefficient 0
    is not read; a lone coefficient of 1 returns that source bit for bit.

    Source: Wortsman et al. 2022, arXiv:2203.05482 (uniform soup: all weights equal), with
    mergekit's `linear` weights. mergekit divides by a sum of 0 and writes NaN; we refuse.
    """
    merged = weighted_sum(sources, shares(weights, normalize=normalize))
    return torch.zeros_like(sources[0]) if merged is None else merged


def shares(weights: Sequence[float], *, normalize: bool) -> list[float]:
    """wᵢ/Σw, or wᵢ without `normalize`. Raises CandidateError where there is no average."""
    total = sum(weights)
    if normalize and abs(total) < NO_WEIGHT:
        raise CandidateError(
            f"linear: the weights {list(weights)} sum to {total:g}, which no average can be "
            "divided by; give one source a weight, or set `normalize: false`"
        )
    divisor = total if normalize else 1.0
    return [weight / divisor for weight in weights]


class Linear(MergeMethod):
    """`linear` as a plug-in."""

    name = "linear"
    summary = "weighted average of whole models; the base plays no part"
    formula = "θ = Σᵢ wᵢ·θᵢ / Σᵢ wᵢ"
    parameters = (
        Parameter("weight", "source", "float", 1.0, "share of the source in the average"),
        Parameter("normalize", "recipe", "bool", True, "divide by the sum of the weights"),
    )
    needs_base = False

    def program(self, coefficients: Coefficients, prepared: Any) -> Program:
        normalize = coefficients.flag("normalize")
        return weighted(shares(coefficients.floats("weight"), normalize=normalize), "zero")

    def merge(self, block: Block, coefficients: Coefficients, prepared: Any) -> Tensor:
        return linear(
            block.sources,
            coefficients.floats("weight"),
            normalize=coefficients.flag("normalize"),
        )
