"""What `merge` does of a recipe that makes dense models the experts of a mixture."""

from __future__ import annotations

from pathlib import Path

import typer

from evomerge.cli.bars import going_on, progress_bar
from evomerge.cli.device import device_here


def make_mixture_of(recipe: Path, directory: Path, *, shard_bytes: int, device: str) -> None:
    """Make it with a progress bar on standard error; say what it has become."""
    from evomerge.calibration.mixture import open_mixture_problem
    from evomerge.errors import SpecError
    from evomerge.merging.aside import check_free
    from evomerge.merging.structure.mixture.export import make_mixture

    check_free(directory)
    with progress_bar() as bar:
        task = bar.add_task("reading models", total=None)
        problem = open_mixture_problem(recipe, device=device_here(device))

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        try:
            with going_on(bar.stop, "after the last whole file"):
                made = make_mixture(problem, directory, shard_bytes=shard_bytes, progress=show)
        except SpecError as error:
            raise SpecError(str(recipe), error.problems) from None
    typer.echo(f"wrote {directory}: {made.architecture}, {len(problem.experts)} experts", err=True)
