"""Asynchronous CMA-ES against a sequential search and Optuna's, in virtual time.

    python benchmarks/async_search.py [--seeds 15] [--workers 8] [--population 8]

Sphere, rotated ellipsoid and Rosenbrock in 10-D on [-5, 5], 320 evaluations whose durations are
log-normal (median 1, σ 0.7) and the same for all; a worker that is free is given the next genome at
once. Everybody starts in the middle with a standard deviation of a sixth of the range. Prints, as
medians over seeds, the best value found, the share of finished evaluations that reached an update
and the makespan. Exits with 1 unless the asynchronous search is within 2x of the sequential one, at
most a third of Optuna's under the same schedule, faster than a sixth of the sequential wall clock,
and leaves no result unused (the last, part-filled pool aside).
"""

from __future__ import annotations

import argparse
import heapq
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import numpy as np
import optuna
from optuna.distributions import FloatDistribution
from optuna.samplers import CmaEsSampler

from evomerge.sampling import Told, make_sampler
from evomerge.spec import SamplerSpec

GENES, EVALUATIONS, LOW, HIGH = 10, 320, -5.0, 5.0
Objective = Callable[[np.ndarray], float]


@dataclass(frozen=True)
class Outcome:
    """The best value, the share of results that were learned from, and the last one's time."""

    best: float
    used: float
    makespan: float


def main() -> int:
    """Run every search and print the table; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=15)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--population", type=int, default=8)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    print(f"{options.workers} workers, population {options.population}, {options.seeds} seeds")
    print(f"{'':12}{'search':22}{'best':>10}{'/ seq.':>8}{'used':>7}{'time':>8}{'/ seq.':>8}")
    missed = []
    for name in ("sphere", "ellipsoid", "rosenbrock"):
        table = _table(name, options.seeds, options.workers, options.population)
        _print(name, table)
        missed += [f"{name}: {fault}" for fault in _faults(table)]
    print("targets: " + ("; ".join(missed) or "all met"))
    return bool(missed)


def _table(name: str, seeds: int, workers: int, population: int) -> dict[str, Outcome]:
    rows: dict[str, list[Outcome]] = {}
    for seed in range(seeds):
        objective = _objective(name, np.random.default_rng([seed, 1]))
        durations = np.random.default_rng([seed, 2]).lognormal(0.0, 0.7, EVALUATIONS)
        for row, outcome in _searches(objective, durations, seed, workers, population):
            rows.setdefault(row, []).append(outcome)
    return {
        row: Outcome(*(median(getattr(o, key) for o in of) for key in ("best", "used", "makespan")))
        for row, of in rows.items()
    }


def _searches(
    objective: Objective, durations: np.ndarray, seed: int, workers: int, population: int
) -> Iterator[tuple[str, Outcome]]:
    common = (objective, durations, seed, population)
    yield "sequential", _ours("generational", 1, *common)
    yield "generational", _ours("generational", workers, *common)
    yield "pipelined", _ours("pipelined", workers, *common)
    yield "asynchronous", _ours("asynchronous", workers, *common)
    yield "Optuna CmaEsSampler", _optunas(workers, *common)


def _ours(
    schedule: str,
    workers: int,
    objective: Objective,
    durations: np.ndarray,
    seed: int,
    population: int,
) -> Outcome:
    spec = SamplerSpec.model_validate(
        {"population": population, "sigma0": 1 / 6, "seed": seed, "schedule": schedule}
    )
    names = [str(i) for i in range(GENES)]
    sampler = make_sampler(spec, genes=GENES, init=[0.5] * GENES, objectives=1, gene_names=names)
    results: list[Told] = []  # asked for, by index
    finished: set[int] = set()
    now, told, running = 0.0, 0, list[tuple[float, int]]()
    while told < EVALUATIONS:
        while len(running) < workers and len(results) < min(EVALUATIONS, sampler.horizon):
            index = len(results)
            genome = sampler.ask(index)
            value = -objective(LOW + (HIGH - LOW) * np.array(genome))
            results.append(Told(index, genome, (value,), None if sampler.ordered else told))
            heapq.heappush(running, (now + durations[index], index))
        now, last = heapq.heappop(running)
        finished.add(last)
        while (index := told if sampler.ordered else last) in finished:
            finished.remove(index)
            sampler.tell(results[index])
            told += 1
    search = sampler.search  # type: ignore[attr-defined]
    used = (search.learned + EVALUATIONS % population) / EVALUATIONS
    return Outcome(-max(r.values[0] for r in results if r.values), used, now)


def _optunas(
    workers: int, objective: Objective, durations: np.ndarray, seed: int, population: int
) -> Outcome:
    study = optuna.create_study(sampler=CmaEsSampler(popsize=population, seed=seed))
    space = {f"x{i}": FloatDistribution(LOW, HIGH) for i in range(GENES)}
    now, running = 0.0, list[tuple[float, int, optuna.Trial]]()
    for _ in range(EVALUATIONS):
        while len(running) < workers and len(study.trials) < EVALUATIONS:
            trial = study.ask(space)
            ends = now + durations[trial.number]
            heapq.heappush(running, (ends, trial.number, trial))
        now, _, trial = heapq.heappop(running)
        study.tell(trial, objective(np.array(list(trial.params.values()))))
    return Outcome(study.best_value, _used_by_optuna(study, population), now)


def _used_by_optuna(study: optuna.Study, population: int) -> float:
    """Its updates, each of a population's worth, over all trials; it counts them on each trial."""
    generations = [
        value
        for trial in study.trials
        for key, value in trial.system_attrs.items()
        if key.endswith(":generation")
    ]
    return max(generations, default=0) * population / EVALUATIONS


def _objective(name: str, generator: np.random.Generator) -> Objective:
    """A function of the range, its optimum (0) somewhere in [-2, 2]; Rosenbrock's as it is."""
    centre = generator.uniform(-2, 2, GENES)
    rotation = np.linalg.qr(generator.standard_normal((GENES, GENES)))[0]
    scales = 1e3 ** (np.arange(GENES) / (GENES - 1))  # condition 1e3

    def sphere(x: np.ndarray) -> float:
        return float(np.sum((x - centre) ** 2))

    def ellipsoid(x: np.ndarray) -> float:
        return float(np.sum(scales * rotation.dot(x - centre) ** 2))

    def rosenbrock(x: np.ndarray) -> float:
        return float(np.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2))

    return {"sphere": sphere, "ellipsoid": ellipsoid, "rosenbrock": rosenbrock}[name]


def _print(name: str, table: dict[str, Outcome]) -> None:
    first = table["sequential"]
    for row, o in table.items():
        print(
            f"{name:12}{row:22}{o.best:10.3g}{o.best / first.best:8.2f}{o.used:7.0%}"
            f"{o.makespan:8.0f}{o.makespan / first.makespan:8.3f}"
        )
        name = ""


def _faults(table: dict[str, Outcome]) -> Iterator[str]:
    ours, sequential, optunas = (
        table[row] for row in ("asynchronous", "sequential", "Optuna CmaEsSampler")
    )
    if ours.best > 2 * sequential.best:
        yield f"{ours.best / sequential.best:.1f}x of the sequential search, not within 2x"
    if ours.best > optunas.best / 3:
        yield f"{ours.best / optunas.best:.2f} of Optuna's, not a third"
    if ours.makespan >= sequential.makespan / 6:
        yield f"{ours.makespan / sequential.makespan:.3f} of the sequential time, not a sixth"
    if ours.used < 1:
        yield f"{ours.used:.0%} of the results used, not all"


if __name__ == "__main__":
    sys.exit(main())
