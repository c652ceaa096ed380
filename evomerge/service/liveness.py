"""Whether a recorded controller still runs: process ids of this host, leases elsewhere.

Knows nothing of studies or stores.
"""

from __future__ import annotations

import os
import socket
from datetime import datetime
from pathlib import Path

from evomerge.store.base import Controller


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
