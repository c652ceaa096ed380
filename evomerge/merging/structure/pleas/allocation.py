"""Which units stay apart within a budget, by one of the ways that a recipe or a fit may ask for.

Knows what a fit has found groups to be worth; computes neither costs nor worth.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evomerge.errors import MergeError
from evomerge.merging.structure.partial.budget import Costs, proxy_weights, scaled, solve, uniform


def units_apart(
    costs: Costs,
    budget: float,
    allocation: str,
    *,
    worth: Mapping[str, Any] | None,
    shares: Mapping[str, float] | None = None,
) -> dict[str, int]:
    """How many units of each group stay apart: by the published `programme`, `uniform`, or in
    proportion to given `shares`.

    Raises MergeError for a budget out of range, and for the programme without `worth`.
    """
    if allocation == "uniform":
        return uniform(costs, budget)
    if allocation == "shares":
        assert shares is not None  # a fit has no such choice
        return scaled(costs, budget, shares)
    if worth is None:
        raise MergeError("allocation: programme needs what groups are worth, and the artifact was"
                         " fitted without `worth`; take `uniform`, or fit with it")  # fmt: skip
    weights = proxy_weights(
        worth["merged_except"], worth["separate_except"], worth["merged"], worth["separate"], budget
    )
    return solve(costs, budget, weights)
