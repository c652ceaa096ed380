"""Options that several commands share, and how answers are printed on standard output."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

DEFAULT_STORE = "sqlite:///evomerge.db"
DEFAULT_EXECUTOR = "local"
_JSON_WIDTH = 88

Store = Annotated[
    str,
    typer.Option(
        "--store", envvar="EVOMERGE_STORE", metavar="URL", help="Database of the studies."
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="One JSON document on standard output, with stable keys.")
]


def store_option(url: str) -> str:
    """What a command that is to be pasted needs to reach this store, with a space before it.

    Nothing where the environment or the default names it. A password is never printed, so that a
    URL with one is left to the environment, which the option then reads.
    """
    from sqlalchemy.engine import make_url

    if url == (os.environ.get("EVOMERGE_STORE") or DEFAULT_STORE):
        return ""
    if make_url(url).password is not None:
        return ' --store "$EVOMERGE_STORE"'
    return f" --store {shlex.quote(url)}"


def without_password(url: str) -> str:
    """A store's URL as it may be printed: logs of a cluster are read by many."""
    from sqlalchemy.engine import make_url

    return make_url(url).render_as_string(hide_password=True)


def print_json(document: Any) -> None:
    """One JSON document on standard output."""
    typer.echo(json_text(document))


def json_text(document: Any, indent: str = "") -> str:
    """JSON indented for people: a list of numbers is one line, and so is all that fits into one."""
    line = json.dumps(document, ensure_ascii=False)
    if len(indent) + len(line) <= _JSON_WIDTH or not isinstance(document, dict | list | tuple):
        return line
    inner = indent + "  "
    if isinstance(document, dict):
        entries = [f"{json.dumps(k)}: {json_text(v, inner)}" for k, v in document.items()]
        opened, closed = "{}"
    elif any(isinstance(entry, dict | list | tuple) for entry in document):
        entries, (opened, closed) = [json_text(entry, inner) for entry in document], "[]"
    else:
        return line
    body = ",\n".join(inner + entry for entry in entries)
    return f"{opened}\n{body}\n{indent}{closed}"


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Aligned columns. No cell is ever cut: words wrap on a terminal, nothing wraps in a pipe."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console(file=sys.stdout)
    if not console.is_terminal:
        console.width = 1 << 16  # measuring is bounded by the width
    needed = console.measure(table)
    console.width = max(console.width, needed.minimum) if console.is_terminal else needed.maximum
    console.print(table, soft_wrap=True)
