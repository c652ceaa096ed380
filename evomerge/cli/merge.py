"""The command that makes a checkpoint without a search, or says what that would take."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal

from evomerge.cli.bars import byte_bar, going_on
from evomerge.cli.device import Device
from evomerge.cli.experts import merge_experts_of
from evomerge.cli.fit import fit_recipe
from evomerge.cli.mixture import make_mixture_of
from evomerge.cli.options import AsJson, print_json
from evomerge.errors import SpecError

if TYPE_CHECKING:
    from evomerge.merging.plan import Plan
    from evomerge.merging.recipe import Recipe

_SHARD_SIZE = "5GB"
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def register(app: typer.Typer) -> None:
    """Add this group's command."""
    app.command()(merge)


def merge(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="What to merge, and how.")],
    directory: Annotated[
        Path | None, typer.Argument(metavar="OUT_DIR", help="Where the result goes.")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what would be done, and do nothing.")
    ] = False,
    shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Largest weight file: bytes, or 500MB, 5GB, 2GiB.")
    ] = _SHARD_SIZE,
    artifact: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="What a fit learned; made first if the recipe has `calibration`."
        ),
    ] = None,
    device: Device = "auto",
    json: AsJson = False,
) -> None:
    """Merge once, without a search, and write an ordinary checkpoint.

    What a recipe with `calibration` learns from data is left in OUT_DIR.artifact, or where
    --artifact says; if it is there already it is applied.
    """
    from evomerge.calibration.experts import wants_experts
    from evomerge.calibration.request import wants_fit
    from evomerge.merging.aside import check_free
    from evomerge.merging.recipe import ModelRef
    from evomerge.merging.recipe_file import load_recipe
    from evomerge.merging.structure.mixture.recipe import wants_mixture

    largest = size_in_bytes(shard_size)
    if wants_experts(recipe) or wants_mixture(recipe):
        if plan or artifact is not None or directory is None:
            wrong = "experts are merged with OUT_DIR, without --plan and --artifact"
            raise typer.BadParameter(wrong, param_hint="RECIPE.yaml")
        make = merge_experts_of if wants_experts(recipe) else make_mixture_of
        return make(recipe, directory, shard_bytes=largest, device=device)
    known = load_recipe(recipe)
    fits = wants_fit(recipe)
    if artifact is None and directory is not None and fits:
        artifact = directory.with_name(f"{directory.name}.artifact")
    if artifact is not None:
        known = replace(known, artifact=ModelRef(str(artifact)))
    if plan:
        with _named(recipe):
            _show_plan(known, largest, json=json)
    elif directory is None:
        raise typer.BadParameter("give a folder for the result, or --plan", param_hint="OUT_DIR")
    else:
        check_free(directory)
        with _named(recipe):
            if artifact is not None and fits:
                fit_recipe(recipe, artifact, device=device)
            export_recipe(known, directory, shard_bytes=largest)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """What is wrong with the recipe is said of its file."""
    try:
        yield
    except SpecError as error:
        raise SpecError(
            str(path) if error.subject == "recipe" else error.subject, error.problems
        ) from None


def export_recipe(recipe: Recipe, directory: Path, *, shard_bytes: int | None = None) -> None:
    """Export with a progress bar on standard error, which a recipe that is refused never sees."""
    from evomerge.merging.export import SHARD_BYTES, export

    bar = byte_bar()
    task = bar.add_task("merging", total=None)
    said: list[str] = []
    with contextlib.ExitStack() as drawn:

        def progress(done: int, total: int) -> None:
            if not bar.live.is_started:
                drawn.enter_context(bar)
            bar.update(task, completed=done, total=total)

        size = shard_bytes or SHARD_BYTES
        with going_on(drawn.close, "after the last whole file"):
            export(recipe, directory, shard_bytes=size, progress=progress, note=said.append)
    for line in said:
        typer.echo(line, err=True)
    typer.echo(f"wrote {directory}", err=True)


def _show_plan(recipe: Recipe, shard_bytes: int, *, json: bool) -> None:
    from evomerge.merging.export import cut
    from evomerge.merging.merge import open_merge
    from evomerge.merging.plan import plan

    merge = open_merge(recipe)
    planned = plan(merge, files=len(cut(merge, shard_bytes)))
    if json:
        print_json(asdict(planned))
        return
    for line in _lines(planned):
        typer.echo(line)


def _lines(plan: Plan) -> Iterator[str]:
    methods = ", ".join(f"{count} by {name}" for name, count in plan.methods.items())
    yield f"tensors   {plan.tensors}: {methods or 'none merged'}"
    for path, size in plan.read.items():
        yield f"read      {decimal(size)}  {path}"
    if plan.structure is not None:
        yield f"structure {plan.structure}"
    else:
        each = plan.flops / plan.elements if plan.elements else 0.0
        yield f"compute   {plan.flops:.3g} FLOPs, {each:.1f} for each of {plan.elements:,} elements"
    yield f"write     {decimal(plan.written)} in {plan.files} file{'s'[: plan.files > 1]}"
    if plan.memory is not None:
        yield f"memory    {decimal(plan.memory)} at most, libraries and page cache aside"


def size_in_bytes(text: str) -> int:
    """1000, 500MB, 5GB or 2GiB in bytes. Raises typer.BadParameter."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?)?B?", text.strip().upper())
    if match is None or float(match[1]) <= 0:
        raise typer.BadParameter(f"{text!r} is no size; write 500MB or 5GB", param_hint="SIZE")
    return int(float(match[1]) * _UNITS[match[2] or ""])
