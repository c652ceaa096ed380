"""`evomerge` in a process group of its own, with workers that score without models.

See `synthetic_command` for how its parts are held up.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml
from run_synthetic import rows, run_synthetic

from evomerge.spec import StudySpec
from evomerge.store import open_store
from evomerge.store.base import StudyStore
from evomerge.testing.synthetic import Row, synthetic_spec
from evomerge.trial import State, Trial

COMMAND = Path(__file__).with_name("synthetic_command.py")
DEADLINE_S = 120.0  # nothing is timed: this ends a test that hangs


def until(what: Callable[[], Any]) -> Any:
    """Wait for something to be true; what it is."""
    deadline = time.monotonic() + DEADLINE_S
    while not (answer := what()):
        assert time.monotonic() < deadline, "waited for too long"
        time.sleep(0.01)
    return answer


class Place:
    """A folder with a small study's spec, its store, and the files that steer the processes."""

    def __init__(self, folder: Path, url: str | None = None, **changes: Any) -> None:
        self.folder = folder
        self.spec = synthetic_spec(
            **{"budget": {"trials": 6, "finalists": 2}, "workers": {"count": 2}, **changes}
        )
        (folder / "study.yaml").write_text(yaml.safe_dump(self.spec.model_dump(mode="json")))
        self.url = url or f"sqlite:///{folder / 'store.db'}"

    def evomerge(self, *arguments: str, **options: Any) -> Process:
        return Process(self, arguments, **options)

    def run(self, **options: Any) -> Process:
        return self.evomerge("run", str(self.folder / "study.yaml"), **options)

    def hold(self, what: str) -> None:
        (self.folder / f"hold-{what}").touch()

    def let_go(self, what: str) -> None:
        (self.folder / f"hold-{what}").unlink()

    def until_began(self, what: str, process: Process) -> None:
        began = (self.folder / f"began-{what}").exists
        until(lambda: began() or process.popen.poll() is not None)
        assert began(), process.said

    @property
    def store(self) -> StudyStore:
        return open_store(self.url, create=False)

    def trials(self) -> Sequence[Trial]:
        store = self.store
        try:
            return store.trials(self.spec.name)
        finally:
            store.close()

    def running(self) -> int:
        return sum(a.state is State.RUNNING for t in self.trials() for a in t.attempts)

    def failures(self) -> list[str]:
        """What failed attempts say."""
        attempts = [a for t in self.trials() for a in t.attempts]
        return [f"{a.failure.error}: {a.failure.message}" for a in attempts if a.failure]

    def table(self) -> list[Row]:
        store = self.store
        try:
            return rows(store, self.spec)
        finally:
            store.close()


def uninterrupted(spec: StudySpec) -> list[Row]:
    """The table of the study that nothing happened to."""
    store = open_store("memory://")
    assert run_synthetic(spec, store)
    return rows(store, spec)


class Process:
    """One `evomerge`, its standard error in a file."""

    def __init__(
        self,
        place: Place,
        arguments: Sequence[str],
        *,
        host: str | None = None,
        pages: int | None = None,
        **options: Any,
    ) -> None:
        settings = {"SYNTHETIC_HOST": host, "SYNTHETIC_PAGES": pages}
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "EVOMERGE_STORE": place.url,
            "SYNTHETIC_FOLDER": str(place.folder),
            **{name: str(value) for name, value in settings.items() if value is not None},
        }
        place.folder.joinpath("err").touch()
        self._said = place.folder / f"err-{len(list(place.folder.glob('err*')))}"
        with self._said.open("wb") as said:
            self.popen = subprocess.Popen(
                [sys.executable, str(COMMAND), "evomerge", *arguments],
                cwd=place.folder,
                env=environment,
                **{
                    "stdin": subprocess.DEVNULL,
                    "stdout": subprocess.PIPE,
                    "stderr": said,
                    "start_new_session": True,
                    **options,
                },
            )

    @property
    def said(self) -> str:
        return self._said.read_text()

    @property
    def last_line(self) -> str:
        return self.said.splitlines()[-1]

    def until_it_says(self, words: str) -> None:
        until(lambda: words in self.said or self.popen.poll() is not None)
        assert words in self.said, self.said

    def workers(self) -> list[psutil.Process]:
        return psutil.Process(self.popen.pid).children()

    def send(self, number: signal.Signals) -> None:
        """To the whole group, as a scheduler and a terminal do."""
        os.killpg(self.popen.pid, number)

    def end(self) -> int:
        """Its exit code, when it and all its workers are gone."""
        children = self.workers() if self.popen.poll() is None else []
        self.popen.communicate(timeout=DEADLINE_S)
        _gone, left = psutil.wait_procs(children, timeout=DEADLINE_S)
        assert not left
        return self.popen.returncode

    def kill(self) -> None:
        """Leave nothing running behind a test that failed."""
        if self.popen.poll() is None:
            os.killpg(self.popen.pid, signal.SIGKILL)
            self.popen.communicate()


def held_in_mid_search(place: Place, start: Callable[[], Process]) -> Process:
    """A run whose workers are all scoring and do not come to an end."""
    place.hold("score")
    process = start()
    place.until_began("score", process)
    until(lambda: place.running() == 2)
    return process
