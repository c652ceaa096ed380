"""Faults as wrappers: a store whose process dies at a chosen write.

Knows only the store protocol; the process that is to die wraps its own store. A death inside a
transaction, which no wrapper can reach, is tested on the SQL store by itself.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

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
    }
)


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
