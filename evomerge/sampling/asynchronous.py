"""The asynchronous schedule: asked at any time, told in any order, nothing waits and nothing is
left out.

Finished results gather in a pool; whenever it holds a population's worth it is learned from,
whichever states its genomes came from. The state is a function of the results in their order of
tells, with the number of results each was asked at; asks leave no trace. Knows no algorithm.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from evomerge.sampling.base import UNLIMITED, Told
from evomerge.sampling.guard import GuardedSampler
from evomerge.trial import Genome


class AsynchronousSampler(GuardedSampler, ABC):
    """A sampler that learns from any `population` results as soon as they are there."""

    ordered = False

    def __init__(self, *, genes: int, objectives: int, population: int) -> None:
        super().__init__(genes=genes, objectives=objectives, population=population)
        self._pool: list[Told] = []
        self._told = 0
        self._below = 0  # every index below it is told
        self._beyond: set[int] = set()  # told, though an index before it is not

    @property
    def horizon(self) -> int:
        """Without end."""
        return UNLIMITED

    def ask(self, index: int) -> Genome:
        """Genome [genes] number `index`, each gene in [0, 1], from the state as it is.

        Raises ValueError for a negative index and for one that is told.
        """
        if index < 0 or self._is_told(index):
            raise ValueError(
                f"genome {index} cannot be asked for now: "
                f"{'its result is told' if index >= 0 else 'indices count from 0'}"
            )
        with self._threads.limit(limits=1):
            return self._propose(index)

    def tell(self, result: Told) -> None:
        """Take in a result. Raises ValueError for an index told before, a wrong shape or value."""
        if result.index < 0 or self._is_told(result.index):
            raise ValueError(f"result {result.index} told, but it was told before")
        if result.asked_at is not None and not 0 <= result.asked_at <= self._told:
            raise ValueError(
                f"result {result.index}: asked for after {result.asked_at} results, "
                f"but {self._told} are told"
            )
        self._check(result)
        self._remember(result.index)
        if self._accepts(result):
            self._pool.append(result)
        if len(self._pool) >= self._population:
            with self._threads.limit(limits=1):
                self._learn(self._pool, self._told)
            self._pool = []

    def _is_told(self, index: int) -> bool:
        return index < self._below or index in self._beyond

    def _remember(self, index: int) -> None:
        self._told += 1
        self._beyond.add(index)
        while self._below in self._beyond:
            self._beyond.remove(self._below)
            self._below += 1

    @abstractmethod
    def _propose(self, index: int) -> Genome:
        """Genome `index` from the state as it is, whatever else was asked."""

    @abstractmethod
    def _accepts(self, result: Told) -> bool:
        """Whether a result has something to say to the state as it is."""

    @abstractmethod
    def _learn(self, results: Sequence[Told], told: int) -> None:
        """Take in a pool [population], in the order of tells, the last of which was number `told`.

        May change `_population`.
        """
