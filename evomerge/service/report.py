"""The report of a study: who won, against whom, by how much, on items the search never saw.

A function of the study and its trials; of a study in a store no more is held in memory than the
report shows. Says what the tests say and no more: "better" only
where the paired test does after Holm's correction. Works for a study that is unfinished, failed or
empty: what is missing is None, and `notes` say why. Knows nothing of HTML and terminals.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from evomerge.sampling.base import Restart
from evomerge.service.cost import Cost
from evomerge.service.history import History
from evomerge.service.measurement import Interval, Measurement, measure, to_json
from evomerge.service.notices import restarts_of
from evomerge.service.refinement import gains, gains_text, refinements_of
from evomerge.service.survey import Survey, cause, objective_weights, search_mean
from evomerge.service.verdict import best_baseline, finalists, to_score, winner
from evomerge.store.base import Refusal, StudyRecord, StudyStore
from evomerge.trial import CANDIDATES, Kind, Part, Score, State, TaskScore, Trial

if TYPE_CHECKING:
    from evomerge.scoring.statistics import Comparison

Verdict = Literal["better", "worse", "no difference shown", "not tested"]
BASELINES: Mapping[str, Kind] = {
    "base": "base",
    "best_source": "source",
    "uniform": "uniform",
    "task_arithmetic": "task_arithmetic",
    "published": "published",
}
ALPHA = 0.05
_MOST_NAMED = 6


@dataclass(frozen=True)
class Candidate:
    """A trial with what was measured of it, on each part it was scored on.

    `place` counts search trials from 1; None for others.
    """

    trial: Trial
    title: str
    parts: Mapping[Part, Measurement]
    place: int | None = None

    @property
    def report(self) -> Measurement | None:
        return self.parts.get("report")

    def to_json(self) -> dict[str, Any]:
        return {
            "label": self.trial.label,
            "number": self.trial.number,
            "search_trial": self.place,
            "recipe_digest": self.trial.recipe_digest,
            **to_json(self.report, "report"),
        }

    def to_full_json(self) -> dict[str, Any]:
        """With the recipe, the genome and the scores on the other parts."""
        genome = self.trial.genome
        other = {part: self.parts.get(part) for part in ("search", "selection")}
        return {
            **self.to_json(),
            "recipe": self.trial.recipe,
            "genome": None if genome is None else list(genome),
            **{part: m and m.values_json() for part, m in other.items()},
        }


@dataclass(frozen=True)
class Outcome:
    """The winner against one baseline on the report items; positive means the winner is better.

    `p_value` is the two-sided paired test's, `p_holm` corrected for all comparisons of the report.
    None where the test could not be made.
    """

    against: str
    title: str
    verdict: Verdict
    sentence: str
    difference: float | None = None
    interval: Interval | None = None
    p_value: float | None = None
    p_holm: float | None = None
    items: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "against": self.against,
            "difference": self.difference,
            "interval": self.interval,
            "p_value": self.p_value,
            "p_holm": self.p_holm,
            "items": self.items,
            "verdict": self.verdict,
            "sentence": self.sentence,
        }


@dataclass(frozen=True)
class Report:
    """Everything the report says.

    `leader` is the best on the search items alone, which is no winner. `finished` is whether the
    winner is final. `notes` say in sentences what failed and what is still to come. `references`
    are the best baseline of each kind on the search items, by title. `refinements` say what
    gradient steps bought (see `refinement.gains`), `start` which artifact the search started from,
    what it cost and how near the space came to it.
    """

    study: str
    weights: Mapping[str, float]
    counts: Mapping[str, int]
    search_counts: Mapping[str, int]
    winner: Candidate | None
    leader: Candidate | None
    baselines: Mapping[str, Candidate | None]
    sources: Mapping[str, Candidate | None]
    comparisons: tuple[Outcome, ...]
    front: tuple[Candidate, ...]
    cost: Cost
    finished: bool
    notes: tuple[str, ...]
    verdict: str
    history: History
    references: Mapping[str, float]
    restarts: tuple[Restart, ...]
    refused: Mapping[Refusal, int]
    refinements: tuple[Mapping[str, Any], ...] = ()
    start: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """One JSON document; its keys are stable."""
        fixed = {name: c and c.to_json() for name, c in self.baselines.items()}
        sources = {name: c and c.to_json() for name, c in self.sources.items()}
        return {
            "study": self.study,
            "trials": {**self.counts, "search": dict(self.search_counts)},
            "winner": self.winner and self.winner.to_full_json(),
            "leader": self.leader and self.leader.to_full_json(),
            "baselines": {**fixed, "sources": sources},
            "comparisons": [outcome.to_json() for outcome in self.comparisons],
            "pareto": [candidate.to_full_json() for candidate in self.front],
            "cost": self.cost.to_json(),
            "restarts": [asdict(restart) for restart in self.restarts],
            "refused": dict(self.refused),
            "start": self.start and dict(self.start),
            "refinements": [dict(gained) for gained in self.refinements],
            "verdict": self.verdict,
            "finished": self.finished,
            "notes": list(self.notes),
        }


def stored_report(record: StudyRecord, store: StudyStore) -> Report:
    """Report on a study in a store, as it stands."""
    survey = Survey.read(record, store, whole=True)
    return _report(record, survey, store.refusals(record.name))


def build_report(record: StudyRecord, trials: Iterable[Trial]) -> Report:
    """Report on a study from all of its trials.

    Those scored on the report part must hold its per-item outcomes.
    """
    return _report(record, Survey.of(record, trials), {})


def _report(record: StudyRecord, survey: Survey, refused: Mapping[Refusal, int]) -> Report:
    trials = survey.kept
    weights = objective_weights(record.spec)
    budget = record.spec["budget"]
    planned, count = int(budget["trials"]), int(budget.get("finalists", 8))
    searched = [t for t in trials if t.kind in CANDIDATES]
    ranked = finalists(searched, count, weights)
    pareto = record.spec["objective"].get("aggregate") == "pareto"

    def candidate(trial: Trial | None) -> Candidate | None:
        return None if trial is None else _candidate(trial, weights, survey.places)

    champion = candidate(winner(trials, weights))
    fixed = {name: candidate(best_baseline(trials, k, weights)) for name, k in BASELINES.items()}
    outcomes = _outcomes(champion, fixed, weights)
    progress = _unfinished(survey, count, planned, weights)
    refinements = _refinements(record, trials)
    return Report(
        study=record.name,
        weights=weights,
        counts=_counts(survey.states),
        search_counts={**_counts(survey.searched), "planned": planned},
        winner=champion,
        leader=candidate(ranked[0]) if ranked and not pareto else None,
        baselines=fixed,
        sources={t.label: candidate(t) for t in trials if t.kind == "source"},
        comparisons=outcomes,
        front=tuple(_candidate(t, weights, survey.places) for t in ranked) if pareto else (),
        cost=survey.costs.total(),
        finished=not progress,
        notes=(
            *_failures(survey),
            *_start(record, survey.history),
            *map(gains_text, refinements),
            *progress,
        ),
        verdict=_overall(champion, outcomes, survey.searched, finished=not progress),
        history=survey.history,
        references=_references(trials, weights),
        restarts=tuple(restarts_of(record)),
        refused=refused,
        refinements=refinements,
        start=record.inspection.get("start"),
    )


def _start(record: StudyRecord, history: History) -> list[str]:
    """What is to be said of a search that started from an artifact."""
    start = record.inspection.get("start")
    first = next((dot for dot in history.dots() if dot.x == 1 and dot.score is not None), None)
    if start is None or first is None:
        return []
    return [
        f"The search started from what {start['kind']} had learned in"
        f" {start['cost']['seconds']:.1f} s, as near as the space comes to it (distance"
        f" {start['distance']:.2f}): {first.score:.3f} on the search items."
    ]


def _refinements(record: StudyRecord, trials: Sequence[Trial]) -> tuple[dict[str, Any], ...]:
    """What each refinement that has its trial bought."""
    refined = [t for t in trials if t.kind == "refined"]
    return tuple(
        gains(refinement, trial)
        for refinement, trial in zip(refinements_of(record), refined, strict=False)
    )


def _candidate(trial: Trial, weights: Mapping[str, float], places: Mapping[int, int]) -> Candidate:
    parts = {part: measure(score, weights) for part, score in trial.scores.items()}
    return Candidate(trial, title_of(trial), parts, places.get(trial.number))


def title_of(trial: Trial) -> str:
    """A trial's name for people."""
    if trial.kind in CANDIDATES:
        return f"trial {trial.number}"
    return f"source {trial.label}" if trial.kind == "source" else trial.label


def _references(trials: Sequence[Trial], weights: Mapping[str, float]) -> dict[str, float]:
    """The best baseline of each kind on the search items."""
    best: dict[str, tuple[float, str]] = {}
    for trial in trials:
        mean = search_mean(trial, weights)
        if trial.kind in CANDIDATES or mean is None:
            continue
        if trial.kind not in best or mean > best[trial.kind][0]:
            best[trial.kind] = (mean, title_of(trial))
    return {title: mean for mean, title in best.values()}


def _counts(states: Counter[State]) -> dict[str, int]:
    return {
        "complete": states[State.COMPLETE],
        "failed": states[State.FAIL],
        "pruned": states[State.PRUNED],
        "running": states[State.RUNNING],
        "waiting": states[State.WAITING],
    }


# -- comparisons ---------------------------------------------------------------------------------


def _outcomes(
    champion: Candidate | None,
    baselines: Mapping[str, Candidate | None],
    weights: Mapping[str, float],
) -> tuple[Outcome, ...]:
    """The winner against every baseline that was scored on the report items."""
    if champion is None or champion.report is None:
        return ()
    from evomerge.scoring.statistics import compare_with_each  # scipy: half a second to import

    ours = champion.trial.scores["report"]
    rivals = {n: c for n, c in baselines.items() if c is not None and c.report is not None}
    titles = {name: _against(name, rival) for name, rival in rivals.items()}
    scores = {name: rival.trial.scores["report"] for name, rival in rivals.items()}
    untested = {n: why for n, s in scores.items() if (why := _unpaired(ours, s, weights))}
    tests = compare_with_each(ours, {n: s for n, s in scores.items() if n not in untested}, weights)
    return tuple(
        _untested(name, titles[name], untested[name])
        if name in untested
        else _outcome(name, titles[name], tests[name])
        for name in rivals
    )


def _unpaired(ours: Score, theirs: Score, weights: Mapping[str, float]) -> str | None:
    """Why two scores cannot be compared item by item; None if they can."""
    for task in weights:
        one, other = ours.tasks[task], theirs.tasks[task]
        a, b = len(one.outcomes), len(other.outcomes)
        if a != b or a < 2:
            return f"task {task!r} has {a} and {b} per-item outcomes"
        if not (_is_mean(one) and _is_mean(other)):
            return (
                f"{one.metric} of task {task!r} is no mean over its items, so their differences "
                "are not the difference of the two models"
            )
    return None


def _is_mean(task: TaskScore) -> bool:
    """Whether a value is the mean of its items' outcomes; a perplexity is not."""
    return math.isclose(math.fsum(task.outcomes) / len(task.outcomes), task.value, abs_tol=1e-9)


def _against(name: str, rival: Candidate) -> str:
    if name == "best_source":
        return f"the best source ({rival.trial.label})"
    if name == "task_arithmetic":
        return f"the best task arithmetic ({rival.trial.label.removeprefix('task arithmetic ')})"
    return f"the {rival.title}"


def _outcome(name: str, title: str, test: Comparison) -> Outcome:
    verdict = _decide(test.difference, test.p_adjusted)
    joined = f"{verdict} from" if verdict == "no difference shown" else f"{verdict} than"
    sentence = (
        f"{joined.capitalize()} {title} on {test.n} items: {test.difference:+.3f} "
        f"[{test.interval[0]:+.3f}, {test.interval[1]:+.3f}], {p_text(test.p_adjusted)} after Holm."
    )
    return Outcome(
        name,
        title,
        verdict,
        sentence,
        test.difference,
        test.interval,
        test.p_value,
        test.p_adjusted,
        test.n,
    )


def _decide(difference: float, p_holm: float) -> Verdict:
    if p_holm < ALPHA and difference != 0:
        return "better" if difference > 0 else "worse"
    return "no difference shown"


def _untested(name: str, title: str, reason: str) -> Outcome:
    return Outcome(name, title, "not tested", f"Not tested against {title}: {reason}.")


def p_text(p: float) -> str:
    """A p-value for people: never `p = 0`."""
    return "p < 0.0001" if p < 0.0001 else f"p = {p:.4f}" if p < 0.01 else f"p = {p:.2f}"


# -- what is to be said in words -----------------------------------------------------------------

_CLAUSES: Mapping[Verdict, str] = {
    "better": "is better than",
    "no difference shown": "shows no difference from",
    "worse": "is worse than",
    "not tested": "was not tested against",
}


def _overall(
    champion: Candidate | None,
    outcomes: Sequence[Outcome],
    searched: Counter[State],
    *,
    finished: bool,
) -> str:
    if champion is None:
        if searched.total() and searched[State.FAIL] == searched.total():
            return "There is no winner: every trial of the search failed."
        return "There is no winner." if finished else "There is no winner yet."
    if not outcomes:
        return f"The winner so far is {champion.title}; it is not yet compared on the report items."
    clauses = [
        f"{words} {_listed(titles)}"
        for verdict, words in _CLAUSES.items()
        if (titles := [o.title for o in outcomes if o.verdict == verdict])
    ]
    so_far = "" if finished else " so far"
    claim = f"he winner{so_far} ({champion.title}) {'; it '.join(clauses)}."
    items = max((o.items or 0 for o in outcomes), default=0)
    return f"T{claim}" if not items else f"On {items} items that the search never saw, t{claim}"


def _listed(titles: Sequence[str]) -> str:
    if len(titles) < 2:
        return "".join(titles)
    return f"{', '.join(titles[:-1])} and {titles[-1]}"


def _named(titles: Sequence[str]) -> str:
    return _listed(titles) if len(titles) <= _MOST_NAMED else f"{len(titles)} candidates"


def _unfinished(
    survey: Survey, count: int, planned: int, weights: Mapping[str, float]
) -> list[str]:
    """One sentence for each thing that is still to come."""
    finished = survey.counts.finished
    if finished < planned:
        return [f"The search has finished {finished} of {planned} trials."]
    refined = [t for t in survey.kept if t.kind == "refined" and not t.state.finished]
    if refined:
        return [f"Not scored on the search items: {_named([title_of(t) for t in refined])}."]
    open_ = to_score(survey.kept, count, weights)
    return [
        f"Not scored on the {part} items: {_named(titles)}."
        for part in ("selection", "report")
        if (titles := [title_of(t) for t, wanted in open_ if wanted == part])
    ]


def _failures(survey: Survey) -> list[str]:
    sentences = [
        f"Baseline {title_of(t)} failed: {cause(t)}."
        for t in survey.kept
        if t.kind not in CANDIDATES and t.state is State.FAIL
    ]
    failed = survey.searched[State.FAIL]
    if failed:
        most, times = survey.causes.most_common(1)[0]
        who = "1 trial" if failed == 1 else f"{failed} trials"
        sentences.append(f"{who} of the search failed; most often ({times}): {most}.")
    return sentences
