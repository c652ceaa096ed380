"""The Ray executor: one actor for each worker, on a local Ray or a running cluster.

Weights never travel through Ray: every actor memory-maps the sources itself, and only recipes and
scores cross. Ray's own retries are off, since attempts are the controller's. Knows nothing of
nodes: Ray places actors, and what fails again and again rests where it is.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import (
    ActorUnavailableError,
    AuthenticationError,
    GetTimeoutError,
    NodeDiedError,
    RayActorError,
    RayError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from evomerge.errors import InfrastructureError, NodeLost, UserError, WorkerLost
from evomerge.service.executor import Event, Job, Pool, Setup
from evomerge.service.wire import event_of, read_inspection
from evomerge.spec import Workers
from evomerge.trial import Failure
from workers.actor import SignBoard, WorkerActor
from workers.waiting import BOOT_S, Waiting, asked_for, lacking

_BOOTS = 3
_ASK_EVERY_S = 1.0
_LONGEST_REST_S = 64.0
_CROWD_S = 15.0  # longer than a controller takes to learn that its share has grown
_log = logging.getLogger(__name__)
_NODE_DIED = "its node has died"  # of an ActorDiedError only the text says it


@dataclass
class _Slot:
    """A place for one worker: its actor, the job it runs, and how its attempts fare."""

    actor: Any
    pending: Any  # the ref of the answer that says it is fit, None once that came
    token: str | None = None
    well: bool = False  # its last attempt came back whole
    strikes: int = 0  # failures since then for which no candidate is to blame
    rests_until_s: float = 0.0
    worn: bool = False  # needs a new actor before its next job
    refusal: str = ""  # why it cannot do this study's jobs

    def is_free(self, now_s: float) -> bool:
        """Whether a job can start here now: the cluster has placed it, nothing runs, no rest."""
        return not (self.pending or self.worn or self.token or self.rests_until_s > now_s)


class RayExecutor:
    """Runs up to `workers.count` actors, as many of them as the cluster has room for.

    The actors it has no room for stay asked for: they start to work when a node joins, and are the
    demand that an autoscaler sees. A worker that fails twice in a row starts anew and, where others
    do well, rests first, longer each time; it keeps its place meanwhile, so that a broken machine
    does not draw the next worker in. Where all fail alike none rests: the study is to stop soon.
    A worker that refuses the study gets no job, and is asked again by a new actor now and then.
    Joins the cluster of RAY_ADDRESS, else starts a local Ray that ends with the executor. Raises
    UserError where the cluster cannot be joined.
    """

    def __init__(
        self,
        workers: Workers,
        *,
        actor: type = WorkerActor,
        time_s: Callable[[], float] = time.monotonic,
    ) -> None:
        if workers.num_gpus > 1 and workers.num_gpus % 1:
            raise UserError(
                f"workers.num_gpus: Ray grants a part of one GPU or whole GPUs, not "
                f"{workers.num_gpus:g}"
            )
        self._workers = workers
        self._actor = actor
        self._time_s = time_s
        self._slots: list[_Slot] = []
        self._limit = workers.count
        self._crowd_until_s = 0.0  # until then nothing is asked for above the limit
        self._running: dict[Any, _Slot] = {}  # result ref -> slot
        self._setup: Setup | None = None
        self._joined = ray.is_initialized()  # by our caller, who leaves it too
        self._may_grow = self._joined or "RAY_ADDRESS" in os.environ
        if not self._joined:
            _join(workers)
        self._board = _board()
        self._signs: Any = None  # the ref of the board's next answer
        self._ask_at_s = 0.0
        self._waiting = Waiting(workers, time_s)

    def inspect(self, spec: Mapping[str, Any]) -> Mapping[str, Any]:
        """See Executor.inspect."""
        self._check_size()
        for tried in range(1, _BOOTS + 1):
            slot = self._slots[0] if self._slots else self._add()
            try:
                return self._inspect_on(slot, spec)
            except GetTimeoutError:
                raise InfrastructureError(_no_room(self._workers)) from None
            except RayError as error:  # its machine may be gone; another can do the same
                self._end(slot)
                if tried == _BOOTS:
                    reason = f"{tried} workers died checking the spec; the last: {_one_line(error)}"
                    raise WorkerLost(reason) from None
        raise AssertionError("the last try returns or raises")

    def prepare(self, setup: Setup) -> None:
        """See Executor.prepare."""
        self._setup = setup
        self._waiting = Waiting(self._workers, self._time_s)
        for slot in self._slots:
            if slot.refusal:
                slot.refusal, slot.rests_until_s = "", 0.0
            if not slot.worn:
                slot.pending = slot.actor.prepare.remote(setup.to_json())

    def free(self) -> int:
        """See Executor.free. An actor counts once the cluster has placed it."""
        self._give_back()
        self._grow()
        now_s = self._time_s()
        idle = sum(slot.is_free(now_s) for slot in self._slots)
        return max(0, min(idle, self._limit - len(self._running)))

    def pool(self) -> Pool:
        """See Executor.pool: the cluster's live nodes. No node holds a part of a worker."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        worker = {"CPU": float(self._workers.num_cpus), "GPU": self._workers.num_gpus}
        fits = [min(node.get(r, 0) / need for r, need in worker.items() if need) for node in nodes]
        resources = {r: sum(node.get(r, 0) for node in nodes) for r in worker}
        name = ray.get_runtime_context().get_session_name()
        return Pool(name, resources, worker, sum(int(n + 1e-9) for n in fits))

    def limit(self, count: int | None) -> None:
        """See Executor.limit. Actors above it stay asked for: an autoscaler may have room for
        them, or another study's controller go without a word.
        """
        self._limit = self._workers.count if count is None else min(count, self._workers.count)

    def submit(self, job: Job) -> None:
        """See Executor.submit."""
        now_s = self._time_s()
        free = (slot for slot in self._slots if slot.is_free(now_s))
        slot = min(free, key=lambda slot: slot.strikes)
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
        if self._setup is not None and self._limit:
            fit = sum(slot.pending is None and not slot.worn for slot in self._slots)
            self._waiting.look(fit=fit, refusals=[s.refusal for s in self._slots if s.refusal])
        pending = {slot.pending: slot for slot in self._slots if slot.pending is not None}
        waiting = [*self._running, *pending]
        if not waiting:
            time.sleep(timeout_s)
            return []
        # to look costs a tenth of what it costs to wait, with a thousand actors
        ready, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0)
        if not ready:
            ready, _ = ray.wait(waiting, num_returns=1, timeout=timeout_s)
        for answer in ready:
            if answer in pending:
                self._settle(pending[answer])
        return [self._collect(result) for result in ready if result in self._running]

    def alive(self) -> Collection[str]:
        """See Executor.alive. Does not wait: what the board says comes with a later call."""
        if self._signs is None:
            if self._running and self._time_s() >= self._ask_at_s:
                self._signs = self._board.take.remote()
                self._ask_at_s = self._time_s() + _ASK_EVERY_S
            return ()
        if not ray.wait([self._signs], num_returns=1, timeout=0)[0]:
            return ()
        answer, self._signs = self._signs, None
        try:
            return set(ray.get(answer))
        except RayError:  # Ray starts the board anew
            return ()

    def close(self, *, now: bool) -> None:
        """See Executor.close."""
        if not now and self._running:
            ray.wait(list(self._running), num_returns=len(self._running))
        self._running.clear()
        for slot in self._slots:
            ray.kill(slot.actor)
        self._slots.clear()
        ray.kill(self._board)
        if not self._joined:
            ray.shutdown()

    def _check_size(self) -> None:
        """Say at once that no node is large enough. Only a cluster of others' may still grow."""
        missing = lacking(self._workers, ray.nodes())
        if missing and not self._may_grow:
            raise UserError(missing)
        if missing:
            _log.warning("%s; waiting %g s for an autoscaler to bring one", missing, BOOT_S)

    def _inspect_on(self, slot: _Slot, spec: Mapping[str, Any]) -> Mapping[str, Any]:
        if slot.worn:
            self._start(slot)
        ray.get(slot.actor.ready.remote(), timeout=BOOT_S)
        # reads every byte of every checkpoint: no limit on that
        return read_inspection(ray.get(slot.actor.inspect.remote(dict(spec))))

    def _grow(self) -> None:
        """Ask for every actor that is still missing, and for those that have rested."""
        now_s = self._time_s()
        wanted = self._workers.count if self._crowd_until_s <= now_s else self._limit
        while len(self._slots) < wanted:
            self._add()
        for slot in self._slots:
            if slot.worn and slot.rests_until_s <= now_s:
                ray.kill(slot.actor)  # it may have kept its place while it rested
                self._start(slot)

    def _give_back(self) -> None:
        """Leave places above the limit to other studies, and ask for no more of them for a while:
        what is asked for at once might be given back to us before another study has it.
        """
        placed = [slot for slot in self._slots if slot.pending is None]
        above = len(placed) - self._limit
        if above <= 0:
            return
        idle = sorted((s for s in placed if s.token is None), key=lambda slot: not slot.worn)
        asked_for = [slot for slot in self._slots if slot.pending is not None]
        for slot in idle[:above] + asked_for:
            ray.kill(slot.actor)
            self._slots.remove(slot)
        self._crowd_until_s = self._time_s() + _CROWD_S

    def _add(self) -> _Slot:
        slot = _Slot(None, None)
        self._start(slot)
        self._slots.append(slot)
        return slot

    def _start(self, slot: _Slot) -> None:
        threads = str(self._workers.num_cpus)
        environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads,
                       "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
        actor = ray.remote(self._actor).options(
            num_cpus=self._workers.num_cpus,
            num_gpus=self._workers.num_gpus,
            max_restarts=0,
            max_task_retries=0,
            runtime_env={"env_vars": environment},
        )
        slot.actor = actor.remote(self._board)
        slot.worn = False
        if self._setup is None:
            slot.pending = slot.actor.ready.remote()
        else:
            slot.pending = slot.actor.prepare.remote(self._setup.to_json())

    def _settle(self, slot: _Slot) -> None:
        """Take in an actor's first answer. Raises InfrastructureError where none is of use."""
        try:
            slot.refusal = ray.get(slot.pending) or ""
            slot.pending = None
            if slot.refusal:
                self._refused(slot)
        except RayError as error:
            self._end(slot)
            if slot.strikes >= _BOOTS and not any(other.well for other in self._slots):
                raise InfrastructureError(
                    f"no Ray actor starts; one died {slot.strikes} times, the last time: "
                    f"{_one_line(error)}"
                ) from None

    def _refused(self, slot: _Slot) -> None:
        """Set a worker aside for a while: the next one in its place may do."""
        slot.worn = True
        slot.rests_until_s = self._time_s() + _LONGEST_REST_S
        if sum(bool(other.refusal) for other in self._slots) == self._workers.count:
            raise InfrastructureError(f"no worker can run this study; the last: {slot.refusal}")

    def _collect(self, result: Any) -> Event:
        slot = self._running.pop(result)
        token = slot.token or ""
        try:
            event = event_of(ray.get(result))
        except RayError as error:
            self._end(slot)
            kind = NodeLost if _node_died(error) else WorkerLost
            failure = Failure(kind.__name__, f"the Ray actor died: {_one_line(error)}")
            return Event(token, "ray", failure=failure)
        slot.token = None
        if event.failure is None or event.candidate:
            slot.well, slot.strikes = True, 0
        else:
            self._strike(slot)
            # at the 2nd, 4th, 8th: a new process mends what a broken device context cannot, but
            # takes its time to start
            slot.worn = slot.strikes > 1 and slot.strikes.bit_count() == 1
        return event

    def _end(self, slot: _Slot) -> None:
        ray.kill(slot.actor)
        slot.pending = slot.token = None
        self._strike(slot)
        slot.worn = True

    def _strike(self, slot: _Slot) -> None:
        """Count a failure that may be the machine's; from the second in a row it costs a rest."""
        slot.well = False
        slot.strikes += 1
        alone = not any(other.well for other in self._slots)
        rest_s = (
            0.0 if alone or slot.strikes < 2 else min(2.0 ** (slot.strikes - 2), _LONGEST_REST_S)
        )
        slot.rests_until_s = self._time_s() + rest_s


def _join(workers: Workers) -> None:
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            _bring_token()
            ray.init(address=address, log_to_driver=False, logging_level="error")
            return
        cpus = max(os.cpu_count() or 1, workers.count * workers.num_cpus)
        options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
        ray.init("local", num_cpus=cpus, **options)  # not another one that runs here
    except (RayError, ConnectionError, ValueError) as error:
        where = address or "this machine"
        raise UserError(f"cannot join Ray at {where}: {_why_not(error)}") from None


def _bring_token() -> None:
    """Use a token that lies here, as `ray start --head` does unasked; a head without one takes it.

    `ray.init` with an address does not look for it. The mode was read when ray was imported.
    """
    core: Any = ray._raylet  # there is no public way
    if "RAY_AUTH_MODE" in os.environ or not hasattr(core, "AuthenticationTokenLoader"):
        return  # it was decided, or this Ray is from before tokens
    if core.AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True):
        os.environ["RAY_AUTH_MODE"] = "token"
        core.Config.initialize("")


def _why_not(error: Exception) -> str:
    """Ray says the same of a head that is not there and of one that refuses: a head listens."""
    silent = re.fullmatch(r"Failed to connect to Ray cluster at (.+):(\d+)", str(error))
    if silent:
        try:
            socket.create_connection((silent[1], int(silent[2])), timeout=5).close()
        except OSError as nobody:
            return f"no head listens there ({nobody})"
    elif not isinstance(error, AuthenticationError):
        return _one_line(error)
    return (
        "the head refuses; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or ~/.ray/auth_token) as "
        "it has them"
    )


def _board() -> Any:
    """A SignBoard on the controller's own node, started anew if it dies."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": here}
    return ray.remote(SignBoard).options(**options).remote()


def _node_died(error: RayError) -> bool:
    """Whether the machine is gone, and not the worker alone.

    An actor is "unavailable" when it is cut off and its node does not say that it died, as a live
    node does at once; that the node died Ray knows only half a minute later.
    """
    if isinstance(error, ActorUnavailableError | NodeDiedError):
        return True
    if isinstance(error, RayActorError) and error.preempted:  # it said so; then its text is empty
        return True
    return _NODE_DIED in str(error)


def _no_room(workers: Workers) -> str:
    return (
        f"Ray gave no worker {asked_for(workers)} within {BOOT_S:g} s; the cluster has "
        f"{ray.cluster_resources()}"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
