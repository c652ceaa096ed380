"""Every sampler keeps the contract."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import pytest

from evomerge.sampling import Sampler, make_sampler
from evomerge.spec import SamplerSpec
from evomerge.testing.sampler_contract import AsynchronousSamplerContract, SamplerContract


class Made:
    """Makes a shipped sampler from a spec."""

    spec: ClassVar[dict[str, Any]]
    levels: ClassVar[int] = 0
    objectives: int = 1

    def make(self, *, genes: int = 3, seed: int = 0) -> Sampler:
        return make_sampler(
            SamplerSpec.model_validate({**self.spec, "seed": seed}),
            genes=genes,
            init=[0.3] * genes,
            objectives=self.objectives,
            gene_names=[f"weight[{i}]" for i in range(genes)],
            levels=[self.levels if i % 2 == 0 else 0 for i in range(genes)],
        )


class Shipped(Made, SamplerContract):
    pass


class TestCmaEs(Shipped):
    spec: ClassVar = {"name": "cmaes"}
    trials = 40


class TestCmaEsSmallestPopulation(Shipped):
    spec: ClassVar = {"name": "cmaes", "population": 2}
    trials = 12


class TestCmaEsPipelined(Shipped):
    spec: ClassVar = {"name": "cmaes", "schedule": "pipelined"}
    trials = 40


class TestCmaEsAsynchronous(Made, AsynchronousSamplerContract):
    spec: ClassVar = {"name": "cmaes", "schedule": "asynchronous"}
    trials = 40


class TestCmaEsDiscrete(Shipped):
    spec: ClassVar = {"name": "cmaes"}
    levels = 3
    trials = 40


class TestCmaEsDiscreteAsynchronous(Made, AsynchronousSamplerContract):
    spec: ClassVar = {"name": "cmaes", "schedule": "asynchronous"}
    levels = 3
    trials = 40


class TestRandom(Shipped):
    spec: ClassVar = {"name": "random"}
    learns = False


class TestRandomInBatches(Shipped):
    spec: ClassVar = {"name": "random", "population": 5}
    learns = False


class TestRandomTwoObjectives(Shipped):
    spec: ClassVar = {"name": "random"}
    learns = False
    objectives = 2


class TestRandomDiscrete(Shipped):
    spec: ClassVar = {"name": "random"}
    levels = 3
    learns = False


class TestTpe(Shipped):
    spec: ClassVar = {"name": "tpe"}


class TestTpeDiscrete(Shipped):
    spec: ClassVar = {"name": "tpe"}
    levels = 3


class TestTpeTwoObjectives(Shipped):
    spec: ClassVar = {"name": "tpe"}
    objectives = 2


class TestNsga2(Shipped):
    spec: ClassVar = {"name": "nsga2", "population": 6}


class TestNsga2Discrete(Shipped):
    spec: ClassVar = {"name": "nsga2", "population": 6}
    levels = 3


class TestNsga2TwoObjectives(Shipped):
    spec: ClassVar = {"name": "nsga2", "population": 6}
    objectives = 2


@pytest.mark.slow
class TestGp(Shipped):
    spec: ClassVar = {"name": "gp"}
    trials = 18

    def resume_points(self) -> Iterable[int]:
        # its model is first fitted after 12 results, and costs a tenth of a second each time
        return (0, 11, 12, 13, 15, 17)


@pytest.mark.slow
class TestGpDiscrete(TestGp):
    levels = 3
    trials = 16

    def resume_points(self) -> Iterable[int]:
        return (11, 13)
