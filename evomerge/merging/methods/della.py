"""DELLA: drop small entries of task vectors the likelier, then merge what agrees in sign.

Knows nothing of checkpoints, devices or studies. What is dropped is decided in `rank_dropping`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from evomerge.merging.methods.base import Block, Blocks, Coefficients, MergeMethod, Parameter
from evomerge.merging.methods.election import election_parameters
from evomerge.merging.methods.rank_dropping import RANK_DROP_PARAMETERS, RankDrops
from evomerge.merging.methods.thinning import Ballot, balloted, thinned_consensus


class Della(MergeMethod):
    """Merge task vectors, thinned at random by rank, where they have the elected sign.

        τ̃ᵢ = fᵢ·mᵢ⊙(θᵢ − θ₀)                       (mᵢ and fᵢ: `rank_dropping.RankDrops`)
        γ  = sign(Σᵢ wᵢ·τ̃ᵢ), `sign_tie` where the sum is 0
        θ  = θ₀ + λ·Σ_A wᵢ·τ̃ᵢ / Σ_A wᵢ      A = {i : sign(wᵢ·τ̃ᵢ) = γ ≠ 0}

    Shapes: as in `MergeMethod`, float32; probabilities are computed in float64. Without `normalize`
    the divisor is 1. A dropped entry neither votes nor counts in a divisor.
    With λ = 0 or without a weight the result is the base bit for bit; a lone source of density 1
    and coefficient 1 is returned bit for bit.

    Source: Deep et al. 2024, arXiv:2406.11617, sec. 3. mergekit's `della` is `rescale: l1,
    sign_tie: positive`; it refuses d ± ε beyond (0, 1), where we cut ε, and crashes on rows of one
    entry.
    """

    name = "della"
    summary = "thins task vectors at random by rank, elects a sign per weight, averages what agrees"
    formula = "θ = θ₀ + λ·Σ_A wᵢ·τ̃ᵢ / Σ_A wᵢ,  τ̃ᵢ = mᵢ⊙τᵢ/qᵢ, A = {i : sign(wᵢ·τ̃ᵢ) = sign(Σ wᵢ·τ̃ᵢ)}"
    parameters = (
        Parameter("weight", "source", "float", 1.0, "weight in the vote and in the mean"),
        *RANK_DROP_PARAMETERS,
        Parameter("lambda", "recipe", "float", 1.0, "factor of the merged task vector"),
        *election_parameters(normalize=True),
    )

    def prepare(self, blocks: Blocks, coefficients: Coefficients, survey: Any) -> Ballot:
        return balloted(blocks, RankDrops(blocks, coefficients), coefficients)

    def merge(self, block: Block, coefficients: Coefficients, prepared: Ballot) -> Tensor:
        return thinned_consensus(block, prepared, coefficients)
