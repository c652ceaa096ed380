"""Who is still at work: controllers by process id and lease, attempts by their leases.

Knows nothing of studies or stores.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from evomerge.store.base import Controller

_STEPS = 4


@dataclass
class _Lease:
    length: timedelta
    left: timedelta
    recorded: timedelta  # what is left of it as the store has it


class Leases:
    """How much is left of each attempt's lease, by a clock that may jump.

    The time between two looks at the clock counts for nothing where it went backwards, and for a
    quarter of a lease at most: so neither a clock that is set nor a controller that was stopped
    for a while (suspended, waiting for its database) makes an attempt look lost.
    """

    def __init__(self, clock: Callable[[], datetime]) -> None:
        self._clock = clock
        self._seen = clock()
        self._leases: dict[str, _Lease] = {}

    def start(self, token: str, lease_s: float) -> None:
        """A lease begins."""
        self._look()
        length = timedelta(seconds=lease_s)
        self._leases[token] = _Lease(length, length, length)

    def renew(self, tokens: Iterable[str], lease_s: float) -> list[str]:
        """These leases begin anew; those of them that are due to be recorded: a third is spent."""
        self._look()
        length, due = timedelta(seconds=lease_s), []
        for token in tokens:
            lease = self._leases[token]
            lease.length = lease.left = length
            if lease.recorded < length * 2 / 3:
                lease.recorded = length
                due.append(token)
        return due

    def end(self, token: str) -> None:
        """A lease is over."""
        del self._leases[token]

    def lapsed(self) -> list[str]:
        """Whose lease has run out."""
        self._look()
        return [token for token, lease in self._leases.items() if lease.left < timedelta(0)]

    def _look(self) -> None:
        now = self._clock()
        passed = max(now - self._seen, timedelta(0))
        self._seen = now
        for lease in self._leases.values():
            step = min(passed, lease.length / _STEPS)
            lease.left -= step
            lease.recorded -= step


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
