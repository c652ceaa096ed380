"""CMA-ES is the `cmaes` package's, told in whole generations of ranks."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from cmaes import CMA, SepCMA
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from evomerge.sampling import Sampler, Told, make_sampler
from evomerge.spec import SamplerSpec
from evomerge.testing.sampler_contract import go_on, sphere
from evomerge.trial import Genome


def cmaes(
    genes: int,
    *,
    init: float = 0.3,
    objectives: int = 1,
    levels: Sequence[int] = (),
    **spec: object,
) -> Sampler:
    return make_sampler(
        SamplerSpec.model_validate({"name": "cmaes", **spec}),
        genes=genes,
        init=[init] * genes,
        objectives=objectives,
        gene_names=[str(i) for i in range(genes)],
        levels=levels,
    )


def reference(
    genes: int, algorithm: type[CMA] | type[SepCMA], population: int | None = None
) -> CMA | SepCMA:
    return algorithm(
        population_size=population,
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
def test_a_generation_of_equals_widens_the_distribution_and_moves_nothing_else(value):
    sampler = cmaes(4, seed=2)
    go_on(sampler, range(3 * sampler.population), lambda _: value)
    untold = reference(4, CMA)
    untold._sigma = min(0.5, 0.1667 * math.exp(0.2 + untold._c_sigma / untold._d_sigma) ** 3)
    first = 3 * sampler.population
    assert sampler.ask(first) == pytest.approx(reference_ask(untold, 2, first), abs=1e-12)


def test_a_tiebreak_decides_between_equals_only():
    def told(values, tiebreaks):
        sampler = cmaes(4)
        for index, (value, tiebreak) in enumerate(zip(values, tiebreaks, strict=True)):
            sampler.tell(Told(index, sampler.ask(index), (value,), tiebreak=tiebreak))
        return sampler.ask(sampler.population)

    assert cmaes(4).population == 8
    halves = [1.0] * 3 + [0.0] * 5
    strict = [9.0, 8.0, 7.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    margins = [0.3, 0.2, -0.1, 8.0, 7.0, 6.0, 5.0, -3.0]
    assert told(halves, margins) == told(strict, [None] * 8)
    assert told(halves, [None] * 8) == told(halves, [0.5] * 8)
    assert told([1.0] * 8, strict) == told(strict, [None] * 8), "no tie is left that would widen"


def test_a_run_goes_on_while_its_margins_grow():
    """On one plateau for more generations than end a run whose values and margins stay the same."""

    def restarts(margin):
        sampler = cmaes(4)
        for index in range(60 * sampler.population):
            genome = sampler.ask(index)
            sampler.tell(Told(index, genome, (0.5,), tiebreak=margin(genome)))
            if sampler.search.ended:
                break
        return [run.reason for run in sampler.search.ended]

    assert "has not changed in 25 generations" in restarts(lambda genome: 1.0)[0]
    assert restarts(lambda genome: sphere(genome)[0]) == []


@pytest.mark.parametrize("schedule", ["generational", "pipelined", "asynchronous"])
@pytest.mark.parametrize(("genes", "levels"), [(5, 0), (5, 2), (120, 0)])
@pytest.mark.parametrize("value", [None, (0.5,)])
def test_500_equal_evaluations_end_nothing_and_are_spread_wide(schedule, genes, levels, value):
    sampler = cmaes(genes, schedule=schedule, levels=[levels] * genes)
    results = go_on(sampler, range(500), lambda _: value)
    assert len({result.genome for result in results}) == 500
    last = np.array([result.genome for result in results[-100:]])
    assert np.all(last.std(axis=0) > 0.2), "uniform has 0.29"


@pytest.mark.parametrize("schedule", ["generational", "pipelined", "asynchronous"])
def test_a_staircase_is_climbed_to_its_top(schedule):
    def staircase(genome: Genome) -> tuple[float, ...]:
        """Accuracy on 8 items: within 0.12 of the optimum in every gene of four to score 1."""
        distance = max(abs(gene - 0.9) for gene in genome)
        return (max(0.0, 8 - round(distance / 0.08)) / 8,)

    sampler = cmaes(4, schedule=schedule)
    assert _best(go_on(sampler, range(400), staircase)) == 1.0


@threadpool_limits.wrap(limits=1)
def test_pipelined_is_the_package_one_generation_behind_told_each_result_twice():
    sampler = cmaes(6, seed=9, schedule="pipelined")
    size = sampler.population
    optimiser = reference(6, CMA, 2 * size)
    waiting = [[reference_ask(optimiser, 9, i) for i in range(size)]]
    alive: list[np.ndarray] = []
    for generation in range(6):
        first = (generation + 1) * size
        waiting.append([reference_ask(optimiser, 9, i) for i in range(first, first + size)])
        alive += waiting.pop(0)
        for place, x in enumerate(alive[-size:]):
            index = generation * size + place
            assert sampler.ask(index) == pytest.approx(x, abs=1e-9)
            sampler.tell(Told(index, sampler.ask(index), sphere(sampler.ask(index))))
        if generation:
            told = [(shortened(optimiser, x) if generation > 1 else x) for x in alive]
            losses = [-sphere(tuple(x))[0] for x in alive]
            optimiser.tell(list(zip(told, losses, strict=True)))
            del alive[:size]


def shortened(optimiser: CMA | SepCMA, x: np.ndarray) -> np.ndarray:
    """Hansen 2011's clipping, by a Cholesky factor."""
    n = len(x)
    step = x - optimiser.mean
    c = optimiser._C if isinstance(optimiser, CMA) else np.diag(optimiser._C)
    u = np.linalg.solve(np.linalg.cholesky(c), step / optimiser._sigma)
    longest = np.sqrt(n) + 2 * n / (n + 2)
    return optimiser.mean + step * min(1.0, longest / np.linalg.norm(u))


@pytest.mark.parametrize(("genes", "algorithm"), [(7, CMA), (120, SepCMA)])
@threadpool_limits.wrap(limits=1)
def test_asynchronous_told_in_sequence_is_the_package_told_each_result_twice(genes, algorithm):
    sampler = cmaes(genes, seed=5, schedule="asynchronous")
    size = sampler.population
    optimiser = reference(genes, algorithm, 2 * size)
    alive: list[np.ndarray] = []
    for index in range(5 * size):
        x = reference_ask(optimiser, 5, index)
        assert sampler.ask(index) == pytest.approx(x, abs=1e-9)
        alive.append(x)
        sampler.tell(Told(index, sampler.ask(index), sphere(sampler.ask(index)), index))
        if len(alive) == 2 * size:
            fresh = 2 * size if index < 2 * size else size
            told = [shortened(optimiser, x) for x in alive[:-fresh]] + alive[-fresh:]
            losses = [-sphere(tuple(x))[0] for x in alive]
            optimiser.tell(list(zip(told, losses, strict=True)))
            del alive[:size]


@settings(deadline=None, max_examples=25)
@given(
    curve=st.sampled_from([math.exp, math.cbrt, lambda v: v**3, lambda v: 1e9 * v - 7]),
    schedule=st.sampled_from(["generational", "pipelined", "asynchronous"]),
    seed=st.integers(0, 9),
)
def test_only_the_order_of_values_matters(curve, schedule, seed):
    def bent(genome: Genome) -> tuple[float, ...]:
        return (curve(sphere(genome)[0]),)

    straight = go_on(cmaes(4, schedule=schedule, seed=seed), range(60), sphere)
    curved = go_on(cmaes(4, schedule=schedule, seed=seed), range(60), bent)
    assert [r.genome for r in straight] == [r.genome for r in curved]


@pytest.mark.parametrize("levels", [0, 4])
def test_what_was_asked_for_before_a_restart_is_left_out_of_the_next_run(levels):
    def ended() -> Sampler:
        sampler = cmaes(2, schedule="asynchronous", levels=[levels] * 2)
        while not sampler.search.ended:
            index = sampler._told
            sampler.tell(Told(index, sampler.ask(index), (0.5,), index))
        return sampler

    sampler, other = ended(), ended()
    told, before = sampler._told, sampler.ask(10**6)
    for index in range(1000, 1000 + 3 * sampler.population):
        sampler.tell(Told(index, (0.9, 0.9), (1.0,), told - 1))
    assert sampler.ask(10**6) == before
    assert "has not changed in" in sampler.search.ended[0].reason
    for index in range(1000, 1000 + 2 * other.population):
        other.tell(Told(index, (0.9, 0.9 - index / 1e5), (float(index),), told))
    assert other.ask(10**6) != before


@pytest.mark.parametrize("schedule", ["generational", "pipelined", "asynchronous"])
def test_a_restart_doubles_the_population_under_every_schedule(schedule):
    sampler = cmaes(2, schedule=schedule)
    results = go_on(sampler, range(1500), sphere)
    runs = sampler.search.ended
    assert runs
    assert [run.population for run in runs] == [6 * 2**i for i in range(len(runs))]
    assert sampler.population == 6 * 2 ** len(runs)
    told = itertools.accumulate(run.results for run in runs)
    assert [(r.number, r.population_before, r.population_after) for r in sampler.restarts] == [
        (number, 6 * 2 ** (number - 1), 6 * 2**number) for number in range(1, len(runs) + 1)
    ]
    assert [r.reason for r in sampler.restarts] == [run.reason for run in runs]
    if schedule == "generational":  # where every result belongs to the run under way
        assert [r.trials for r in sampler.restarts] == list(told)
    again = cmaes(2, schedule=schedule)
    for result in results[:1400]:
        again.tell(result)
    assert go_on(again, range(1400, 1500), sphere) == results[1400:]
    assert again.restarts == sampler.restarts


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
