"""The distribution is the `cmaes` package's: what it stops for, its margin, its warm start."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
from cmaes import CMA, CMAwM, get_warm_start_mgd
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.sampling import make_sampler
from evomerge.sampling.distribution import Distribution
from evomerge.sampling.warm_start import best_tenth, promising_distribution
from evomerge.space.scales import level_of
from evomerge.spec import SamplerSpec
from evomerge.testing.sampler_contract import go_on, sphere
from evomerge.trial import Genome


def tell_sphere(distribution: Distribution, generation: int, population: int) -> None:
    genomes = [distribution.ask(generation * population + i) for i in range(population)]
    losses = [-sphere(genome)[0] for genome in genomes]
    distribution.tell(genomes, losses, [False] * population)


@pytest.mark.parametrize(("genes", "levels"), [(2, ()), (101, ()), (3, (3, 0, 0))])
def test_it_is_exhausted_when_the_package_stops(genes, levels):
    distribution = Distribution([0.3] * genes, sigma=0.2, population=8, levels=levels)
    stopped = 0
    for generation in range(400):
        tell_sphere(distribution, generation, 8)
        # its tolfun looks at the values, which are the search's to watch here
        distribution._cma._tolfun = 0.0
        assert (distribution.exhausted() is not None) == distribution._cma.should_stop()
        stopped += distribution._cma.should_stop()
    assert stopped or genes != 2


@pytest.mark.parametrize("seed", range(4))
def test_told_a_rotated_cloud_it_is_rotated(seed):
    """Stale results, far enough to be cut, included."""
    generator = np.random.default_rng(seed)
    rotation = np.linalg.qr(generator.standard_normal((6, 6)))[0]
    first, other = (Distribution([0.5] * 6, sigma=0.02, population=8) for _ in range(2))
    for _ in range(12):
        steps = generator.uniform(-0.1, 0.1, (8, 6))
        losses = generator.permutation(8).astype(float).tolist()
        stale = (generator.random(8) < 0.5).tolist()
        first.tell([tuple(0.5 + step) for step in steps], losses, stale)
        other.tell([tuple(0.5 + rotation @ step) for step in steps], losses, stale)
    assert other._cma._sigma == pytest.approx(first._cma._sigma, rel=1e-9)
    moved = rotation @ (first._cma.mean - 0.5)
    assert other._cma.mean - 0.5 == pytest.approx(moved, abs=1e-10)
    turned = rotation @ first._cma._C @ rotation.T
    np.testing.assert_allclose(other._cma._C, turned, rtol=1e-8, atol=1e-10)
    assert not np.allclose(first._cma._C, other._cma._C)


def skew(cma) -> None:
    variances = np.logspace(0, 30, cma.dim)
    cma._sigma, cma._C = 1e-12, np.diag(variances) if isinstance(cma, CMA) else variances


@pytest.mark.parametrize("genes", [4, 101])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda cma: setattr(cma, "_sigma", 1e-14), "steps are below 1.7e-13 in every gene"),
        (lambda cma: setattr(cma, "_sigma", 1e5), "diverged"),
        (
            lambda cma: (setattr(cma, "_sigma", 1e-17), setattr(cma, "_tolx", 0.0)),
            "rounding of a gene",
        ),
        (lambda cma: skew(cma), "condition is above"),
    ],
)
def test_why_it_is_exhausted(genes, change, reason):
    distribution = Distribution([0.3] * genes, sigma=0.1667, population=8)
    assert distribution.exhausted() is None
    change(distribution._cma)
    distribution._cma._B = distribution._cma._D = None
    assert distribution._cma.should_stop()
    assert reason in (distribution.exhausted() or "")


def test_with_margin_it_is_cmawm_driven_by_hand():
    levels, genes = (10, 0, 10, 0), 4
    distribution = Distribution([0.5] * genes, sigma=0.03, population=8, levels=levels)
    bounds = np.array([[0.05, 0.95], [0.0, 1.0]] * 2)
    package = CMAwM(
        mean=np.full(genes, 0.5),
        sigma=0.03,
        bounds=bounds,
        steps=np.array([0.1, 0.0] * 2),
        population_size=8,
    )
    for generation in range(12):
        genomes, solutions = [], []
        for place in range(8):
            seed = generation * 8 + place
            package.reseed_rng(seed)
            evaluated, raw = package.ask()
            genomes.append(distribution.ask(seed))
            cells = [level_of(genomes[-1][i], 10) for i in (0, 2)]
            assert cells == np.floor(evaluated[[0, 2]] * 10).tolist()
            assert np.array(genomes[-1])[[1, 3]] == pytest.approx(evaluated[[1, 3]], abs=1e-9)
            solutions.append((raw, float(np.sum((evaluated - 0.65) ** 2))))
        distribution.tell(genomes, [loss for _, loss in solutions], [False] * 8)
        package.tell(solutions)
        assert distribution._cma.mean == pytest.approx(package.mean, abs=1e-9)


def mixed(genome: Genome) -> tuple[float, ...]:
    """An ellipsoid in the first half, the count of cells that are 1 of 0 and 1 in the second."""
    half = len(genome) // 2
    scales = np.logspace(0, 3, half)
    smooth = float(np.sum(scales * (np.array(genome[:half]) - 0.6) ** 2))
    return (-smooth - 0.1 * sum(1 - level_of(gene, 2) for gene in genome[half:]),)


def test_a_margin_keeps_both_cells_alive_where_rounding_gets_stuck():
    """EllipsoidOneMax, as in Hamano et al. 2022."""

    def best(levels, seed, schedule):
        sampler = make_sampler(
            SamplerSpec(seed=seed, schedule=schedule, sigma0=0.2),
            genes=10,
            init=[0.3] * 10,
            objectives=1,
            gene_names=[str(i) for i in range(10)],
            levels=levels,
        )
        return max(r.values[0] for r in go_on(sampler, range(1000), mixed) if r.values)

    for schedule in ("generational", "asynchronous"):
        assert all(best([0] * 5 + [2] * 5, seed, schedule) > -0.05 for seed in range(4))
    assert sum(best((), seed, "generational") < -0.05 for seed in range(4)) >= 2


def test_a_discrete_gene_has_two_levels_or_more():
    with pytest.raises(ValueError, match="at least 2 levels"):
        make_sampler(
            SamplerSpec(), genes=2, init=[0.5] * 2, objectives=1, gene_names="ab", levels=[1, 0]
        )


@settings(deadline=None, max_examples=50)
@given(
    genomes=st.lists(
        st.tuples(*[st.floats(0, 1, allow_subnormal=False)] * 3), min_size=10, max_size=60
    ),
    seed=st.integers(0, 99),
)
def test_a_warm_start_is_the_packages(genomes, seed):
    values = np.random.default_rng(seed).standard_normal(len(genomes)).tolist()
    mean, sigma, cov = promising_distribution(best_tenth(list(zip(genomes, values, strict=True))))
    losses = [(np.array(g), -v) for g, v in zip(genomes, values, strict=True)]
    theirs = get_warm_start_mgd(losses, gamma=0.1, alpha=0.1)
    assert mean == pytest.approx(theirs[0], abs=1e-12)
    assert sigma == pytest.approx(theirs[1], rel=1e-9)
    assert cov == pytest.approx(theirs[2], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("genes", "target"), [(5, 2e-3), (300, 0.08)])
def test_a_warm_start_halves_the_evaluations(genes, target):
    def make(seed: int, promising=()):
        return make_sampler(
            SamplerSpec(seed=seed),
            genes=genes,
            init=[0.1] * genes,
            objectives=1,
            gene_names=[str(i) for i in range(genes)],
            promising=promising,
        )

    def near(genome: Genome) -> tuple[float, ...]:
        return (-sum((gene - 0.65) ** 2 for gene in genome) / len(genome),)

    def to_target(seed: int, promising=()) -> int:
        results = go_on(make(seed, promising), range(600), near)
        return next((r.index for r in results if r.values and r.values[0] > -target), 600)

    earlier = go_on(make(0), range(300), sphere)
    promising = best_tenth([(r.genome, r.values[0]) for r in earlier if r.values])
    cold, warm = (
        statistics.median(to_target(seed, start) for seed in (1, 2, 3)) for start in ((), promising)
    )
    assert cold < 600
    assert warm < cold / 2
