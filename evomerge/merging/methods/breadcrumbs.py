"""Model Breadcrumbs: drop the outliers and the small entries of task vectors, add up the rest.

Knows nothing of checkpoints, devices or studies. What is kept is found in `bands`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from evomerge.merging.kernels.program import Program
from evomerge.merging.methods.bands import BAND_PARAMETERS, TensorBands, bands_of
from evomerge.merging.methods.base import Block, Blocks, Coefficients, MergeMethod, Parameter
from evomerge.merging.methods.thinning import Thinning, sum_program, thinned_sum


class Breadcrumbs(MergeMethod):
    """Move the base along a weighted sum of the middling entries of task vectors.

        τ̂ᵢ = τᵢ where |τᵢ| ranks after the ⌊γᵢ·P⌋ largest and among the ⌊dᵢ·P⌋ next, else 0
        θ  = θ₀ + λ·Σᵢ wᵢ·τ̂ᵢ          τᵢ = θᵢ − θ₀            (normalize: wᵢ/Σw in place of wᵢ)

    Shapes: as in `MergeMethod`, all arithmetic float32 but for λ·wᵢ, in float64. P counts the
    entries of the tensor or the row; where ⌊γ·P⌋ + ⌊d·P⌋ > P fewer of the largest are dropped.
    With every λ·wᵢ = 0 the result is the base bit for bit; density 1 drops nothing, whatever γ, and
    with one λ·wᵢ = 1 and the others 0 is that source bit for bit.

    Source: Davari and Belilovsky 2023, arXiv:2312.06795, sec. 3: per row in the authors' code, per
    tensor in mergekit, whose density and γ these are. In mergekit ⌊γ·P⌋ = 0 drops everything.
    """

    name = "breadcrumbs"
    summary = "the base plus a weighted sum of the middling entries of task vectors"
    formula = "θ = θ₀ + λ·Σᵢ wᵢ·τ̂ᵢ,  τ̂ᵢ = τᵢ without its γ largest share, then its d largest"
    parameters = (
        Parameter("weight", "source", "float", 1.0, "factor of the source's task vector"),
        *BAND_PARAMETERS,
        Parameter("normalize", "recipe", "bool", False, "divide by the sum of the weights"),
        Parameter("lambda", "recipe", "float", 1.0, "factor of the summed task vectors"),
    )

    def prepare(self, blocks: Blocks, coefficients: Coefficients, survey: Any) -> Thinning:
        return bands_of(blocks, coefficients)

    def program(self, coefficients: Coefficients, prepared: Thinning) -> Program | None:
        return sum_program(prepared, coefficients) if isinstance(prepared, TensorBands) else None

    def merge(self, block: Block, coefficients: Coefficients, prepared: Thinning) -> Tensor:
        return thinned_sum(block, prepared, coefficients)
