"""The command that fits what a merge method learns from data, and what `merge` does of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evomerge.cli.bars import going_on, progress_bar
from evomerge.cli.device import Device, device_here
from evomerge.errors import ExportError

if TYPE_CHECKING:
    from evomerge.merging.fitted.artifact import Provenance


def register(app: typer.Typer) -> None:
    """Add this group's command."""
    app.command()(fit)


def fit(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE.yaml", help="A recipe with `calibration`.")
    ],
    directory: Annotated[
        Path, typer.Argument(metavar="ARTIFACT_DIR", help="Where what is learned goes.")
    ],
    device: Device = "auto",
) -> None:
    """Learn from data what a recipe's method needs, once; `merge` and studies apply it."""
    fit_recipe(recipe, directory, device=device)


def fit_recipe(path: Path, directory: Path, *, device: str) -> None:
    """Fit with a progress bar on standard error; an artifact that is there already is left alone.

    Raises ExportError where the folder holds anything but this very fit.
    """
    from evomerge.calibration.request import load_request, open_problem
    from evomerge.merging.aside import check_free
    from evomerge.merging.fitted.artifact import DOCUMENT
    from evomerge.merging.fitted.base import Watch, provenance
    from evomerge.merging.fitted.base import fit as run

    request = load_request(path)
    if not (directory / DOCUMENT).exists():
        check_free(directory)
    with progress_bar() as bar:
        task = bar.add_task("reading models and data", total=None)
        problem = open_problem(request, device=device_here(device))
        for source, words in problem.calibration.described.items():
            bar.console.print(f"{source}: {words}", highlight=False)
        if directory.exists():
            _check_same(directory, provenance(request.fitter, problem, request.settings))
            return
        bar.update(task, description=f"fitting {request.fitter.name}")
        watch = Watch(
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            note=lambda text: bar.console.print(text, highlight=False),
        )
        with going_on(bar.stop, "where it was"):
            run(request.fitter, problem, request.settings, directory, watch=watch)
    typer.echo(f"wrote {directory}", err=True)


def _check_same(directory: Path, wanted: Provenance) -> None:
    from evomerge.merging.fitted.artifact import open_artifact

    if different := wanted.differences(open_artifact(directory).provenance):
        raise ExportError(
            f"{directory}: was fitted with other {', '.join(different)} than the recipe now has;"
            " give a new folder, or remove it first"
        )
    typer.echo(f"{directory}: fitted already", err=True)
