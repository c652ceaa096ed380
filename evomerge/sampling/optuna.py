"""Optuna's TPE, GP and NSGA-II, made replayable.

For each generation an in-memory Optuna study is built anew from the recorded results, and each
proposal comes from a fresh Optuna sampler seeded by (study seed, index). So nothing outlives a
generation that is not a function of the results. Knows nothing of the store's Optuna mirror.
"""

from __future__ import annotations

from collections.abc import Sequence

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, TPESampler
from optuna.trial import TrialState, create_trial

from evomerge.errors import UserError
from evomerge.sampling.base import Told
from evomerge.sampling.generations import GenerationalSampler
from evomerge.sampling.seeding import derived_seed
from evomerge.space.scales import level_of, middle_of
from evomerge.spec import SamplerSpec
from evomerge.trial import Genome

AUTO_POPULATION = {"tpe": 4, "gp": 4, "nsga2": 20}
_UNIT = FloatDistribution(0.0, 1.0)
_GENERATION = NSGAIISampler._get_generation_key()


class OptunaSampler(GenerationalSampler):
    """One of Optuna's samplers; genome 0 is the start point `init`.

    Proposals of one generation are made in the order of their indices and each sees the ones before
    it as running, so that TPE and GP spread them. `population: auto` is 4 for TPE and GP, whose
    proposals get worse the more of them run at once, and 20 for NSGA-II. A failed candidate enters
    with a value below the worst one told, so that the sampler keeps away from it. To Optuna a
    discrete gene is a whole number, its level; `levels` [genes] as for CMA-ES.
    """

    def __init__(
        self,
        spec: SamplerSpec,
        *,
        init: Sequence[float],
        objectives: int,
        gene_names: Sequence[str],
        levels: Sequence[int],
    ) -> None:
        _require(spec.name, objectives)
        population = AUTO_POPULATION[spec.name] if spec.population == "auto" else spec.population
        super().__init__(genes=len(init), objectives=objectives, population=population)
        optuna.logging.set_verbosity(optuna.logging.ERROR)  # it reports each study
        self._spec = spec
        self._levels = levels
        self._init = self._genome(self._parameters(init))
        self._distributions: dict[str, BaseDistribution] = {
            name: IntDistribution(0, count - 1) if count else _UNIT
            for name, count in zip(gene_names, levels, strict=True)
        }
        self._history: list[Told] = []
        self._study: optuna.Study | None = None
        self._proposed: list[Genome] = []

    def _propose(self, index: int) -> Genome:
        first = self._told_generations * self._population
        while len(self._proposed) <= index - first:
            self._proposed.append(self._draw(first + len(self._proposed)))
        return self._proposed[index - first]

    def _draw(self, index: int) -> Genome:
        if index == 0:
            return self._init
        if self._study is None:
            self._study = self._rebuilt()
        self._study.sampler = self._optuna_sampler(index)
        params = self._study.ask(self._distributions).params
        return self._genome([params[name] for name in self._distributions])

    def _parameters(self, genome: Sequence[float]) -> list[float]:
        """A genome as Optuna sees it: of a discrete gene the number of its level."""
        return [
            level_of(gene, levels) if levels else gene
            for gene, levels in zip(genome, self._levels, strict=True)
        ]

    def _genome(self, parameters: Sequence[float]) -> Genome:
        return tuple(
            middle_of(int(value), levels) if levels else float(value)
            for value, levels in zip(parameters, self._levels, strict=True)
        )

    def _learn(self, results: Sequence[Told]) -> None:
        self._history.extend(results)
        self._study = None
        self._proposed = []

    def _optuna_sampler(self, index: int) -> BaseSampler:
        seed = derived_seed(self._spec.seed, index, bits=32)
        if self._spec.name == "tpe":
            return TPESampler(seed=seed)
        if self._spec.name == "gp":
            return GPSampler(seed=seed, warn_independent_sampling=False)
        return NSGAIISampler(population_size=self._population, seed=seed)

    def _rebuilt(self) -> optuna.Study:
        study = optuna.create_study(directions=["maximize"] * self._objectives)
        for told, values in zip(
            self._history, _imputed(self._history, self._objectives), strict=True
        ):
            study.add_trial(
                create_trial(
                    state=TrialState.COMPLETE,
                    values=values,
                    params=dict(
                        zip(self._distributions, self._parameters(told.genome), strict=True)
                    ),
                    distributions=self._distributions,
                    system_attrs={_GENERATION: told.index // self._population},
                )
            )
        if self._spec.name == "nsga2":
            # from the first generation on, since Optuna would recurse through all of them
            selection = NSGAIISampler(population_size=self._population, seed=0)
            for generation in range(1, self._told_generations + 1):
                selection.get_parent_population(study, generation)
        return study


def _require(name: str, objectives: int) -> None:
    if name == "gp":
        if objectives != 1:
            raise ValueError(f"sampler gp has one objective only, got {objectives}")
        try:
            import torch  # noqa: F401
        except ImportError:
            raise UserError(
                "sampler gp needs torch, which is not installed here; "
                "install evomerge[worker], or use the sampler tpe"
            ) from None


def _imputed(history: Sequence[Told], objectives: int) -> list[tuple[float, ...]]:
    """Values [n, objectives], with a failed candidate worse in each than all that have values."""
    known = [told.values for told in history if told.values is not None]
    if not known:
        return [(0.0,) * objectives] * len(history)
    failed = tuple(_below(column) for column in zip(*known, strict=True))
    return [failed if told.values is None else told.values for told in history]


def _below(values: Sequence[float]) -> float:
    spread = max(values) - min(values)
    # near enough to the worst that a Gaussian process still resolves the others
    return min(values) - (spread / 10 or max(1.0, abs(min(values))))
