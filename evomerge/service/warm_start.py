"""The genomes that an earlier study of the same store hands to a new one to start from.

They are written into the new study when it is created, so that it can be replayed whatever happens
to the earlier one. Knows nothing of what a sampler makes of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evomerge.errors import SpecError, StudyNotFound
from evomerge.sampling.warm_start import FEWEST, best_tenth
from evomerge.space import Gene, load_space
from evomerge.spec import StudySpec, nearest
from evomerge.store.base import StudyRecord, StudyStore
from evomerge.trial import Genome, State


def good_genomes(
    spec: StudySpec, document: Mapping[str, Any], store: StudyStore
) -> dict[str, list[Genome]]:
    """`{"warm_start": genomes [k, genes]}`, best first; empty if the spec names no earlier study.

    `document` is the spec with its space written out. Raises SpecError if the earlier study is
    unknown, has other genes, several objectives or fewer than FEWEST results.
    """
    name = spec.sampler.warm_start
    if name is None:
        return {}
    try:
        earlier = store.study(name)
    except StudyNotFound:
        known = [record.name for record in store.studies()]
        hint = nearest(name, known) if known else "; the store has none"
        raise _fault(spec, f"no study {name!r} is in the store{hint}") from None
    if _genes(earlier.spec) != _genes(document):
        raise _fault(spec, f"study {name!r} has other genes; space and sources must be the same")
    return {"warm_start": best_tenth(_results(spec, earlier, store))}


def _results(
    spec: StudySpec, earlier: StudyRecord, store: StudyStore
) -> list[tuple[Genome, float]]:
    if earlier.spec["objective"]["aggregate"] == "pareto":
        raise _fault(spec, f"study {earlier.name!r} has several objectives")
    results = [
        (trial.genome, trial.values[0])
        for trial in store.trials(earlier.name, outcomes=False)
        if trial.kind == "search" and trial.state is State.COMPLETE
        if trial.genome is not None and trial.values is not None
    ]
    if len(results) < FEWEST:
        raise _fault(
            spec, f"study {earlier.name!r} has {len(results)} results, at least {FEWEST} are needed"
        )
    return results


def _genes(
    document: Mapping[str, Any],
) -> list[tuple[str, float, float, str, tuple[bool | float | str, ...]]]:
    """What a genome of a study means, gene by gene."""
    genes: tuple[Gene, ...] = load_space(document["space"]).genes(list(document["sources"]))
    return [(gene.name, gene.low, gene.high, gene.scale, gene.shown) for gene in genes]


def _fault(spec: StudySpec, problem: str) -> SpecError:
    return SpecError(f"study {spec.name!r}", [f"sampler.warm_start: {problem}"])
