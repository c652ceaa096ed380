"""A Ray cluster of several nodes on this machine, with GPUs that exist by name only.

Nodes join, leave and are killed in mid-search; what is compared is the study's final table, bit for
bit, with that of a run without Ray. Scores are synthetic, so that no node has to load torch.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from run_synthetic import rows, run_synthetic

pytest.importorskip("ray")

import ray
from ray._raylet import GcsClient  # as `ray drain-node` does; there is no public way
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from evomerge.service.executor import Event
from evomerge.service.study import build_controller, controlling, open_study
from evomerge.spec import Workers
from evomerge.store.memory import MemoryStore
from evomerge.testing.synthetic import Row, synthetic_spec
from evomerge.trial import Attempt, State
from workers.executor import RayExecutor

pytestmark = pytest.mark.slow
DEADLINE_S = 240.0  # nothing is timed: this ends a test that hangs


class Gate:
    """A folder that workers wait at while it is shut, leaving word of where they are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shut()

    def shut(self) -> None:
        (self.folder / "shut").touch()

    def open(self) -> None:
        (self.folder / "shut").unlink(missing_ok=True)

    def is_shut(self) -> bool:
        return (self.folder / "shut").exists()

    def waiting(self) -> set[str]:
        """The workers that wait, or have waited, as node:pid:gpus."""
        return {file.name for file in self.folder.iterdir() if file.name != "shut"}


def actor_at(gate: Gate) -> type:
    """An actor class with synthetic scores; made here, so that Ray ships it by value."""
    folder = str(gate.folder)

    class Actor:
        def __init__(self, board: Any) -> None:
            gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
            self._name = f"{ray.get_runtime_context().get_node_id()}:{os.getpid()}:{gpus}"
            self._tasks: list[str] = []

        def ready(self) -> None:
            pass

        def inspect(self, spec: Mapping[str, Any]) -> dict[str, Any]:
            from evomerge.spec import StudySpec
            from evomerge.testing.synthetic import synthetic_inspection

            return {"inspection": synthetic_inspection(StudySpec.model_validate(spec))}

        def prepare(self, setup: Mapping[str, Any]) -> None:
            self._tasks = [task["task"] for task in setup["spec"]["objective"]["tasks"]]

        def run(self, token: str, recipe: Mapping[str, Any], part: Any) -> dict[str, Any]:
            from evomerge.merging.recipe import Recipe
            from evomerge.testing.synthetic import synthetic_score

            Path(folder, self._name).touch()
            while Path(folder, "shut").exists():
                time.sleep(0.01)
            score = synthetic_score(Recipe.from_json(recipe), part, self._tasks)
            event = {"token": token, "worker": self._name, "seconds": {}}
            return {**event, "score": score.to_json()}

    return Actor


class Watched(RayExecutor):
    """Calls `meddle` with the number of events so far before each poll."""

    def __init__(self, workers: Workers, gate: Gate, meddle: Callable[[int], None]) -> None:
        super().__init__(workers, actor=actor_at(gate))
        self._meddle = meddle
        self._events = 0

    def poll(self, timeout_s: float) -> Sequence[Event]:
        self._meddle(self._events)
        events = super().poll(timeout_s)
        self._events += len(events)
        return events


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    head = {"num_cpus": 0, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def add_node(cluster: Cluster) -> Iterator[Callable[[int], Any]]:
    """Adds a node with so many GPUs; what a test has added goes with it."""
    added: list[Any] = []

    def add(gpus: int) -> Any:
        added.append(cluster.add_node(num_cpus=4, num_gpus=gpus))
        return added[-1]

    yield add
    for node in added:
        cluster.remove_node(node, allow_graceful=False)


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    folder = tmp_path / "gate"
    folder.mkdir()
    return Gate(folder)


@pytest.fixture(scope="module")
def undisturbed() -> list[Row]:
    """The table of the same study without Ray."""
    store = MemoryStore()
    assert run_synthetic(synthetic_spec(), store)
    return rows(store, synthetic_spec())


def study(executor: RayExecutor) -> tuple[list[Row], list[Attempt]]:
    """The whole study on this executor: its table, and every attempt."""
    spec, store = synthetic_spec(), MemoryStore()
    try:
        record = open_study(spec, store, executor)
        with controlling(record, store) as token:
            assert build_controller(record, store, executor, token).run()
    finally:
        executor.close(now=True)
    return rows(store, spec), [a for trial in store.trials(spec.name) for a in trial.attempts]


def nodes_of(workers: set[str]) -> list[str]:
    return sorted(worker.split(":")[0] for worker in workers)


def within_deadline() -> Callable[[], None]:
    end = time.monotonic() + DEADLINE_S

    def check() -> None:
        assert time.monotonic() < end, "the cluster did not do what was waited for"

    return check


def test_half_gpus_hold_two_workers_each_on_both_nodes(
    add_node: Callable[[int], Any], gate: Gate, undisturbed: list[Row]
) -> None:
    nodes = [add_node(1).node_id for _ in range(2)]
    check = within_deadline()

    def open_when_full(events: int) -> None:
        check()
        if len(gate.waiting()) == 4:
            gate.open()

    table, attempts = study(Watched(Workers(count=9, num_gpus=0.5), gate, open_when_full))
    assert table == undisturbed
    workers = {attempt.worker for attempt in attempts}
    assert nodes_of(workers) == sorted(2 * nodes), "two workers on each node's one GPU"
    assert all(attempt.state is State.COMPLETE for attempt in attempts)


@pytest.mark.parametrize("notice", [False, True], ids=["no notice", "notice"])
def test_a_node_that_joins_is_used_and_one_that_is_killed_costs_nothing(
    cluster: Cluster,
    add_node: Callable[[int], Any],
    gate: Gate,
    undisturbed: list[Row],
    notice: bool,
) -> None:
    first, late = add_node(1), []
    gate.open()
    check = within_deadline()

    def join_then_die(events: int) -> None:
        check()
        if events >= 3 and not late:
            gate.shut()
            late.append(add_node(1))
        if late and late[0].node_id in nodes_of(gate.waiting()):
            if notice and gate.is_shut():
                announce_the_end(cluster, late[0])
            kill(late[0])
            gate.open()

    table, attempts = study(Watched(Workers(count=2, num_gpus=1), gate, join_then_die))
    assert table == undisturbed
    lost = [attempt for attempt in attempts if attempt.state is not State.COMPLETE]
    assert [attempt.failure.error for attempt in lost if attempt.failure] == ["NodeLost"]
    assert set(nodes_of(gate.waiting())) == {first.node_id, late[0].node_id}


def test_two_gpus_for_one_worker_lie_on_one_node(
    add_node: Callable[[int], Any], gate: Gate, undisturbed: list[Row]
) -> None:
    add_node(1)
    large = add_node(2)
    gate.open()
    check = within_deadline()
    watched = Watched(Workers(count=2, num_gpus=2), gate, lambda events: check())
    table, attempts = study(watched)
    assert table == undisturbed
    (worker,) = {attempt.worker for attempt in attempts}
    assert worker is not None
    node, _pid, gpus = worker.split(":")
    assert node == large.node_id
    assert sorted(gpus.split(",")) == ["0", "1"]


def announce_the_end(cluster: Cluster, node: Any) -> None:
    """Tell Ray what a node on SIGTERM tells it: it takes no more work and is gone in a moment."""
    reason = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    deadline_ms = int(time.time() * 1000) + 1000
    accepted, why = GcsClient(address=cluster.address).drain_node(
        node.node_id, reason, "the spot instance is taken back", deadline_ms
    )
    assert accepted, why


def kill(node: Any) -> None:
    """SIGKILL to all of a node's processes, as when its machine is taken away."""
    raylets = [psutil.Process(info.process.pid) for info in node.all_processes["raylet"]]
    everything = [p for raylet in raylets for p in (raylet, *raylet.children(recursive=True))]
    for process in everything:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
