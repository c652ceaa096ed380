"""`evomerge refine`: gradient steps from a study's best trial, scored as a trial of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from evomerge.cli.bars import progress_bar
from evomerge.cli.device import Device, device_here
from evomerge.cli.options import DEFAULT_EXECUTOR, DEFAULT_STORE, AsJson, Store
from evomerge.cli.run import ExecutorName, WorkerCount, show_report, with_workers
from evomerge.errors import StudyBusy
from evomerge.spec import StudySpec
from evomerge.store import open_store

if TYPE_CHECKING:
    from evomerge.service.refinement import Refinement
    from evomerge.store.base import StudyRecord, StudyStore


def register(app: typer.Typer) -> None:
    """Add this group's command."""
    app.command()(refine)


def refine(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="The study's name.")],
    calibration: Annotated[
        Path,
        typer.Option(
            "--calibration", metavar="FILE.yaml", help="Says on what data, under `calibration`."
        ),
    ],
    steps: Annotated[
        int, typer.Option("--steps", min=1, help="How many gradients to compute at most.")
    ] = 20,
    loss: Annotated[
        Literal["answers", "sources"],
        typer.Option(
            "--loss", help="Answers' cross-entropy, or divergence from what each source predicts."
        ),
    ] = "answers",
    trial: Annotated[
        int | None, typer.Option("--trial", metavar="N", help="Which trial; the best by default.")
    ] = None,
    device: Device = "auto",
    store: Store = DEFAULT_STORE,
    executor: ExecutorName = DEFAULT_EXECUTOR,
    workers: WorkerCount = None,
    json: AsJson = False,
) -> None:
    """Lower a loss from a study's best trial by gradient steps, then go on with the study.

    What is found is scored as a trial of its own, and may win; the sampler does not hear of it.
    """
    from evomerge.cli.running import run_study
    from evomerge.service.refinement import with_refinement

    opened = open_store(store, create=False)
    record = opened.study(study)
    if _is_held(opened, study):
        raise StudyBusy(f"study {study!r} is being run; refine it once that has stopped")
    found = _refined(record, opened, calibration, steps, loss, trial, device)

    def change(record: StudyRecord) -> StudyRecord:
        return record if found is None else with_refinement(record, found)

    spec = with_workers(StudySpec.model_validate(record.spec), workers)
    show_report(run_study(spec, store, executor, change), store, json=json)


def _refined(
    record: StudyRecord,
    store: StudyStore,
    path: Path,
    steps: int,
    loss: Literal["answers", "sources"],
    number: int | None,
    device: str,
) -> Refinement | None:
    """What gradient steps find; None where that is known already, or nothing."""
    from evomerge.service.refinement import elite, refinements_of
    from evomerge.service.refining import read_calibration
    from evomerge.service.refining import refine as run
    from evomerge.service.survey import objective_weights

    trials = store.trials(record.name, outcomes=False)
    origin = elite(trials, objective_weights(record.spec), number)
    data = read_calibration(path, StudySpec.model_validate(record.spec))
    for known in refinements_of(record):
        if known.is_of(origin.number, data.digest, loss, steps):
            typer.echo(f"evomerge: trial {origin.number} is refined so already", err=True)
            return None
    with progress_bar() as bar:
        task = bar.add_task(f"refining trial {origin.number}", total=steps)
        found = run(
            record,
            origin,
            trials,
            data,
            loss=loss,
            steps=steps,
            device=device_here(device),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if found is None:
        typer.echo(f"evomerge: no step from trial {origin.number} lowers the loss", err=True)
        return None
    typer.echo(
        f"refined trial {origin.number} in {found.seconds:.1f} s: loss {found.before:.4g} to"
        f" {found.after:.4g}",
        err=True,
    )
    return found


def _is_held(store: StudyStore, study: str) -> bool:
    from evomerge.service.ledger import utc_now
    from evomerge.service.liveness import is_dead

    holder = store.controller(study)
    return holder is not None and holder.lease_until > utc_now() and not is_dead(holder)
