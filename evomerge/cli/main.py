"""The `evomerge` command: puts the groups together and turns errors into one line and a code.

Exit codes: 0 done, 2 the user's input, 1 ours, 130 interrupted (and resumable). A traceback comes
with `-v` only. Imports neither torch nor ray: `evomerge status` answers at once.
"""

from __future__ import annotations

import sys
import traceback

import typer

import evomerge
from evomerge.cli import checkpoints, demo, read, run, service, space, zoo
from evomerge.errors import EvomergeError, UserError

OK, OURS, USER, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    name="evomerge",
    help="Find the best way to merge fine-tuned language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"evomerge {evomerge.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Show a traceback with an error."),
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True),
) -> None:
    pass


for group in (demo, run, read, checkpoints, space, zoo, service):
    group.register(app)


def main() -> None:
    """Run the command line and exit."""
    verbose = any(flag in sys.argv[1:] for flag in ("-v", "--verbose"))
    arguments = [flag for flag in sys.argv[1:] if flag not in ("-v", "--verbose")]
    try:
        code = app(arguments, standalone_mode=False)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        if verbose:
            traceback.print_exc()
        code = _explain(error)
    sys.exit(code if isinstance(code, int) else OK)


def _explain(error: Exception) -> int:
    """Print one line that names the fault and the way out; the exit code it deserves."""
    usage = getattr(error, "format_message", None)  # what typer raises for a wrong command line
    if usage is not None:
        typer.echo(f"evomerge: {usage()}", err=True)
        return int(getattr(error, "exit_code", USER))
    if isinstance(error, EvomergeError):
        typer.echo(f"evomerge: {error}", err=True)
        return USER if isinstance(error, UserError) else OURS
    if isinstance(error, typer.Abort):
        return INTERRUPTED
    typer.echo(
        f"evomerge: {type(error).__name__}: {error} (a fault of ours; -v shows where)", err=True
    )
    return OURS


if __name__ == "__main__":
    main()
