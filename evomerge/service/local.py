"""The local executor: worker processes on this machine, spoken to over pipes.

Knows nothing of studies beyond the JSON it passes on. A worker that dies is reported and replaced.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from evomerge.errors import InfrastructureError, WorkerLost
from evomerge.service.executor import Event, Job, Pool, Setup
from evomerge.service.local_worker import HELD
from evomerge.service.wire import event_of, read_inspection
from evomerge.spec import Workers
from evomerge.trial import Failure

_COMMAND = (sys.executable, "-m", "evomerge.service.local_worker")
_TAIL_BYTES = 2000


@dataclass
class _Process:
    """A worker process, what it has said so far of its next line, and the job it runs."""

    popen: subprocess.Popen[bytes]
    log: IO[bytes]
    name: str = ""
    job: Job | None = None
    refusal: str = ""  # why it cannot do this study's jobs
    partial: bytes = b""
    last_words: str = ""


class LocalExecutor:
    """Runs up to `workers.count` worker processes; they are started when first needed.

    A worker that refuses the study gives its job back, which costs no attempt: another one does it,
    and where there is none `poll` raises InfrastructureError with the reason.
    """

    def __init__(self, workers: Workers) -> None:
        self._count = self._limit = workers.count
        self._num_cpus = workers.num_cpus
        self._processes: list[_Process] = []
        self._selector = selectors.DefaultSelector()
        self._setup: Setup | None = None
        self._lost: list[Event] = []
        self._returned: list[Job] = []
        self._alive: set[str] = set()

    def inspect(self, spec: Mapping[str, Any]) -> Mapping[str, Any]:
        """See Executor.inspect. A worker that dies of it is replaced once: it may be chance."""
        try:
            return self._inspected(spec)
        except WorkerLost:
            return self._inspected(spec)

    def _inspected(self, spec: Mapping[str, Any]) -> Mapping[str, Any]:
        process = self._processes[0] if self._processes else self._start()
        _send(process, {"inspect": dict(spec)})
        while True:
            for answer in self._read(None):
                if "inspection" in answer or "refused" in answer:
                    return read_inspection(answer)
            if process not in self._processes:
                raise WorkerLost(f"the worker died checking the spec: {process.last_words}")

    def prepare(self, setup: Setup) -> None:
        """See Executor.prepare."""
        self._setup = setup
        self._returned.clear()
        for process in self._processes:
            process.refusal = ""
            _send(process, {"prepare": setup.to_json()})

    def free(self) -> int:
        """See Executor.free."""
        self._give_back()
        taken = sum(bool(process.job or process.refusal) for process in self._processes)
        return max(0, self._limit - taken - len(self._returned))

    def pool(self) -> Pool:
        """See Executor.pool: the cores of this machine that this process may use."""
        cores = _cores()
        worker = min(self._num_cpus, cores)
        return Pool(_machine(), {"CPU": cores}, {"CPU": worker}, cores // worker)

    def limit(self, count: int | None) -> None:
        """See Executor.limit."""
        self._limit = self._count if count is None else min(count, self._count)

    def submit(self, job: Job) -> None:
        """See Executor.submit."""
        process = self._idle() or self._start()
        process.job = job
        request = {"token": job.token, "recipe": dict(job.recipe), "part": job.part}
        _send(process, {"run": request})

    def cancel(self, token: str) -> None:
        """See Executor.cancel."""
        for process in self._processes:
            if process.job is not None and process.job.token == token:
                process.job = None
                self._end(process)
                return
        self._returned = [job for job in self._returned if job.token != token]

    def poll(self, timeout_s: float) -> Sequence[Event]:
        """See Executor.poll."""
        answers = self._read(timeout_s)
        self._hand_on()
        events = [event_of(answer) for answer in answers if "token" in answer]
        events += self._lost
        self._lost = []
        return events

    def alive(self) -> Collection[str]:
        """See Executor.alive."""
        tokens, self._alive = self._alive, set()
        return tokens

    def close(self, *, now: bool) -> None:
        """See Executor.close."""
        for process in list(self._processes):
            if process.popen.stdin is not None and not now:
                process.popen.stdin.close()
                process.popen.wait()
            self._end(process)
        self._selector.close()

    def _start(self) -> _Process:
        log = tempfile.TemporaryFile(prefix="evomerge-worker-")  # noqa: SIM115  lives with it
        with _held_signals():
            popen = subprocess.Popen(
                [*_COMMAND, str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._environment(),
                bufsize=0,
            )
        process = _Process(popen, log)
        self._processes.append(process)
        assert popen.stdout is not None
        os.set_blocking(popen.stdout.fileno(), False)
        self._selector.register(popen.stdout, selectors.EVENT_READ, process)
        if self._setup is not None:
            _send(process, {"prepare": self._setup.to_json()})
        return process

    def _give_back(self) -> None:
        """End idle workers above the limit: each keeps a model in memory."""
        above = len(self._processes) - self._limit
        idle = [process for process in self._processes if process.job is None]
        for process in idle[: max(0, above)]:
            self._end(process)

    def _environment(self) -> dict[str, str]:
        """Threads as granted, before any numerical library reads its settings."""
        threads = str(self._num_cpus)
        return {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads,
                "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}  # fmt: skip

    def _read(self, timeout_s: float | None) -> list[dict[str, Any]]:
        """Every whole line that has come; a worker whose pipe ended is reported as lost."""
        answers: list[dict[str, Any]] = []
        if not self._selector.get_map():
            time.sleep(timeout_s or 0)
        for key, _ in self._selector.select(timeout_s):
            process: _Process = key.data
            chunk = os.read(key.fd, 1 << 20)
            if not chunk:
                self._bury(process)
                continue
            *lines, process.partial = (process.partial + chunk).split(b"\n")
            for line in lines:
                answers.append(self._note(process, json.loads(line)))
        return answers

    def _note(self, process: _Process, answer: dict[str, Any]) -> dict[str, Any]:
        if "ready" in answer:
            process.name = answer["ready"]
        elif "alive" in answer:
            self._alive.add(answer["alive"])
        elif "refuses" in answer:
            self._refused(process, answer["refuses"])
        elif "token" in answer:
            process.job = None
        return answer

    def _idle(self) -> _Process | None:
        fit = (p for p in self._processes if p.job is None and not p.refusal)
        return next(fit, None)

    def _refused(self, process: _Process, reason: str) -> None:
        """Take a worker's job back, for another one to do."""
        process.refusal = reason
        if process.job is not None:
            self._returned.append(process.job)
            process.job = None

    def _hand_on(self) -> None:
        """Give jobs that were taken back to others. Raises InfrastructureError where all refuse: a
        new worker would as well, the machine being the same."""
        if self._processes and all(process.refusal for process in self._processes):
            reason = self._processes[-1].refusal
            raise InfrastructureError(f"no worker can run this study; the last: {reason}")
        while self._returned and (self._idle() or not self._processes):
            self.submit(self._returned.pop(0))

    def _bury(self, process: _Process) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.popen.wait(timeout=5)  # its pipe ended; let it leave its own exit code
        process.last_words = _tail(process)
        self._end(process)
        if process.job is not None:
            reason = f"exit code {process.popen.returncode}; last words: {process.last_words}"
            failure = Failure(WorkerLost.__name__, f"worker {process.name} died, {reason}")
            self._lost.append(Event(process.job.token, process.name, failure=failure))

    def _end(self, process: _Process) -> None:
        self._processes.remove(process)
        assert process.popen.stdout is not None
        assert process.popen.stdin is not None
        self._selector.unregister(process.popen.stdout)
        process.popen.kill()
        process.popen.wait()
        process.popen.stdout.close()
        process.popen.stdin.close()
        process.log.close()


def _cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _machine() -> str:
    """A name of this machine that no other one has: host names repeat, boots do not."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()}/{boot.read_text().strip() if boot.exists() else ''}"


@contextlib.contextmanager
def _held_signals() -> Iterator[None]:
    """A process started within it begins with them blocked: see `local_worker`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _send(process: _Process, request: dict[str, Any]) -> None:
    """Pass a request on; to a worker that just died it is lost, and the pipe's end will tell."""
    assert process.popen.stdin is not None
    line = memoryview(json.dumps(request).encode() + b"\n")
    with contextlib.suppress(BrokenPipeError):
        while line:  # a raw pipe may take a part only
            line = line[process.popen.stdin.write(line) or 0 :]


def _tail(process: _Process) -> str:
    process.log.seek(0, os.SEEK_END)
    process.log.seek(max(0, process.log.tell() - _TAIL_BYTES))
    lines = process.log.read().decode(errors="replace").strip().splitlines()
    return " | ".join(line.strip() for line in lines[-3:]) or "none"
