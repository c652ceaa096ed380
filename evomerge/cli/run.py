"""`evomerge run` and `evomerge resume`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from evomerge.cli.options import (
    DEFAULT_EXECUTOR,
    DEFAULT_STORE,
    AsJson,
    Store,
    print_json,
    store_option,
)
from evomerge.spec import StudySpec
from evomerge.store import open_store

if TYPE_CHECKING:
    from evomerge.service.report import Report

ExecutorName = Annotated[
    str, typer.Option("--executor", metavar="NAME", help="Where attempts run: local or ray.")
]
WorkerCount = Annotated[
    int | None, typer.Option("--workers", min=1, help="Workers at once; the spec's by default.")
]


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command()(run)
    app.command()(resume)


def run(
    spec: Annotated[Path, typer.Argument(metavar="SPEC.yaml", help="The study's spec.")],
    store: Store = DEFAULT_STORE,
    executor: ExecutorName = DEFAULT_EXECUTOR,
    workers: WorkerCount = None,
    json: AsJson = False,
) -> None:
    """Create a study, or go on with it, and run it to its end."""
    from evomerge.cli.running import load_spec, run_study

    report = run_study(with_workers(load_spec(spec, executor), workers), store, executor)
    show_report(report, store, json=json)


def resume(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="The study's name.")],
    store: Store = DEFAULT_STORE,
    executor: ExecutorName = DEFAULT_EXECUTOR,
    workers: WorkerCount = None,
    json: AsJson = False,
) -> None:
    """Go on with a study where it was, from the spec that the store keeps."""
    from evomerge.cli.running import run_study

    record = open_store(store, create=False).study(study)
    spec = StudySpec.model_validate(record.spec)
    show_report(run_study(with_workers(spec, workers), store, executor), store, json=json)


def with_workers(spec: StudySpec, count: int | None) -> StudySpec:
    """The spec with another number of workers; it changes the wall time and nothing else."""
    if count is None:
        return spec
    return spec.model_copy(update={"workers": spec.workers.model_copy(update={"count": count})})


def show_report(report: Report, store: str, *, json: bool) -> None:
    """The final table on standard output and what to do next on standard error."""
    from evomerge.service.report_table import print_report

    if json:
        print_json(report.to_json())
        return
    print_report(report, Console(file=sys.stdout))
    option = store_option(store)
    next_steps = {
        f"evomerge best {report.study}{option} --export DIR": "take the winner home",
        f"evomerge report {report.study}{option} -o FILE.html": "the whole story in one page",
        f"evomerge dashboard{option}": "every trial in optuna-dashboard",
    }
    width = max(map(len, next_steps))
    typer.echo("", err=True)
    for command, purpose in next_steps.items():
        typer.echo(f"{command:{width}}   {purpose}", err=True)
