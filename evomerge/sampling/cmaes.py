"""CMA-ES, replayable: the state is a function of the recorded results, never of a pickle.

A search is a series of runs of one distribution; a run that stagnates is followed by another from
a random mean. Knows nothing of stores or of who evaluates.

Source: Hansen 2016, arXiv:1604.00772. Where we differ: only ranks enter, a generation without any
ranking widens the distribution and is not learned from, and under the schedules whose results are
stale anyway a result lives for κ = 2 updates, after the (μ, κ, λ) selection of Schwefel and Rudolph
1995, Contemporary evolution strategies, where only the parents live on.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from evomerge.sampling.asynchronous import AsynchronousSampler
from evomerge.sampling.base import Restart, Sampler, Told
from evomerge.sampling.distribution import Distribution, Vector
from evomerge.sampling.generations import GenerationalSampler
from evomerge.sampling.restarts import Run, next_run
from evomerge.sampling.seeding import derived_seed
from evomerge.sampling.warm_start import promising_distribution
from evomerge.spec import SamplerSpec
from evomerge.trial import Genome

_TOLERANCE = 1e-12  # of values; the package's tolfun
# κ, in updates; measured in benchmarks/async_search.py. `generational` is the textbook's algorithm
_LIFETIMES = {"generational": 1, "pipelined": 2, "asynchronous": 2}

_Merit = tuple[float, float]  # the value, and what decides between equal ones


def cmaes_sampler(
    spec: SamplerSpec,
    *,
    init: Sequence[float],
    objectives: int,
    levels: Sequence[int] = (),
    promising: Sequence[Genome] = (),
    init_first: bool = False,
) -> Sampler:
    """CMA-ES under the schedule of `spec`; see `CmaEs`. Raises ValueError for two objectives."""
    if objectives != 1:
        raise ValueError(f"CMA-ES has one objective only, got {objectives}")
    search = CmaEs(spec, init, levels, promising, init_first=init_first)
    if spec.schedule == "asynchronous":
        return AsynchronousCmaEs(search, genes=len(init))
    return GenerationalCmaEs(search, genes=len(init), ahead=int(spec.schedule == "pipelined"))


class CmaEs:
    """CMA-ES in the unit cube from the mean `init`, step size `sigma0`, or from `promising` genomes
    of an earlier study. With `init_first` genome 0 is `init`, a step of length 0.

    `population: auto` is 4 + floor(3 ln n) for n genes (Hansen 2016, eq. 48). Each λ results are
    learned from together with the κλ - λ before them, as one population of κλ; κ is 1 under the
    generational schedule, else 2, and a run's first κλ results are one update. A failed candidate
    ranks below every candidate that has a value; of equal values the higher tiebreak wins. Where
    the best 70% are alike the distribution widens, where all are alike nothing else happens. A run
    ends, with a reason in `ended`, when its steps are too small or too skewed to go on, or when
    the best of a generation, its tiebreak included, has stayed the same for 10 + ⌈30n/λ⌉
    generations; the next one starts from a random mean. Results that were asked for in a run that
    has ended since say nothing about the next one and are left out of it.
    """

    def __init__(
        self,
        spec: SamplerSpec,
        init: Sequence[float],
        levels: Sequence[int],
        promising: Sequence[Genome],
        *,
        init_first: bool = False,
    ) -> None:
        auto = 4 + math.floor(3 * math.log(len(init)))
        population = auto if spec.population == "auto" else spec.population
        self._spec = spec
        self._genes = len(init)
        self._levels = levels
        self._first = tuple(init) if init_first else None
        self._lifetime = _LIFETIMES[spec.schedule]
        self._alive: list[Told] = []  # of the run under way, in the order of tells
        self.ended: list[Run] = []
        self.restarts: list[Restart] = []
        self._began_at = self._changed_at = 0  # in numbers of results told
        self._run = Run(population, spec.sigma0)
        self._best = self._no_values()
        self._distribution = (
            self._around(*promising_distribution(promising))
            if promising
            else self._around(init, spec.sigma0)
        )

    @property
    def population(self) -> int:
        """λ of the run under way."""
        return self._run.population

    @property
    def learned(self) -> int:
        """How many results were learned from, in every run."""
        return sum(run.results for run in [*self.ended, self._run])

    def propose(self, index: int) -> Genome:
        """Genome `index`, drawn from the distribution as it is, but for a first one given."""
        if index == 0 and self._first is not None:
            return self._first
        return self._distribution.ask(derived_seed(self._spec.seed, index, bits=32))

    def accepts(self, result: Told) -> bool:
        """Whether a result belongs to the run under way."""
        return result.asked_at is None or result.asked_at >= self._began_at

    def learn(self, results: Sequence[Told], told: int) -> None:
        """Take in results [population] of the run under way; `told` counts all so far."""
        self._alive += results
        self._best.append(max(map(_merit, results)))
        if len(self._alive) < self._lifetime * self.population:
            return
        self._update(told)
        reason = self._distribution.exhausted() or self._stagnation()
        if reason is not None:
            self._restart(reason, told)

    def _update(self, told: int) -> None:
        """Learn from the results alive [κ·population], and let the oldest go."""
        ranks = _ranks(self._alive)
        ordered = sorted(ranks)
        if ordered[0] == ordered[math.ceil(0.7 * len(ordered)) - 1]:
            self._distribution.widen()
        if ordered[0] != ordered[-1]:
            genomes = [result.genome for result in self._alive]
            self._distribution.tell(genomes, ranks, [self._is_stale(r) for r in self._alive])
        self._changed_at = told
        learned = self._run.results + self.population
        self._run = replace(self._run, results=max(learned, len(self._alive)))
        del self._alive[: self.population]

    def _is_stale(self, result: Told) -> bool:
        return result.asked_at is None or result.asked_at < self._changed_at

    def _stagnation(self) -> str | None:
        window = self._best.maxlen
        if len(self._best) != window or not all(map(_is_flat, zip(*self._best, strict=True))):
            return None
        return f"the best of a generation has not changed in {window} generations"

    def _restart(self, reason: str, told: int) -> None:
        self.ended.append(replace(self._run, reason=reason))
        generator = random.Random(derived_seed(self._spec.seed, "restart", told - 1))
        mean = [generator.random() for _ in range(self._genes)]
        before, self._run = self._run, next_run(self._spec.restarts, self.ended, generator)
        self.restarts.append(
            Restart(len(self.ended), told, before.population, self._run.population, reason)
        )
        self._best, self._alive = self._no_values(), []
        self._distribution = self._around(mean, self._run.sigma0)
        self._began_at = told

    def _around(
        self, mean: Sequence[float], sigma: float, cov: Vector | None = None
    ) -> Distribution:
        size = self._lifetime * self.population
        return Distribution(mean, sigma=sigma, population=size, levels=self._levels, cov=cov)

    def _no_values(self) -> deque[_Merit]:
        """Room for the best of each generation, as far back as stagnation is looked for."""
        return deque(maxlen=10 + math.ceil(30 * self._genes / self.population))


class GenerationalCmaEs(GenerationalSampler):
    """CMA-ES by whole generations."""

    def __init__(self, search: CmaEs, *, genes: int, ahead: int) -> None:
        super().__init__(genes=genes, objectives=1, population=search.population, ahead=ahead)
        self.search = search

    @property
    def restarts(self) -> tuple[Restart, ...]:
        """Every restart so far, with why the run before it ended."""
        return tuple(self.search.restarts)

    def _propose(self, index: int) -> Genome:
        return self.search.propose(index)

    def _learn(self, results: Sequence[Told]) -> None:
        # a generation comes from one state, so it is of one run
        if self.search.accepts(results[0]):
            self.search.learn(results, results[-1].index + 1)
        self._population = self.search.population


class AsynchronousCmaEs(AsynchronousSampler):
    """CMA-ES from whatever is finished."""

    def __init__(self, search: CmaEs, *, genes: int) -> None:
        super().__init__(genes=genes, objectives=1, population=search.population)
        self.search = search

    @property
    def restarts(self) -> tuple[Restart, ...]:
        """Every restart so far, with why the run before it ended."""
        return tuple(self.search.restarts)

    def _propose(self, index: int) -> Genome:
        return self.search.propose(index)

    def _accepts(self, result: Told) -> bool:
        return self.search.accepts(result)

    def _learn(self, results: Sequence[Told], told: int) -> None:
        self.search.learn(results, told)
        self._population = self.search.population


def _ranks(results: Sequence[Told]) -> list[float]:
    """Ranks [population] from 0, the best: equals share a rank, failures have the last."""
    merits = list(map(_merit, results))
    levels = sorted(set(merits), reverse=True)
    rank = {merit: float(place) for place, merit in enumerate(levels)}
    return [rank[merit] for merit in merits]


def _merit(result: Told) -> _Merit:
    if result.values is None:
        return -math.inf, -math.inf
    return result.values[0], -math.inf if result.tiebreak is None else result.tiebreak


def _is_flat(values: Sequence[float]) -> bool:
    return min(values) == max(values) or max(values) <= min(values) + _TOLERANCE
