"""The Ray actor: a Worker that lives in the cluster. JSON in, JSON out.

Errors come back as plain data, since an exception that the driver cannot unpickle would be lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evomerge.service.wire import answer_inspection
from evomerge.service.worker import Worker


class WorkerActor:
    """One worker on one node. `RayExecutor` makes it an actor, with the resources of the spec."""

    def __init__(self) -> None:
        self._worker = Worker()

    def ready(self) -> str:
        """The worker's name: an answer says that the cluster had room for the actor."""
        return self._worker.name

    def inspect(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        """What the worker finds, or why it refuses; see `evomerge.service.wire`."""
        return answer_inspection(self._worker.inspect, spec)

    def prepare(self, setup: Mapping[str, Any]) -> None:
        """Say what will be scored: the JSON of a Setup."""
        self._worker.prepare(**setup)

    def run(self, token: str, recipe: Mapping[str, Any], part: str) -> dict[str, Any]:
        """Materialise and score: the JSON of an Event."""
        return self._worker.run(token, recipe, part)
