"""Random search: every genome uniform in the unit cube, the baseline of every other sampler.

Learns nothing, so nothing has to wait: knows no results at all.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from evomerge.sampling.base import UNLIMITED, Told
from evomerge.sampling.generations import GenerationalSampler
from evomerge.sampling.seeding import derived_seed
from evomerge.space.scales import snapped
from evomerge.spec import SamplerSpec
from evomerge.trial import Genome


class RandomSampler(GenerationalSampler):
    """Uniform draws, each a function of (seed, index) alone. `levels` [genes] as for CMA-ES.

    `population: auto` is one generation without end: no proposal waits for any result. A number
    is kept to, which only costs workers their time.
    """

    def __init__(self, spec: SamplerSpec, *, objectives: int, levels: Sequence[int]) -> None:
        population = UNLIMITED if spec.population == "auto" else spec.population
        super().__init__(genes=len(levels), objectives=objectives, population=population)
        self._seed = spec.seed
        self._levels = levels

    def _propose(self, index: int) -> Genome:
        generator = random.Random(derived_seed(self._seed, index))
        return tuple(snapped(generator.random(), levels) for levels in self._levels)

    def _learn(self, results: Sequence[Told]) -> None:
        pass
