"""With how many points and how wide CMA-ES starts again once a run of it has ended.

Knows nothing of distributions.

Source: IPOP: Auger and Hansen 2005; BIPOP: Hansen 2009.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Policy = Literal["ipop", "bipop", "same"]


@dataclass(frozen=True)
class Run:
    """One run of CMA-ES between restarts: `results` were learned from when it ended, and why."""

    population: int
    sigma0: float
    small: bool = False
    results: int = 0
    reason: str = ""


def next_run(policy: Policy, ended: Sequence[Run], generator: random.Random) -> Run:
    """The run that follows `ended`, of which there is at least one.

    ipop    λ doubles
    bipop   the larger of two: λ doubles, or, where small runs have taken less so far,
            λ = λ₀(λ_large / 2λ₀)^(U²) and σ = σ₀·10^(-2U'), U and U' uniform
    same    λ₀ and σ₀ again
    """
    first, restarts = ended[0], ended[1:]
    if policy == "same":
        return Run(first.population, first.sigma0)
    large = first.population * 2 ** sum(not run.small for run in ended)
    spent = [sum(run.results for run in restarts if run.small == small) for small in (False, True)]
    if policy == "ipop" or spent[1] >= spent[0]:
        return Run(large, first.sigma0)
    last_large = large // 2
    growth = (last_large / (2 * first.population)) ** (generator.random() ** 2)
    population = max(2, int(first.population * growth))
    return Run(population, first.sigma0 * 10 ** (-2 * generator.random()), small=True)
