"""`evomerge zoo build`: tiny real experts, trained on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evomerge.cli.bars import progress_bar

if TYPE_CHECKING:
    from evomerge.zoo.build import ZooPaths, ZooProgress

app = typer.Typer(help="Tiny real experts to try things on.", no_args_is_help=True)


def register(root: typer.Typer) -> None:
    """Add this group's commands."""
    root.add_typer(app, name="zoo")


@app.command("build")
def build(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where the zoo goes.")],
    seed: Annotated[int, typer.Option("--seed", min=0, help="Another seed, another zoo.")] = 0,
) -> None:
    """Train a base and four experts, and write their lm-eval tasks; a second call reuses them."""
    paths = build_with_bar(directory, seed)
    typer.echo(f"wrote {paths.directory}: base, {', '.join(paths.sources)}, tasks", err=True)


def build_with_bar(directory: Path, seed: int) -> ZooPaths:
    """Build a zoo, with a progress bar and the time left on standard error.

    Raises typer.Exit(130) when it was interrupted, after saying how to go on.
    """
    from evomerge.zoo.build import build_zoo

    with progress_bar() as bar:
        task = bar.add_task("zoo", total=1.0)

        def show(progress: ZooProgress) -> None:
            bar.update(task, description=progress.stage, completed=progress.fraction)

        try:
            return build_zoo(directory, seed=seed, progress=show)
        except KeyboardInterrupt:
            bar.stop()
            typer.echo("stopped; finished models are kept. To go on: the same command", err=True)
            raise typer.Exit(130) from None
