"""Consensus task arithmetic: keep the weights that several tasks need, and only those.

Knows nothing of checkpoints, layers or blocks beyond the elements it is handed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from evomerge.merging.methods.base import Block, Coefficients, MergeMethod, Parameter
from evomerge.merging.methods.combination import moved, sole, task_vectors, weighted_sum

CONSENSUS_PARAMETERS = (
    Parameter(
        "threshold",
        "source",
        "float",
        0.4,
        "how much nearer to the source than to the base the sum must be for the source to need a "
        "weight; lower needs more",
        low=0.0,
    ),
    Parameter(
        "agree", "recipe", "float", 2.0, "least number of sources that need a weight", low=0.0
    ),
    Parameter("lambda", "recipe", "float", 1.0, "factor of the merged task vector"),
)


def consensus_task_arithmetic(
    base: Tensor,
    sources: Tensor,
    *,
    weights: Sequence[float],
    thresholds: Sequence[float],
    agree: float = 2.0,
    scale: float = 1.0,
) -> Tensor:
    """Add the sum of task vectors where enough of them need it.

        τ_m = Σᵢ vᵢ                                   vᵢ = wᵢ·(θᵢ − θ₀)
        mᵢ  = 1 where |vᵢ| > tᵢ·|τ_m − vᵢ|, else 0    (the TALL mask of task i)
        θ   = θ₀ + λ·τ_m where Σᵢ mᵢ ≥ k, else θ₀

    Shapes: base [n], sources [s, n] float32, weights and thresholds t [s], k is `agree`; returns
    [n] float32. All arithmetic is float32, sums in the order given.
    With λ = 0 the result is the base bit for bit, also with k above the number of sources; k = 0
    is task arithmetic; a lone source of λ·w = 1 and k ≤ 1 is returned bit for bit. A source of
    weight 0 takes no part.

    Source: Wang et al. 2024, arXiv:2405.07813 (TALL masks, consensus merging). The authors have no
    weights and pick tᵢ from {0.2, ..., 0.6} for each task by its validation accuracy.
    """
    if scale == 0 or not any(weights):
        return base.clone()
    only = sole([scale * weight for weight in weights])
    if only is not None and agree <= 1:
        return sources[only].clone()
    taus = list(task_vectors(base, sources))
    total = weighted_sum(taus, weights)
    assert total is not None
    needed = needs(taus, total, weights=weights, thresholds=thresholds)
    return torch.where(needed >= agree, moved(base, total * scale), base)


def needs(
    taus: Sequence[Tensor], total: Tensor, *, weights: Sequence[float], thresholds: Sequence[float]
) -> Tensor:
    """How many sources need each weight: Σᵢ [|vᵢ| > tᵢ·|τ_m − vᵢ|], vᵢ = wᵢ·τᵢ.

    Shapes: taus s times [n], total τ_m [n], weights and thresholds [s]; returns [n] float32.
    """
    count = torch.zeros_like(total)
    for tau, weight, threshold in zip(taus, weights, thresholds, strict=True):
        if weight != 0:
            vote = tau * weight
            count += vote.abs() > (total - vote).abs_().mul_(threshold)
    return count


class Consensus(MergeMethod):
    """`consensus` as a plug-in."""

    name = "consensus"
    summary = "task arithmetic on the weights that at least k sources need"
    formula = "θ = θ₀ + λ·τ_m⊙[Σᵢ mᵢ ≥ k],  τ_m = Σᵢ vᵢ,  mᵢ = |vᵢ| > tᵢ·|τ_m − vᵢ|,  vᵢ = wᵢ·τᵢ"
    parameters = (
        Parameter("weight", "source", "float", 1.0, "factor of the source's task vector"),
        *CONSENSUS_PARAMETERS,
    )

    def merge(self, block: Block, coefficients: Coefficients, prepared: Any) -> Tensor:
        assert block.base is not None
        return consensus_task_arithmetic(
            block.base,
            block.sources,
            weights=coefficients.floats("weight"),
            thresholds=coefficients.floats("threshold"),
            agree=coefficients.number("agree"),
            scale=coefficients.number("lambda"),
        )
