"""The live view of a running study: a panel on a terminal, plain lines everywhere else.

Knows nothing of stores, executors or how a `Progress` is come by; it is told, and it shows.
Everything goes to the stream it was made for (standard error), so standard output stays data.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Protocol, Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

Phase = Literal["baselines", "search", "selection", "report"]

PLAIN_EVERY_S = 5.0
_MOST_TASKS = 8  # columns of task scores that fit beside the mean


@dataclass(frozen=True)
class Entry:
    """A model's scores on the search items: the objective's weighted mean, and task by task."""

    label: str
    mean: float
    tasks: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    """Where a study stands.

    `trials_*` count search trials; `evaluations_*` count the evaluations of the present phase when
    that is not the search (baselines, selection, report). `baselines` are base, best source,
    uniform average and best task arithmetic, as far as scored. `left_s` is None while unknown.
    """

    study: str
    phase: Phase
    trials_done: int
    trials_total: int
    evaluations_done: int = 0
    evaluations_total: int = 0
    failed: int = 0
    running: int = 0
    best: Entry | None = None
    baselines: tuple[Entry, ...] = ()
    elapsed_s: float = 0.0
    left_s: float | None = None


class View(Protocol):
    """Shows the progress of one study from `__enter__` to `__exit__`."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def update(self, progress: Progress) -> None:
        """Show the newest state; may be called as often as one likes."""

    def note(self, text: str) -> None:
        """Show a message that stays."""


def make_view(stream: TextIO) -> View:
    """A live panel if `stream` is a terminal that can redraw, else plain lines."""
    console = Console(file=stream)
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveView(console)
    return PlainView(stream)


def seconds_left(elapsed_s: float, work_done: float, work_left: float) -> float | None:
    """Seconds to go at the mean rate so far; None before anything was done.

    Work is in any one unit, say evaluations weighted by their share of the items. Count only what
    was done within `elapsed_s`: a resumed study starts at 0.
    """
    if work_left <= 0:
        return 0.0
    if work_done <= 0 or elapsed_s <= 0:
        return None
    return elapsed_s * work_left / work_done


def clock_text(seconds: float | None) -> str:
    """Seconds as `m:ss` or `h:mm:ss`; `?` for None."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class LiveView:
    """A panel that redraws itself in place."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, refresh_per_second=4, transient=False)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def update(self, progress: Progress) -> None:
        self._live.update(panel(progress))

    def note(self, text: str) -> None:
        self._console.print(Text(text))


class PlainView:
    """One line at each new phase and new best, otherwise at most every few seconds."""

    def __init__(
        self,
        stream: TextIO,
        *,
        every_s: float = PLAIN_EVERY_S,
        time_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream
        self._every_s = every_s
        self._time_s = time_s
        self._written_s = float("-inf")
        self._last: Progress | None = None
        self._line = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._last is not None:
            self._write(line(self._last))

    def update(self, progress: Progress) -> None:
        news = self._last is None or _news(self._last, progress)
        self._last = progress
        if news or self._time_s() - self._written_s >= self._every_s:
            self._write(line(progress))

    def note(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def _write(self, text: str) -> None:
        if text != self._line:
            print(text, file=self._stream, flush=True)
        self._line = text
        self._written_s = self._time_s()


def line(progress: Progress) -> str:
    """One line of `key=value` fields in a fixed order, for logs and grep.

    evomerge study=zoo phase=search trials=87/200 failed=1 running=2 elapsed=3:12 left=4:05
    best=0.8120 add=0.9000 sort=0.7240
    """
    fields = {
        "study": progress.study,
        "phase": progress.phase,
        "trials": f"{progress.trials_done}/{progress.trials_total}",
    }
    if progress.phase != "search":
        fields["evaluations"] = f"{progress.evaluations_done}/{progress.evaluations_total}"
    fields |= {
        "failed": str(progress.failed),
        "running": str(progress.running),
        "elapsed": clock_text(progress.elapsed_s),
        "left": clock_text(progress.left_s),
    }
    if progress.best is not None:
        scores = {"best": progress.best.mean, **progress.best.tasks}
        fields |= {name: f"{score:.4f}" for name, score in scores.items()}
    return "evomerge " + " ".join(f"{_word(k)}={_word(v)}" for k, v in fields.items())


def panel(progress: Progress) -> RenderableType:
    """What a terminal shows: the heading, a bar, and the best so far above the baselines."""
    parts: list[RenderableType] = [_heading(progress), _bar(progress)]
    if progress.best is not None or progress.baselines:
        parts.append(_scores(progress))
    return Group(*parts)


def _news(before: Progress, now: Progress) -> bool:
    if before.phase != now.phase:
        return True
    return now.best is not None and (before.best is None or now.best.mean > before.best.mean)


def _word(text: str) -> str:
    """Names are the user's: whatever would break a line or a field becomes an underscore."""
    return "".join(c if c.isprintable() and not c.isspace() else "_" for c in text)


def _heading(progress: Progress) -> Text:
    heading = Text.assemble((progress.study, "bold"), ": ", progress.phase)
    counts = [f"{progress.running} running"]
    if progress.failed:
        counts.append(f"{progress.failed} failed")
    counts.append(f"{clock_text(progress.elapsed_s)} elapsed")
    if progress.left_s is not None:
        counts.append(f"about {clock_text(progress.left_s)} left")
    return heading.append("  " + ", ".join(counts), style="dim")


def _bar(progress: Progress) -> Table:
    if progress.phase == "search":
        done, total, unit = progress.trials_done, progress.trials_total, "trials"
    else:
        done, total, unit = progress.evaluations_done, progress.evaluations_total, "evaluations"
    grid = Table.grid(padding=(0, 1))
    grid.add_row(
        ProgressBar(total=max(total, 1), completed=done, width=40), f"{done}/{total} {unit}"
    )
    return grid


def _scores(progress: Progress) -> Table:
    best = () if progress.best is None else (progress.best,)
    rows = [*best, *progress.baselines]
    tasks = list(dict.fromkeys(name for row in rows for name in row.tasks))[:_MOST_TASKS]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(Text("on the search items"), no_wrap=True)
    for name in ("mean", *tasks):
        table.add_column(Text(_word(name)), justify="right", overflow="ellipsis")
    for row in rows:
        style = "bold" if row is progress.best else ""
        cells = [f"{row.tasks[name]:.3f}" if name in row.tasks else "" for name in tasks]
        table.add_row(Text(row.label), f"{row.mean:.3f}", *cells, style=style)
    return table
