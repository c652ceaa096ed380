"""How a run is asked to stop: Ctrl-C, SIGTERM from a scheduler, SIGHUP from a closed terminal.

Knows a controller that can be told to stop, and nothing of studies. Exit codes are `running`'s.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Self

from evomerge.service.controller import Controller
from evomerge.service.progress import View
from evomerge.store.reconnecting import stop_waiting

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stop:
    """Handles the signals within a `with`; `asked` once one came, `began` once a controller ran.

    A signal interrupts what goes on with KeyboardInterrupt, except within `gently`: there the first
    lets running attempts finish and the second stops at once. SIGHUP is left alone where `nohup`
    has it ignored.
    """

    def __init__(self, view: View) -> None:
        self.asked = self.began = False
        self._view = view
        self._controller: Controller | None = None

    def __enter__(self) -> Self:
        handled = [
            n for n in _SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN
        ]
        self._terminals = _terminals()
        self._before = {number: signal.signal(number, self._handle) for number in handled}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        stop_waiting(False)

    @contextlib.contextmanager
    def gently(self, controller: Controller) -> Iterator[None]:
        """While the controller runs, it is told to stop."""
        self._controller, self.began = controller, True
        try:
            yield
        finally:
            self._controller = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.asked = self.asked, True  # before the note: a second one may come meanwhile
        stop_waiting()
        if number == signal.SIGHUP:
            _leave(self._terminals)
        if self._controller is None:
            raise KeyboardInterrupt
        self._controller.stop(now=again)
        if not again:
            self._view.note(
                "stopping once the running attempts are done; press Ctrl-C again to stop now"
            )


def _terminals() -> list[int]:
    """Descriptors of our output that are terminals; once one is closed it cannot be asked."""
    with contextlib.suppress(OSError, ValueError):  # a test's stand-ins have no descriptors
        return [s.fileno() for s in (sys.stdout, sys.stderr) if s.isatty()]
    return []


def _leave(terminals: list[int]) -> None:
    """What is written to a terminal that is gone would be an error in the midst of something."""
    with open(os.devnull, "w") as nowhere:
        for terminal in terminals:
            os.dup2(nowhere.fileno(), terminal)
