"""A cluster in virtual time that several controllers share, each of them in a thread of its own.

One thread runs at a time, the one whose turn comes first, so that a run is the same every time. A
controller may start late or die at a given second. Knows nothing of stores.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Sequence
from datetime import datetime, timedelta

from evomerge.service.executor import Event, Pool
from evomerge.testing.faults import Killed
from evomerge.testing.virtual_time import _START, VirtualExecutor


class VirtualCluster:
    """So many places for workers, and the clock of everybody who draws on them."""

    def __init__(self, places: int) -> None:
        self.places = places
        self.now_s = 0.0
        self.executors: list[ClusterExecutor] = []
        self._turn = threading.Condition()
        self._wakes_s: dict[ClusterExecutor, float] = {}

    def clock(self) -> datetime:
        """The virtual time, for leases."""
        return _START + timedelta(seconds=self.now_s)

    @property
    def vacant(self) -> int:
        """Places that nobody holds."""
        return self.places - sum(executor.held for executor in self.executors)

    def run(self, studies: dict[ClusterExecutor, Callable[[], object]]) -> None:
        """Run each of the studies from its executor's start to its end or death."""
        self._wakes_s = {executor: executor.starts_s for executor in studies}
        failures: list[BaseException] = []

        def live(executor: ClusterExecutor, study: Callable[[], object]) -> None:
            try:
                self._wait_for(executor)
                study()
            except Killed:
                pass
            except BaseException as error:
                failures.append(error)
            finally:
                executor.held = 0  # a cluster ends the workers of a process that is gone
                with self._turn:
                    self.executors.remove(executor)
                    self._turn.notify_all()

        threads = [threading.Thread(target=live, args=item, daemon=True)
                   for item in studies.items()]  # fmt: skip
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for failure in failures:
            raise failure

    def sleep_until(self, executor: ClusterExecutor, wakes_s: float) -> None:
        """Let the others run until it is this executor's turn, at that time."""
        with self._turn:
            self._wakes_s[executor] = wakes_s
            self._turn.notify_all()
        self._wait_for(executor)

    def _wait_for(self, executor: ClusterExecutor) -> None:
        with self._turn:
            self._turn.wait_for(lambda: self._next() is executor)
            self.now_s = max(self.now_s, self._wakes_s.pop(executor))

    def _next(self) -> ClusterExecutor | None:
        """Whose turn it is once everybody sleeps."""
        if any(executor not in self._wakes_s for executor in self.executors):
            return None
        return min(self.executors, key=self._wakes_s.__getitem__)


class ClusterExecutor(VirtualExecutor):
    """One study's workers on a cluster: it holds their places until it gives them back."""

    def __init__(
        self,
        cluster: VirtualCluster,
        count: int,
        draw_s: Callable[[], float],
        *,
        starts_s: float = 0.0,
        dies_s: float = math.inf,
    ) -> None:
        super().__init__(count, draw_s, items=4, spent_s=lambda: 0.0)
        self.held = 0
        self.starts_s = starts_s
        self.dead = False
        self._cluster = cluster
        self._dies_s = dies_s
        self._limit = count
        cluster.executors.append(self)

    def pool(self) -> Pool:
        """See Executor.pool."""
        places = self._cluster.places
        return Pool("virtual", {"CPU": places}, {"CPU": 1.0}, places)

    def limit(self, count: int | None) -> None:
        """See Executor.limit."""
        self._limit = self._count if count is None else min(count, self._count)

    def free(self) -> int:
        """See Executor.free."""
        running = len(self._running)
        self.held = max(running, min(self.held, self._limit))
        self.held += max(0, min(self._limit - self.held, self._cluster.vacant))
        return max(0, min(self.held, self._limit) - running)

    def poll(self, timeout_s: float) -> Sequence[Event]:
        """See Executor.poll."""
        ends_s = self._running[0][0] if self._running else math.inf
        self._cluster.sleep_until(self, min(ends_s, self._cluster.now_s + timeout_s))
        self.now_s = self._cluster.now_s
        if self.now_s >= self._dies_s:
            self.dead = True
            raise Killed
        return self._ended()

    def alive(self) -> Collection[str]:
        """See Executor.alive."""
        return ()
