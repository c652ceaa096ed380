"""The generational barrier that every sampler shares, and what is refused at its door.

Proposals of one generation all come from one state; results are taken in by whole generations.
So the state after n whole generations depends on the results alone: on neither what was asked, nor
in which order, nor by how many workers. Knows no algorithm; subclasses propose and learn.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

from threadpoolctl import ThreadpoolController

from evomerge.sampling.base import Told
from evomerge.trial import Genome


class GenerationalSampler(ABC):
    """A sampler that learns a generation at a time."""

    def __init__(self, *, genes: int, objectives: int, population: int) -> None:
        self._genes = genes
        self._objectives = objectives
        self._population = population
        self._told_generations = 0
        self._results: list[Told] = []
        # several BLAS threads sum in another order and change the last bits of a state
        self._threads = ThreadpoolController()

    @property
    def population(self) -> int:
        """How many genomes are proposed from one state: the size of a generation."""
        return self._population

    def ask(self, index: int) -> Genome:
        """Genome [genes] number `index`, each gene in [0, 1].

        Raises ValueError unless `index` lies in the first generation that is not wholly told.
        """
        if index < 0 or index // self._population != self._told_generations:
            first = self._told_generations * self._population
            raise ValueError(
                f"genome {index} cannot be asked for now: {first + len(self._results)} results "
                f"are told, so the open generation is {first} to {first + self._population - 1}"
            )
        with self._threads.limit(limits=1):
            return self._propose(index)

    def tell(self, result: Told) -> None:
        """Take in the next result. Raises ValueError for a wrong index, shape or value."""
        expected = self._told_generations * self._population + len(self._results)
        if result.index != expected:
            raise ValueError(f"result {result.index} told, but result {expected} is next")
        self._check(result)
        self._results.append(result)
        if len(self._results) == self._population:
            with self._threads.limit(limits=1):
                self._learn(self._results)
            self._results = []
            self._told_generations += 1

    def _check(self, result: Told) -> None:
        where = f"result {result.index}"
        if len(result.genome) != self._genes or not all(0 <= g <= 1 for g in result.genome):
            raise ValueError(f"{where}: expected {self._genes} genes in [0, 1]")
        if result.values is None:
            return
        if len(result.values) != self._objectives or not all(map(math.isfinite, result.values)):
            raise ValueError(
                f"{where}: expected {self._objectives} finite values, got {result.values}; "
                "a failed candidate is told as None"
            )

    @abstractmethod
    def _propose(self, index: int) -> Genome:
        """Genome `index` of the open generation, whatever else was asked."""

    @abstractmethod
    def _learn(self, results: Sequence[Told]) -> None:
        """Take in one whole generation [population], in the order of its indices."""
