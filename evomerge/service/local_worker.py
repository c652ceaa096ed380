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
from typing import Any, TextIO

from evomerge.service.wire import answer_inspection
from evomerge.service.worker import Worker

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Answer requests until standard input ends."""
    parent = int(sys.argv[1])
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the controller's to handle
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker()
    _answer(answers, {"ready": worker.name})
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        if "prepare" in request:
            worker.prepare(**request["prepare"])
        elif "inspect" in request:
            _answer(answers, answer_inspection(worker.inspect, request["inspect"]))
        else:
            _answer(answers, worker.run(**request["run"]))


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
