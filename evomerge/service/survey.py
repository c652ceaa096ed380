"""A study read through, some trials at a time: what is left of a hundred thousand trials.

Counts, costs, a curve that a chart can show, and the few trials that still matter: baselines and
contenders. Everything else is let go of, so that memory does not grow with trials but for some 50
bytes of each attempt's times. Knows nothing of terminals, pages and statistics.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Self

from evomerge.service.cost import Costs
from evomerge.service.counts import Counts
from evomerge.service.history import Dot, History
from evomerge.service.verdict import contenders
from evomerge.store.base import StudyRecord, StudyStore
from evomerge.trial import State, Trial, weighted_mean

_PAGE = 1000  # trials read at once


class Survey:
    """What is known of a study once every trial was put in, in the order of numbers.

    `states` and `searched` count trials, and search trials, by state; `causes` say why search
    trials failed. `kept` are baselines, refined trials and contenders, as they were put in;
    `places` are those of the search trials among them in the search, from 1, by number.
    """

    def __init__(self, record: StudyRecord) -> None:
        self.counts = Counts()
        self.states: Counter[State] = Counter()
        self.searched: Counter[State] = Counter()
        self.causes: Counter[str] = Counter()
        self.costs = Costs()
        self.history = History()
        self.kept: list[Trial] = []
        self.places: dict[int, int] = {}
        self._weights = objective_weights(record.spec)
        self._finalists = int(record.spec["budget"].get("finalists", 8))

    @classmethod
    def of(cls, record: StudyRecord, trials: Iterable[Trial]) -> Self:
        """Of trials in memory."""
        survey = cls(record)
        survey._put(list(trials))
        return survey

    @classmethod
    def read(cls, record: StudyRecord, store: StudyStore, *, whole: bool) -> Self:
        """Of a study in a store. Unless `whole`, no costs are known, and the trials kept have
        neither recipes nor genomes nor outcomes.
        """
        survey = cls(record)
        for page in _pages(store, record.name, attempts=whole):
            survey._put(page)
        if whole:
            survey.kept = list(_whole(store, record.name, survey.kept))
        return survey

    def _put(self, page: Sequence[Trial]) -> None:
        for trial in page:
            self.counts.put(trial)
            self.states[trial.state] += 1
            self.costs.put(trial)
            if trial.kind == "search":
                self._put_searched(trial)
        met = [*self.kept, *page]
        chosen = {trial.number for trial in contenders(met, self._finalists, self._weights)}
        self.kept = [t for t in met if t.kind != "search" or t.number in chosen]
        self.places = {t.number: self.places[t.number] for t in self.kept if t.kind == "search"}

    def _put_searched(self, trial: Trial) -> None:
        self.searched[trial.state] += 1
        self.places[trial.number] = self.counts.searched
        if trial.state is State.FAIL:
            self.causes[cause(trial)] += 1
        if trial.state.finished:
            score = search_mean(trial, self._weights)
            place = self.counts.searched
            self.history.put(Dot(place, score, f"trial {trial.number} (search trial {place})"))


def objective_weights(spec: Mapping[str, Any]) -> dict[str, float]:
    """Each task's weight, from the JSON of a StudySpec."""
    return {t["task"]: float(t.get("weight", 1.0)) for t in spec["objective"]["tasks"]}


def search_mean(trial: Trial, weights: Mapping[str, float]) -> float | None:
    """The weighted mean on the search items, more is better; None without a finite one."""
    values = trial.values
    if trial.state is not State.COMPLETE or values is None:
        return None
    if len(values) == 1:
        (mean,) = values
    else:
        mean = weighted_mean(dict(zip(weights, values, strict=True)), weights)
    return mean if math.isfinite(mean) else None


def cause(trial: Trial) -> str:
    """Why a trial failed, in words."""
    if trial.failure is None:
        return "no cause recorded"
    return f"{trial.failure.error}: {trial.failure.message.strip().rstrip('.')}"


def _pages(store: StudyStore, study: str, *, attempts: bool) -> Iterator[Sequence[Trial]]:
    first = 0
    while page := store.outlines(study, numbers=range(first, first + _PAGE), attempts=attempts):
        yield page
        first = page[-1].number + 1


def _whole(store: StudyStore, study: str, outlines: Sequence[Trial]) -> Iterator[Trial]:
    """The same trials with everything, those of neighbouring numbers in one go."""
    numbers = [trial.number for trial in outlines]
    for _, run in groupby(enumerate(numbers), key=lambda entry: entry[1] - entry[0]):
        places = [number for _, number in run]
        yield from store.trials(study, numbers=range(places[0], places[-1] + 1))
