"""What `merge` does of a recipe that merges the experts of one model."""

from __future__ import annotations

from pathlib import Path

import typer

from evomerge.cli.bars import going_on, progress_bar
from evomerge.cli.device import device_here


def merge_experts_of(recipe: Path, directory: Path, *, shard_bytes: int, device: str) -> None:
    """Merge with a progress bar on standard error; say how many experts each layer keeps."""
    from evomerge.calibration.experts import open_expert_problem
    from evomerge.merging.aside import check_free
    from evomerge.merging.structure.experts.export import merge_experts

    check_free(directory)
    with progress_bar() as bar:
        task = bar.add_task("reading model and data", total=None)
        problem = open_expert_problem(recipe, device=device_here(device))
        bar.console.print(problem.described, highlight=False)

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        with going_on(bar.stop, "where it was"):
            plans = merge_experts(problem, directory, shard_bytes=shard_bytes, progress=show)
    kept = ", ".join(str(len(plan.groups.members)) for plan in plans)
    typer.echo(f"experts kept in each layer: {kept}", err=True)
    typer.echo(f"wrote {directory}", err=True)
