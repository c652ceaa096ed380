"""The commands around the store: `evomerge dashboard` and `evomerge db upgrade`."""

from __future__ import annotations

from typing import Annotated

import typer

from evomerge.cli.options import DEFAULT_STORE, Store, without_password

database = typer.Typer(help="The store's tables.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command()(dashboard)
    app.add_typer(database, name="db")


def dashboard(
    store: Store = DEFAULT_STORE,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 8080,
) -> None:
    """Show every trial in optuna-dashboard, read-only, until Ctrl-C."""
    from evomerge.service.dashboard import serve_dashboard

    serve_dashboard(store, host, port)


@database.command("upgrade")
def upgrade(store: Store = DEFAULT_STORE) -> None:
    """Bring an older store's tables up to this version."""
    from evomerge.store.migrations import upgrade as upgrade_store

    upgrade_store(store)
    typer.echo(f"{without_password(store)} is up to date", err=True)
