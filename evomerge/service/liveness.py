"""Who is still at work: controllers by process id and lease, attempts by their leases.

Knows nothing of studies or stores.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import takewhile
from pathlib import Path

from evomerge.store.base import Controller

_STEPS = 4


@dataclass
class _Lease:
    ends: timedelta  # in the time that has counted for leases of its length
    recorded: timedelta  # when it ends as the store has it, in the same


@dataclass
class _OneLength:
    """Leases of one length, in the order of their ends; `passed` is the time that has counted."""

    length: timedelta
    passed: timedelta = timedelta(0)
    leases: dict[str, _Lease] = field(default_factory=dict)

    def lapsed(self) -> Iterator[str]:
        over = takewhile(lambda item: item[1].ends < self.passed, self.leases.items())
        return (token for token, _ in over)


class Leases:
    """How much is left of each attempt's lease, by a clock that may jump.

    The time between two looks at the clock counts for nothing where it went backwards, and for a
    quarter of a lease at most: so neither a clock that is set nor a controller that was stopped
    for a while (suspended, waiting for its database) makes an attempt look lost. A look costs the
    same for any number of leases.
    """

    def __init__(self, clock: Callable[[], datetime]) -> None:
        self._clock = clock
        self._seen = clock()
        self._lengths: dict[timedelta, _OneLength] = {}
        self._length_of: dict[str, _OneLength] = {}

    def start(self, token: str, lease_s: float) -> None:
        """A lease begins."""
        self._look()
        one = self._of(lease_s)
        ends = one.passed + one.length
        one.leases[token] = _Lease(ends, ends)
        self._length_of[token] = one

    def renew(self, tokens: Iterable[str], lease_s: float) -> list[str]:
        """These leases begin anew; those of them that are due to be recorded: a third is spent."""
        self._look()
        new, due = self._of(lease_s), []
        for token in tokens:
            old = self._length_of[token]
            left = old.leases.pop(token).recorded - old.passed
            if left < new.length * 2 / 3:
                left = new.length
                due.append(token)
            new.leases[token] = _Lease(new.passed + new.length, new.passed + left)
            self._length_of[token] = new
        return due

    def end(self, token: str) -> None:
        """A lease is over."""
        del self._length_of.pop(token).leases[token]

    def lapsed(self) -> list[str]:
        """Whose lease has run out."""
        self._look()
        return [token for one in self._lengths.values() for token in one.lapsed()]

    def _of(self, lease_s: float) -> _OneLength:
        length = timedelta(seconds=lease_s)
        return self._lengths.setdefault(length, _OneLength(length))

    def _look(self) -> None:
        now = self._clock()
        passed = max(now - self._seen, timedelta(0))
        self._seen = now
        for one in self._lengths.values():
            one.passed += min(passed, one.length / _STEPS)


def is_running(holder: Controller, now: datetime) -> bool:
    """Whether a controller may still be at work: not known to be dead, its lease not lapsed."""
    return not is_dead(holder) and holder.lease_until > now


def is_dead(holder: Controller) -> bool:
    """Whether a controller of this host no longer runs; False for one elsewhere."""
    if holder.host != socket.gethostname():
        return False
    return process_start(holder.pid) != holder.started


def process_start(pid: int) -> float | None:
    """When a process started, in ticks since boot; None if there is no such process.

    Where there is no /proc, 0.0 stands for a live process: a recycled pid then reads as alive.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        if Path("/proc/self").exists():
            return None
        return 0.0 if _signals(pid) else None
    except OSError:
        return None
    after_name = stat.rpartition(")")[2].split()
    return None if after_name[0] == "Z" else float(after_name[19])


def _signals(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
