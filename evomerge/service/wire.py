"""What crosses between controller and worker, as JSON: events, inspections and refusals.

One place, so that every executor says the same. Knows nothing of pipes, Ray or models.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import evomerge.errors
from evomerge.errors import CandidateError, EvomergeError, OutOfMemory
from evomerge.service.executor import Event
from evomerge.trial import Failure

Inspect = Callable[[Mapping[str, Any]], dict[str, Any]]


def failure_of(error: Exception) -> dict[str, Any]:
    """What an exception says of an attempt: its cause, and whether the candidate is to blame."""
    name, message = type(error).__name__, str(error) or repr(error)
    if isinstance(error, MemoryError) or name == "OutOfMemoryError":
        name = OutOfMemory.__name__
    elif not isinstance(error, EvomergeError):
        message = f"{message} [{_where(error)}]"
    return {
        "failure": {"error": name, "message": message},
        "candidate": isinstance(error, CandidateError),
    }


def reason_of(error: Exception) -> str:
    """What an exception says of a worker that refuses a study."""
    failure = failure_of(error)["failure"]
    return f"{failure['error']}: {failure['message']}"


def event_of(answer: Mapping[str, Any]) -> Event:
    """The event that a worker's answer to a job stands for."""
    failure = answer.get("failure")
    return Event(
        token=answer["token"],
        worker=answer["worker"],
        score=answer.get("score"),
        failure=Failure(**failure) if failure else None,
        candidate=bool(answer.get("candidate")),
        seconds=answer["seconds"],
        notes=tuple(answer.get("notes", ())),
    )


def answer_inspection(inspect: Inspect, spec: Mapping[str, Any]) -> dict[str, Any]:
    """A worker's answer to an inspection: what it found, or why it refuses."""
    try:
        return {"inspection": inspect(spec)}
    except Exception as error:
        return {"refused": failure_of(error)["failure"], "arguments": _plain(error.args)}


def read_inspection(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """What an inspection found. Raises what the worker raised, as the class it was."""
    if "inspection" in answer:
        return dict(answer["inspection"])
    name, message = answer["refused"]["error"], answer["refused"]["message"]
    kind = getattr(evomerge.errors, name, None)
    if isinstance(kind, type) and issubclass(kind, EvomergeError):
        raise kind(*answer["arguments"])
    raise EvomergeError(f"{name}: {message}")


def _plain(arguments: tuple[object, ...]) -> list[object]:
    try:
        json.dumps(arguments)
    except TypeError:
        return [str(argument) for argument in arguments]
    return list(arguments)


def _where(error: Exception) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return "no traceback"
    return f"{os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}"
