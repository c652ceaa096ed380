"""Repeating a store's method when the connection to the database breaks.

Only what is safe is repeated: a transaction of which nothing was kept, or a read. A commit that was
cut off is not repeated here; `sql` finds out first whether it came through. Knows no table.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

from evomerge.errors import StoreUnreachable

RECONNECT_S = 300.0
_FIRST_S, _LONGEST_S = 0.05, 5.0
_LOOK_EVERY_S = 0.1
_stopping = False  # of the whole process, as the signals are that ask for it


class Reconnects(Protocol):
    """What has methods that are repeated: for about so many seconds."""

    reconnect_s: float


Method = TypeVar("Method", bound=Callable[..., Any])


def reconnecting(method: Method) -> Method:
    """Call a method again, after a pause that grows, while there is no connection.

    Raises the last StoreUnreachable once `reconnect_s` seconds were waited away, or at once where
    `stop_waiting` was called.
    """

    @functools.wraps(method)
    def call(self: Reconnects, *args: Any, **kwargs: Any) -> Any:
        said = False
        for pause_s in pauses(self.reconnect_s):
            try:
                return method(self, *args, **kwargs)
            except StoreUnreachable as error:
                if _stopping:
                    raise
                if not said:
                    _say(error, self.reconnect_s)
                    said = True
            _sleep(pause_s)
        return method(self, *args, **kwargs)

    return call  # type: ignore[return-value]


def stop_waiting(stop: bool = True) -> None:
    """This process is to end: from now on nothing in it waits for a connection, or waits on.

    Only leaves word, so that a signal handler may call it: what it may interrupt is a lock's owner.
    """
    global _stopping
    _stopping = stop


def pauses(total_s: float) -> Iterator[float]:
    """Pauses that double from one to the next, `total_s` seconds in all."""
    pause_s = _FIRST_S
    while total_s > 0:
        yield min(pause_s, total_s)
        total_s -= pause_s
        pause_s = min(2 * pause_s, _LONGEST_S)


def _sleep(seconds: float) -> None:
    until_s = time.monotonic() + seconds
    while not _stopping and (left_s := until_s - time.monotonic()) > 0:
        time.sleep(min(left_s, _LOOK_EVERY_S))


def _say(error: StoreUnreachable, reconnect_s: float) -> None:
    logging.getLogger(__name__).warning(
        "%s; nothing is lost, trying again for up to %g s", error, reconnect_s
    )
