"""Faults as wrappers: a process that dies at a chosen call of its store or its executor.

Knows only the two protocols, and of the SQL store that it commits. The death is a SIGKILL, or in
tests of many deaths an exception after which nothing the dead process owned answers any more.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Collection
from typing import Any

import sqlalchemy as sa

WRITES = frozenset(
    {
        "create_study",
        "update_study",
        "acquire",
        "renew",
        "release",
        "create_trials",
        "start_attempt",
        "renew_attempts",
        "finish",
        "fail_attempt",
        "refuse",
        "reuse",
        "mark_told",
        "claim",
        "withdraw",
    }
)

CALLS = frozenset({"inspect", "prepare", "submit", "cancel", "poll", "close"})
"""The executor's calls that do something."""


class Killed(BaseException):
    """Stands for SIGKILL: nothing may handle it, and what `finally` would still do is refused."""


def kill_by_exception() -> None:
    """Die within this process."""
    raise Killed


def kill_by_signal() -> None:
    """Die."""
    os.kill(os.getpid(), signal.SIGKILL)


class Fate:
    """Numbers the points at which a process may die, from 0, and ends it at point `at`.

    `at=None` only counts: see `points`.
    """

    def __init__(self, at: int | None = None, die: Callable[[], None] = kill_by_exception) -> None:
        self._at = at
        self._die = die
        self.points = 0

    def pass_point(self) -> None:
        """Die here if it is the point, or if this process is dead already."""
        if self._at is not None and self.points >= self._at:
            self._die()
        self.points += 1

    def bind(self, thing: Any, calls: Collection[str]) -> Any:
        """The same thing, with a point before and one after each of these calls.

        Type it as what it was with `typing.cast`. An SQL store gets a point in each commit too,
        when every statement was sent.
        """
        if hasattr(thing, "engine"):

            @sa.event.listens_for(thing.engine, "commit")
            def commit(connection: sa.Connection) -> None:
                if connection.get_execution_options().get("evomerge_write"):
                    self.pass_point()

        return _Mortal(self, thing, calls)


class _Mortal:
    def __init__(self, fate: Fate, thing: Any, calls: Collection[str]) -> None:
        self._fate, self._thing, self._calls = fate, thing, calls

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._thing, name)
        if name not in self._calls:
            return method

        def call(*args: Any, **kwargs: Any) -> Any:
            self._fate.pass_point()
            result = method(*args, **kwargs)
            self._fate.pass_point()
            return result

        return call


class KillAt:
    """A store that ends its own process with SIGKILL at write `at`, counted from 0.

    `after=False` dies before that write, with nothing of it in the store; `after=True` once it is
    committed, before the caller hears of it. `at=None` only counts: see `writes`.

    It has every method of the store it wraps, by delegation, so type it as a StudyStore with
    `typing.cast`.
    """

    def __init__(self, store: Any, at: int | None = None, *, after: bool = False) -> None:
        self._store = store
        self._at = at
        self._after = after
        self.writes = 0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        return self._deadly(method) if name in WRITES else method

    def _deadly(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def write(*args: Any, **kwargs: Any) -> Any:
            now = self.writes == self._at
            if now and not self._after:
                _die()
            result = method(*args, **kwargs)
            if now:
                _die()
            self.writes += 1
            return result

        return write


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
