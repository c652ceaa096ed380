"""Two studies on one real Ray cluster and in one store, each with a controller process of its own.

The cluster's GPUs exist by name only, and scores are synthetic. Workers wait at a gate, so that who
has how many of them can be read while nothing moves.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from run_synthetic import rows, run_synthetic

pytest.importorskip("ray")

from ray.cluster_utils import Cluster

from evomerge.service.ledger import utc_now
from evomerge.spec import StudySpec
from evomerge.store import open_store
from evomerge.store.memory import MemoryStore
from evomerge.testing.synthetic import synthetic_spec

pytestmark = pytest.mark.slow
LEASE_S = 30.0
DEADLINE_S = 150.0  # nothing is timed: this ends a test that hangs

CONTROLLER = """
import sys, time
from pathlib import Path
from typing import Any

import ray

from evomerge.service import controller
from evomerge.service.study import build_controller, controlling, open_study
from evomerge.spec import StudySpec
from evomerge.store import open_store
from workers.executor import RayExecutor
import workers.executor

controller.CONTROLLER_LEASE_S = 3.0  # a tick each second
workers.executor._CROWD_S = 2.0
address, url, folder, document = sys.argv[1:]
ray.init(address=address, log_to_driver=False, logging_level="error")
spec = StudySpec.model_validate_json(document)
gate = str(Path(folder, spec.name))


class Actor:
    def __init__(self, board: Any) -> None:
        self._tasks: list[str] = []

    def ready(self) -> None:
        pass

    def inspect(self, spec: Any) -> Any:
        from evomerge.testing.synthetic import synthetic_inspection

        return {"inspection": synthetic_inspection(StudySpec.model_validate(spec))}

    def prepare(self, setup: Any) -> None:
        self._tasks = [task["task"] for task in setup["spec"]["objective"]["tasks"]]

    def run(self, token: str, recipe: Any, part: Any) -> Any:
        from evomerge.merging.recipe import Recipe
        from evomerge.testing.synthetic import synthetic_score

        here = Path(gate, token)
        here.touch()
        while not Path(gate, "open").exists() and here.exists():
            time.sleep(0.01)
        here.unlink(missing_ok=True)
        score = synthetic_score(Recipe.from_json(recipe), part, self._tasks)
        return {"token": token, "worker": "w", "seconds": {}, "score": score.to_json()}


store, executor = open_store(url), RayExecutor(spec.workers, actor=Actor)
try:
    record = open_study(spec, store, executor)
    with controlling(record, store) as token:
        assert build_controller(record, store, executor, token).run()
finally:
    executor.close(now=True)
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    head = {"num_cpus": 0, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        cluster.add_node(num_cpus=4, num_gpus=2)
    yield str(cluster.address)
    cluster.shutdown()


class Studies:
    """Controllers, each in a process, and the gates at which their workers wait."""

    def __init__(self, address: str, folder: Path) -> None:
        self.url, self._address, self._folder = f"sqlite:///{folder}/store.db", address, folder
        self._processes: list[subprocess.Popen[bytes]] = []
        self._store = open_store(self.url)
        self._known: Collection[str] = ()
        self._since = utc_now()

    def start(self, spec: StudySpec) -> subprocess.Popen[bytes]:
        self._gate(spec).mkdir()
        arguments = [self._address, self.url, str(self._folder), spec.model_dump_json()]
        with (self._folder / f"{spec.name}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", CONTROLLER, *arguments], stdout=log, stderr=log
            )
        self._processes.append(process)
        return process

    def running(self, spec: StudySpec) -> int:
        return len(list(self._gate(spec).iterdir()))

    def let_one_pass(self, spec: StudySpec) -> None:
        """End one attempt, once the study knows of the other's claim and has its new limit."""
        claims = {claim.study: claim for claim in self._store.claims(now=utc_now())}
        if len(claims) < 2 or claims.keys() != self._known:
            self._known, self._since = claims.keys(), utc_now()
        elif claims[spec.name].lease_until - timedelta(seconds=LEASE_S) > self._since:
            self._since = utc_now()
            for file in list(self._gate(spec).iterdir())[:1]:
                file.unlink(missing_ok=True)

    def open(self, *specs: StudySpec) -> None:
        for spec in specs:
            (self._gate(spec) / "open").touch()

    def wait(self, what: Callable[[], bool]) -> None:
        end = time.monotonic() + DEADLINE_S
        while not what():
            if time.monotonic() > end or any(p.poll() for p in self._processes):
                logs = [file.read_text()[-2000:] for file in self._folder.glob("*.log")]
                pytest.fail("\n".join(["the controllers did not do what was waited for", *logs]))
            time.sleep(0.05)

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        self._store.close()

    def _gate(self, spec: StudySpec) -> Path:
        return self._folder / spec.name


@pytest.fixture
def studies(address: str, tmp_path: Path) -> Iterator[Studies]:
    found = Studies(address, tmp_path)
    yield found
    found.end()


def spec(name: str, seed: int, **workers: int) -> StudySpec:
    sampler = {"name": "cmaes", "population": 4, "seed": seed}
    return synthetic_spec(
        name=name, sampler=sampler, workers={"num_gpus": 1, "count": 4, **workers}
    )


@pytest.mark.parametrize(("priority", "expected"), [(0, (2, 2)), (3, (1, 3))])
def test_two_studies_share_a_cluster(
    studies: Studies, priority: int, expected: tuple[int, int]
) -> None:
    first = spec("first", 1)
    second = spec("second", 2, priority=priority, count=3 if priority else 2)
    one = studies.start(first)
    studies.wait(lambda: studies.running(first) == 4)
    other = studies.start(second)

    def shared() -> bool:
        if (studies.running(first), studies.running(second)) == expected:
            return True
        if studies.running(first) > expected[0]:
            studies.let_one_pass(first)
        return False

    studies.wait(shared)
    studies.open(second)
    studies.wait(lambda: other.poll() == 0)
    studies.wait(lambda: studies.running(first) == 4)
    studies.open(first)
    studies.wait(lambda: one.poll() == 0)
    store = open_store(studies.url)
    for found in (first, second):
        alone = MemoryStore()
        run_synthetic(found, alone)
        assert rows(store, found) == rows(alone, found)
        assert all(len(t.attempts) <= 3 for t in store.trials(found.name)), "none was cut off"
    store.close()
