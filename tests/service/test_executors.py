"""The executor contract, on local worker processes and on Ray actors."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest

from evomerge.errors import WorkerLost
from evomerge.service.executor import Executor, Setup
from evomerge.service.local import LocalExecutor
from evomerge.spec import StudySpec, Workers
from evomerge.store.base import StudyRecord
from evomerge.testing.executor_contract import ExecutorContract

pytestmark = pytest.mark.slow
TWO = Workers(count=2)


@pytest.fixture(scope="module")
def spec(tiny_zoo: Path) -> StudySpec:
    return StudySpec.model_validate(
        {
            "name": "contract",
            "base": str(tiny_zoo / "base"),
            "sources": {name: str(tiny_zoo / name) for name in ("reverse", "sort")},
            "objective": {"include_path": str(tiny_zoo / "tasks"), "tasks": ["compare", "sort"]},
            "budget": {"trials": 4},
        }
    )


def _record(spec: StudySpec, executor: Executor) -> StudyRecord:
    document = spec.model_dump(mode="json")
    inspection = dict(executor.inspect(document))
    document["space"] = inspection["space"]
    return StudyRecord(spec.name, document, inspection, "digest", datetime.now(UTC))


def _setup(record: StudyRecord) -> Setup:
    return Setup(record.spec, record.inspection["digests"], record.inspection["dtype"])


class _Prepared(ExecutorContract):
    @pytest.fixture(scope="class")
    @classmethod
    def record(cls, spec: StudySpec, executor: Executor) -> StudyRecord:
        return _record(spec, executor)

    @pytest.fixture(scope="class")
    @classmethod
    def setup(cls, record: StudyRecord, executor: Executor) -> Setup:
        return _setup(record)

    @pytest.fixture(autouse=True)
    def _prepare(self, executor: Executor, setup: Setup, request: pytest.FixtureRequest) -> None:
        if not getattr(request.cls, "prepared", False):
            executor.prepare(setup)
            request.cls.prepared = True


class TestLocalExecutor(_Prepared):
    @pytest.fixture(scope="class")
    @classmethod
    def executor(cls) -> Iterator[LocalExecutor]:
        executor = LocalExecutor(TWO)
        yield executor
        started = [process.popen.pid for process in executor._processes]
        executor.close(now=True)
        assert started
        assert not any(psutil.pid_exists(pid) for pid in started)

    @staticmethod
    def lose_a_worker(executor: Executor) -> None:
        assert isinstance(executor, LocalExecutor)
        busy = next(p for p in executor._processes if p.job is not None)
        busy.popen.kill()


class TestRayExecutor(_Prepared):
    @pytest.fixture(scope="class")
    @classmethod
    def executor(cls) -> Iterator[Executor]:
        pytest.importorskip("ray")
        from workers.executor import RayExecutor

        executor = RayExecutor(TWO)
        yield executor
        executor.close(now=True)

    @staticmethod
    def lose_a_worker(executor: Executor) -> None:
        from workers.executor import RayExecutor

        assert isinstance(executor, RayExecutor)
        busy = next(slot for slot in executor._slots if slot.token is not None)
        import ray

        ray.kill(busy.actor)


def test_a_worker_killed_in_the_inspection_is_replaced_once(
    spec: StudySpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor, started = LocalExecutor(TWO), []

    def start() -> object:
        process = LocalExecutor._start(executor)
        started.append(process)
        if len(started) in dying:
            process.popen.kill()
        return process

    monkeypatch.setattr(executor, "_start", start)
    dying = {1}
    assert executor.inspect(spec.model_dump(mode="json"))["space"]
    assert len(started) == 2
    executor._end(started[1])
    dying = {3, 4, 5}
    with pytest.raises(WorkerLost, match="died checking the spec"):
        executor.inspect(spec.model_dump(mode="json"))
    assert len(started) == 4
    executor.close(now=True)
