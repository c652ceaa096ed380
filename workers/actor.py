"""The Ray actor: a Worker that lives in the cluster. JSON in, JSON out.

Errors come back as plain data, since an exception that the driver cannot unpickle would be lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evomerge.service.wire import answer_inspection, failure_of
from evomerge.service.worker import Worker


class WorkerActor:
    """One worker on one node. `RayExecutor` makes it an actor, with the resources of the spec."""

    def __init__(self) -> None:
        self._worker = Worker()
        self._unfit: dict[str, Any] | None = None  # why it could not be prepared

    def ready(self) -> str:
        """The worker's name: an answer says that the cluster had room for the actor."""
        return self._worker.name

    def inspect(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        """What the worker finds, or why it refuses; see `evomerge.service.wire`."""
        return answer_inspection(self._worker.inspect, spec)

    def prepare(self, setup: Mapping[str, Any]) -> None:
        """Say what will be scored: the JSON of a Setup. What goes wrong is told by `run`."""
        self._unfit = None
        try:
            self._worker.prepare(**setup)
        except Exception as error:  # nobody waits for this call's answer
            self._unfit = failure_of(error)

    def run(self, token: str, recipe: Mapping[str, Any], part: str) -> dict[str, Any]:
        """Materialise and score: the JSON of an Event."""
        if self._unfit is not None:
            return {"token": token, "worker": self._worker.name, "seconds": {}, **self._unfit}
        return self._worker.run(token, recipe, part)
