"""The dispatcher: takes scoring tasks from a queue to workers and records what became of them.

A lost worker or a lapsed lease costs one attempt; a bad candidate fails its trial. Knows nothing of
samplers, generations or who wins.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence

from evomerge.errors import NodeLost, OutOfMemory, StudyStopped
from evomerge.service.executor import Event, Executor, Job
from evomerge.service.ledger import Ledger
from evomerge.spec import StudySpec
from evomerge.trial import Attempt, Failure, Part, Score, State

_log = logging.getLogger(__name__)
Task = tuple[int, Part]
_POLL_S = 0.25
_MACHINES_FAILED = 10  # so many may fail a task before they count, since nothing is for ever


class Dispatcher:
    """Keeps workers busy with the queue, and no busier: what waits, waits here.

    `given_up` holds the tasks that failed for good.
    """

    def __init__(
        self,
        spec: StudySpec,
        ledger: Ledger,
        executor: Executor,
        *,
        time_s: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._spec = spec
        self._ledger = ledger
        self._executor = executor
        self._weights = {task.task: task.weight for task in spec.objective.tasks}
        self._pareto = spec.objective.aggregate == "pareto"
        self._queue: deque[Task] = deque()
        self._failures: Counter[Task] = Counter()
        self._machines_failed: Counter[Task] = Counter()
        self.given_up: set[Task] = set()
        self._time_s = time_s
        self._working_since_s = time_s()  # when the last poll returned
        self._controller_s = 0.0  # our own time that no attempt has been charged with yet
        self._works = False  # something succeeded since this process began or gave a task up

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return not self._queue and not self._ledger.live

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def room(self) -> int:
        """How many more tasks would start at once."""
        return max(0, self._executor.free() - len(self._queue))

    @property
    def running(self) -> int:
        return len(self._ledger.live)

    def enqueue(self, tasks: Iterable[Task]) -> None:
        """Queue tasks behind those that wait."""
        self._queue.extend(tasks)

    def drop_queue(self) -> None:
        """Forget what waits; the store still has it as WAITING."""
        self._queue.clear()

    def step(self) -> bool:
        """Dispatch what fits, take in what came back; True if anything changed.

        Raises StudyStopped when a task fails `max_attempts` times and none has succeeded since this
        process began, or since the last task was given up for the same reason.
        """
        changed = self._dispatch()
        for event in self._poll():
            changed |= self._take(event)
        self._ledger.seen_alive(self._executor.alive(), self._spec.workers.lease_s)
        for attempt in self._ledger.lapsed():
            changed |= self._expire(attempt)
        return changed

    def _poll(self) -> Sequence[Event]:
        """Wait for events; whatever was not spent waiting was the controller's own time."""
        self._controller_s += self._time_s() - self._working_since_s
        events = self._executor.poll(0.0 if self.idle else _POLL_S)
        self._working_since_s = self._time_s()
        return events

    def _dispatch(self) -> bool:
        before = len(self._queue)
        while self._queue and self._executor.free() > 0:
            number, part = self._queue.popleft()
            trial = self._ledger[number]
            known = self._ledger.known_score(trial, part)
            if known is not None:
                self._ledger.reuse(trial, part, known, self._values(known))
                continue
            attempt = self._ledger.start(number, part, self._spec.workers.lease_s)
            self._executor.submit(Job(attempt.token, trial.recipe, part))
        return len(self._queue) != before

    def _take(self, event: Event) -> bool:
        """Record an event; one whose attempt is no longer live is refused, and counted."""
        for note in event.notes:
            _log.warning("worker %s: %s", event.worker, note)
        attempt = self._ledger.live.get(event.token)
        if attempt is None:
            self._ledger.refuse(event.token)
            return False
        if event.score is not None:
            score = Score.from_json(event.score)
            seconds = {**event.seconds, "controller": self._controller_s}
            values, self._controller_s = self._values(score), 0.0
            self._ledger.finish(event.token, score, values, worker=event.worker, seconds=seconds)
            self._works = True
        elif event.failure is not None:
            self._refuse(attempt, event, event.failure)
        return True

    def _expire(self, attempt: Attempt) -> bool:
        self._executor.cancel(attempt.token)
        message = (
            f"no result or sign of life within the lease of {self._spec.workers.lease_s:g} s; "
            "set a longer `workers.lease_s` if one attempt needs more"
        )
        failure = Failure("WorkerLost", message)
        self._refuse(attempt, Event(attempt.token, attempt.worker or ""), failure)
        return True

    def _refuse(self, attempt: Attempt, event: Event, failure: Failure) -> None:
        task = (attempt.trial, attempt.part)
        self._count(task, failure)
        exhausted = self._failures[task] >= self._spec.workers.max_attempts
        # while nothing else succeeds the fault is not shown to be the candidate's
        broken = exhausted and not event.candidate and not self._works
        final = event.candidate or (exhausted and not broken)
        self._ledger.fail(
            attempt.token,
            failure,
            trial_state=State.FAIL if final else State.WAITING,
            worker=event.worker,
            seconds=event.seconds,
        )
        if final:
            self.given_up.add(task)
            self._works = self._works and event.candidate
        elif not broken:
            self._queue.append(task)
        else:
            raise StudyStopped(
                f"study {self._spec.name!r} stopped: trial {attempt.trial} failed "
                f"{self._failures[task]} times and nothing succeeds any more; the last time "
                f"{failure.error}: {failure.message}"
            )

    def _count(self, task: Task, failure: Failure) -> None:
        """Count a failure against `max_attempts`, unless it is the machine's: it went as a whole,
        or has too little memory for a model that others had room for."""
        small = failure.error == OutOfMemory.__name__ and self._works
        gone = failure.error == NodeLost.__name__
        if (gone or small) and self._machines_failed[task] < _MACHINES_FAILED:
            self._machines_failed[task] += 1
        else:
            self._failures[task] += 1

    def _values(self, score: Score) -> tuple[float, ...]:
        return score.values(self._weights, pareto=self._pareto)
