"""The demo, killed for real: SIGKILL to controller and workers of the real command line.

What is compared with the uninterrupted run is the whole final trial table, bit for bit: genomes,
recipes, scores item by item.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from evomerge.errors import StoreError
from evomerge.store import open_store
from evomerge.testing.synthetic import Row, table
from evomerge.trial import State, Trial

TRIALS = 12
STUDY = "demo-0"
DEADLINE_S = 1200.0  # nothing is timed here; this only ends a test that hangs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * DEADLINE_S)]


class Demo:
    """One `evomerge demo` in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._popen: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "evomerge.cli.main", "demo", "--dir", str(self.folder)]
        log = (self.folder.parent / f"{self.folder.name}.log").open("ab")
        with log:
            self._popen = subprocess.Popen(
                [*command, "--trials", str(TRIALS)], stdout=log, stderr=log, env=environment()
            )

    def wait(self) -> int:
        assert self._popen is not None
        try:
            return self._popen.wait(timeout=DEADLINE_S)
        finally:
            self._popen.kill()

    def workers(self) -> list[psutil.Process]:
        assert self._popen is not None
        children = psutil.Process(self._popen.pid).children(recursive=True)
        return [child for child in children if "local_worker" in " ".join(child.cmdline())]

    def kill(self) -> None:
        """SIGKILL the controller; its workers must not outlive it."""
        assert self._popen is not None
        orphans = self.workers()
        self._popen.kill()
        self._popen.wait()
        _gone, alive = psutil.wait_procs(orphans, timeout=30)
        assert not alive, "workers outlived their controller"

    def end(self) -> None:
        """Leave nothing running behind a test that failed."""
        if self._popen is not None and self._popen.poll() is None:
            self._popen.kill()
            self._popen.wait()

    def trials(self) -> list[Trial]:
        try:
            store = open_store(f"sqlite:///{self.folder / 'evomerge.db'}", create=False)
            return list(store.trials(STUDY, outcomes=False))
        except StoreError:
            return []  # not there yet

    def until_finished(self, count: int) -> None:
        """Wait until so many trials are finished and one is running."""
        assert self._popen is not None
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            states = [trial.state for trial in self.trials()]
            if sum(s.finished for s in states) >= count and State.RUNNING in states:
                return
            assert self._popen.poll() is None, "the demo ended before it was to be killed"
            time.sleep(0.02)
        pytest.fail(f"{count} trials were not finished in {DEADLINE_S:g} s")

    def table(self) -> list[Row]:
        store = open_store(f"sqlite:///{self.folder / 'evomerge.db'}", create=False)
        return table(store.trials(STUDY))


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def whole(real_zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """The uninterrupted demo."""
    demo = _with_zoo(real_zoo, tmp_path_factory.mktemp("whole"))
    demo.start()
    assert demo.wait() == 0
    yield demo
    demo.end()


@pytest.fixture
def fresh(real_zoo: Path, tmp_path: Path) -> Iterator[Demo]:
    """A demo that has its zoo already and has searched nothing."""
    demo = _with_zoo(real_zoo, tmp_path)
    yield demo
    demo.end()


def _with_zoo(zoo: Path, folder: Path) -> Demo:
    shutil.copytree(zoo, folder / "demo" / "zoo-0")
    return Demo(folder / "demo")


def test_a_killed_controller_goes_on_where_it_was(whole: Demo, fresh: Demo) -> None:
    for finished in (3, 17, 23):
        fresh.start()
        fresh.until_finished(finished)
        fresh.kill()
    fresh.start()
    assert fresh.wait() == 0
    assert fresh.table() == whole.table()
    trials = fresh.trials()
    done = [(t.number, a.part) for t in trials for a in t.attempts if a.state is State.COMPLETE]
    assert len(done) == len(set(done)), "nothing is evaluated to the end twice"


def test_a_killed_worker_costs_one_attempt(whole: Demo, fresh: Demo) -> None:
    fresh.start()
    fresh.until_finished(8)
    victim = fresh.workers()[0]
    victim.send_signal(signal.SIGKILL)
    assert fresh.wait() == 0
    assert fresh.table() == whole.table()
    failed = [a for t in fresh.trials() for a in t.attempts if a.state is State.FAIL]
    assert len(failed) <= 1
    assert all(a.failure is not None and a.failure.error == "WorkerLost" for a in failed)
