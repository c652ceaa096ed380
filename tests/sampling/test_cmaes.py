"""CMA-ES is the `cmaes` package's, told in whole generations of ranks."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from cmaes import CMA, SepCMA
from threadpoolctl import threadpool_limits

from evomerge.sampling import Sampler, Told, make_sampler
from evomerge.spec import SamplerSpec
from evomerge.testing.sampler_contract import go_on, sphere
from evomerge.trial import Genome


def cmaes(genes: int, *, init: float = 0.3, objectives: int = 1, **spec: object) -> Sampler:
    return make_sampler(
        SamplerSpec.model_validate({"name": "cmaes", **spec}),
        genes=genes,
        init=[init] * genes,
        objectives=objectives,
        gene_names=[str(i) for i in range(genes)],
    )


def reference(genes: int, algorithm: type[CMA] | type[SepCMA]) -> CMA | SepCMA:
    return algorithm(
        mean=np.full(genes, 0.3),
        sigma=0.1667,
        bounds=np.array([[0.0, 1.0]] * genes),
        n_max_resampling=10,
    )


def reference_ask(optimiser: CMA | SepCMA, seed: int, index: int) -> np.ndarray:
    digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
    optimiser.reseed_rng(int.from_bytes(digest[:4], "big"))
    return optimiser.ask()


@pytest.mark.parametrize(("genes", "algorithm"), [(7, CMA), (100, CMA), (101, SepCMA)])
@threadpool_limits.wrap(limits=1)
def test_it_is_the_package_driven_by_hand(genes, algorithm):
    sampler, optimiser = cmaes(genes, seed=5), reference(genes, algorithm)
    assert sampler.population == optimiser.population_size
    for generation in range(4):
        solutions = []
        for index in range(generation * sampler.population, (generation + 1) * sampler.population):
            x = reference_ask(optimiser, 5, index)
            assert sampler.ask(index) == tuple(x)
            solutions.append((x, -sphere(tuple(x))[0]))
            sampler.tell(Told(index, tuple(x.tolist()), (-solutions[-1][1],)))
        optimiser.tell(solutions)


def test_a_failure_ranks_as_a_value_below_all_others_does():
    def with_failures(replacement):
        return lambda genome: replacement if genome[0] > 0.3 else sphere(genome)

    lost = go_on(cmaes(4), range(40), with_failures(None))
    low = go_on(cmaes(4), range(40), with_failures((-1e300,)))
    assert [r.genome for r in lost] == [r.genome for r in low]
    assert sum(r.values is None for r in lost) > 3


@pytest.mark.parametrize("value", [None, (0.25,)])
def test_a_generation_of_equals_leaves_the_distribution_as_it_was(value):
    sampler = cmaes(4, seed=2)
    go_on(sampler, range(3 * sampler.population), lambda _: value)
    untold = reference(4, CMA)
    first = 3 * sampler.population
    assert sampler.ask(first) == tuple(reference_ask(untold, 2, first))


def test_a_converged_search_starts_again_elsewhere():
    distances = [-result.values[0] for result in go_on(cmaes(2), range(3000), sphere)]
    converged = next(index for index, distance in enumerate(distances) if distance < 1e-18)
    assert max(distances[converged:]) > 0.01, "nothing but the optimum is looked at any more"


def test_several_objectives_are_refused():
    with pytest.raises(ValueError, match="one objective"):
        cmaes(3, objectives=2)


def _best(results: list[Told]) -> float:
    return max(result.values[0] for result in results if result.values is not None)


def test_infeasible_half_spaces_are_left():
    def half(genome: Genome) -> tuple[float, ...] | None:
        return None if genome[0] > 0.5 else sphere(genome)

    results = go_on(cmaes(5), range(200), half)
    assert _best(results) > -0.02
