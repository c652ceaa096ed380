"""Where a study stands, worked out from its trials. Pure; knows nothing of terminals or stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from evomerge.service.counts import Counts
from evomerge.service.progress import Entry, Phase, Progress, seconds_left
from evomerge.service.verdict import standing_of, to_score
from evomerge.spec import StudySpec
from evomerge.trial import CANDIDATES, Kind, Part, Trial

_LABELS: Mapping[Kind, str] = {
    "base": "base",
    "source": "best source",
    "uniform": "uniform average",
    "task_arithmetic": "best task arithmetic",
    "published": "as published",
}


def standing(
    spec: StudySpec,
    trials: Sequence[Trial],
    *,
    counts: Counts | None = None,
    running: int = 0,
    elapsed_s: float = 0.0,
    work_before: float = 0.0,
) -> Progress:
    """The progress of a study; `work_before` (see `work_done`) was there before `elapsed_s`.

    Where `counts` speak for every trial, `trials` may be the baselines and contenders alone.
    """
    counts = counts or Counts.of(trials)
    weights = {task.task: task.weight for task in spec.objective.tasks}
    phase = _phase(spec, trials, counts)
    searched = [t for t in trials if t.kind in CANDIDATES]
    baselines = [t for t in trials if t.kind not in CANDIDATES]
    done, total = _evaluations(spec, trials, counts, phase)
    best = {kind: _best([t for t in baselines if t.kind == kind], weights) for kind in _LABELS}
    return Progress(
        study=spec.name,
        phase=phase,
        trials_done=counts.finished,
        trials_total=max(spec.budget.trials, counts.searched),
        evaluations_done=done,
        evaluations_total=total,
        failed=counts.failed,
        running=running,
        best=_entry(_best(searched, weights), None, weights),
        baselines=tuple(
            entry
            for kind, trial in best.items()
            if (entry := _entry(trial, _LABELS[kind], weights)) is not None
        ),
        elapsed_s=elapsed_s,
        left_s=seconds_left(
            elapsed_s, work_done(spec, counts) - work_before, _work_left(spec, baselines, counts)
        ),
    )


def work_done(spec: StudySpec, counts: Counts) -> float:
    """Evaluations so far, each counted by its part's share of the items."""
    share = spec.objective.split.model_dump()
    return float(sum(share[part] * scored for part, scored in counts.scored.items()))


def _work_left(spec: StudySpec, baselines: Sequence[Trial], counts: Counts) -> float:
    share = spec.objective.split.model_dump()
    open_baselines = sum(not t.state.finished for t in baselines)
    to_search = spec.budget.trials - counts.finished + open_baselines
    finalists = min(spec.budget.finalists, spec.budget.trials)
    to_select = max(0, len(baselines) + finalists - counts.scored["selection"])
    # base, uniform, best lambda, winner
    to_report = max(0, len(spec.sources) + 4 - counts.scored["report"])
    work = share["search"] * to_search + share["selection"] * to_select
    return float(work + share["report"] * to_report)


def _phase(spec: StudySpec, trials: Sequence[Trial], counts: Counts) -> Phase:
    if any(t.kind not in CANDIDATES and not t.state.finished for t in trials):
        return "baselines"
    if counts.finished < spec.budget.trials:
        return "search"
    todo = _to_score(spec, trials)
    return "selection" if todo and todo[0][1] == "selection" else "report"


def _evaluations(
    spec: StudySpec, trials: Sequence[Trial], counts: Counts, phase: Phase
) -> tuple[int, int]:
    if phase == "search":
        return 0, 0
    if phase == "baselines":
        baselines = [t for t in trials if t.kind not in CANDIDATES]
        return sum(t.state.finished for t in baselines), len(baselines)
    done = counts.scored[phase]
    return done, done + len(_to_score(spec, trials))


def _to_score(spec: StudySpec, trials: Sequence[Trial]) -> list[tuple[Trial, Part]]:
    weights = {task.task: task.weight for task in spec.objective.tasks}
    return to_score(trials, spec.budget.finalists, weights)


def _mean(trial: Trial, weights: Mapping[str, float]) -> float:
    """The weighted mean on the search items, more is better."""
    return trial.scores["search"].values(weights, pareto=False)[0]


def _best(trials: Sequence[Trial], weights: Mapping[str, float]) -> Trial | None:
    scored = [t for t in trials if "search" in t.scores]
    return max(scored, key=lambda t: standing_of(t, weights), default=None)


def _entry(trial: Trial | None, label: str | None, weights: Mapping[str, float]) -> Entry | None:
    if trial is None:
        return None
    found = trial.scores["search"].tasks  # a store keeps them in an order of its own
    tasks = {name: found[name].value for name in weights}
    return Entry(label or f"trial {trial.number}", _mean(trial, weights), tasks)
