"""`evomerge demo`: the whole job on tiny experts that are trained on the spot."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from evomerge.cli.options import AsJson
from evomerge.cli.run import show_report
from evomerge.cli.zoo import build_with_bar
from evomerge.spec import StudySpec

_MOST_WORKERS = 4  # each takes some 600 MB, most of it libraries
_SPEC = """\
# Written by `evomerge demo`. `evomerge run {path} --store {store}` does the same.
name: demo-{seed}
base: {zoo}/base
sources:
{sources}
space: source_depth
objective:
  include_path: {zoo}/tasks
  tasks: [{tasks}]
sampler: {{name: cmaes, seed: {seed}}}
budget: {{trials: {trials}}}
workers: {{count: {workers}}}
"""


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command()(demo)


def demo(
    directory: Annotated[Path, typer.Option("--dir", help="Where everything goes.")] = Path("demo"),
    trials: Annotated[int, typer.Option("--trials", min=1, help="Candidates to search.")] = 200,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Another seed, other experts and another search.")
    ] = 0,
    json: AsJson = False,
) -> None:
    """Train a base and four experts, search for the best merge, compare it on unseen items.

    Stop it whenever you like: the same command goes on where it was.
    """
    from evomerge.cli.running import run_study

    zoo = build_with_bar(directory / f"zoo-{seed}", seed)
    path, store = directory / f"study-{seed}.yaml", f"sqlite:///{directory / 'evomerge.db'}"
    folder = zoo.directory.name
    document = _SPEC.format(
        path=path,
        store=store,
        seed=seed,
        zoo=folder,
        sources="\n".join(f"  {name}: {folder}/{name}" for name in zoo.sources),
        tasks=", ".join(zoo.sources),
        trials=trials,
        workers=min(_MOST_WORKERS, os.cpu_count() or 1),
    )
    path.write_text(document, encoding="utf-8")
    show_report(run_study(StudySpec.load(path), store, "local"), store, json=json)
