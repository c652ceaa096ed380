"""Signs of life, from the model's forward pass to the executor."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evomerge.service import local, local_worker
from evomerge.service.executor import Job
from evomerge.service.local import LocalExecutor
from evomerge.service.local_worker import Signs
from evomerge.service.worker import Worker
from evomerge.spec import StudySpec, Workers

DEADLINE_S = 120.0  # nothing is timed: this ends a test that hangs


def test_signs_are_given_now_and_then() -> None:
    now_s, given = 0.0, []
    signs = Signs(given.append, time_s=lambda: now_s)
    signs.token = "t1"
    for _ in range(100):
        now_s += 0.25
        signs()
    assert given == [{"alive": "t1"}] * 5


def test_a_worker_beats_at_every_forward_pass(tiny_zoo: Path) -> None:
    spec = StudySpec.model_validate(
        {
            "name": "beats",
            "base": str(tiny_zoo / "base"),
            "sources": {"sort": str(tiny_zoo / "sort")},
            "objective": {"include_path": str(tiny_zoo / "tasks"), "tasks": ["sort"]},
            "budget": {"trials": 1},
            "evaluation": {"batch_size": 2},
        }
    ).model_dump(mode="json")
    beats: list[int] = []
    worker = Worker(beat=lambda: beats.append(1))
    inspection = worker.inspect(spec)
    worker.prepare(spec, inspection["digests"], inspection["dtype"])
    from evomerge.merging.recipe import ModelRef, Recipe, Source

    base = ModelRef(spec["base"], inspection["digests"][spec["base"]])
    sort = ModelRef(spec["sources"]["sort"], inspection["digests"][spec["sources"]["sort"]])
    source = Source("sort", sort, {"weight": 1.0})
    recipe = Recipe("task_arithmetic", base, (source,), {"lambda": 1.0}, dtype=inspection["dtype"])
    answer = worker.run("t1", recipe.to_json(), "search")
    assert "score" in answer, answer
    items = answer["score"]["tasks"]["sort"]["n"]
    assert len(beats) >= 2 + items // 2


class Busy:
    """A worker that gets on with its job until a file appears."""

    def __init__(self, *, beat: Any) -> None:
        self.name, self._beat = "busy", beat

    def run(self, token: str, recipe: dict[str, str], part: str) -> dict[str, Any]:
        while not Path(recipe["until"]).exists():
            time.sleep(0.01)
            self._beat()
        return {"token": token, "worker": self.name, "score": {"tasks": {}}, "seconds": {}}


@pytest.fixture
def executor(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalExecutor]:
    command = (
        sys.executable,
        "-c",
        "import sys; sys.path[:0] = sys.argv.pop(1).split(':'); "
        "import test_signs_of_life as us; us.be_busy()",
        ":".join([str(Path(__file__).parent), *sys.path]),
    )
    monkeypatch.setattr(local, "_COMMAND", command)
    executor = LocalExecutor(Workers())
    yield executor
    executor.close(now=True)


def be_busy() -> None:
    """What the executor starts here."""
    local_worker.Worker = Busy  # type: ignore[assignment,misc]
    local_worker._SIGN_EVERY_S = 0.0
    local_worker.main()


def test_the_local_executor_knows_which_jobs_get_on(
    executor: LocalExecutor, tmp_path: Path
) -> None:
    end = tmp_path / "end"
    executor.submit(Job("t1", {"until": str(end)}, "search"))
    deadline = time.monotonic() + DEADLINE_S
    for _ in range(2):
        while not (alive := executor.alive()):
            assert executor.poll(1.0) == []
            assert time.monotonic() < deadline
        assert alive == {"t1"}
    end.touch()
    while not (events := executor.poll(1.0)):
        assert time.monotonic() < deadline
    assert [event.token for event in events] == ["t1"]
    executor.alive()
    assert executor.alive() == set()
