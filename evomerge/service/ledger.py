"""The controller's view of one study: every write goes to the store first, then to memory.

Knows nothing of executors and samplers. It exists so that the loop need not read the study back
after each trial, and it keeps no more of it than the loop may still ask for: a study of a hundred
thousand trials needs no more memory than one of a thousand.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from evomerge.service.counts import Counts
from evomerge.service.liveness import Leases
from evomerge.service.verdict import contenders
from evomerge.store.base import Refusal, StudyRecord, StudyStore, Tell
from evomerge.trial import Attempt, Failure, NewTrial, Part, Score, State, Trial

Clock = Callable[[], datetime]


def utc_now() -> datetime:
    """The wall clock, aware, in UTC."""
    return datetime.now(UTC)


_PAGE = 500  # trials read at once
_SETTLED = 256  # trials that are told before those among them that do not matter are let go

_Show = Callable[[Sequence[Trial]], object]


class Ledger:
    """One study's trials, written through to the store under one controller token.

    `show` is given what the store has at the start, some trials at a time.
    """

    def __init__(
        self,
        store: StudyStore,
        record: StudyRecord,
        controller: str,
        *,
        clock: Clock = utc_now,
        show: _Show = lambda trials: None,
    ) -> None:
        self.record = record
        self.counts = Counts()
        self.untold: set[int] = set()
        self._store = store
        self._study = record.name
        self._controller = controller
        self._clock = clock
        self._finalists = int(record.spec["budget"]["finalists"])
        tasks = record.spec["objective"]["tasks"]
        self._weights = {task["task"]: float(task["weight"]) for task in tasks}
        self._trials: dict[int, Trial] = {}  # in the order of numbers
        self._settled = 0  # how many of them are told since some were let go
        self._news: dict[int, Trial] = {}
        self._live: dict[str, Attempt] = {}
        self._leases = Leases(clock)
        for page in self._pages():
            self._load(page)
            show(page)
        self.counts_before = deepcopy(self.counts)

    @property
    def trials(self) -> list[Trial]:
        """The trials that still matter by number, per-item outcomes left out: baselines, what is
        not finished, what is not told, and every one that may be a finalist or win.
        """
        return list(self._trials.values())

    def __getitem__(self, number: int) -> Trial:
        """One of the trials that still matter."""
        return self._trials[number]

    def __len__(self) -> int:
        """How many trials the study has, all told."""
        return self.counts.trials

    def news(self) -> list[Trial]:
        """The finished trials that have changed since this was last asked for."""
        news, self._news = self._news, {}
        return list(news.values())

    def tells(self) -> Iterator[Tell]:
        """Every recorded tell, in order."""
        after = -1
        while page := self._store.told(self._study, after=after, limit=_PAGE):
            yield from page
            after = page[-1].order

    @property
    def live(self) -> Mapping[str, Attempt]:
        """Open attempts by token."""
        return self._live

    def create(self, trials: Sequence[NewTrial]) -> None:
        """Record trials, all or none."""
        self._store.create_trials(self._study, trials, controller=self._controller)
        for new in trials:
            trial = Trial(
                number=new.number,
                kind=new.kind,
                label=new.label,
                genome=new.genome,
                recipe=new.recipe,
                recipe_digest=new.recipe_digest,
                state=State.WAITING,
            )
            self._trials[new.number] = trial
            self.counts.put(trial)

    def start(self, number: int, part: Part, lease_s: float) -> Attempt:
        """Open an attempt, with a token of its own."""
        now = self._clock()
        attempt = self._store.start_attempt(
            self._study,
            number,
            part,
            token=uuid.uuid4().hex,
            worker=None,
            now=now,
            lease_until=now + timedelta(seconds=lease_s),
            controller=self._controller,
        )
        self._live[attempt.token] = attempt
        self._leases.start(attempt.token, lease_s)
        if part == "search":
            self._change(number, state=State.RUNNING)
        return attempt

    def finish(
        self,
        token: str,
        score: Score,
        values: tuple[float, ...],
        *,
        worker: str,
        seconds: Mapping[str, float],
    ) -> Trial:
        """Accept the result of a live attempt."""
        now = self._clock()
        self._store.finish(
            self._study,
            token,
            score,
            values,
            worker=worker,
            seconds=seconds,
            now=now,
            controller=self._controller,
        )
        closed = {"worker": worker, "finished_at": now, "seconds": dict(seconds)}
        attempt = self._close(token, state=State.COMPLETE, **closed)
        return self._scored(attempt.trial, attempt.part, score, values)

    def fail(
        self,
        token: str,
        failure: Failure,
        *,
        trial_state: State,
        worker: str | None,
        seconds: Mapping[str, float] | None = None,
    ) -> Trial:
        """Close an attempt as failed; for the search part the trial goes to `trial_state`."""
        now = self._clock()
        self._store.fail_attempt(
            self._study,
            token,
            failure,
            trial_state=trial_state,
            worker=worker,
            seconds=seconds or {},
            now=now,
            controller=self._controller,
        )
        closed = {"worker": worker, "finished_at": now, "seconds": dict(seconds or {})}
        attempt = self._close(token, state=State.FAIL, failure=failure, **closed)
        if attempt.part != "search":
            return self._trials[attempt.trial]
        kept = failure if trial_state is State.FAIL else None
        return self._change(attempt.trial, state=trial_state, failure=kept)

    def reuse(self, trial: Trial, part: Part, score: Score, values: tuple[float, ...]) -> Trial:
        """Take a score that the store already holds for the same recipe, items and scorer."""
        self._store.reuse(
            self._study, trial.number, part, score, values, controller=self._controller
        )
        return self._scored(trial.number, part, score, values)

    def known_score(self, trial: Trial, part: Part) -> Score | None:
        """The score that any study of the store has for this recipe on these items."""
        return self._store.known_score(self.record.scorer_digest, trial.recipe_digest, part)

    def mark_told(self, numbers: Sequence[int], first: int) -> None:
        """Record that these trials were told, in this order, as number `first` and on."""
        orders = {number: first + place for place, number in enumerate(numbers)}
        self._store.mark_told(self._study, orders, controller=self._controller)
        for number, order in orders.items():
            self._change(number, tell_order=order)
        self._settle(len(orders))

    def renew(self, lease_s: float) -> None:
        """Stay this study's controller for another `lease_s` seconds."""
        until = self._clock() + timedelta(seconds=lease_s)
        self._store.renew(self._study, self._controller, lease_until=until)

    def refuse(self, token: str) -> Refusal | None:
        """Count a result for an attempt that is not live; why it is refused."""
        return self._store.refuse(self._study, token, controller=self._controller)

    def seen_alive(self, tokens: Collection[str], lease_s: float) -> None:
        """Start the leases of these attempts anew: their workers gave a sign of life.

        The store hears of it once a third of a lease is spent, of all that are due at once.
        """
        due = self._leases.renew([t for t in dict.fromkeys(tokens) if t in self._live], lease_s)
        if not due:
            return
        until = self._clock() + timedelta(seconds=lease_s)
        self._store.renew_attempts(self._study, due, lease_until=until, controller=self._controller)
        for token in due:
            self._live[token] = replace(self._live[token], lease_until=until)

    def lapsed(self) -> list[Attempt]:
        """Live attempts whose lease has run out."""
        return [self._live[token] for token in self._leases.lapsed()]

    def _close(self, token: str, **changes: Any) -> Attempt:
        """Put a live attempt, as it ended, among its trial's attempts in the order of starts."""
        attempt = replace(self._live.pop(token), **changes)
        self._leases.end(token)
        attempts = [*self._trials[attempt.trial].attempts, attempt]
        self._change(attempt.trial, attempts=tuple(attempts))
        return attempt

    def _scored(self, number: int, part: Part, score: Score, values: tuple[float, ...]) -> Trial:
        bare = Score({n: replace(task, outcomes=()) for n, task in score.tasks.items()})
        scores: dict[Part, Score] = {**self._trials[number].scores, part: bare}
        if part != "search":
            return self._change(number, scores=scores)
        return self._change(number, scores=scores, state=State.COMPLETE, values=values)

    def _change(self, number: int, **changes: Any) -> Trial:
        before = self._trials[number]
        self._trials[number] = trial = replace(before, **changes)
        self.counts.put(before, -1)
        self.counts.put(trial)
        self._note(trial)
        return trial

    def _note(self, trial: Trial) -> None:
        if trial.state.finished:
            self._news[trial.number] = trial
        if trial.state.finished and trial.kind == "search" and trial.tell_order is None:
            self.untold.add(trial.number)
        else:
            self.untold.discard(trial.number)

    def _pages(self) -> Iterator[Sequence[Trial]]:
        first = 0
        while page := self._store.trials(
            self._study, outcomes=False, numbers=range(first, first + _PAGE)
        ):
            yield page
            first = page[-1].number + 1

    def _load(self, page: Sequence[Trial]) -> None:
        for trial in page:
            self._trials[trial.number] = trial
            self.counts.put(trial)
            self._note(trial)
        self._news.clear()  # they are shown as they are read
        self._settle(len(page))

    def _settle(self, told: int) -> None:
        """Let go of told trials that can neither be finalists nor win."""
        self._settled += told
        if self._settled < _SETTLED:
            return
        self._settled = 0
        kept = {trial.number for trial in contenders(self.trials, self._finalists, self._weights)}
        self._trials = {
            number: trial
            for number, trial in self._trials.items()
            if trial.tell_order is None or number in kept
        }
