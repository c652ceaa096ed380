"""An executor of any number of workers in virtual time: an hour of a cluster takes no time here.

Jobs last as long as the caller draws; the clock jumps to the next end. What the controller spends
between two polls is put on the clock too, so a controller that is too slow leaves workers idle, as
it would in earnest. Scores are a pure function of the recipe. Knows nothing of stores.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from evomerge.merging.values import leaves
from evomerge.service.executor import Event, Job, Pool, Setup
from evomerge.spec import StudySpec
from evomerge.testing.synthetic import synthetic_inspection
from evomerge.trial import Score, TaskScore

_SIGN_EVERY_S = 10.0
_START = datetime(2026, 1, 1, tzinfo=UTC)


class VirtualExecutor:
    """`count` workers; each job lasts `draw_s()` seconds of virtual time.

    `now_s` is the virtual time; `searched_s` that of the last dispatch to the search, and
    `searched_busy_s` the worker seconds that were used up to then. `own_s` was really spent in
    here, by `spent_s`: who times a controller takes it off.
    """

    def __init__(
        self,
        count: int,
        draw_s: Callable[[], float],
        *,
        items: int = 100,
        spent_s: Callable[[], float] = time.process_time,
    ) -> None:
        self._count = count
        self._draw_s = draw_s
        self._items = items
        self._spent_s = spent_s
        self._running: list[tuple[float, int, float, Job]] = []
        self._tasks: list[str] = []
        self._left_s = spent_s()  # when the controller was last given control
        self._shown_s = 0.0
        self.submitted = self.finished = 0
        self.now_s = self.own_s = self.searched_s = self.searched_busy_s = 0.0
        self._done_s = self._begun_s = 0.0  # sums: durations of the finished, starts of the running

    def clock(self) -> datetime:
        """The virtual time, for leases."""
        return _START + timedelta(seconds=self.now_s)

    def inspect(self, spec: Mapping[str, Any]) -> Mapping[str, Any]:
        """See Executor.inspect."""
        return synthetic_inspection(StudySpec.model_validate(spec))

    def prepare(self, setup: Setup) -> None:
        """See Executor.prepare."""
        self._tasks = [task["task"] for task in setup.spec["objective"]["tasks"]]
        self._left_s = self._spent_s()

    def free(self) -> int:
        """See Executor.free."""
        return self._count - len(self._running)

    def pool(self) -> Pool | None:
        """See Executor.pool."""
        return None

    def limit(self, count: int | None) -> None:
        """See Executor.limit. Nobody shares with it."""

    def submit(self, job: Job) -> None:
        """See Executor.submit."""
        lasts_s = self._draw_s()
        self.submitted += 1
        heapq.heappush(self._running, (self.now_s + lasts_s, self.submitted, lasts_s, job))
        self._begun_s += self.now_s
        if job.part == "search":
            self.searched_s = self.now_s
            self.searched_busy_s = self._done_s + len(self._running) * self.now_s - self._begun_s

    def cancel(self, token: str) -> None:
        """See Executor.cancel."""
        self._running = [entry for entry in self._running if entry[3].token != token]
        heapq.heapify(self._running)

    def poll(self, timeout_s: float) -> Sequence[Event]:
        """See Executor.poll. Everything that ended while the controller worked, or the next."""
        entered_s = self._spent_s()
        self.now_s += entered_s - self._left_s
        if self._running:
            self.now_s = max(self.now_s, self._running[0][0])
        events = self._ended()
        self._left_s = self._spent_s()
        self.own_s += self._left_s - entered_s
        return events

    def _ended(self) -> list[Event]:
        """The events of all jobs whose time is over."""
        events = []
        while self._running and self._running[0][0] <= self.now_s:
            ends_s, place, lasts_s, job = heapq.heappop(self._running)
            self._done_s += lasts_s
            self._begun_s -= ends_s - lasts_s
            self.finished += 1
            worker = f"virtual-{place % self._count}"
            score = self._score(job).to_json()
            events.append(Event(job.token, worker, score=score, seconds={"score": lasts_s}))
        return events

    def alive(self) -> Collection[str]:
        """See Executor.alive. All of them, every so often: nothing hangs here."""
        if self.now_s - self._shown_s < _SIGN_EVERY_S:
            return ()
        self._shown_s = self.now_s
        return [job.token for _, _, _, job in self._running]

    def close(self, *, now: bool) -> None:
        """See Executor.close."""
        self._running.clear()

    def _score(self, job: Job) -> Score:
        """Best where every weight is 0.5; an item is right up to the candidate's quality."""
        weights = [
            float(weight)
            for source in job.recipe["sources"]
            for weight in leaves(source["parameters"].get("weight", 1.0))
        ]
        distance = math.fsum((weight - 0.5) ** 2 for weight in weights) / len(weights)
        quality = math.exp(-4 * distance)
        return Score({task: self._task_score(quality, i) for i, task in enumerate(self._tasks)})

    def _task_score(self, quality: float, task: int) -> TaskScore:
        # levels of difficulty, spread evenly and in another order for each task
        levels = (
            (item * (7 + 2 * task) % self._items) / self._items for item in range(self._items)
        )
        outcomes = tuple(float(quality > level) for level in levels)
        return TaskScore("acc", quality, None, self._items, True, outcomes)
