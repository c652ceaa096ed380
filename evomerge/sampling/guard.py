"""What every sampler refuses at its door, and the one BLAS thread that it works on.

Knows no schedule and no algorithm.
"""

from __future__ import annotations

import math

from threadpoolctl import ThreadpoolController

from evomerge.sampling.base import Restart, Told


class GuardedSampler:
    """A sampler of `genes` genes and `objectives` objectives."""

    def __init__(self, *, genes: int, objectives: int, population: int) -> None:
        self._genes = genes
        self._objectives = objectives
        self._population = population
        # several BLAS threads sum in another order and change the last bits of a state
        self._threads = ThreadpoolController()

    @property
    def population(self) -> int:
        """How many new results an update waits for."""
        return self._population

    @property
    def restarts(self) -> tuple[Restart, ...]:
        """None, but for a sampler that says otherwise."""
        return ()

    def _check(self, result: Told) -> None:
        where = f"result {result.index}"
        if len(result.genome) != self._genes or not all(0 <= g <= 1 for g in result.genome):
            raise ValueError(f"{where}: expected {self._genes} genes in [0, 1]")
        if result.tiebreak is not None and not math.isfinite(result.tiebreak):
            raise ValueError(f"{where}: expected a finite tiebreak, got {result.tiebreak}")
        if result.values is None:
            return
        if len(result.values) != self._objectives or not all(map(math.isfinite, result.values)):
            raise ValueError(
                f"{where}: expected {self._objectives} finite values, got {result.values}; "
                "a failed candidate is told as None"
            )
