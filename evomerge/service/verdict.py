"""Who won, decided without ever looking at the report items.

The best trials of the search are scored again on the selection items; what picks the winner is
the search and the selection items together, each counted once. The baselines that have to be picked
(the best source, the best lambda) are picked in just that way. Where values are equal the margins
decide, as they did in the search: what it found on a plateau is not its first step there. Pure
functions of the trials.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence

from evomerge.sampling.pareto import pareto_front
from evomerge.trial import CANDIDATES, Kind, Part, State, Trial, tiebreak, weighted_mean

Weights = Mapping[str, float]


def finalists(trials: Sequence[Trial], count: int, weights: Weights) -> list[Trial]:
    """The trials of the search worth scoring again: the best `count`, or the whole Pareto front.

    Trials of one recipe count once; among equal values the margins decide, among equal margins the
    earlier trial goes first.
    """
    complete = _distinct([t for t in trials if t.kind in CANDIDATES and t.state is State.COMPLETE])
    if complete and len(complete[0].values or ()) > 1:
        front = pareto_front([t.values or () for t in complete])
        return [complete[i] for i in front]
    return sorted(complete, key=lambda t: standing_of(t, weights), reverse=True)[:count]


def standing_of(trial: Trial, weights: Weights) -> tuple[float, float, int]:
    """What orders trials, higher first, by their score on the search items."""
    score = trial.scores["search"]
    (value,) = score.values(weights, pareto=False)
    return value, _decider(score.margins, weights), -trial.number


def contenders(trials: Sequence[Trial], count: int, weights: Weights) -> list[Trial]:
    """The finished search trials that may still be finalists or win, whatever trials come after:
    the finalists, and what was scored beyond the search items. `trials` are in order of numbers.

    Where equal recipes have equal scores, contenders of contenders and further trials are those of
    all: so the others need not be kept.
    """
    chosen = {trial.number for trial in finalists(trials, count, weights)}
    return [
        trial
        for trial in trials
        if trial.kind in CANDIDATES and (trial.number in chosen or trial.scores.keys() - {"search"})
    ]


def merit(trial: Trial, weights: Weights) -> float | None:
    """The weighted mean over search and selection items together; None until both are scored."""
    if not {"search", "selection"} <= trial.scores.keys():
        return None
    return weighted_mean({task: _pooled(trial, task) for task in weights}, weights)


def best_of(trials: Sequence[Trial], weights: Weights) -> Trial | None:
    """The trial of highest merit among those scored on selection items.

    Among equals that of the highest margin over the same items, then the earliest.
    """
    scored = [
        (value, _decider(_pooled_margins(t), weights), -t.number, t)
        for t in trials
        if (value := merit(t, weights)) is not None
    ]
    return max(scored, key=lambda entry: entry[:3])[3] if scored else None


def winner(trials: Sequence[Trial], weights: Weights) -> Trial | None:
    """The winner of the search."""
    return best_of([t for t in trials if t.kind in CANDIDATES], weights)


def best_baseline(trials: Sequence[Trial], kind: Kind, weights: Weights) -> Trial | None:
    """The baseline of a kind: the only one, or the one of highest merit."""
    return best_of([t for t in trials if t.kind == kind], weights)


def to_score(
    trials: Sequence[Trial],
    count: int,
    weights: Weights,
    given_up: Container[tuple[int, Part]] = (),
) -> list[tuple[Trial, Part]]:
    """What is still to be scored once the search is over, in order.

    First the finalists and all baselines on the selection items; when none of these is open, base,
    sources, the averages and the winner on the report items. What was `given_up` is not waited for.
    """

    def missing(candidates: Sequence[Trial], part: Part) -> list[tuple[Trial, Part]]:
        scored = [t for t in candidates if t.state is State.COMPLETE and part not in t.scores]
        return [(t, part) for t in scored if (t.number, part) not in given_up]

    baselines = [t for t in trials if t.kind not in CANDIDATES]
    first = [*baselines, *finalists(trials, count, weights)]
    selection = missing(first, "selection")
    if selection:
        return selection
    champion = winner(trials, weights)
    best_lambda = best_baseline(trials, "task_arithmetic", weights)
    fixed = [t for t in baselines if t.kind != "task_arithmetic"]
    last = [*fixed, *(t for t in (best_lambda, champion) if t is not None)]
    if champion is not None and len(champion.values or ()) > 1:
        last += [t for t in finalists(trials, count, weights) if t.number != champion.number]
    return missing(last, "report")


def _pooled(trial: Trial, task: str) -> float:
    scores = [trial.scores[part].tasks[task] for part in ("search", "selection")]
    return math.fsum(s.n * s.merit for s in scores) / sum(s.n for s in scores)


def _pooled_margins(trial: Trial) -> dict[str, float]:
    """Each task's margin over search and selection items together, where it has one on both."""
    search, selection = (trial.scores[part].tasks for part in ("search", "selection"))
    return {
        name: (one.n * one.margin + two.n * two.margin) / (one.n + two.n)
        for name, one in search.items()
        if (two := selection.get(name)) is not None
        if one.margin is not None and two.margin is not None
    }


def _decider(margins: Mapping[str, float], weights: Weights) -> float:
    decides = tiebreak(margins, weights)
    return -math.inf if decides is None else decides


def _distinct(trials: Sequence[Trial]) -> list[Trial]:
    first: dict[str, Trial] = {}
    for trial in trials:
        first.setdefault(trial.recipe_digest, trial)
    return list(first.values())
