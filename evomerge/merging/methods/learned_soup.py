"""Learned soup: an average of whole models whose shares were learned on held-out data.

The learning is `evomerge.merging.fitted.learned_soup`; this only averages.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from evomerge.merging.kernels.program import Program
from evomerge.merging.methods.base import Block, Coefficients, MergeMethod, Parameter
from evomerge.merging.methods.linear import Linear

_LINEAR = Linear()


class LearnedSoup(MergeMethod):
    """The average with the learned shares αᵢ of each tensor, or part of the way to them.

        θ = Σᵢ ((1 − b)/s + b·αᵢ)·θᵢ

    Shares in float64, products and sums in float32. A tensor that the fit did not learn (no
    parameter of the live model) is averaged uniformly.

    Source: Wortsman et al. 2022, arXiv:2203.05482, appendix I. `blend` is ours.
    """

    name = "learned_soup"
    summary = "average whose shares, for each tensor, were learned on held-out data"
    formula = "θ = Σᵢ ((1 − b)/s + b·αᵢ)·θᵢ,  α learned, of sum 1"
    parameters = (
        Parameter(
            "blend",
            "recipe",
            "float",
            1.0,
            "how far to go from the uniform average (0) to the learned one (1)",
            low=0.0,
            high=1.0,
        ),
    )
    needs_base = False
    artifact = "learned_soup"

    def program(self, coefficients: Coefficients, prepared: Any) -> Program:
        return _LINEAR.program(_delegated(coefficients), None)

    def merge(self, block: Block, coefficients: Coefficients, prepared: Any) -> Tensor:
        return _LINEAR.merge(block, _delegated(coefficients), None)


def _delegated(coefficients: Coefficients) -> Coefficients:
    fitted, count = coefficients.fitted, len(coefficients.names)
    assert fitted is not None
    uniform = [1 / count] * count
    learned = uniform
    if coefficients.tensor in fitted:
        values = fitted.tensor(coefficients.tensor).tolist()
        by_name = dict(zip(fitted.facts["sources"], values, strict=True))
        learned = [by_name[name] for name in coefficients.names]
    blend = coefficients.number("blend")
    shares = tuple((1 - blend) * u + blend * a for u, a in zip(uniform, learned, strict=True))
    return replace(coefficients, source={"weight": shares}, recipe={"normalize": False})
