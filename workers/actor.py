"""The Ray actor: a Worker that lives in the cluster. JSON in, JSON out.

Errors come back as plain data, since an exception that the driver cannot unpickle would be lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evomerge.service.local_worker import Signs
from evomerge.service.wire import answer_inspection, reason_of
from evomerge.service.worker import Worker


class SignBoard:
    """Where workers leave signs of life, and the executor takes them away.

    Workers say them, rather than answer when asked, since an actor that can answer while it works
    runs its work outside the main thread, and tasks that set alarms (minerva_math) need that one.
    """

    def __init__(self) -> None:
        self._tokens: set[str] = set()

    def put(self, token: str) -> None:
        """The worker of this job got on."""
        self._tokens.add(token)

    def take(self) -> list[str]:
        """The jobs whose workers got on since the last call."""
        tokens, self._tokens = self._tokens, set()
        return list(tokens)


class WorkerActor:
    """One worker on one node. `RayExecutor` makes it an actor, with the resources of the spec."""

    def __init__(self, board: Any) -> None:
        """`board` is the handle of a SignBoard."""
        self._signs = Signs(lambda sign: board.put.remote(sign["alive"]))
        self._worker = Worker(beat=self._signs)

    def ready(self) -> None:
        """An answer says that the cluster had room for the actor."""

    def inspect(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        """What the worker finds, or why it refuses; see `evomerge.service.wire`."""
        return answer_inspection(self._worker.inspect, spec)

    def prepare(self, setup: Mapping[str, Any]) -> str | None:
        """Say what will be scored: the JSON of a Setup. Why the worker refuses, if it does."""
        try:
            self._worker.prepare(**setup)
        except Exception as error:
            return reason_of(error)
        return None

    def run(self, token: str, recipe: Mapping[str, Any], part: str) -> dict[str, Any]:
        """Materialise and score: the JSON of an Event."""
        self._signs.token = token
        return self._worker.run(token, recipe, part)
