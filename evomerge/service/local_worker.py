"""The process that LocalExecutor starts: a Worker behind two pipes, one JSON document a line.

Requests come on standard input, answers go to the descriptor that was standard output; everything
libraries print goes to standard error instead, so that it cannot garble an answer. Dies with its
controller.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from evomerge.service.wire import answer_inspection, reason_of
from evomerge.service.worker import Worker

_PR_SET_PDEATHSIG = 1
_SIGN_EVERY_S = 5.0
HELD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that are the controller's to handle, though terminals and schedulers send them to all:
running attempts finish then. A worker starts with them blocked, until it can ignore them."""


class Signs:
    """Signs of life of the job under way, one every few seconds at most."""

    def __init__(
        self,
        answer: Callable[[dict[str, Any]], None],
        *,
        time_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._answer = answer
        self._time_s = time_s
        self._last_s = time_s()
        self.token = ""

    def __call__(self) -> None:
        now_s = self._time_s()
        if now_s - self._last_s >= _SIGN_EVERY_S:
            self._last_s = now_s
            self._answer({"alive": self.token})


def main() -> None:
    """Answer requests until standard input ends."""
    parent = int(sys.argv[1])
    _die_with(parent)
    for number in HELD:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    signs = Signs(lambda sign: _answer(answers, sign))
    worker = Worker(beat=signs)
    _answer(answers, {"ready": worker.name})
    refusal = ""
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        if "prepare" in request:
            refusal = _refusal(worker, request["prepare"])
            if refusal:
                _answer(answers, {"refuses": refusal})
        elif "inspect" in request:
            _answer(answers, answer_inspection(worker.inspect, request["inspect"]))
        elif not refusal:  # else the job was taken back
            signs.token = request["run"]["token"]
            _answer(answers, worker.run(**request["run"]))


def _refusal(worker: Worker, setup: dict[str, Any]) -> str:
    """Prepare the worker; why it refuses, if it does."""
    try:
        worker.prepare(**setup)
    except Exception as error:
        return reason_of(error)
    return ""


def _answer(stream: TextIO, document: dict[str, Any]) -> None:
    stream.write(json.dumps(document) + "\n")
    stream.flush()


def _die_with(parent: int) -> None:
    """Have Linux kill us when the controller dies; elsewhere the end of standard input does."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the controller is gone")


if __name__ == "__main__":
    main()
