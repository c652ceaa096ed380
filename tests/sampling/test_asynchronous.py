"""Asynchronous CMA-ES: whatever the order of asks and tells, replaying the tells is the state."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.sampling import Sampler, Told, make_sampler
from evomerge.space.scales import level_of
from evomerge.spec import SamplerSpec
from evomerge.testing.sampler_contract import interleaved, replayed, sphere
from evomerge.trial import Genome

SHAPES = [(3, ()), (4, (2, 0, 5, 0)), (101, ())]


def sampler(genes: int, levels: tuple[int, ...], **spec: object) -> Sampler:
    return make_sampler(
        SamplerSpec.model_validate({"schedule": "asynchronous", **spec}),
        genes=genes,
        init=[0.3] * genes,
        objectives=1,
        gene_names=[str(i) for i in range(genes)],
        levels=levels,
    )


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[str, int]]:
    """Events in order: ("ask", index), and ("tell", place among those under way)."""
    workers = draw(st.integers(1, 20))
    events, asked, running = list[tuple[str, int]](), 0, 0
    for asks in draw(st.lists(st.booleans(), min_size=5, max_size=90)):
        if running < workers and (asks or not running):
            events.append(("ask", asked))
            asked, running = asked + 1, running + 1
        else:
            events.append(("tell", draw(st.integers(0, running - 1))))
            running -= 1
    return events


def value(genome: Genome, failing: float, steps: int) -> tuple[float, ...] | None:
    if genome[0] < failing:
        return None
    distance = sphere(genome)[0]
    return (round(distance * steps) / steps if steps else distance,)


@pytest.mark.parametrize(("genes", "levels"), SHAPES)
@settings(deadline=None, max_examples=40)
@given(
    events=histories(),
    population=st.integers(2, 9),
    failing=st.sampled_from([0.0, 0.25, 1.0]),
    steps=st.sampled_from([0, 1, 40]),
)
def test_any_interleaving_is_replayed_bit_for_bit(
    genes, levels, events, population, failing, steps
):
    live = sampler(genes, levels, population=population)
    running, told, states = list[Told](), list[Told](), list[tuple[int, int, Genome]]()
    for kind, which in events:
        if kind == "ask":
            genome = live.ask(which)
            running.append(Told(which, genome, value(genome, failing, steps), len(told)))
            states.append((len(told), which, genome))
        else:
            told.append(running.pop(which))
            live.tell(told[-1])
    again, done = sampler(genes, levels, population=population), 0
    for before, index, genome in states:  # cut off before every ask
        replayed(again, told[done:before])
        done = before
        assert again.ask(index) == genome
    replayed(again, told[done:])
    # what was under way at the cut comes back with its own genome, and the search goes on alike
    for result in running:
        assert result.genome in [genome for _, _, genome in states]
        live.tell(result)
        again.tell(result)
    assert again.ask(10**6) == live.ask(10**6)
    assert again.search.learned == live.search.learned


@pytest.mark.parametrize("workers", [1, 3, 8, 16])
def test_every_result_is_learned_from(workers):
    live = sampler(5, (), population=8)
    interleaved(live, 160, sphere, workers=workers, seed=3)
    assert live.search.learned == 160


@pytest.mark.parametrize("workers", [1, 8, 16])
def test_stale_results_still_lead_to_the_optimum(workers):
    told, _ = interleaved(sampler(5, (), population=8), 320, sphere, workers=workers, seed=3)
    assert max(r.values[0] for r in told if r.values) > -1e-3


def test_a_far_stray_result_does_not_blow_the_search_up():
    live = sampler(5, (), population=8)
    told, _ = interleaved(live, 400, sphere, workers=1, seed=3)
    for index in range(400, 408):  # of the first state, finished at last
        live.tell(Told(index, (0.99, 0.01, 0.99, 0.01, 0.5), (-9.0,) if index > 400 else None, 0))
    drawn = [sphere(live.ask(index))[0] for index in range(500, 520)]
    nearest = max(r.values[0] for r in told if r.values)
    assert nearest > -1e-5
    assert min(drawn) > -1e-2


@pytest.mark.parametrize(
    ("restarts", "levels"), [("ipop", (0, 0)), ("bipop", (0, 0)), ("ipop", (4, 0))]
)
def test_restarts_are_replayed_and_leave_out_no_more_than_was_under_way(restarts, levels):
    def make() -> Sampler:
        return sampler(2, levels, restarts=restarts)

    def objective(genome: Genome) -> tuple[float, ...]:
        cell = level_of(genome[0], levels[0]) / 4 if levels[0] else genome[0]
        return sphere((cell, genome[1]))

    live, again, done = make(), make(), 0
    told, asked_at = interleaved(live, 1500, objective, workers=8, seed=5)
    runs = live.search.ended
    assert len(runs) >= 2
    assert all(run.reason for run in runs)
    genomes = {result.index: result.genome for result in told}
    for index, before in enumerate(asked_at):
        replayed(again, told[done:before])
        done = before
        assert again.ask(index) == genomes[index]
    assert again.search.ended == runs
    assert 1500 - live.search.learned < 8 * len(runs) + live.population
