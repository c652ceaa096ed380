"""Hand a tensor on to a simpler method, with parameters that this one sets.

Knows no method.
"""

from __future__ import annotations

from dataclasses import replace

from evomerge.merging.methods.base import Coefficients
from evomerge.merging.values import Scalar


def with_parameters(coefficients: Coefficients, **shared: Scalar) -> Coefficients:
    """The same coefficients with parameters of recipe scope set."""
    return replace(coefficients, recipe={**coefficients.recipe, **shared})
