"""The commands that only read a store: status, trials, best (and its export), report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evomerge.cli.options import DEFAULT_STORE, AsJson, Store, print_json, print_table, store_option
from evomerge.errors import UserError
from evomerge.service.ledger import utc_now
from evomerge.service.liveness import is_running
from evomerge.service.notices import refusals_text, restart_texts, restarts_of
from evomerge.service.progress import Progress
from evomerge.service.standing import standing
from evomerge.service.survey import Survey
from evomerge.spec import PARTS, StudySpec
from evomerge.store import open_store
from evomerge.store.base import Claim, Controller, Refusal, StudyRecord, StudyStore
from evomerge.trial import Score, Trial

if TYPE_CHECKING:
    from evomerge.merging.recipe import Recipe
    from evomerge.service.report import Report

StudyName = Annotated[str, typer.Argument(metavar="STUDY", help="The study's name.")]


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command()(status)
    app.command()(trials)
    app.command()(best)
    app.command()(report)


def status(
    study: Annotated[
        str | None, typer.Argument(metavar="STUDY", help="One study's name; all of them without.")
    ] = None,
    store: Store = DEFAULT_STORE,
    json: AsJson = False,
) -> None:
    """Where every study stands, or one of them."""
    opened = open_store(store, create=False)
    records = [opened.study(study)] if study else list(opened.studies())
    claims = {claim.study: claim for claim in opened.claims(now=utc_now())}
    rows = [_status(record, opened, claims.get(record.name)) for record in records]
    if json:
        print_json(rows[0] if study else rows)
    elif rows:
        counted = ["trials", "failed", "best", "priority", "workers"]
        print_table(["study", "phase", *counted, "controller"], [
            [r["study"], r["phase"], f"{r['trials']['finished']}/{r['trials']['budget']}",
             str(r["trials"]["failed"]), _number(r["best"]), str(r["priority"]),
             _workers(r["workers"]), r["controller"] or "none running"]
            for r in rows
        ])  # fmt: skip
        for record, row in zip(records, rows, strict=True):
            for notice in _notices(record, row["refused"], most=10 if study else 1):
                typer.echo(f"{record.name}: {notice}")
    else:
        typer.echo("no studies in this store", err=True)


def trials(study: StudyName, store: Store = DEFAULT_STORE, json: AsJson = False) -> None:
    """Every trial of a study: state, genome, scores, attempts, seconds."""
    opened = open_store(store, create=False)
    record = opened.study(study)
    weights = _weights(record)
    rows = [trial_json(trial, weights) for trial in opened.trials(study, outcomes=False)]
    if json:
        print_json(rows)
        return
    print_table(["number", "kind", "label", "state", "search mean", "attempts", "seconds"], [
        [str(r["number"]), r["kind"], r["label"], r["state"],
         _number((r["scores"].get("search") or {}).get("mean")), str(r["attempts"]),
         f"{r['seconds']:.2f}"]
        for r in rows
    ])  # fmt: skip


def best(
    study: StudyName,
    export: Annotated[
        Path | None, typer.Option("--export", metavar="DIR", help="Write the winner's checkpoint.")
    ] = None,
    mergekit: Annotated[
        Path | None,
        typer.Option("--mergekit", metavar="FILE", help="Write the winner as mergekit's YAML."),
    ] = None,
    store: Store = DEFAULT_STORE,
    json: AsJson = False,
) -> None:
    """The winner so far, its recipe and scores; with --export its checkpoint."""
    from evomerge.cli.merge import export_recipe
    from evomerge.service.report import stored_report

    opened = open_store(store, create=False)
    record = opened.study(study)
    found = stored_report(record, opened)
    candidate = found.winner or found.leader
    if candidate is None:
        raise UserError(f"study {study!r} has no scored trial yet; `evomerge status {study}`")
    recipe = _located(candidate.trial, record)
    if export is not None:
        export_recipe(recipe, export)
    if mergekit is not None:
        _write_mergekit(recipe, mergekit)
    if json:
        document = {**candidate.to_full_json(), "recipe": recipe.to_json()}
        print_json({**document, "final": found.finished})
        return
    print_json(recipe.to_json())  # first: it is long, and what scrolls away is read least
    rank = _rank(found)
    typer.echo(f"trial {candidate.trial.number} ({rank})\nrecipe {candidate.trial.recipe_digest}")
    scores = candidate.trial.scores
    for part in sorted(scores, key=PARTS.index):
        tasks = scores[part].tasks
        values = ", ".join(f"{name} {tasks[name].value:.4f}" for name in _weights(record))
        typer.echo(f"{part}: {values}")


def report(
    study: StudyName,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Where the page goes; STUDY.html by default."
        ),
    ] = None,
    store: Store = DEFAULT_STORE,
    json: AsJson = False,
) -> None:
    """One self-contained HTML page: the history, the comparison, the winner's coefficients."""
    from evomerge.service.report import stored_report
    from evomerge.service.report_page import render

    opened = open_store(store, create=False)
    record = opened.study(study)
    found = stored_report(record, opened)
    if json:
        print_json(found.to_json())
    if output is None and json:
        return
    path = output or Path(f"{study}.html")
    _write(path, render(found, record, store_option(store)))
    typer.echo(f"wrote {path}", err=True)


def trial_json(trial: Trial, weights: dict[str, float]) -> dict[str, Any]:
    """One trial as plain JSON.

    `attempts` counts those at the search items, `executions` lists those at every part.
    """
    searched = [attempt for attempt in trial.attempts if attempt.part == "search"]
    return {
        "number": trial.number,
        "kind": trial.kind,
        "label": trial.label,
        "state": trial.state.value,
        "genome": None if trial.genome is None else list(trial.genome),
        "recipe_digest": trial.recipe_digest,
        "values": None if trial.values is None else list(trial.values),
        "scores": {part: score_json(score, weights) for part, score in trial.scores.items()},
        "attempts": len(searched),
        "seconds": trial.seconds,
        "tell_order": trial.tell_order,
        "error": None
        if trial.failure is None
        else f"{trial.failure.error}: {trial.failure.message}",
        "executions": [
            {
                "part": attempt.part,
                "number": attempt.number,
                "state": attempt.state.value,
                "worker": attempt.worker,
                "started_at": attempt.started_at.isoformat(),
                "seconds": dict(attempt.seconds),
                "error": attempt.failure and f"{attempt.failure.error}: {attempt.failure.message}",
            }
            for attempt in trial.attempts
        ],
    }


def score_json(score: Score, weights: dict[str, float]) -> dict[str, float]:
    """A score as {task: value, ..., "mean": the objective's weighted mean, more is better}."""
    (mean,) = score.values(weights, pareto=False)
    return {**{name: score.tasks[name].value for name in weights}, "mean": mean}


def _status(record: StudyRecord, store: StudyStore, claim: Claim | None) -> dict[str, Any]:
    spec = StudySpec.model_validate(record.spec)
    survey = Survey.read(record, store, whole=False)
    now: Progress = standing(spec, survey.kept, counts=survey.counts)
    return {
        "study": record.name,
        "phase": "done" if _done(now) else now.phase,
        "trials": {
            "finished": now.trials_done,
            "budget": spec.budget.trials,
            "failed": now.failed,
            "states": {state.value: count for state, count in survey.states.items()},
        },
        "best": None if now.best is None else now.best.mean,
        "baselines": {entry.label: entry.mean for entry in now.baselines},
        "created_at": record.created_at.isoformat(),
        "restarts": [asdict(restart) for restart in restarts_of(record)],
        "priority": spec.workers.priority,
        "workers": None if claim is None else {"held": claim.held, "wanted": claim.wanted},
        "controller": _holder(store.controller(record.name)),
        "refused": dict(store.refusals(record.name)),
    }


def _notices(record: StudyRecord, refused: Mapping[Refusal, int], *, most: int) -> list[str]:
    """What there is to say of a study beside its row."""
    said = refusals_text(refused)
    refusals = [f"results refused: {said}"] if said else []
    return [*restart_texts(restarts_of(record), most), *refusals]


def _done(now: Progress) -> bool:
    return now.phase == "report" and 0 < now.evaluations_done == now.evaluations_total


def _holder(controller: Controller | None) -> str | None:
    if controller is None or not is_running(controller, utc_now()):
        return None
    return f"{controller.host}, process {controller.pid}"


def _workers(counts: Mapping[str, int] | None) -> str:
    return "" if counts is None else f"{counts['held']}/{counts['wanted']}"


def _weights(record: StudyRecord) -> dict[str, float]:
    return {task["task"]: task["weight"] for task in record.spec["objective"]["tasks"]}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _rank(found: Report) -> str:
    if found.winner is None:
        return "best so far, on the search items alone"
    return "winner" if found.finished else "winner so far"


def _located(trial: Trial, record: StudyRecord) -> Recipe:
    """The trial's recipe with its models where they lay when the study was last opened."""
    from evomerge.merging.recipe import Recipe

    places = {digest: path for path, digest in record.inspection["digests"].items()}
    return Recipe.from_json(trial.recipe).located(places)


def _write(path: Path, text: str) -> None:
    """Whole or not at all. Raises UserError."""
    aside = path.absolute().with_name(f".{path.absolute().name}.part")
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # a device, a pipe
            path.write_text(text, encoding="utf-8")
            return
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def _write_mergekit(recipe: Recipe, file: Path) -> None:
    import yaml

    from evomerge.checkpoints.adapted import open_model
    from evomerge.merging.mergekit_write import write_mergekit

    anchor = open_model((recipe.base or recipe.sources[0].model).path)
    stored = str(anchor.dtype(anchor.names[0])).removeprefix("torch.")
    document = write_mergekit(recipe, anchor.names, dtype=stored)
    _write(file, yaml.safe_dump(document, sort_keys=False))
    typer.echo(f"wrote {file}", err=True)
