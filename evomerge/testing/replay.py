"""An asynchronous search proposed again from its record: what a resume rests on.

Takes trials as the store has them, in the middle of a study or at its end; runs no evaluation.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from evomerge.sampling import make_sampler
from evomerge.sampling.base import Told
from evomerge.space import load_space
from evomerge.spec import StudySpec
from evomerge.trial import Genome, Trial, tiebreak


def in_order_told(trials: Sequence[Trial]) -> list[Trial]:
    """The told ones among a study's search trials, in the order of tells."""
    return sorted(
        (trial for trial in trials if trial.tell_order is not None),
        key=lambda trial: trial.tell_order or 0,
    )


def asked_at(trials: Sequence[Trial]) -> list[int]:
    """For each search trial [n], by number: how many results were told when it was asked for."""
    told = in_order_told(trials)
    asked_before = [(trial.tell_order or 0) - place for place, trial in enumerate(told)]
    return [bisect_right(asked_before, trial.number - trials[0].number) for trial in trials]


def proposed_again(spec: StudySpec, trials: Sequence[Trial]) -> list[Genome]:
    """Genomes [n, genes] of all search trials [n], each asked for in the state of its time."""
    space, sources = load_space(spec.space), list(spec.sources)
    genes = space.genes(sources)
    sampler = make_sampler(
        spec.sampler,
        genes=len(genes),
        init=space.start(sources),
        objectives=1,
        gene_names=[gene.name for gene in genes],
    )
    weights = {task.task: task.weight for task in spec.objective.tasks}
    told, asked, done, genomes = in_order_told(trials), asked_at(trials), 0, []
    for index, before in enumerate(asked):
        for known in told[done:before]:
            place = known.number - trials[0].number
            margins = known.scores["search"].margins if "search" in known.scores else {}
            ties = tiebreak(margins, weights)
            sampler.tell(Told(place, known.genome or (), known.values, asked[place], ties))
        done = before
        genomes.append(sampler.ask(index))
    return genomes
