"""The final table: every baseline and the winner on the report items, then what the tests say.

For a terminal, and as plain Markdown text that can be pasted into a README as it is. Knows nothing
of trials; a `Report` in, a table out.
"""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.measure import Measurement as RichMeasurement
from rich.table import Table
from rich.text import Text

from evomerge.service.measurement import Interval, Measurement
from evomerge.service.report import Candidate, Report

Row = tuple[str, Measurement]


def final_table(report: Report) -> Table:
    """Rows: base, each source, the averages that were scored, winner; columns: mean, tasks."""
    title = Text(f"{report.study}: report items")
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    header, *rows = _cells(report)
    for place, name in enumerate(header):
        stacked = Text(name.replace(" (n=", "\n(n="))
        table.add_column(stacked, justify="right" if place else "left", no_wrap=True)
    for cells in rows:
        best = report.winner is not None and cells[0] == _winner_label(report.winner)
        table.add_row(*(Text(cell) for cell in cells), style="bold" if best else "")
    return table


def print_report(report: Report, console: Console) -> None:
    """The table and what it means; as plain text where the table has no room or no terminal."""
    table = final_table(report)
    endless = console.options.update_width(10_000)
    width = RichMeasurement.get(console, endless, table).maximum
    if console.is_terminal and width <= console.width:
        console.print(table)
        text = "\n".join(sentences(report))
    else:
        text = final_text(report)
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def final_text(report: Report) -> str:
    """The table in aligned Markdown, the verdict, one sentence for each comparison, the notes."""
    rows = [[_escape(cell) for cell in row] for row in _cells(report)]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    rule = [f"{'-' * widths[0]}", *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    lines = [_markdown(row, widths) for row in (rows[0], rule, *rows[1:])] if rows[1:] else []
    return "\n".join([*lines, *([""] if lines else []), *sentences(report)])


def sentences(report: Report) -> list[str]:
    """What the table means, one sentence a line."""
    return [report.verdict, *(o.sentence for o in report.comparisons), *report.notes]


def rows_of(report: Report) -> list[Row]:
    """Label and measurement of every candidate that was scored on the report items."""
    return [
        (label, candidate.report)
        for label, candidate in _labelled(report)
        if candidate is not None and candidate.report is not None
    ]


def _labelled(report: Report) -> Iterator[tuple[str, Candidate | None]]:
    best = report.baselines.get("best_source")
    yield "base", report.baselines.get("base")
    for name, source in report.sources.items():
        is_best = (
            best is not None and source is not None and source.trial.number == best.trial.number
        )
        yield f"source {name} (best)" if is_best else f"source {name}", source
    yield "uniform average", report.baselines.get("uniform")
    scaled = report.baselines.get("task_arithmetic")
    yield f"{scaled.title} (best)" if scaled else "task arithmetic", scaled
    yield "as published", report.baselines.get("published")
    yield (_winner_label(report.winner) if report.winner else "winner"), report.winner


def _winner_label(winner: Candidate) -> str:
    return f"winner ({winner.title})"


def _cells(report: Report) -> list[list[str]]:
    rows = rows_of(report)
    items = rows[0][1].items if rows else {}
    total = sum(items.values())
    tasks = [f"{task} (n={n})" for task, n in items.items()]
    header = ["model", f"mean (n={total})", "95% interval", *tasks]
    return [header, *([label, *_scores(m)] for label, m in rows)]


def _scores(measurement: Measurement) -> list[str]:
    tasks = [f"{value:.3f}" for value in measurement.values.values()]
    return [f"{measurement.mean:.3f}", _interval(measurement.mean_interval), *tasks]


def _interval(interval: Interval | None) -> str:
    return "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"


def _escape(cell: str) -> str:
    return "".join(c if c.isprintable() else " " for c in cell).replace("|", "\\|")


def _markdown(row: list[str], widths: list[int]) -> str:
    first, *rest = row
    right = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
    return f"| {' | '.join([first.ljust(widths[0]), *right])} |"
