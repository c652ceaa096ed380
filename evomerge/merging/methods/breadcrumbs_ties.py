"""Breadcrumbs with an election: keep the middling entries, then merge what agrees in sign.

Knows nothing of checkpoints, devices or studies. What is kept is found in `bands`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from evomerge.merging.kernels.program import Program
from evomerge.merging.methods.bands import BAND_PARAMETERS, TensorBands, bands_of
from evomerge.merging.methods.base import Block, Blocks, Coefficients, MergeMethod, Parameter
from evomerge.merging.methods.election import election_parameters
from evomerge.merging.methods.thinning import Ballot, balloted, consensus_program, thinned_consensus


class BreadcrumbsTies(MergeMethod):
    """Merge the middling entries of task vectors where they have the elected sign.

        τ̂ᵢ = τᵢ where |τᵢ| ranks after the ⌊γᵢ·P⌋ largest and among the ⌊dᵢ·P⌋ next, else 0
        γ± = sign(Σᵢ wᵢ·τ̂ᵢ), `sign_tie` where the sum is 0
        θ  = θ₀ + λ·Σ_A wᵢ·τ̂ᵢ       A = {i : sign(wᵢ·τ̂ᵢ) = γ± ≠ 0}      (normalize: ÷ Σ_A wᵢ)

    Shapes: as in `MergeMethod`, all arithmetic float32. P counts the entries of the tensor or the
    row; where ⌊γ·P⌋ + ⌊d·P⌋ > P fewer of the largest are dropped.
    With λ = 0 or without a weight the result is the base bit for bit; density 1 drops nothing.

    Source: Davari and Belilovsky 2023, arXiv:2312.06795, with the election of Yadav et al. 2023,
    arXiv:2306.01708, as in mergekit, which takes a tie for + (`sign_tie: positive`) and drops
    everything where ⌊γ·P⌋ = 0.
    """

    name = "breadcrumbs_ties"
    summary = "keeps middling entries, elects a sign per weight and adds what agrees"
    formula = "θ = θ₀ + λ·Σ_A wᵢ·τ̂ᵢ,  τ̂: breadcrumbs,  A = {i : sign(wᵢ·τ̂ᵢ) = sign(Σᵢ wᵢ·τ̂ᵢ) ≠ 0}"
    parameters = (
        Parameter("weight", "source", "float", 1.0, "weight in the vote and in the sum"),
        *BAND_PARAMETERS,
        Parameter("lambda", "recipe", "float", 1.0, "factor of the merged task vector"),
        *election_parameters(normalize=False),
    )

    def prepare(self, blocks: Blocks, coefficients: Coefficients, survey: Any) -> Ballot:
        bands = bands_of(blocks, coefficients)
        counts = isinstance(bands, TensorBands)
        return balloted(blocks, bands, coefficients, kernel_counts=counts)

    def program(self, coefficients: Coefficients, prepared: Ballot) -> Program | None:
        bands = prepared.thinning
        if not isinstance(bands, TensorBands):
            return None
        return consensus_program(bands, prepared.tie, coefficients)

    def merge(self, block: Block, coefficients: Coefficients, prepared: Ballot) -> Tensor:
        return thinned_consensus(block, prepared, coefficients)
