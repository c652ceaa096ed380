"""`evomerge diff`: how two checkpoints, two recipes, or a recipe and a checkpoint differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evomerge.cli.bars import progress_bar
from evomerge.cli.options import AsJson, print_json
from evomerge.errors import SpecError, UserError

if TYPE_CHECKING:
    from evomerge.checkpoints.weights import Weights
    from evomerge.merging.difference import Model
    from evomerge.merging.recipe import ModelRef, Recipe

_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")

_HELP = "A checkpoint's folder or hub name, BASE+ADAPTER, or a recipe's file."
SideA = Annotated[str, typer.Argument(metavar="A", help=_HELP)]
SideB = Annotated[str, typer.Argument(metavar="B", help=_HELP)]


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command()(diff)


def diff(
    a: SideA,
    b: SideB,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="MODEL", help="Compare their task vectors to it, too."),
    ] = None,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="Exit with 1 if they differ, 0 if not.")
    ] = False,
    json: AsJson = False,
) -> None:
    """How two checkpoints, two recipes, or a recipe's merge and a checkpoint differ."""
    from evomerge.merging.recipe import Recipe

    one, other = _open(a), _open(b)
    if isinstance(one, Recipe) and isinstance(other, Recipe):
        if base is not None:
            raise UserError("--base is for tensors; two recipes are compared by what they say")
        identical = _diff_recipes((a, one), (b, other), json=json)
    else:
        identical = _diff_models((a, one), (b, other), base, json=json)
    if exit_code and not identical:
        raise typer.Exit(1)


def _open(text: str) -> Weights | Recipe:
    """A recipe for a file, a checkpoint for anything else."""
    from evomerge.checkpoints.adapted import open_model
    from evomerge.merging.methods.registry import check
    from evomerge.merging.recipe_file import load_recipe

    path = Path(text).expanduser()
    if path.suffix in _WEIGHT_FILES or path.is_dir() or not _is_file(path):
        return open_model(text)
    recipe = load_recipe(path)
    if problems := check(recipe):
        raise SpecError(text, problems)
    return recipe


def _is_file(path: Path) -> bool:
    """Whether a recipe is meant, there or not; a pipe is a file, too."""
    return path.exists() or path.suffix in (".yaml", ".yml", ".json")


def _diff_recipes(a: tuple[str, Recipe], b: tuple[str, Recipe], *, json: bool) -> bool:
    from evomerge.cli.diff_json import recipes_json
    from evomerge.cli.diff_text import print_recipes
    from evomerge.merging.recipe_difference import recipe_difference

    tensors = _known_tensors(a[1], b[1])
    found = recipe_difference(a[1], b[1], tensors)
    if json:
        print_json({"a": a[0], "b": b[0], **recipes_json(a[1], b[1], found)})
    else:
        typer.echo(f"A {a[0]}: recipe {a[1].digest[:12]}\nB {b[0]}: recipe {b[1].digest[:12]}\n")
        print_recipes(found, resolved=bool(tensors))
    return found.identical


def _known_tensors(*recipes: Recipe) -> Sequence[str]:
    """The tensors of the first recipe whose models lie on this machine; nothing is downloaded."""
    from evomerge.merging.merge import open_merge

    for recipe in recipes:
        if all(map(_is_here, [*filter(None, [recipe.base]), *(s.model for s in recipe.sources)])):
            try:
                return open_merge(recipe).names
            except UserError:
                continue
    return ()


def _is_here(model: ModelRef) -> bool:
    from evomerge.checkpoints.adapted import split_adapter

    return all(Path(part).expanduser().exists() for part in split_adapter(model.path) if part)


def _diff_models(
    a: tuple[str, Weights | Recipe],
    b: tuple[str, Weights | Recipe],
    base: str | None,
    *,
    json: bool,
) -> bool:
    from evomerge.checkpoints.adapted import open_model
    from evomerge.cli.diff_json import models_json
    from evomerge.cli.diff_text import print_models
    from evomerge.merging.difference import difference

    origin = open_model(base) if base is not None else None
    one, other = _bound(a[1]), _bound(b[1])
    with progress_bar() as bar:
        task = bar.add_task("comparing", total=1.0)
        found = difference(
            one, other, base=origin, progress=lambda done: bar.update(task, completed=done)
        )
    if json:
        print_json({"a": a[0], "b": b[0], "base": base, **models_json(found)})
    else:
        typer.echo(f"A {a[0]}\nB {b[0]}" + (f"\nbase {base}" if base is not None else "") + "\n")
        print_models(found)
    return found.identical


def _bound(side: Weights | Recipe) -> Model:
    from evomerge.merging.merge import open_merge
    from evomerge.merging.recipe import Recipe

    return open_merge(side) if isinstance(side, Recipe) else side
