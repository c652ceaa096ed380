"""Asked to stop by a scheduler, a terminal or a person, at any time: real processes and signals."""

from __future__ import annotations

import fcntl
import os
import signal
import termios
from collections.abc import Callable
from pathlib import Path

import pytest
from postgres_server import Postgres
from synthetic_processes import (
    Place,
    Process,
    held_in_mid_search,
    uninterrupted,
    until,
)

from evomerge.errors import StoreError

pytestmark = pytest.mark.slow


def goes_on_to_the_same_end(place: Place, run: Callable[..., Process]) -> None:
    process = run(place)
    assert process.end() == 0, process.said
    assert place.table() == uninterrupted(place.spec)


STOPPED = "stopped; nothing is lost. To go on: evomerge resume synthetic"
AT_ONCE = (
    "nothing finished is lost, and what was cut off will run again. "
    "To go on: evomerge resume synthetic"
)


def test_a_signal_to_the_group_lets_running_attempts_finish(
    tmp_path: Path, run: Callable[..., Process]
) -> None:
    place = Place(tmp_path)
    process = held_in_mid_search(place, lambda: run(place))
    process.send(signal.SIGTERM)
    process.until_it_says("stopping once the running attempts are done")
    place.let_go("score")
    assert process.end() == 130
    assert STOPPED in process.last_line
    assert place.failures() == []
    assert place.running() == 0
    assert place.store.controller(place.spec.name) is None, "given up: the next one need not wait"
    goes_on_to_the_same_end(place, run)


def test_a_second_signal_stops_at_once(tmp_path: Path, run: Callable[..., Process]) -> None:
    place = Place(tmp_path)
    process = held_in_mid_search(place, lambda: run(place))
    process.send(signal.SIGTERM)
    process.until_it_says("stopping once the running attempts are done")
    process.send(signal.SIGTERM)
    assert process.end() == 130
    assert process.last_line == f"stopped at once; {AT_ONCE}"
    place.let_go("score")
    goes_on_to_the_same_end(place, run)
    assert len(place.failures()) == 2
    assert all("its controller ended" in line for line in place.failures())


def test_signals_to_workers_alone_change_nothing(
    tmp_path: Path, run: Callable[..., Process]
) -> None:
    place = Place(tmp_path)
    process = held_in_mid_search(place, lambda: run(place))
    for worker in process.workers():
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            worker.send_signal(number)
    place.let_go("score")
    assert process.end() == 0, process.said
    assert place.table() == uninterrupted(place.spec)
    assert place.failures() == []


def test_while_models_are_inspected(tmp_path: Path, run: Callable[..., Process]) -> None:
    place = Place(tmp_path)
    place.hold("inspect")
    process = run(place)
    place.until_began("inspect", process)
    process.send(signal.SIGTERM)
    assert process.end() == 130
    assert process.last_line.startswith("stopped at once; ")
    assert process.last_line.endswith("To go on: the same command"), "there is none to resume yet"
    with pytest.raises(StoreError, match="no study"):
        place.trials()
    place.let_go("inspect")
    goes_on_to_the_same_end(place, run)


def test_while_the_report_is_made(tmp_path: Path, run: Callable[..., Process]) -> None:
    place = Place(tmp_path)
    place.hold("report")
    process = run(place)
    place.until_began("report", process)
    process.send(signal.SIGTERM)
    assert process.end() == 130
    assert process.last_line == f"stopped at once; {AT_ONCE}"
    place.let_go("report")
    assert place.table() == uninterrupted(place.spec)
    again = run(place)
    out, _ = again.popen.communicate()
    assert again.popen.returncode == 0, again.said
    assert b"winner" in out


def test_a_terminal_that_is_closed(tmp_path: Path, started: list[Process]) -> None:
    """The kernel sends SIGHUP, and every word to the terminal is an error from then on."""
    place = Place(tmp_path)
    mine, theirs = os.openpty()

    def take_terminal() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def start() -> Process:
        started.append(
            place.run(
                stdin=theirs,
                stdout=theirs,
                stderr=theirs,
                preexec_fn=take_terminal,
            )
        )
        return started[-1]

    process = held_in_mid_search(place, start)
    os.close(theirs)
    os.close(mine)
    until(lambda: os.readlink(f"/proc/{process.popen.pid}/fd/2") == os.devnull)
    place.let_go("score")
    assert process.end() == 130
    assert place.failures() == []
    assert place.store.controller(place.spec.name) is None
    again = place.run()
    started.append(again)
    assert again.end() == 0, again.said
    assert place.table() == uninterrupted(place.spec)


def test_nohup_is_respected(tmp_path: Path, run: Callable[..., Process]) -> None:
    place = Place(tmp_path)

    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    process = held_in_mid_search(place, lambda: run(place, preexec_fn=ignore))
    process.send(signal.SIGHUP)
    place.let_go("score")
    assert process.end() == 0, process.said
    assert place.failures() == []
    assert place.table() == uninterrupted(place.spec)


def test_while_the_database_is_away(
    tmp_path: Path,
    run: Callable[..., Process],
    own_postgres: Postgres,
    postgres_url: str,
) -> None:
    place = Place(tmp_path, postgres_url)
    process = held_in_mid_search(place, lambda: run(place))
    own_postgres.stop()
    try:
        place.let_go("score")
        process.until_it_says("trying again for up to 300 s")
        process.send(signal.SIGTERM)
        assert process.end() == 130
    finally:
        own_postgres.start()
    assert process.last_line.startswith("stopped without the store (postgresql")
    assert process.last_line.endswith(AT_ONCE)
    assert "Traceback" not in process.said
    goes_on_to_the_same_end(place, run)
