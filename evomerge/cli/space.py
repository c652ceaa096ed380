"""`evomerge space show|check`: what the genome is, before any model is loaded."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from evomerge.cli.options import AsJson, print_json
from evomerge.errors import SpecError

Reference = Annotated[
    str, typer.Argument(metavar="SPACE", help="A shipped space's name, or a YAML file.")
]
Sources = Annotated[
    str | None, typer.Option("--sources", metavar="A,B,...", help="Names of the sources.")
]

app = typer.Typer(help="Look at search spaces.", no_args_is_help=True)


def register(root: typer.Typer) -> None:
    """Add this group's commands."""
    root.add_typer(app, name="space")


@app.command("show")
def show_space(space: Reference, sources: Sources = None, json: AsJson = False) -> None:
    """The genome: every gene, its bounds, where it starts and what it does."""
    from evomerge.space import load_space, show

    loaded = load_space(space)
    rows = show(loaded, sources.split(",") if sources else None)
    if json:
        print_json({"space": loaded.to_json(), "genes": rows})
        return
    typer.echo(f"{space}: {loaded.about}\nmethod {loaded.method}, {len(rows)} genes")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    columns = ("index", "name", "low", "high", "init", "scale", "does")
    for column in columns:
        table.add_column(column, justify="left" if column in ("name", "scale", "does") else "right")
    for row in rows:
        table.add_row(*(str(row[column]) for column in columns))
    Console(file=sys.stdout).print(table)


@app.command("check")
def check_space(space: Reference, sources: Sources = None) -> None:
    """Every problem of a space, against its merge method; exit code 2 if there is one."""
    from evomerge.space import check_space as check
    from evomerge.space import load_space

    names = sources.split(",") if sources else ["source_1", "source_2"]
    problems = check(load_space(space), names)
    if problems:
        raise SpecError(space, problems)
    typer.echo(f"{space}: no problems", err=True)
