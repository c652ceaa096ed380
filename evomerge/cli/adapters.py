"""The commands that make a LoRA adapter: extracted from a model, or merged from adapters."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evomerge.cli.bars import progress_bar
from evomerge.cli.options import AsJson, print_json, print_table
from evomerge.errors import UserError

if TYPE_CHECKING:
    from evomerge.merging.adapters import Kept
    from evomerge.merging.extraction import Extracted

_SHOWN = 5  # of the weights that lose most


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command("extract-lora")(extract_lora)
    app.command("merge-adapters")(merge_adapters)


def extract_lora(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="What the adapter will be loaded on.")
    ],
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A fine-tuned or merged model; MODEL+ADAPTER, too."),
    ],
    directory: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="Where the adapter goes.")],
    rank: Annotated[int, typer.Option(min=1, help="Most rank per weight.")] = 32,
    energy: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=1.0, help="Share of each change to keep; stops below --rank once it is."
        ),
    ] = None,
    only: Annotated[
        str | None, typer.Option(metavar="REGEX", help="Only tensors whose name it is found in.")
    ] = None,
    exclude: Annotated[
        str | None, typer.Option(metavar="REGEX", help="No tensors whose name it is found in.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Extract a LoRA adapter: what a model changed of its base, at low rank, for PEFT."""
    _check_regex(only, exclude)
    from evomerge.checkpoints.adapted import open_models
    from evomerge.merging.adapters import write_adapter
    from evomerge.merging.aside import check_free
    from evomerge.merging.extraction import extract

    check_free(directory)
    models = open_models([base, model])
    with progress_bar() as bar:
        task = bar.add_task("extracting", total=1.0)
        found = extract(
            models[base],
            models[model],
            rank=rank,
            energy=energy,
            only=only,
            exclude=exclude,
            progress=lambda done: bar.update(task, completed=done),
        )
    write_adapter(directory, found.config, found.tensors)
    if json:
        print_json(_document(found))
    else:
        _tell(found)
    typer.echo(f"wrote {directory}", err=True)


def merge_adapters(
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER", help="LoRA adapters of one base.")
    ],
    directory: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="Where the result goes.")],
    weight: Annotated[
        list[float] | None,
        typer.Option(
            metavar="W", help="One for each adapter, in their order; all equal, of sum 1, without."
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Nearest adapter of this rank; without it exact, ranks add up."),
    ] = None,
    json: AsJson = False,
) -> None:
    """Merge LoRA adapters of one base into one adapter: the weighted sum of what they change."""
    weights = weight or [1 / len(adapters)] * len(adapters)
    if not all(map(math.isfinite, weights)):
        raise UserError(f"--weight: finite numbers are expected, got {weights}")
    from evomerge.checkpoints.adapter import Adapter
    from evomerge.merging.adapters import merge_adapters as merged
    from evomerge.merging.adapters import write_adapter
    from evomerge.merging.aside import check_free

    check_free(directory)
    config, tensors, kept = merged([Adapter.open(a) for a in adapters], weights, rank=rank)
    write_adapter(directory, config, tensors)
    if json:
        print_json({"kept": [_change(change) for change in kept]})
    elif kept:
        _least(kept)
    typer.echo(f"wrote {directory}", err=True)


def _check_regex(*patterns: str | None) -> None:
    for pattern in filter(None, patterns):
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{pattern!r}: not a regular expression: {error}") from None


def _tell(found: Extracted) -> None:
    typer.echo(
        f"{found.share:.1%} of the change (squared norm) kept, {len(found.kept)} weights at low"
        f" rank; {len(found.whole)} tensors saved whole; {len(found.lost)} left out"
    )
    _least([*found.kept, *found.lost])


def _least(changes: Sequence[Kept]) -> None:
    """The weights that lose most."""
    worst = sorted(changes, key=lambda c: (c.share - 1) * c.norm**2)[:_SHOWN]
    rows = [(c.name, str(c.rank), f"{c.share:.1%}", f"{c.norm:.3g}") for c in worst]
    print_table(("loses most", "rank", "kept", "change"), rows)


def _document(found: Extracted) -> dict[str, Any]:
    return {
        "share": found.share,
        "kept": [_change(change) for change in found.kept],
        "whole": found.whole,
        "lost": [_change(change) for change in found.lost],
    }


def _change(change: Kept) -> dict[str, Any]:
    return {
        "name": change.name,
        "rank": change.rank,
        "share": change.share,
        "norm": change.norm,
    }
