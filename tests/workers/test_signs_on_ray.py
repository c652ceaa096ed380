"""Signs of life on a real local Ray: from an actor that works to the executor."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

import ray

from evomerge.service.executor import Job
from evomerge.spec import Workers
from evomerge.testing.executor_contract import collect, wait_for_room
from workers.actor import WorkerActor
from workers.executor import RayExecutor

pytestmark = pytest.mark.slow
DEADLINE_S = 120.0  # nothing is timed: this ends a test that hangs


def busy_actor() -> type:
    """An actor that works until one file appears, hangs until another does, and is done.

    Made here, so that Ray ships it by value.
    """

    class Busy:
        def __init__(self, beat: Callable[[], None]) -> None:
            self._beat = beat

        def run(self, token: str, recipe: dict[str, Any], part: str) -> dict[str, Any]:
            while not Path(recipe["ends"]).exists():
                time.sleep(0.01)
                if not Path(recipe["hangs"]).exists():
                    self._beat()
            name = threading.current_thread().name
            return {"token": token, "worker": name, "score": {"tasks": {}}, "seconds": {}}

    class Actor(WorkerActor):
        def __init__(self, board: Any) -> None:
            from evomerge.service import local_worker

            local_worker._SIGN_EVERY_S = 0.0
            super().__init__(board)
            self._worker = Busy(self._signs)  # type: ignore[assignment]

    return Actor


@pytest.fixture
def executor() -> Iterator[RayExecutor]:
    ticks = itertools.count()  # a second passes whenever the clock is looked at
    executor = RayExecutor(Workers(count=2), actor=busy_actor(), time_s=lambda: float(next(ticks)))
    yield executor
    executor.close(now=True)


def alive_soon(executor: RayExecutor) -> set[str]:
    deadline = time.monotonic() + DEADLINE_S
    while not (alive := set(executor.alive())):
        assert executor.poll(0.1) == []
        assert time.monotonic() < deadline, "no sign of life"
    return alive


def test_a_job_that_gets_on_is_told_from_one_that_hangs(
    executor: RayExecutor, tmp_path: Path
) -> None:
    wait_for_room(executor, 2)
    end, later = tmp_path / "end", tmp_path / "later"
    for token, hangs in (("works", later), ("hangs", tmp_path)):
        executor.submit(Job(token, {"ends": str(end), "hangs": str(hangs)}, "search"))
    for _ in range(5):
        assert alive_soon(executor) == {"works"}
    ray.kill(executor._board, no_restart=False)
    for _ in range(5):
        assert alive_soon(executor) == {"works"}, "a board that died is started anew"
    later.touch()
    deadline = time.monotonic() + DEADLINE_S
    answers = 0
    while answers < 3:  # one may be under way, one may tell of the time before
        assert time.monotonic() < deadline, "still said to be alive"
        asked = executor._signs
        assert executor.poll(0.1) == []
        if executor.alive():
            answers = 0
        elif asked is not None and executor._signs is None:
            answers += 1
    end.touch()
    events = collect(executor, 2)
    assert {event.worker for event in events.values()} == {"MainThread"}, "where alarms can be set"
