"""`evomerge space show|check`: what the genome is, before any model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from evomerge.cli.options import AsJson, print_json, print_table
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
    columns = ("index", "name", "low", "high", "init", "scale", "does")
    print_table(columns, [[_cell(row, column) for column in columns] for row in rows])


def _cell(row: Mapping[str, Any], column: str) -> str:
    if column == "scale" and row["values"]:
        return f"one of {', '.join(f'{value:g}' for value in row['values'])}"
    return str(row[column])


@app.command("check")
def check_space(space: Reference, sources: Sources = None, json: AsJson = False) -> None:
    """Every problem of a space, against its merge method; exit code 2 if there is one."""
    from evomerge.space import check_space as check
    from evomerge.space import load_space

    names = sources.split(",") if sources else ["source_1", "source_2"]
    problems = [line.removeprefix("space: ") for line in check(load_space(space), names)]
    if json:
        print_json({"space": space, "problems": problems})
    if problems:
        raise SpecError(space, problems)
    typer.echo(f"{space}: no problems", err=True)
