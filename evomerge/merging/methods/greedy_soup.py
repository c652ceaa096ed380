"""Greedy soup: the plain average of the models that a fit picked.

The picking is `evomerge.merging.fitted.greedy_soup`; this only averages.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evomerge.merging.kernels.program import Program, weighted
from evomerge.merging.methods.base import Block, Coefficients, MergeMethod
from evomerge.merging.methods.combination import weighted_sum


class GreedySoup(MergeMethod):
    """The average of the ingredients, computed from scratch in float32.

    Source: Wortsman et al. 2022, arXiv:2203.05482. The authors' code averages one ingredient at a
    time into the soup before, which drifts by a rounding for each.
    """

    name = "greedy_soup"
    summary = "average of the models that raise held-out accuracy when added in order of merit"
    formula = "θ = Σ_{i∈S} θᵢ / |S|,  S grown greedily"
    parameters = ()
    needs_base = False
    artifact = "greedy_soup"

    def program(self, coefficients: Coefficients, prepared: Any) -> Program:
        return weighted(_shares(coefficients), "zero")

    def merge(self, block: Block, coefficients: Coefficients, prepared: Any) -> Tensor:
        merged = weighted_sum(block.sources, _shares(coefficients))
        return torch.zeros_like(block.sources[0]) if merged is None else merged


def _shares(coefficients: Coefficients) -> list[float]:
    assert coefficients.fitted is not None
    ingredients = coefficients.fitted.facts["ingredients"]
    return [(name in ingredients) / len(ingredients) for name in coefficients.names]
