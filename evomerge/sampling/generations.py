"""Schedules by generations: proposals of one generation all come from one state, and results are
taken in by whole generations, in the order of their index.

So a search depends on the results alone: on neither what was asked, nor in which order, nor by how
many workers. With `ahead` 0 (generational) generation g comes from the state that has learned every
generation before it; with 1 (pipelined) from the one that has not learned generation g - 1 yet, so
that workers go on while a generation's last results are awaited. Knows no algorithm; subclasses
propose and learn.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

from evomerge.sampling.base import Told
from evomerge.sampling.guard import GuardedSampler
from evomerge.trial import Genome


@dataclass(frozen=True)
class _Generation:
    """Genomes `first` to `end` - 1, proposed when `asked_at` results were told."""

    first: int
    end: int
    asked_at: int


class GenerationalSampler(GuardedSampler, ABC):
    """A sampler that learns a generation at a time, with one open, or `ahead` more."""

    ordered = True

    def __init__(self, *, genes: int, objectives: int, population: int, ahead: int = 0) -> None:
        super().__init__(genes=genes, objectives=objectives, population=population)
        self._told_generations = 0
        self._results: list[Told] = []
        firsts = [generation * population for generation in range(ahead + 1)]
        self._open = [_Generation(first, first + population, 0) for first in firsts]
        self._drawn_before: dict[int, Genome] = {}  # from states that are no more

    @property
    def horizon(self) -> int:
        """The end of the last open generation."""
        return self._open[-1].end

    def ask(self, index: int) -> Genome:
        """Genome [genes] number `index`, each gene in [0, 1].

        Raises ValueError unless `index` lies in a generation that is open.
        """
        first = self._open[0].first
        if not first <= index < self.horizon:
            raise ValueError(
                f"genome {index} cannot be asked for now: {first + len(self._results)} results "
                f"are told, so the open generation is {first} to {self.horizon - 1}"
            )
        if index in self._drawn_before:
            return self._drawn_before[index]
        with self._threads.limit(limits=1):
            return self._propose(index)

    def tell(self, result: Told) -> None:
        """Take in the next result. Raises ValueError for a wrong index, shape or value."""
        expected = self._open[0].first + len(self._results)
        if result.index != expected:
            raise ValueError(f"result {result.index} told, but result {expected} is next")
        self._check(result)
        self._results.append(replace(result, asked_at=self._open[0].asked_at))
        self._drawn_before.pop(result.index, None)
        if expected + 1 == self._open[0].end:
            with self._threads.limit(limits=1):
                self._close()

    def _close(self) -> None:
        told = self._open.pop(0)
        for index in range(self._open[-1].first, self.horizon) if self._open else ():
            self._drawn_before[index] = self._propose(index)
        self._learn(self._results)
        self._results = []
        self._told_generations += 1
        first = self._open[-1].end if self._open else told.end
        self._open.append(_Generation(first, first + self._population, told.end))

    @abstractmethod
    def _propose(self, index: int) -> Genome:
        """Genome `index` from the state as it is, whatever else was asked."""

    @abstractmethod
    def _learn(self, results: Sequence[Told]) -> None:
        """Take in one whole generation [population], in the order of its indices.

        May change `_population`, for generations that are not open yet.
        """
