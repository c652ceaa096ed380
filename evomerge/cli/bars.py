"""Progress bars, on standard error, so that answers can be piped."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


def progress_bar() -> Progress:
    """A bar with the time left, on standard error."""
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()
    return Progress(*columns, TimeRemainingColumn(), console=Console(file=sys.stderr))


@contextlib.contextmanager
def going_on(stop: Callable[[], object], where: str) -> Iterator[None]:
    """Ctrl-C takes the bar away by `stop`, says `where` the same command goes on, and exits 130."""
    try:
        yield
    except KeyboardInterrupt:
        stop()
        typer.echo(f"evomerge: interrupted; the same command goes on {where}", err=True)
        raise typer.Exit(130) from None


def byte_bar() -> Progress:
    """A bar with bytes, bytes per second and the time left, on standard error."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
    )
