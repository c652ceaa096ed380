"""A study to test a store on: records, trials, scores, and one with short names for each call.

Knows only the store protocol. Used by `store_contract` and by tests of one store alone.
"""

from __future__ import annotations

import struct
from datetime import UTC, datetime, timedelta
from typing import Any

from evomerge.store.base import Claim, Controller, StudyRecord, StudyStore
from evomerge.trial import Attempt, Failure, NewTrial, Part, Score, State, TaskScore, Trial

NOW = datetime(2026, 3, 29, 1, 30, 0, 123457, tzinfo=UTC)
LEASE = timedelta(minutes=15)
ODD_FLOATS = (-0.0, 5e-324, 2.2250738585072014e-308, 0.1 + 0.2, 1.7976931348623157e308, 1 / 3)
BAD = Failure("NonFiniteModel", "NaN in the logits of item 3 – “ü”")


def record(name: str = "s", *, scorer: str = "scorer-1", minutes: int = 0) -> StudyRecord:
    """A study record; `minutes` makes it younger."""
    spec = {"name": name, "budget": {"trials": 3}, "sources": {"b": "x/b", "a": "x/a"}}
    inspection = {"items": {"add": ["h1", "h2"]}, "bits": 0.1 + 0.2}
    return StudyRecord(name, spec, inspection, scorer, NOW + timedelta(minutes=minutes))


def holder(token: str = "c1", *, until: datetime = NOW + LEASE) -> Controller:
    """A controller process with that token."""
    return Controller(token, "host-a", 4321, 1234567.25, until)


def new_trial(number: int, *, genome: tuple[float, ...] | None = (0.25, 0.75)) -> NewTrial:
    """A trial with a recipe of its own."""
    recipe = {"method": "ties", "parameters": {"scale": [0.1 + 0.2, number]}, "seed": None}
    return NewTrial(number, "search", f"trial {number}", genome, recipe, f"digest-{number}")


def score(
    value: float = 0.5, outcomes: tuple[float, ...] = (1.0, 0.0), margin: float | None = None
) -> Score:
    """A score of two tasks, one where lower is better and no margin is known."""
    return Score(
        {
            "add": TaskScore("exact_match", value, 0.05, len(outcomes), True, outcomes, margin),
            "wiki": TaskScore("word_perplexity", 12.5, None, 1, False, (12.5,)),
        }
    )


def bits(values: tuple[float, ...]) -> bytes:
    """The bytes of floats: equal only if every bit is."""
    return struct.pack(f"<{len(values)}d", *values)


def claim(token: str = "c1") -> Claim:
    """What the study `s` asks of a pool."""
    return Claim("s", token, "pool-a", 0, 4, 3, {"GPU": 0.1 + 0.2, "CPU": 2.0}, NOW, NOW + LEASE)


class StudyUnderTest:
    """A study under controller `c1`, and short names for what the tests do to it."""

    def __init__(self, store: StudyStore, name: str = "s", trials: int = 2) -> None:
        self.store, self.name = store, name
        store.create_study(record(name))
        store.acquire(name, holder(), now=NOW)
        store.create_trials(name, [new_trial(n) for n in range(trials)], controller="c1")

    def start(
        self, number: int = 0, part: Part = "search", token: str = "t1", controller: str = "c1"
    ) -> Attempt:
        return self.store.start_attempt(
            self.name,
            number,
            part,
            token=token,
            worker="w0",
            now=NOW,
            lease_until=NOW + LEASE,
            controller=controller,
        )

    def finish(self, token: str = "t1", result: Score | None = None, **changes: Any) -> None:
        arguments: dict[str, Any] = {
            "values": (0.5,),
            "worker": "w1",
            "seconds": {"materialise": 0.25, "score": 1.5},
            "now": NOW + timedelta(seconds=2),
            "controller": "c1",
        }
        arguments |= changes
        values = arguments.pop("values")
        self.store.finish(self.name, token, result or score(), values, **arguments)

    def fail(
        self, token: str = "t1", state: State = State.FAIL, why: Failure = BAD, **changes: Any
    ) -> None:
        arguments: dict[str, Any] = {
            "worker": "w1",
            "seconds": {"score": 0.5},
            "now": NOW + timedelta(seconds=2),
            "controller": "c1",
        }
        arguments |= changes
        self.store.fail_attempt(self.name, token, why, trial_state=state, **arguments)

    def reuse(
        self,
        number: int = 0,
        part: Part = "search",
        result: Score | None = None,
        controller: str = "c1",
    ) -> None:
        known = result or score()
        self.store.reuse(self.name, number, part, known, (0.5,), controller=controller)

    def trial(self, number: int = 0) -> Trial:
        return self.store.trial(self.name, number)

    def everything(self) -> Any:
        """All that the store says of the study, for `nothing changed`."""
        store = self.store
        return (
            store.study(self.name),
            store.controller(self.name),
            list(store.trials(self.name)),
            store.refusals(self.name),
            [claim for claim in store.claims(now=NOW) if claim.study == self.name],
        )
