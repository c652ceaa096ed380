"""How a search starts again, by the papers' formulas."""

from __future__ import annotations

import itertools
import random

from evomerge.sampling.restarts import Run, next_run

FIRST = Run(10, 0.2, results=500)


def series(policy: str, count: int, results: int = 500, seed: int = 0) -> list[Run]:
    runs, generator = [FIRST], random.Random(seed)
    for _ in range(count):
        run = next_run(policy, runs, generator)
        runs.append(Run(run.population, run.sigma0, run.small, results * run.population // 10))
    return runs


def test_ipop_doubles():
    assert [run.population for run in series("ipop", 4)] == [10, 20, 40, 80, 160]
    assert {run.sigma0 for run in series("ipop", 4)} == {0.2}


def test_the_same_again():
    assert [(run.population, run.sigma0) for run in series("same", 2)] == [(10, 0.2)] * 3


def test_bipop_gives_small_runs_as_much_as_large_ones():
    runs = series("bipop", 40)
    large = [run for run in runs[1:] if not run.small]
    small = [run for run in runs if run.small]
    assert [run.population for run in large] == [20 * 2**i for i in range(len(large))]
    spent = 0
    for before, run in itertools.pairwise(runs[1:]):
        spent += before.results * (-1 if before.small else 1)
        assert run.small == (spent > 0)
    assert small


def test_bipops_small_runs_lie_between_the_first_and_half_the_last_large_one():
    small = [run for seed in range(200) for run in series("bipop", 12, seed=seed) if run.small]
    assert all(run.population >= 2 for run in small)
    assert {run.population < 12 for run in small} == {True, False}
    assert min(run.sigma0 for run in small) < 0.2 * 10**-1.8
    assert max(run.sigma0 for run in small) > 0.2 * 10**-0.2
