"""Consensus TIES: TIES merging on the weights that several tasks need, and only those.

Knows nothing of checkpoints, devices or studies. The trim and the vote are those of `ties`, the
count of tasks that of `consensus`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from evomerge.merging.methods.base import (
    Block,
    Blocks,
    Coefficients,
    MergeMethod,
    Parameter,
    streamed,
)
from evomerge.merging.methods.combination import moved, sole, task_vectors
from evomerge.merging.methods.consensus import CONSENSUS_PARAMETERS, needs
from evomerge.merging.methods.election import SIGN_TIE, consensus
from evomerge.merging.methods.selection import Cut
from evomerge.merging.methods.ties import (
    TRIM_PARAMETERS,
    Prepared,
    Survey,
    Ties,
    trimmed_votes,
)


def consensus_ties(
    base: Tensor,
    sources: Tensor,
    trims: Sequence[Cut],
    *,
    weights: Sequence[float],
    thresholds: Sequence[float],
    agree: float = 2.0,
    scale: float = 1.0,
    tie: int = 0,
    start: int = 0,
) -> Tensor:
    """Merge by TIES, where enough task vectors need what it merges.

        τ_m = Σ_A wᵢ·τ̂ᵢ       A = {i : sign(wᵢ·τ̂ᵢ) = γ ≠ 0}       (τ̂ and γ as in `ties`)
        mᵢ  = 1 where |vᵢ| > tᵢ·|τ_m − vᵢ|, else 0                 vᵢ = wᵢ·(θᵢ − θ₀)
        θ   = θ₀ + λ·τ_m where Σᵢ mᵢ ≥ k, else θ₀

    Shapes: base [n], sources [s, n] float32 from flat index `start`; trims, weights and thresholds
    t [s], k is `agree`; returns [n] float32. All arithmetic is float32, sums in the order given.
    With λ = 0 the result is the base bit for bit, also with k above the number of sources; k = 0
    is TIES with `aggregate: sum`; a lone source of λ·w = 1, density 1 and k ≤ 1 is returned bit
    for bit. A source of weight 0 takes no part.

    Source: Wang et al. 2024, arXiv:2405.07813, on Yadav et al. 2023, arXiv:2306.01708. The authors
    have no weights, trim to 20 % of the whole model and pick tᵢ by validation accuracy.
    """
    if scale == 0 or not any(weights):
        return base.clone()
    only = sole([scale * weight for weight in weights])
    if only is not None and agree <= 1 and trims[only].keeps_all:
        return sources[only].clone()
    votes = trimmed_votes(Block(base, sources, start), trims, weights)
    total = consensus(votes, [w for w in weights if w != 0], tie=tie, aggregate="sum")
    taus = list(task_vectors(base, sources))
    needed = needs(taus, total, weights=weights, thresholds=thresholds)
    return torch.where(needed >= agree, moved(base, total * scale), base)


class ConsensusTies(MergeMethod):
    """`consensus_ties` as a plug-in."""

    name = "consensus_ties"
    summary = "TIES (its sum) on the weights that at least k sources need"
    formula = "θ = θ₀ + λ·τ_m⊙[Σᵢ mᵢ ≥ k],  τ_m = Σ_A wᵢ·τ̂ᵢ (TIES),  mᵢ = |vᵢ| > tᵢ·|τ_m − vᵢ|"
    parameters = (
        Parameter("weight", "source", "float", 1.0, "weight in the vote and in the sum"),
        Parameter(
            "density", "source", "float", 0.2, "share of the task vector kept", low=0.0, high=1.0
        ),
        *CONSENSUS_PARAMETERS,
        *TRIM_PARAMETERS,
        SIGN_TIE,
    )

    def survey(self, model: Callable[[], Iterable[tuple[Coefficients, Blocks]]]) -> Survey | None:
        return Ties().survey(model)

    def prepare(self, blocks: Blocks, coefficients: Coefficients, survey: Any) -> Prepared:
        return Ties().prepare(streamed(blocks), coefficients, survey)

    def merge(self, block: Block, coefficients: Coefficients, prepared: Prepared) -> Tensor:
        assert block.base is not None
        assert prepared.tie is not None
        return consensus_ties(
            block.base,
            block.sources,
            prepared.trims,
            weights=coefficients.floats("weight"),
            thresholds=coefficients.floats("threshold"),
            agree=coefficients.number("agree"),
            scale=coefficients.number("lambda"),
            tie=prepared.tie,
            start=block.start,
        )
