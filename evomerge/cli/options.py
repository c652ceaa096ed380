"""Options that several commands share, and how answers are printed."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

DEFAULT_STORE = "sqlite:///evomerge.db"

Store = Annotated[
    str,
    typer.Option(
        "--store", envvar="EVOMERGE_STORE", metavar="URL", help="Database of the studies."
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="One JSON document on standard output, with stable keys.")
]


def print_json(document: Any) -> None:
    """One JSON document on standard output."""
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False))
