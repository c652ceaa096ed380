"""Where a study stands, worked out from its trials. Pure; knows nothing of terminals or stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from evomerge.service.progress import Entry, Phase, Progress, seconds_left
from evomerge.service.verdict import to_score
from evomerge.spec import StudySpec
from evomerge.trial import Kind, State, Trial

_LABELS: Mapping[Kind, str] = {
    "base": "base",
    "source": "best source",
    "uniform": "uniform average",
    "task_arithmetic": "best task arithmetic",
}


def standing(
    spec: StudySpec,
    trials: Sequence[Trial],
    *,
    running: int = 0,
    elapsed_s: float = 0.0,
    work_before: float = 0.0,
) -> Progress:
    """The progress of a study; `work_before` (see `work_done`) was there before `elapsed_s`."""
    weights = {task.task: task.weight for task in spec.objective.tasks}
    phase = _phase(spec, trials)
    searched = [t for t in trials if t.kind == "search"]
    baselines = [t for t in trials if t.kind != "search"]
    done, total = _evaluations(spec, trials, phase, weights)
    best = {kind: _best([t for t in baselines if t.kind == kind], weights) for kind in _LABELS}
    return Progress(
        study=spec.name,
        phase=phase,
        trials_done=sum(t.state.finished for t in searched),
        trials_total=max(spec.budget.trials, len(searched)),
        evaluations_done=done,
        evaluations_total=total,
        failed=sum(t.state is State.FAIL for t in trials),
        running=running,
        best=_entry(_best(searched, weights), None, weights),
        baselines=tuple(
            entry
            for kind, trial in best.items()
            if (entry := _entry(trial, _LABELS[kind], weights)) is not None
        ),
        elapsed_s=elapsed_s,
        left_s=seconds_left(
            elapsed_s, work_done(spec, trials) - work_before, _work_left(spec, trials)
        ),
    )


def work_done(spec: StudySpec, trials: Sequence[Trial]) -> float:
    """Evaluations so far, each counted by its part's share of the items."""
    share = spec.objective.split.model_dump()
    return float(sum(share[part] for trial in trials for part in trial.scores))


def _work_left(spec: StudySpec, trials: Sequence[Trial]) -> float:
    share = spec.objective.split.model_dump()
    baselines = [t for t in trials if t.kind != "search"]
    sources = len(spec.sources)
    searched = sum(t.kind == "search" and t.state.finished for t in trials)
    to_search = spec.budget.trials - searched + sum(not t.state.finished for t in baselines)
    selected = sum("selection" in t.scores for t in trials)
    reported = sum("report" in t.scores for t in trials)
    finalists = min(spec.budget.finalists, spec.budget.trials)
    to_select = max(0, len(baselines) + finalists - selected)
    to_report = max(0, sources + 4 - reported)  # base, uniform, best lambda, winner
    work = share["search"] * to_search + share["selection"] * to_select
    return float(work + share["report"] * to_report)


def _phase(spec: StudySpec, trials: Sequence[Trial]) -> Phase:
    if any(t.kind != "search" and not t.state.finished for t in trials):
        return "baselines"
    if sum(t.kind == "search" and t.state.finished for t in trials) < spec.budget.trials:
        return "search"
    weights = {task.task: task.weight for task in spec.objective.tasks}
    todo = to_score(trials, spec.budget.finalists, weights)
    return "selection" if todo and todo[0][1] == "selection" else "report"


def _evaluations(
    spec: StudySpec, trials: Sequence[Trial], phase: Phase, weights: Mapping[str, float]
) -> tuple[int, int]:
    if phase == "search":
        return 0, 0
    if phase == "baselines":
        baselines = [t for t in trials if t.kind != "search"]
        return sum(t.state.finished for t in baselines), len(baselines)
    done = sum(phase in t.scores for t in trials)
    return done, done + len(to_score(trials, spec.budget.finalists, weights))


def _mean(trial: Trial, weights: Mapping[str, float]) -> float:
    """The weighted mean on the search items, more is better."""
    return trial.scores["search"].values(weights, pareto=False)[0]


def _best(trials: Sequence[Trial], weights: Mapping[str, float]) -> Trial | None:
    scored = [t for t in trials if "search" in t.scores]
    return max(scored, key=lambda t: (_mean(t, weights), -t.number), default=None)


def _entry(trial: Trial | None, label: str | None, weights: Mapping[str, float]) -> Entry | None:
    if trial is None:
        return None
    tasks = {name: score.value for name, score in trial.scores["search"].tasks.items()}
    return Entry(label or f"trial {trial.number}", _mean(trial, weights), tasks)
