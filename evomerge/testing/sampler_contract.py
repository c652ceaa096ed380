"""The contract of a sampler, as tests: every sentence of `evomerge.sampling.base` is one here.

A plug-in runs it on its own sampler by a subclass that says how to make a fresh one:

    class TestMySampler(SamplerContract):
        def make(self, *, genes=3, seed=0): ...

A sampler that is told in any order runs AsynchronousSamplerContract instead. Uses nothing but the
protocol. Whether a sampler searches well is tested beside it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable

import numpy as np
import pytest

from evomerge.sampling.base import Sampler, Told
from evomerge.trial import Genome

Objective = Callable[[Genome], tuple[float, ...] | None]


def sphere(genome: Genome) -> tuple[float, ...]:
    """Best, 0, where every gene is 0.6."""
    return (-sum((gene - 0.6) ** 2 for gene in genome),)


def go_on(sampler: Sampler, indices: Iterable[int], objective: Objective) -> list[Told]:
    """Ask, evaluate and tell one genome at a time."""
    results = []
    for index in indices:
        genome = sampler.ask(index)
        results.append(Told(index, genome, objective(genome)))
        sampler.tell(results[-1])
    return results


def replayed(sampler: Sampler, results: Iterable[Told]) -> Sampler:
    """The sampler after it was told these results, asked for nothing."""
    for result in results:
        sampler.tell(result)
    return sampler


def interleaved(
    sampler: Sampler, trials: int, objective: Objective, *, workers: int, seed: int
) -> tuple[list[Told], list[int]]:
    """A search by `workers` at once that finish in any order: its results in the order of tells,
    and for each ask, by index, how many tells came before it.
    """
    generator, running, told = random.Random(seed), list[Told](), list[Told]()
    asked_at: list[int] = []
    while len(told) < trials:
        if len(asked_at) < trials and len(running) < workers and generator.random() < 0.7:
            genome = sampler.ask(len(asked_at))
            running.append(Told(len(asked_at), genome, objective(genome), len(told)))
            asked_at.append(len(told))
        elif running:
            told.append(running.pop(generator.randrange(len(running))))
            sampler.tell(told[-1])
    return told, asked_at


class _EverySampler:
    """What is asked of a sampler whatever the order of its tells."""

    objectives: int = 1
    trials: int = 24
    """How far a search is followed; past at least two generations where there are any."""
    learns: bool = True
    """Whether results change what is proposed within that many trials."""

    def make(self, *, genes: int = 3, seed: int = 0) -> Sampler:
        """A fresh sampler that was told nothing."""
        raise NotImplementedError

    def objective(self, genome: Genome) -> tuple[float, ...]:
        """What is maximised; with several objectives they pull apart."""
        corners = np.linspace(0.6, 0.1, self.objectives)
        return tuple(-float(sum((g - c) ** 2 for g in genome)) for c in corners)

    def resume_points(self) -> Iterable[int]:
        """After how many tells a search is cut off: by default after every one."""
        return range(self.trials)

    def search(self, *, genes: int = 3, seed: int = 0) -> list[Told]:
        """An uninterrupted search."""
        return go_on(self.make(genes=genes, seed=seed), range(self.trials), self.objective)

    @pytest.mark.parametrize("genes", [1, 2, 60])
    def test_genomes_lie_in_the_unit_cube_as_plain_floats(self, genes: int) -> None:
        for result in self.search(genes=genes):
            assert len(result.genome) == genes
            assert all(type(gene) is float and 0 <= gene <= 1 for gene in result.genome)
            assert tuple(json.loads(json.dumps(result.genome))) == result.genome

    def test_the_first_generation_is_no_single_point(self) -> None:
        sampler = self.make()
        first = [sampler.ask(index) for index in range(min(4, sampler.population))]
        assert len(set(first)) == len(first)

    def test_a_seed_gives_one_search_and_another_seed_another(self) -> None:
        assert self.search() == self.search()
        assert self.search() != self.search(seed=1)

    def test_global_generators_are_neither_read_nor_moved(self) -> None:
        genomes = []
        for seed in (1, 2):
            random.seed(seed)
            np.random.seed(seed)
            before = (random.getstate(), str(np.random.get_state()))
            genomes.append(self.search())
            assert (random.getstate(), str(np.random.get_state())) == before
        assert genomes[0] == genomes[1]

    def test_a_search_cut_off_after_any_tell_goes_on_the_same(self) -> None:
        whole = self.search()
        for told in self.resume_points():
            sampler = replayed(self.make(), whole[:told])
            beyond = min(told + 2 * sampler.population + 1, self.trials)
            rest = go_on(sampler, range(told, beyond), self.objective)
            assert rest == whole[told:beyond], f"cut off after {told} tells"

    def test_asks_in_any_order_and_any_number_give_the_same(self) -> None:
        whole = self.search()
        sampler = self.make()
        size = min(sampler.population, self.trials)
        for first in range(0, self.trials - size + 1, size):
            for index in [*reversed(range(first, first + size)), first]:
                assert sampler.ask(index) == whole[index].genome
            replayed(sampler, whole[first : first + size])

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_a_value_that_is_no_number_is_refused_and_leaves_no_trace(self, value: float) -> None:
        sampler = self.make()
        with pytest.raises(ValueError, match="finite"):
            sampler.tell(Told(0, sampler.ask(0), (value,) * self.objectives))
        assert go_on(sampler, range(self.trials), self.objective) == self.search()

    @pytest.mark.parametrize("genome", [(0.5, 0.5), (0.5, 0.5, 1.5), (0.5, 0.5, float("nan"))])
    def test_a_genome_outside_the_cube_is_refused(self, genome: Genome) -> None:
        with pytest.raises(ValueError, match="genes"):
            self.make().tell(Told(0, genome, (0.0,) * self.objectives))

    def test_the_genome_told_counts_not_the_one_proposed(self) -> None:
        whole = self.search()
        moved = [Told(r.index, tuple(1 - g for g in r.genome), r.values) for r in whole]
        again = go_on(replayed(self.make(), moved[:-1]), [self.trials - 1], self.objective)
        assert (again[0].genome != whole[-1].genome) == self.learns

    def test_a_flat_objective_ends_nothing(self) -> None:
        results = go_on(self.make(), range(self.trials), lambda _: (0.5,) * self.objectives)
        assert all(0 <= gene <= 1 for result in results for gene in result.genome)

    def test_candidates_that_all_fail_end_nothing(self) -> None:
        sampler = self.make()
        failed = go_on(sampler, range(self.trials // 2), lambda _: None)
        later = go_on(sampler, range(len(failed), self.trials), self.objective)
        assert all(0 <= gene <= 1 for result in failed + later for gene in result.genome)

    def test_restarts_are_replayed_with_the_results(self) -> None:
        live = self.make()
        results = go_on(live, range(self.trials), lambda _: (0.5,) * self.objectives)
        assert replayed(self.make(), results).restarts == live.restarts
        assert [restart.number for restart in live.restarts] == [
            number for number, _ in enumerate(live.restarts, 1)
        ]

    def test_failures_are_replayed_like_values(self) -> None:
        def half(genome: Genome) -> tuple[float, ...] | None:
            return None if genome[0] > 0.5 else self.objective(genome)

        whole = go_on(self.make(), range(self.trials), half)
        assert any(r.values is None for r in whole)
        told = self.trials - 2
        assert (
            go_on(replayed(self.make(), whole[:told]), range(told, self.trials), half)
            == (whole[told:])
        )


class SamplerContract(_EverySampler):
    """For a sampler that is told in order. Subclass it, and say how a fresh sampler is made."""

    def test_it_says_so(self) -> None:
        assert self.make().ordered

    def test_told_within_a_generation_changes_nothing_yet(self) -> None:
        whole = self.search()
        sampler = self.make()
        size = min(sampler.population, self.trials)
        sampler.tell(whole[0])
        assert [sampler.ask(i) for i in range(size)] == [r.genome for r in whole[:size]]

    def test_an_ask_beyond_the_open_generation_is_refused(self) -> None:
        sampler = self.make()
        for index in (-1, sampler.horizon):
            with pytest.raises(ValueError, match=str(index)):
                sampler.ask(index)
        if sampler.population < self.trials:
            replayed(sampler, self.search()[: sampler.population])
            with pytest.raises(ValueError, match="open generation"):
                sampler.ask(0)

    def test_a_result_out_of_turn_is_refused(self) -> None:
        sampler = self.make()
        first = Told(0, sampler.ask(0), self.objective(sampler.ask(0)))
        with pytest.raises(ValueError, match="result 1"):
            sampler.tell(Told(1, first.genome, first.values))
        sampler.tell(first)
        with pytest.raises(ValueError, match="result 0"):
            sampler.tell(first)


class AsynchronousSamplerContract(_EverySampler):
    """For a sampler that is told in any order and asked at any time."""

    def test_it_says_so(self) -> None:
        assert not self.make().ordered

    def test_any_genome_may_be_asked_for_unless_it_is_told(self) -> None:
        sampler = self.make()
        assert sampler.ask(10**6) != sampler.ask(0)
        sampler.tell(Told(5, sampler.ask(5), self.objective(sampler.ask(5)), 0))
        for index in (-1, 5):
            with pytest.raises(ValueError, match=str(index)):
                sampler.ask(index)

    def test_a_result_counts_once(self) -> None:
        sampler = self.make()
        for index in (3, 0, 1):
            result = Told(index, sampler.ask(index), self.objective(sampler.ask(index)), 0)
            sampler.tell(result)
            with pytest.raises(ValueError, match=f"result {index}"):
                sampler.tell(result)

    def test_a_genome_from_the_future_is_refused(self) -> None:
        sampler = self.make()
        with pytest.raises(ValueError, match="after 1 results"):
            sampler.tell(Told(0, sampler.ask(0), self.objective(sampler.ask(0)), 1))

    @pytest.mark.parametrize("workers", [1, 2, 8, 40])
    def test_every_ask_is_repeated_by_replaying_the_tells_before_it(self, workers: int) -> None:
        live = self.make()
        told, asked_at = interleaved(live, self.trials, self.objective, workers=workers, seed=1)
        genomes = {result.index: result.genome for result in told}
        again, done = self.make(), 0
        for index, before in enumerate(asked_at):
            replayed(again, told[done:before])
            done = before
            assert again.ask(index) == genomes[index]
        replayed(again, told[done:])
        assert again.ask(self.trials) == live.ask(self.trials)
