"""The controller: asks the sampler, writes down, has it scored, tells; then finds the winner.

Everything it knows is in the store before it acts on it, so it can be killed between any two
lines. Knows nothing of torch, Ray or terminals: models live behind the executor, and whoever
watches is called back.
"""

from __future__ import annotations

import time
from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import count, takewhile
from typing import Protocol

from evomerge.sampling.base import Sampler, Told
from evomerge.service.dispatch import Dispatcher
from evomerge.service.ledger import Ledger
from evomerge.service.verdict import to_score
from evomerge.spec import StudySpec
from evomerge.store.base import Tell
from evomerge.trial import CANDIDATES, Genome, NewTrial, State, Trial, tiebreak

CONTROLLER_LEASE_S = 30.0
_WATCH_EVERY_S = 0.5
_AT_ONCE = 64  # trials recorded in one go, where a sampler would have more

Propose = Callable[[int, int, Genome], NewTrial]
"""(trial number, search index, genome) -> the trial, its recipe decoded."""


class Mirror(Protocol):
    """Shows finished trials elsewhere; may lag, never decides."""

    def sync(self, trials: Sequence[Trial]) -> int:
        """Add those of the trials that are finished and not there yet; how many there were. What
        cannot be added now is kept for the next call.
        """


class Controller:
    """Runs one study to its end, or until told to stop.

    The ledger's controller token must be the study's live one, and its baselines and refined trials
    recorded. `claim`
    is told now and then for how many workers there is work, and how many are at it.
    """

    def __init__(
        self,
        spec: StudySpec,
        ledger: Ledger,
        sampler: Sampler,
        dispatcher: Dispatcher,
        propose: Propose,
        *,
        mirror: Mirror | None = None,
        watch: Callable[[Ledger, int], None] = lambda ledger, running: None,
        claim: Callable[[int, int], None] = lambda wanted, held: None,
        time_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spec = spec
        self._ledger = ledger
        self._sampler = sampler
        self._dispatcher = dispatcher
        self._propose = propose
        self._mirror = mirror
        self._watch = watch
        self._claim = claim
        self._widest = 0  # so many trials were open at once
        self._time_s = time_s
        self._weights = {task.task: task.weight for task in spec.objective.tasks}
        self._pareto = spec.objective.aggregate == "pareto"
        self._first = sum(t.kind not in CANDIDATES for t in ledger.trials)
        # they stand among the search trials, wherever they were made
        self._refined = [t.number for t in ledger.trials if t.kind == "refined"]
        self._to_settle = spec.budget.finalists + self._first  # to be scored after the search
        self._asked_before_tell = array("q")  # for each tell in turn, how many were asked for
        self._stopping = self._stopping_now = False
        self._renewed_s = self._watched_s = time_s()

    def stop(self, *, now: bool = False) -> None:
        """Stop gently: dispatch nothing more, wait for what is running; with `now`, do not wait.

        Only leaves word, so that a signal handler may call it: it takes effect at the next step,
        never inside a transaction, and `now` ends `run` there with KeyboardInterrupt.
        """
        self._stopping = True
        self._stopping_now = self._stopping_now or now

    def run(self) -> bool:
        """Search to the end of the budget and score the finalists; False if stopped before.

        Raises StudyStopped when attempts fail and nothing succeeds.
        """
        self._restore()
        self._claim(self._wanted(), self._dispatcher.running)
        self._search()
        self._to_settle = 0
        self._settle()
        self._show()
        return not self._stopping

    def _restore(self) -> None:
        """Replay what was told, in the order it was told; queue what is not finished."""
        for tell in self._ledger.tells():
            self._note_tell(tell.order)
            self._sampler.tell(self._result(tell))
            self._renew()
        open_trials = [t for t in self._ledger.trials if not t.state.finished]
        self._dispatcher.enqueue((t.number, "search") for t in open_trials)

    def _search(self) -> None:
        self._tell()
        self._ask()
        while not self._dispatcher.idle:
            self._step()
            self._tell()
            self._ask()

    def _settle(self) -> None:
        """Score the finalists on the selection items, then the winner on the report items."""
        while not self._stopping:
            todo = to_score(
                self._ledger.trials,
                self._spec.budget.finalists,
                self._weights,
                self._dispatcher.given_up,
            )
            self._dispatcher.enqueue((trial.number, part) for trial, part in todo)
            if self._dispatcher.idle:
                return
            while not self._dispatcher.idle:
                self._step()

    def _ask(self) -> None:
        """Record more of what the sampler will answer for, as much as workers may soon need."""
        index, number = self._asked, len(self._ledger)
        last = min(self._sampler.horizon, index + self._room(), self._spec.budget.trials)
        if self._stopping or index >= last:
            return
        trials = [
            self._propose(number + i - index, i, self._sampler.ask(i)) for i in range(index, last)
        ]
        self._ledger.create(trials)
        self._dispatcher.enqueue((trial.number, "search") for trial in trials)

    def _room(self) -> int:
        """How many more to ask for: proposals of an open generation come to no harm by waiting, but
        one that waits while others finish could have known their results.
        """
        if self._sampler.ordered:
            return 0 if self._dispatcher.waiting > _AT_ONCE else _AT_ONCE
        return max(self._dispatcher.room, int(self._dispatcher.idle))

    def _tell(self) -> None:
        """Tell every finished trial, where order matters up to the first that is not finished."""
        asked, told = self._asked, len(self._asked_before_tell)
        # where tells come as they may, their places count the asks between them too, so that the
        # order of both can be read back
        first = told if self._sampler.ordered else told + asked
        ready = self._ready()
        for place, number in enumerate(ready):
            self._note_tell(first + place)
            self._sampler.tell(self._result(_tell(first + place, self._ledger[number])))
        if ready:
            self._ledger.mark_told(ready, first)

    def _ready(self) -> list[int]:
        """Numbers of the trials to tell now, in order."""
        finished = self._ledger.untold
        if not self._sampler.ordered:
            return sorted(finished)
        following = map(self._number, count(len(self._asked_before_tell)))
        return list(takewhile(finished.__contains__, following))

    @property
    def _asked(self) -> int:
        """How many genomes the sampler was asked for."""
        return len(self._ledger) - self._first - len(self._refined)

    def _number(self, index: int) -> int:
        """The number of search trial `index`."""
        number = self._first + index
        for refined in self._refined:
            number += refined <= number
        return number

    def _index(self, number: int) -> int:
        """Which search trial has this number."""
        return number - self._first - bisect_right(self._refined, number)

    def _note_tell(self, order: int) -> None:
        self._asked_before_tell.append(order - len(self._asked_before_tell))

    def _step(self) -> None:
        if self._stopping_now:
            raise KeyboardInterrupt
        if self._stopping:
            self._dispatcher.drop_queue()
        changed = self._dispatcher.step()
        self._renew()
        if changed and self._time_s() - self._watched_s > _WATCH_EVERY_S:
            self._show()

    def _renew(self) -> None:
        """Stay the study's controller, where a third of the lease is spent."""
        now_s = self._time_s()
        if now_s - self._renewed_s > CONTROLLER_LEASE_S / 3:
            self._ledger.renew(CONTROLLER_LEASE_S)
            self._claim(self._wanted(), self._dispatcher.running)
            self._renewed_s = now_s

    def _wanted(self) -> int:
        """How many workers there is work for, now or in the generation that comes: one that was
        given back between two generations would have its model to load again.
        """
        asked, told = self._asked, len(self._asked_before_tell)
        now = self._dispatcher.waiting + self._dispatcher.running
        self._widest = max(self._widest, self._sampler.horizon - told)
        left = now + self._spec.budget.trials - asked + self._to_settle
        return now if self._stopping else max(now, min(left, self._widest))

    def _show(self) -> None:
        self._watched_s = self._time_s()
        self._watch(self._ledger, self._dispatcher.running)
        if self._mirror is not None:
            self._mirror.sync(self._ledger.news())

    def _result(self, tell: Tell) -> Told:
        index = self._index(tell.number)
        # only a sampler that is told in any order needs to hear it: others know by the index
        asked_at = None if self._sampler.ordered else bisect_right(self._asked_before_tell, index)
        # of several objectives no single number decides
        ties = None if self._pareto else tiebreak(tell.margins, self._weights)
        return Told(index, tell.genome or (), tell.values, asked_at, ties)


def _tell(order: int, trial: Trial) -> Tell:
    """A finished trial as the store will have it once it is told."""
    if trial.state is not State.COMPLETE:
        return Tell(order, trial.number, trial.genome, None)
    margins = trial.scores["search"].margins
    return Tell(order, trial.number, trial.genome, trial.values, margins)
