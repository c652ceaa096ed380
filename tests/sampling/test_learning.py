"""Samplers that learn find more than chance does, on functions whose best is known."""

from __future__ import annotations

import statistics

import pytest

from evomerge.errors import UserError
from evomerge.sampling import Told, make_sampler
from evomerge.sampling.pareto import pareto_front
from evomerge.spec import SamplerSpec
from evomerge.testing.sampler_contract import go_on, sphere
from evomerge.trial import Genome

SEEDS = (0, 1, 2)


def search(name, *, trials, seed, genes=5, objectives=1, objective=sphere) -> list[Told]:
    sampler = make_sampler(
        SamplerSpec(name=name, seed=seed),
        genes=genes,
        init=[0.3] * genes,
        objectives=objectives,
        gene_names=[str(i) for i in range(genes)],
    )
    return go_on(sampler, range(trials), objective)


def median_distance(name: str, trials: int) -> float:
    """Median over seeds of the squared distance of the best of `trials` to the optimum."""
    return statistics.median(
        -max(r.values[0] for r in search(name, trials=trials, seed=seed)) for seed in SEEDS
    )


@pytest.mark.parametrize(("name", "trials"), [("cmaes", 150), ("tpe", 80)])
def test_sphere_in_five_dimensions(name, trials):
    assert median_distance(name, trials) < median_distance("random", trials) / 5


@pytest.mark.slow
def test_gp_on_the_sphere():
    assert median_distance("gp", 40) < median_distance("random", 40) / 20


def trade_off(genome: Genome) -> tuple[float, float]:
    """Best for gene 0 anywhere in [0.2, 0.8] and all other genes at 0.5 (Schaffer's function)."""
    off = sum((gene - 0.5) ** 2 for gene in genome[1:])
    return -((genome[0] - 0.2) ** 2) - off, -((genome[0] - 0.8) ** 2) - off


def hypervolume(points: list[tuple[float, float]]) -> float:
    """Area that a front dominates above (-1, -1)."""
    area, floor = 0.0, -1.0
    for first, second in sorted(points, reverse=True):
        area += max(first + 1, 0.0) * max(second - floor, 0.0)
        floor = max(floor, second)
    return area


@pytest.mark.parametrize("name", ["nsga2", "tpe"])
def test_fronts_of_two_objectives_cover_more_than_chance(name):
    def covered(sampler: str, seed: int) -> float:
        results = search(sampler, trials=160, seed=seed, objectives=2, objective=trade_off)
        values = [result.values for result in results]
        return hypervolume([values[i] for i in pareto_front(values)])

    best = hypervolume([trade_off((0.2 + 0.6 * i / 400, *[0.5] * 4)) for i in range(401)])
    gaps = [(best - covered(name, seed)) / (best - covered("random", seed)) for seed in SEEDS]
    assert statistics.median(gaps) < 0.6


@pytest.mark.parametrize("name", ["tpe", "nsga2"])
def test_failing_regions_are_avoided(name):
    def half(genome: Genome) -> tuple[float, ...] | None:
        return None if genome[0] > 0.5 else sphere(genome)

    results = search(name, trials=120, seed=0, objective=half)
    failed = [result.values is None for result in results[60:]]
    assert sum(failed) < 0.35 * len(failed), "chance fails half of the time"


def test_nsga2_goes_on_after_more_generations_than_python_recurses():
    sampler = make_sampler(
        SamplerSpec(name="nsga2", population=2),
        genes=2,
        init=[0.3, 0.3],
        objectives=1,
        gene_names=["a", "b"],
    )
    for index in range(1200):
        sampler.tell(Told(index, (index / 1200, 0.5), (float(index),)))
    proposed = sampler.ask(1200)
    assert max(proposed) > 0.9 or proposed[1] == 0.5, "a child of the best has a gene of it"


def test_gp_without_torch_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(UserError, match=r"evomerge\[worker\]"):
        search("gp", trials=1, seed=0)


def test_gp_has_one_objective():
    with pytest.raises(ValueError, match="one objective"):
        search("gp", trials=1, seed=0, objectives=2)


def test_names_values_and_genes_must_fit():
    with pytest.raises(ValueError, match="2 values"):
        make_sampler(
            SamplerSpec(), genes=3, init=[0.5, 0.5], objectives=1, gene_names=["a", "b", "c"]
        )
