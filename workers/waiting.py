"""Says what an executor waits for: workers that refuse the study, places the cluster still owes.

Waiting in silence looks like hanging. Knows nothing of Ray: it is told how workers fare, and by a
clock.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evomerge.errors import InfrastructureError
from evomerge.spec import Workers

BOOT_S = 900.0  # an autoscaler may have to start a machine and pull an image first
_QUIET_S = 60.0
_log = logging.getLogger(__name__)


class Waiting:
    """One study's: what was said already, and since when nothing can run."""

    def __init__(self, workers: Workers, time_s: Callable[[], float]) -> None:
        self._worker = asked_for(workers)
        self._time_s = time_s
        self._said: set[str] = set()
        self._idle_since_s: float | None = None

    def look(self, *, fit: int, refusals: Sequence[str]) -> None:
        """`fit` workers run or could run, and so many others refuse.

        Raises InfrastructureError where none was fit for 15 minutes and some refuse: those that
        the cluster still owes are not coming.
        """
        for reason in refusals:
            self._say(f"a worker refuses this study and gets no job: {reason}", once=reason)
        if fit:
            self._idle_since_s = None
            self._said.discard("idle")
            return
        now_s = self._time_s()
        if self._idle_since_s is None:
            self._idle_since_s = now_s
        idle_s = now_s - self._idle_since_s
        if refusals and idle_s >= BOOT_S:
            raise InfrastructureError(
                f"no worker can run this study: {len(refusals)} refuse it, and the cluster gave no "
                f"other one within {BOOT_S:g} s; the last: {refusals[-1]}"
            )
        if refusals:
            self._say(
                f"nothing runs: every worker so far refuses this study; it stops in {BOOT_S:g} s "
                "unless the cluster gives another one",
                once="idle",
            )
        elif idle_s >= _QUIET_S:
            self._say(
                f"nothing has run for {idle_s:.0f} s: waiting for the cluster to give a worker "
                f"{self._worker}",
                once="idle",
            )

    def _say(self, line: str, *, once: str) -> None:
        if once not in self._said:
            self._said.add(once)
            _log.warning("%s", line)


def asked_for(workers: Workers) -> str:
    """What one worker takes, in words."""
    return f"{workers.num_cpus} CPUs and {workers.num_gpus:g} GPUs"


def lacking(workers: Workers, nodes: Sequence[Mapping[str, Any]]) -> str:
    """Why no live node, of those that Ray knows, could ever hold a worker; empty if one could."""
    live = [node["Resources"] for node in nodes if node["Alive"]]
    needs = {"CPU": workers.num_cpus, "GPU": workers.num_gpus}
    if any(all(node.get(name, 0) >= need for name, need in needs.items()) for node in live):
        return ""
    most = {name: max((node.get(name, 0) for node in live), default=0) for name in needs}
    return (
        f"no node of the cluster holds a worker of {asked_for(workers)} "
        f"(`workers.num_cpus`, `workers.num_gpus`); the most that one has are {most['CPU']:g} CPUs "
        f"and {most['GPU']:g} GPUs"
    )
