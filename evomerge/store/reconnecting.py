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


class Reconnects(Protocol):
    """What has methods that are repeated: for about so many seconds."""

    reconnect_s: float


Method = TypeVar("Method", bound=Callable[..., Any])


def reconnecting(method: Method) -> Method:
    """Call a method again, after a pause that grows, while there is no connection.

    Raises the last StoreUnreachable once `reconnect_s` seconds were waited away.
    """

    @functools.wraps(method)
    def call(self: Reconnects, *args: Any, **kwargs: Any) -> Any:
        said = False
        for pause_s in pauses(self.reconnect_s):
            try:
                return method(self, *args, **kwargs)
            except StoreUnreachable as error:
                if not said:
                    _say(error, self.reconnect_s)
                    said = True
            time.sleep(pause_s)
        return method(self, *args, **kwargs)

    return call  # type: ignore[return-value]


def pauses(total_s: float) -> Iterator[float]:
    """Pauses that double from one to the next, `total_s` seconds in all."""
    pause_s = _FIRST_S
    while total_s > 0:
        yield min(pause_s, total_s)
        total_s -= pause_s
        pause_s = min(2 * pause_s, _LONGEST_S)


def _say(error: StoreUnreachable, reconnect_s: float) -> None:
    logging.getLogger(__name__).warning(
        "%s; nothing is lost, trying again for up to %g s", error, reconnect_s
    )
