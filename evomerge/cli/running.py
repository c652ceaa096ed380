"""Running a study in the foreground: the view, the mirror. Shared by run, resume, demo."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path

import typer

from evomerge.cli.options import DEFAULT_EXECUTOR, store_option
from evomerge.cli.stopping import Stop
from evomerge.documents import read_yaml
from evomerge.errors import SpecError, StoreUnreachable, UserError
from evomerge.service.controller import Mirror
from evomerge.service.executor import Executor
from evomerge.service.progress import View, make_view
from evomerge.service.report import Report, stored_report
from evomerge.service.study import build_controller, controlling, open_study, refuse_early
from evomerge.space import Gene
from evomerge.space.mergekit_evolve import is_mergekit_evolve, read_mergekit_evolve
from evomerge.spec import StudySpec, Workers, nearest
from evomerge.store import IN_MEMORY, open_store
from evomerge.store.base import StudyRecord

Change = Callable[[StudyRecord], StudyRecord]
"""What is to be written into a study before it goes on."""


def run_study(
    spec: StudySpec, url: str, executor_name: str, change: Change = lambda record: record
) -> Report:
    """Create or resume a study and run it to its end; the report when it is done.

    Raises typer.Exit(130) when it was interrupted, after saying how to go on.
    """
    view = make_view(sys.stderr)
    with Stop(view) as stop:
        try:
            return _run(spec, url, executor_name, view, stop, change)
        except KeyboardInterrupt:
            why = "stopped at once"
        except StoreUnreachable as error:
            if not stop.asked:
                raise
            why = f"stopped without the store ({error})"
    go_on = resume_command(spec.name, url, executor_name) if stop.began else "the same command"
    view.note(
        f"{why}; nothing finished is lost, and what was cut off will run again. To go on: {go_on}"
    )
    raise typer.Exit(130)


def _run(
    spec: StudySpec, url: str, executor_name: str, view: View, stop: Stop, change: Change
) -> Report:
    store = open_store(url)
    refuse_early(spec, store)
    with _executor(executor_name, spec.workers) as executor:
        view.note(f"study {spec.name}: checking models and tasks")
        record = change(open_study(spec, store, executor))
        with controlling(record, store) as token:

            def make_mirror(record: StudyRecord, genes: Sequence[Gene]) -> Mirror | None:
                return _mirror(url, record, genes)

            controller = build_controller(
                record,
                store,
                executor,
                token,
                make_mirror=make_mirror,
                watch=view.update,
                note=view.note,
            )
            with view, stop.gently(controller):
                done = controller.run()
    if not done:
        go_on = resume_command(spec.name, url, executor_name)
        view.note(f"stopped; nothing is lost. To go on: {go_on}")
        raise typer.Exit(130)
    return stored_report(store.study(spec.name), store)


def load_spec(path: Path, executor_name: str) -> StudySpec:
    """Read a spec. Raises SpecError with every problem: those of a faulty spec's checkpoints and
    tasks too, as far as it can be read, so that nobody has to mend it twice. A mergekit-evolve file
    is a spec as well; what is done another way here is noted on standard error.
    """
    document = read_yaml(path)
    if is_mergekit_evolve(document):
        converted, notes = read_mergekit_evolve(document, path)
        for note in notes:
            make_view(sys.stderr).note(f"{path.name}: {note}")
        spec, problems = StudySpec.examine_document(converted, path)
    else:
        spec, problems = StudySpec.examine(path)
    if spec is None or problems:
        if spec is not None:
            problems += _inspected(spec, executor_name)
        raise SpecError(str(path), problems)
    return spec


def _inspected(spec: StudySpec, executor_name: str) -> list[str]:
    make_view(sys.stderr).note(f"study {spec.name}: checking models and tasks")
    try:
        with _executor(executor_name, spec.workers) as executor:
            executor.inspect(spec.model_dump(mode="json"))
    except SpecError as error:
        return error.problems
    return []


def resume_command(study: str, url: str, executor_name: str) -> str:
    """What to type to go on with a study; the store keeps the rest."""
    executor = "" if executor_name == DEFAULT_EXECUTOR else f" --executor {executor_name}"
    return f"evomerge resume {study}{store_option(url)}{executor}"


@contextlib.contextmanager
def _executor(name: str, workers: Workers) -> Iterator[Executor]:
    known = {point.name: point for point in entry_points(group="evomerge.executors")}
    if name not in known:
        raise UserError(f"unknown executor {name!r}{nearest(name, known)}")
    try:
        make = known[name].load()
    except ImportError as error:
        raise UserError(
            f"executor {name!r} is not installed ({error}); `pip install evomerge[{name}]`"
        ) from None
    executor: Executor = make(workers)
    finished = False
    try:
        yield executor
        finished = True
    finally:
        executor.close(now=not finished)


def _mirror(url: str, record: StudyRecord, genes: Sequence[Gene]) -> Mirror | None:
    if url == IN_MEMORY:
        return None
    from evomerge.store.mirror import OptunaMirror

    pareto = record.spec["objective"]["aggregate"] == "pareto"
    tasks = [task["task"] for task in record.spec["objective"]["tasks"]]
    names = tasks if pareto else ["mean"]
    return OptunaMirror(
        url,
        record.name,
        directions=len(names),
        gene_names=[gene.name for gene in genes],
        values={gene.name: gene.shown for gene in genes if gene.levels},
        metric_names=names,
    )
