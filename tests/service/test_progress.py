"""The live view: what a terminal shows, and lines that a log can be searched for."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from evomerge.service.progress import (
    Entry,
    LiveView,
    PlainView,
    Progress,
    clock_text,
    line,
    make_view,
    panel,
    seconds_left,
)

NOW = Progress(
    study="zoo",
    phase="search",
    trials_done=87,
    trials_total=200,
    failed=3,
    running=2,
    best=Entry("trial 103", 0.812, {"add": 0.9, "sort": 0.724}),
    baselines=(Entry("base", 0.2, {"add": 0.1, "sort": 0.3}), Entry("best source", 0.5)),
    elapsed_s=192,
    left_s=245,
)


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def shown(progress: Progress) -> str:
    console = Console(record=True, width=90, file=io.StringIO())
    console.print(panel(progress))
    return console.export_text()


def test_the_time_left_goes_by_the_rate_so_far() -> None:
    assert seconds_left(10, 5, 20) == 40
    assert seconds_left(10, 5, 0) == 0
    assert seconds_left(10, 0, 20) is None
    assert seconds_left(0, 0, 0) == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "?"), (0, "0:00"), (59.6, "1:00"), (192, "3:12"), (3600, "1:00:00"), (7325, "2:02:05")],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert clock_text(seconds) == text


def test_the_line_is_stable() -> None:
    assert line(NOW) == (
        "evomerge study=zoo phase=search trials=87/200 failed=3 running=2 "
        "elapsed=3:12 left=4:05 best=0.8120 add=0.9000 sort=0.7240"
    )


def test_other_phases_count_evaluations() -> None:
    report = replace(NOW, phase="report", evaluations_done=2, evaluations_total=7, best=None)
    assert "phase=report trials=87/200 evaluations=2/7 failed=3" in line(report)
    assert "2/7 evaluations" in shown(report)


def test_a_name_cannot_break_the_line() -> None:
    hostile = replace(NOW, best=Entry("x", 0.5, {"a b\nc\x1b[31m=": 0.1}))
    text = line(hostile)
    assert text.isprintable()
    assert "a_b_c_[31m==0.1000" in text


def test_the_panel_shows_everything() -> None:
    text = shown(NOW)
    for word in ("zoo", "search", "87/200 trials", "2 running", "3 failed", "3:12", "4:05 left"):
        assert word in text
    assert "trial 103" in text
    assert "0.812" in text
    assert "0.724" in text
    assert "best source" in text


def test_the_panel_at_the_very_start() -> None:
    text = shown(Progress("zoo", "baselines", 0, 200, 0, 14))
    assert "0/14 evaluations" in text
    assert "left" not in text


def test_many_long_tasks_keep_the_mean_visible() -> None:
    tasks = {f"a_task_with_a_long_name_{i}": 0.5 for i in range(10)}
    text = shown(replace(NOW, best=Entry("trial 7", 0.8125, tasks), baselines=()))
    assert "0.812" in text
    assert max(len(row) for row in text.splitlines()) <= 90


def test_markup_in_names_is_text() -> None:
    text = shown(replace(NOW, study="[bold]x", best=Entry("[red]y", 0.5, {"[b]t": 0.5})))
    assert "[bold]x" in text
    assert "[red]y" in text
    assert "[b]t" in text


def test_plain_lines_come_at_news_and_otherwise_seldom() -> None:
    stream, clock = io.StringIO(), Clock()
    with PlainView(stream, every_s=5, time_s=clock) as view:
        view.update(NOW)  # the first
        view.update(replace(NOW, trials_done=88))  # too soon
        clock.now_s = 4.9
        view.update(replace(NOW, trials_done=89))  # too soon
        clock.now_s = 5.0
        view.update(replace(NOW, trials_done=90))
        view.update(replace(NOW, trials_done=91, best=Entry("t", 0.9)))  # a new best
        view.update(replace(NOW, trials_done=92, best=Entry("t", 0.9)))  # too soon
        view.update(replace(NOW, phase="selection", best=Entry("t", 0.9)))  # a new phase
    trials = [part.split()[0] for part in stream.getvalue().split("trials=")[1:]]
    assert trials == ["87/200", "90/200", "91/200", "87/200"]


def test_the_last_state_is_written_once() -> None:
    stream = io.StringIO()
    with PlainView(stream, time_s=Clock()) as view:
        view.update(NOW)
        view.update(replace(NOW, trials_done=200))
    assert [text.split("trials=")[1][:7] for text in stream.getvalue().splitlines()] == [
        "87/200 ",
        "200/200",
    ]


def test_notes_appear_in_both_views() -> None:
    stream = io.StringIO()
    with PlainView(stream) as view:
        view.note("worker 1 was lost")
    assert stream.getvalue() == "worker 1 was lost\n"
    console = Console(record=True, width=80, force_terminal=True, file=io.StringIO())
    with LiveView(console) as live:
        live.update(NOW)
        live.note("[dim]worker 1 was lost")
    assert "[dim]worker 1 was lost" in console.export_text()
    assert "87/200 trials" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_file_gets_lines_and_a_terminal_gets_a_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    assert isinstance(make_view(io.StringIO()), PlainView)
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(make_view(Terminal()), LiveView)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_view(Terminal()), PlainView)
