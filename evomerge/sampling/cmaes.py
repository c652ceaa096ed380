"""CMA-ES, replayable: the state is a function of the recorded results, never of a pickle.

Drives the `cmaes` package (full covariance up to 100 genes, diagonal above). Knows nothing of
stores or of who evaluates.

Source: Hansen 2016, arXiv:1604.00772; diagonal: Ros and Hansen 2008. Where we differ: restarts
keep the population's size, and a generation without any ranking is not learned from.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
from cmaes import CMA, SepCMA

from evomerge.sampling.base import Told
from evomerge.sampling.generations import GenerationalSampler
from evomerge.sampling.seeding import derived_seed
from evomerge.spec import SamplerSpec
from evomerge.trial import Genome

FULL_COVARIANCE_GENES = 100
# a point outside the cube is drawn again this often, then clipped: with many genes hardly any point
# lies inside, and at 300 genes a hundred draws would cost 80 ms
_RESAMPLING = 10


class CmaEsSampler(GenerationalSampler):
    """CMA-ES in the unit cube from the mean `init`, step size `sigma0`.

    `population: auto` is 4 + floor(3 ln n) for n genes (Hansen 2016, eq. 48). Only the ranks of a
    generation enter; a failed candidate ranks below every candidate that has a value. Where all
    candidates of a generation are alike (equal values, or all failed) there are no ranks: the
    distribution stays as it is and the next generation draws from it anew. A search that can go
    no further (`should_stop`) starts again from a random mean.
    """

    def __init__(self, spec: SamplerSpec, *, init: Sequence[float], objectives: int) -> None:
        if objectives != 1:
            raise ValueError(f"CMA-ES has one objective only, got {objectives}")
        genes = len(init)
        auto = 4 + math.floor(3 * math.log(genes))
        population = auto if spec.population == "auto" else spec.population
        super().__init__(genes=genes, objectives=objectives, population=population)
        self._seed = spec.seed
        self._sigma0 = spec.sigma0
        self._optimiser = self._start(init)

    def _start(self, mean: Sequence[float]) -> CMA | SepCMA:
        algorithm = CMA if self._genes <= FULL_COVARIANCE_GENES else SepCMA
        # a population of 2 or 3 has one parent, and learning rates that divide by zero
        with np.errstate(divide="ignore"):
            return algorithm(
                mean=np.array(mean, dtype=np.float64),
                sigma=self._sigma0,
                bounds=np.tile([0.0, 1.0], (self._genes, 1)),
                n_max_resampling=_RESAMPLING,
                population_size=self._population,
                seed=0,  # never drawn from: each ask reseeds
            )

    def _propose(self, index: int) -> Genome:
        self._optimiser.reseed_rng(derived_seed(self._seed, index, bits=32))
        return tuple(self._optimiser.ask().tolist())

    def _learn(self, results: Sequence[Told]) -> None:
        losses = _losses(results)
        if len(set(losses)) == 1:
            return
        points = [np.array(result.genome) for result in results]
        self._optimiser.tell(list(zip(points, losses, strict=True)))
        if self._optimiser.should_stop():
            restart = derived_seed(self._seed, "restart", results[-1].index)
            generator = random.Random(restart)
            self._optimiser = self._start([generator.random() for _ in range(self._genes)])


def _losses(results: Sequence[Told]) -> list[float]:
    """Ranks [population] from 0, the best: equal values share a rank, failures have the last."""
    levels = sorted({r.values[0] for r in results if r.values is not None}, reverse=True)
    rank = {value: float(place) for place, value in enumerate(levels)}
    return [float(len(levels)) if r.values is None else rank[r.values[0]] for r in results]
