"""A scorer that never returns, in a real worker: found by its lease, ended, and tried again."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import synthetic_command
from run_synthetic import rows
from synthetic_processes import uninterrupted

from evomerge.errors import StudyStopped
from evomerge.service import local
from evomerge.service.executor import Executor
from evomerge.service.study import build_controller, controlling, open_study
from evomerge.spec import StudySpec
from evomerge.store.memory import MemoryStore
from evomerge.testing.store_builders import NOW
from evomerge.testing.synthetic import synthetic_spec
from evomerge.trial import State

LEASE_S = 100.0
NO_SIGN = "no result or sign of life within the lease of 100 s"
pytestmark = pytest.mark.slow


class Clock:
    """Stands still, but for while a process hangs."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._now = folder, NOW

    def __call__(self) -> datetime:
        if any(psutil.pid_exists(pid) for pid in hung(self._folder)):
            self._now += timedelta(seconds=LEASE_S / 4)
        return self._now


def hung(folder: Path) -> list[int]:
    """The processes that hang, or did until they were ended."""
    return [int(file.name.removeprefix("hung-")) for file in folder.glob("hung-*")]


@pytest.fixture(params=["local", "ray"])
def executor(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Executor]:
    monkeypatch.setenv("SYNTHETIC_FOLDER", str(tmp_path))
    executor = on_ray() if request.param == "ray" else on_this_machine(monkeypatch)
    yield executor
    executor.close(now=True)
    assert not any(psutil.pid_exists(pid) for pid in hung(tmp_path))


def on_this_machine(monkeypatch: pytest.MonkeyPatch) -> Executor:
    command = (sys.executable, synthetic_command.__file__, "worker")
    monkeypatch.setattr(local, "_COMMAND", command)
    return local.LocalExecutor(synthetic_spec().workers)


def on_ray() -> Executor:
    pytest.importorskip("ray")
    import ray

    from workers.actor import WorkerActor
    from workers.executor import RayExecutor

    class Actor(WorkerActor):
        def __init__(self, board: Any) -> None:
            super().__init__(board)
            self._worker = synthetic_command.Synthetic(beat=self._signs)  # type: ignore[assignment]

    ray.cloudpickle.register_pickle_by_value(synthetic_command)
    return RayExecutor(synthetic_spec().workers, actor=Actor)


def spec(**workers: Any) -> StudySpec:
    return synthetic_spec(
        budget={"trials": 4, "finalists": 1}, workers={"lease_s": LEASE_S, **workers}
    )


def run(study: StudySpec, store: MemoryStore, executor: Executor, clock: Clock) -> None:
    record = open_study(study, store, executor, clock=clock)
    with controlling(record, store, clock) as token:
        assert build_controller(record, store, executor, token, clock=clock).run()


def test_the_worker_is_ended_and_the_attempt_repeated(executor: Executor, tmp_path: Path) -> None:
    store, study = MemoryStore(), spec()
    (tmp_path / "hang-once").touch()
    run(study, store, executor, Clock(tmp_path))
    assert len(hung(tmp_path)) == 1
    assert rows(store, study) == uninterrupted(study)
    lost = [a for t in store.trials(study.name) for a in t.attempts if a.failure]
    assert len(lost) == 1
    assert NO_SIGN in str(lost[0].failure)


def test_a_candidate_that_always_hangs_is_given_up(executor: Executor, tmp_path: Path) -> None:
    store, study = MemoryStore(), spec(max_attempts=2)
    target = uninterrupted(study)[-1]
    (tmp_path / "hang").write_text(target.recipe_digest)
    run(study, store, executor, Clock(tmp_path))
    trials = store.trials(study.name)
    (given_up,) = [t for t in trials if t.state is State.FAIL]
    assert given_up.number == target.number
    assert [a.state for a in given_up.attempts] == [State.FAIL] * 2
    assert NO_SIGN in str(given_up.failure)
    assert len(set(hung(tmp_path))) == 2, "a new worker each time"


def test_where_all_hang_the_study_stops_with_the_reason(executor: Executor, tmp_path: Path) -> None:
    store, study = MemoryStore(), spec(max_attempts=2)
    (tmp_path / "hang").touch()
    with pytest.raises(StudyStopped, match=f"failed 2 times and nothing succeeds.*{NO_SIGN}"):
        run(study, store, executor, Clock(tmp_path))
    assert not any(t.state is State.FAIL for t in store.trials(study.name))
    (tmp_path / "hang").unlink()
    run(study, store, executor, Clock(tmp_path))
    assert rows(store, study) == uninterrupted(study)
