"""RegMean: merge each linear layer by least squares on what its sources compute.

Knows nothing of data: the inner products of the layers' inputs are an artifact's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evomerge.errors import CandidateError
from evomerge.merging.kernels.program import Program
from evomerge.merging.methods.base import Block, Blocks, Coefficients, MergeMethod
from evomerge.merging.methods.gram import (
    WEIGHT,
    System,
    average,
    by_inputs,
    is_layer,
    off_diagonal,
    system,
)
from evomerge.merging.methods.linear import Linear
from evomerge.merging.methods.matrices import active
from evomerge.merging.methods.simpler import with_parameters

_AVERAGE = Linear()


def regmean(problem: System, *, tensor: str = "") -> Tensor:
    """Solve for the layer that is nearest to its sources on their own inputs.

        W = argmin Σᵢ wᵢ·‖Xᵢ·W − Xᵢ·Wᵢ‖²/nᵢ = (Σᵢ wᵢ·Gᵢ)⁻¹ Σᵢ wᵢ·Gᵢ·Wᵢ      Gᵢ = XᵢᵀXᵢ/nᵢ
        with a·Gᵢ + (1 − a)·diag(Gᵢ) for Gᵢ

    Shapes: returns W [d, o] float64. Solved by Cholesky for W − W̄, W̄ being the average, after
    scaling S to a unit diagonal. An input that is 0 in all data keeps the average, and so does a
    single source. a = 1 is carried out as 1 − 1e-5, so that there is one solution where there are
    fewer tokens than inputs: of those that fit, the nearest to the sources input by input.

    Source: Jin et al. 2023, arXiv:2212.09849. The authors invert ΣG, and have no weights.
    """
    diagonal = problem.left.diagonal()
    scale = torch.where(diagonal > 0, diagonal.clamp_min(1e-300).rsqrt(), 0.0)
    left = problem.left * scale * scale[:, None]
    left.diagonal().fill_(1.0)
    factor, failed = torch.linalg.cholesky_ex(left)
    if bool(failed):
        raise CandidateError(
            f"{tensor}: the Gram matrices are singular; lower off_diagonal, or fit on more data"
        )
    right = problem.right * scale[:, None]
    return problem.start + torch.cholesky_solve(right, factor) * scale[:, None]


class RegMean(MergeMethod):
    """`regmean` as a plug-in; tensors without a Gram matrix are averaged."""

    name = "regmean"
    summary = "linear layers by least squares on their sources' own inputs; the rest averaged"
    formula = "W = (Σᵢ wᵢ·G̃ᵢ)⁻¹·Σᵢ wᵢ·G̃ᵢ·Wᵢ,  G̃ᵢ = a·Gᵢ + (1 − a)·diag(Gᵢ)"
    parameters = (WEIGHT, off_diagonal(0.9))
    needs_base = False
    artifact = "gram"

    def prepare(self, blocks: Blocks, coefficients: Coefficients, survey: Any) -> Tensor | None:
        """The merged layer, flat in float32; None for what is averaged."""
        if len(active(coefficients)) < 2 or not is_layer(coefficients):
            return None
        found = system(average(blocks, coefficients), blocks, coefficients)
        solved = regmean(found, tensor=coefficients.tensor)
        return by_inputs(solved, coefficients).float().flatten()

    def program(self, coefficients: Coefficients, prepared: Any) -> Program | None:
        return None if prepared is not None else _AVERAGE.program(_averaged(coefficients), None)

    def merge(self, block: Block, coefficients: Coefficients, prepared: Tensor | None) -> Tensor:
        if prepared is not None:
            return prepared[block.start : block.start + block.sources.shape[1]].clone()
        return _AVERAGE.merge(block, _averaged(coefficients), None)


def _averaged(coefficients: Coefficients) -> Coefficients:
    return with_parameters(coefficients, normalize=True)
