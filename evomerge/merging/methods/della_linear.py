"""DELLA with a weighted sum: drop small entries of task vectors the likelier, add up the rest.

Knows nothing of checkpoints, devices or studies. What is dropped is decided in `rank_dropping`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from evomerge.merging.methods.base import Block, Blocks, Coefficients, MergeMethod, Parameter
from evomerge.merging.methods.rank_dropping import RANK_DROP_PARAMETERS, RankDrops
from evomerge.merging.methods.thinning import thinned_sum


class DellaLinear(MergeMethod):
    """Move the base along a weighted sum of task vectors, thinned at random by rank.

        τ̃ᵢ = fᵢ·mᵢ⊙(θᵢ − θ₀)           (mᵢ and fᵢ: `rank_dropping.RankDrops`)
        θ  = θ₀ + λ·Σᵢ wᵢ·τ̃ᵢ            (normalize: wᵢ/Σw in place of wᵢ)

    Shapes: as in `MergeMethod`, float32; probabilities and λ·wᵢ are computed in float64.
    With every λ·wᵢ = 0 the result is the base bit for bit; with one λ·wᵢ = 1, the others 0 and
    density 1 it is that source bit for bit. E[θ] is task arithmetic's θ if fᵢ = 1/qᵢ; with ε = 0 it
    is DARE, draw by draw.

    Source: Deep et al. 2024, arXiv:2406.11617, sec. 3, without its election. mergekit's
    `della_linear` is `rescale: l1`, which inflates large entries; it refuses d ± ε beyond (0, 1),
    where we cut ε, and crashes on rows of one entry.
    """

    name = "della_linear"
    summary = "the base plus a weighted sum of task vectors, thinned at random by rank"
    formula = "θ = θ₀ + λ·Σᵢ wᵢ·fᵢ·mᵢ⊙(θᵢ − θ₀),  mᵢ ~ Bernoulli(qᵢ), fᵢ = 1/qᵢ, qᵢ grows with |τᵢ|"
    parameters = (
        Parameter("weight", "source", "float", 1.0, "factor of the source's task vector"),
        *RANK_DROP_PARAMETERS,
        Parameter("normalize", "recipe", "bool", False, "divide by the sum of the weights"),
        Parameter("lambda", "recipe", "float", 1.0, "factor of the summed task vectors"),
    )

    def prepare(self, blocks: Blocks, coefficients: Coefficients, survey: Any) -> RankDrops:
        return RankDrops(blocks, coefficients)

    def merge(self, block: Block, coefficients: Coefficients, prepared: RankDrops) -> Tensor:
        return thinned_sum(block, prepared, coefficients)
