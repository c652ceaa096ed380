"""The commands that make a checkpoint without a search: merge; and the list of merge methods."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from evomerge.cli.options import AsJson, print_json

if TYPE_CHECKING:
    from evomerge.merging.methods.base import MergeMethod, Parameter
    from evomerge.merging.recipe import Recipe


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command()(merge)
    app.command()(methods)


def merge(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="What to merge, and how.")],
    directory: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="Where the result goes.")],
) -> None:
    """Merge once, without a search, and write an ordinary checkpoint."""
    from evomerge.merging.recipe_file import load_recipe

    export_recipe(load_recipe(recipe), directory)


def export_recipe(recipe: Recipe, directory: Path) -> None:
    """Export with a progress bar on standard error."""
    from evomerge.errors import SpecError
    from evomerge.merging.export import export
    from evomerge.merging.methods.registry import check

    problems = check(recipe)
    if problems:
        raise SpecError("recipe", problems)
    with progress_bar() as bar:
        task = bar.add_task("merging", total=1.0)
        export(recipe, directory, progress=lambda done: bar.update(task, completed=done))
    typer.echo(f"wrote {directory}", err=True)


def progress_bar() -> Progress:
    """A bar with the time left, on standard error."""
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()
    return Progress(*columns, TimeRemainingColumn(), console=Console(file=sys.stderr))


def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="One method's name; all of them without.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Every merge method, or one: formula, parameters, what it needs."""
    from evomerge.merging.methods.registry import METHODS, get

    chosen = [get(name)] if name else list(METHODS.values())
    if json:
        documents = [_document(method) for method in chosen]
        print_json(documents[0] if name else documents)
        return
    for method in chosen:
        _describe(method, whole=name is not None)


def _describe(method: MergeMethod, *, whole: bool) -> None:
    needs = "needs a base" if method.needs_base else "needs no base"
    typer.echo(f"{method.name}: {method.summary}")
    typer.echo(f"    {method.formula}")
    typer.echo(f"    {needs}; {_sources(method)}")
    for parameter in method.parameters:
        words = f" {parameter.doc}" if whole else ""
        each = "for each source" if parameter.scope == "source" else "for the merge"
        typer.echo(
            f"    {parameter.name} = {parameter.default} {_range(parameter)}, {each}.{words}"
        )
    typer.echo("")


def _sources(method: MergeMethod) -> str:
    if method.max_sources == method.min_sources:
        return f"exactly {method.min_sources} sources"
    most = "" if method.max_sources is None else f", at most {method.max_sources}"
    return f"at least {method.min_sources} source{'s'[: method.min_sources > 1]}{most}"


def _range(parameter: Parameter) -> str:
    if parameter.kind == "choice":
        return f"({' | '.join(parameter.choices)})"
    if parameter.kind == "bool":
        return "(true | false)"
    low = "-inf" if parameter.low is None else f"{parameter.low:g}"
    high = "inf" if parameter.high is None else f"{parameter.high:g}"
    return f"[{low}, {high}]"


def _document(method: MergeMethod) -> dict[str, Any]:
    return {
        "name": method.name,
        "summary": method.summary,
        "formula": method.formula,
        "needs_base": method.needs_base,
        "min_sources": method.min_sources,
        "max_sources": method.max_sources,
        "parameters": [
            {
                "name": parameter.name,
                "scope": parameter.scope,
                "kind": parameter.kind,
                "default": parameter.default,
                "low": parameter.low,
                "high": parameter.high,
                "choices": list(parameter.choices),
                "doc": parameter.doc,
            }
            for parameter in method.parameters
        ],
    }
