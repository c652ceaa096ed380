"""The `evomerge` command: puts the groups together and turns errors into one line and a code.

Exit codes: 0 done, 2 the user's input, 1 ours, 3 another process took the study over, 130
interrupted (and resumable). A traceback comes with `-v` only. Imports neither torch nor ray:
`evomerge status` answers at once.
"""

from __future__ import annotations

import io
import sys
import traceback
from typing import Any

import typer

import evomerge
from evomerge.cli import (
    adapters,
    demo,
    diff,
    fit,
    merge,
    methods,
    read,
    refine,
    run,
    service,
    space,
    zoo,
)
from evomerge.errors import EvomergeError, StudyTaken, UserError

OK, OURS, USER, TAKEN = 0, 1, 2, 3
_WORKER_PACKAGES = ("torch", "transformers", "lm_eval", "safetensors", "accelerate")

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
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version."
    ),
) -> None:
    pass


for group in (demo, run, refine, read, merge, fit, methods, adapters, diff, space, zoo, service):
    group.register(app)


def main() -> None:
    """Run the command line and exit."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # θ on a terminal of another encoding: \u03b8
            stream.reconfigure(errors="backslashreplace")
    verbose = any(flag in sys.argv[1:] for flag in ("-v", "--verbose"))
    arguments = [flag for flag in sys.argv[1:] if flag not in ("-v", "--verbose")]
    try:
        code = app(arguments, standalone_mode=False, prog_name="evomerge")
    except Exception as error:
        if verbose:
            traceback.print_exc()
        code = _explain(error)
    sys.exit(code if isinstance(code, int) else OK)


def _explain(error: Exception) -> int:
    """Print one line that names the fault and the way out; the exit code it deserves."""
    if hasattr(error, "format_message"):  # what typer raises for a wrong command line
        return _explain_usage(error)
    if isinstance(error, StudyTaken):
        return _say(str(error), TAKEN)
    if isinstance(error, EvomergeError):
        return _say(str(error), USER if isinstance(error, UserError) else OURS)
    if isinstance(error, OSError) and error.filename:
        return _say(f"{error.filename}: {error.strerror}", USER)
    if isinstance(error, ModuleNotFoundError) and str(error.name).split(".")[0] in _WORKER_PACKAGES:
        return _say(f"needs {error.name}; `pip install 'evomerge[worker]'`", USER)
    return _say(f"{type(error).__name__}: {error} (a fault of ours; -v shows where)", OURS)


def _explain_usage(error: Any) -> int:
    message = error.format_message().rstrip(".?")
    if message:  # empty where the help was printed already
        command = error.ctx.command_path if error.ctx is not None else "evomerge"
        typer.echo(f"evomerge: {message}; see `{command} --help`", err=True)
    return int(error.exit_code)


def _say(message: str, code: int) -> int:
    typer.echo(f"evomerge: {message}", err=True)
    return code


if __name__ == "__main__":
    main()
