"""Local workers that refuse a study: another does the job, and it costs no attempt."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from run_synthetic import rows, run_synthetic

from evomerge.errors import InfrastructureError
from evomerge.service import local
from evomerge.service.local import LocalExecutor
from evomerge.service.study import build_controller, controlling, open_study
from evomerge.spec import Workers
from evomerge.store.memory import MemoryStore
from evomerge.testing.synthetic import synthetic_spec

# The real protocol of `local_worker` with synthetic scores; the worker whose turn is named refuses.
_WORKER = """
import os, pathlib, sys
from evomerge.service import local_worker
from evomerge.errors import VersionMismatch
from evomerge.merging.recipe import Recipe
from evomerge.spec import StudySpec
from evomerge.testing.synthetic import synthetic_inspection, synthetic_score

folder, refusing = pathlib.Path(sys.argv[1]), sys.argv[2].split(",")
turn = len(list(folder.iterdir()))
(folder / str(turn)).touch()

class Worker:
    def __init__(self, **_):
        self.name = f"worker {turn}"
    def inspect(self, spec):
        return synthetic_inspection(StudySpec.model_validate(spec))
    def prepare(self, spec, **_):
        if str(turn) in refusing or "all" in refusing:
            raise VersionMismatch("torch is 2.12.0 here and 2.13.0 in the study")
        self.tasks = [task["task"] for task in spec["objective"]["tasks"]]
    def run(self, token, recipe, part):
        if "dies" in refusing and turn == 0:
            os._exit(3)
        score = synthetic_score(Recipe.from_json(recipe), part, self.tasks).to_json()
        return {"token": token, "worker": self.name, "seconds": {}, "score": score}

local_worker.Worker = Worker
sys.argv = ["local_worker", sys.argv[3]]
local_worker.main()
"""


@pytest.fixture
def executor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[LocalExecutor]:
    monkeypatch.setattr(
        local, "_COMMAND", (sys.executable, "-c", _WORKER, str(tmp_path), request.param)
    )
    executor = LocalExecutor(Workers(count=3))
    yield executor
    executor.close(now=True)


def _study(executor: Any) -> MemoryStore:
    spec, store = synthetic_spec(), MemoryStore()
    record = open_study(spec, store, executor)
    with controlling(record, store) as token:
        assert build_controller(record, store, executor, token).run()
    return store


@pytest.mark.parametrize("executor", ["1", "0,2"], indirect=True)
def test_a_worker_that_refuses_costs_no_attempt(executor: LocalExecutor) -> None:
    """As when its libraries were replaced since the others were started."""
    calm = MemoryStore()
    run_synthetic(synthetic_spec(), calm)
    store = _study(executor)
    assert rows(store, synthetic_spec()) == rows(calm, synthetic_spec())
    attempts = [a for trial in store.trials("synthetic") for a in trial.attempts]
    assert all(attempt.failure is None for attempt in attempts)


@pytest.mark.parametrize("executor", ["all"], indirect=True)
def test_where_all_refuse_the_study_stops_with_the_reason(executor: LocalExecutor) -> None:
    spec, store = synthetic_spec(), MemoryStore()
    record = open_study(spec, store, executor)
    with controlling(record, store) as token:
        controller = build_controller(record, store, executor, token)
        with pytest.raises(InfrastructureError, match=r"no worker can.*torch is 2\.12\.0 here"):
            controller.run()
    attempts = [a for trial in store.trials("synthetic") for a in trial.attempts]
    assert all(attempt.failure is None for attempt in attempts)


@pytest.mark.parametrize("executor", ["1,2,3,4,5,6,dies"], indirect=True)
def test_where_the_last_one_that_did_not_refuse_dies_the_reason_is_said(
    executor: LocalExecutor,
) -> None:
    with pytest.raises(InfrastructureError, match=r"no worker can.*torch is 2\.12\.0 here"):
        _study(executor)
