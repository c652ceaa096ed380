"""The Ray executor: one actor for each worker, on a local Ray or a running cluster.

Weights never travel through Ray: every actor memory-maps the sources itself, and only recipes and
scores cross. Ray's own retries are off, since attempts are the controller's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from evomerge.errors import InfrastructureError, UserError, WorkerLost
from evomerge.service.executor import Event, Job, Setup
from evomerge.service.wire import event_of, read_inspection
from evomerge.spec import Workers
from evomerge.trial import Failure
from workers.actor import WorkerActor

_BOOT_S = 300.0


@dataclass
class _Slot:
    """An actor and the job it runs; `pending` until the cluster has placed it."""

    actor: Any
    pending: Any  # the ref of its first answer, None once that came
    token: str | None = None


class RayExecutor:
    """Runs up to `workers.count` actors, as many of them as the cluster has room for.

    While there are fewer, one more is always asked for: it starts to work when there is room.
    Joins the cluster of RAY_ADDRESS, else starts a local Ray that ends with the executor. Raises
    UserError where the cluster cannot be joined.
    """

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._slots: list[_Slot] = []
        self._running: dict[Any, _Slot] = {}  # result ref -> slot
        self._setup: Setup | None = None
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            _join(workers)

    def inspect(self, spec: Mapping[str, Any]) -> Mapping[str, Any]:
        """See Executor.inspect."""
        slot = self._slots[0] if self._slots else self._start()
        try:
            ray.get(slot.pending or slot.actor.ready.remote(), timeout=_BOOT_S)
            slot.pending = None
            # reads every byte of every checkpoint: no limit on that
            return read_inspection(ray.get(slot.actor.inspect.remote(dict(spec))))
        except GetTimeoutError:
            raise InfrastructureError(_no_room(self._workers)) from None
        except RayError as error:
            raise WorkerLost(f"the worker died checking the spec: {_one_line(error)}") from None

    def prepare(self, setup: Setup) -> None:
        """See Executor.prepare."""
        self._setup = setup
        for slot in self._slots:
            slot.actor.prepare.remote(setup.to_json())

    def free(self) -> int:
        """See Executor.free. An actor counts once the cluster has placed it."""
        self._grow()
        return sum(slot.pending is None and slot.token is None for slot in self._slots)

    def submit(self, job: Job) -> None:
        """See Executor.submit."""
        slot = next(s for s in self._slots if s.pending is None and s.token is None)
        slot.token = job.token
        result = slot.actor.run.remote(job.token, dict(job.recipe), job.part)
        self._running[result] = slot

    def cancel(self, token: str) -> None:
        """See Executor.cancel."""
        for result, slot in list(self._running.items()):
            if slot.token == token:
                del self._running[result]
                self._end(slot)

    def poll(self, timeout_s: float) -> Sequence[Event]:
        """See Executor.poll."""
        waiting = [*self._running, *(s.pending for s in self._slots if s.pending is not None)]
        if not waiting:
            time.sleep(timeout_s)
            return []
        ready, _ = ray.wait(waiting, num_returns=1, timeout=timeout_s)
        if ready:  # and whatever else is there by now
            ready, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0)
        return [self._collect(result) for result in ready if result in self._running]

    def close(self, *, now: bool) -> None:
        """See Executor.close."""
        if not now and self._running:
            ray.wait(list(self._running), num_returns=len(self._running))
        self._running.clear()
        for slot in list(self._slots):
            self._end(slot)
        if self._owns_ray:
            ray.shutdown()

    def _grow(self) -> None:
        """See which actors the cluster has placed, and ask for one more if that is all of them."""
        for slot in [slot for slot in self._slots if slot.pending is not None]:
            self._settle(slot)
        placed = all(slot.pending is None for slot in self._slots)
        if placed and len(self._slots) < self._workers.count:
            self._start()

    def _settle(self, slot: _Slot) -> None:
        if not ray.wait([slot.pending], timeout=0)[0]:
            return
        try:
            ray.get(slot.pending)
            slot.pending = None
        except RayError as error:
            self._end(slot)
            if not self._slots:
                reason = _one_line(error)
                raise InfrastructureError(f"a Ray actor died while it started: {reason}") from None

    def _start(self) -> _Slot:
        threads = str(self._workers.num_cpus)
        environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads,
                       "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
        actor = ray.remote(WorkerActor).options(
            num_cpus=self._workers.num_cpus,
            num_gpus=self._workers.num_gpus,
            max_restarts=0,
            max_task_retries=0,
            runtime_env={"env_vars": environment},
        )
        started = actor.remote()
        slot = _Slot(started, started.ready.remote())
        self._slots.append(slot)
        if self._setup is not None:
            slot.actor.prepare.remote(self._setup.to_json())
        return slot

    def _collect(self, result: Any) -> Event:
        slot = self._running.pop(result)
        token, slot.token = slot.token or "", None
        try:
            return event_of(ray.get(result))
        except RayError as error:
            self._end(slot)
            failure = Failure(WorkerLost.__name__, f"the Ray actor died: {_one_line(error)}")
            return Event(token, "ray", failure=failure)

    def _end(self, slot: _Slot) -> None:
        self._slots.remove(slot)
        ray.kill(slot.actor)


def _join(workers: Workers) -> None:
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(address=address, log_to_driver=False)
            return
        cpus = max(os.cpu_count() or 1, workers.count * workers.num_cpus)
        ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level="error")
    except (RayError, ConnectionError, ValueError) as error:
        where = address or "this machine"
        raise UserError(f"cannot join Ray at {where}: {_one_line(error)}") from None


def _no_room(workers: Workers) -> str:
    return (
        f"Ray gave no worker {workers.num_cpus} CPUs and {workers.num_gpus:g} GPUs within "
        f"{_BOOT_S:g} s; the cluster has {ray.cluster_resources()}"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
