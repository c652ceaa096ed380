"""Write a file past the page cache, where the file system can.

A checkpoint is written once and not read again soon: going through the page cache costs a copy, its
upkeep, and the pages of other files. Measured on ext4: a tenth of the CPU time and several times
the speed of ordinary writes. Knows nothing of what is written.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

SLAB = 4 << 20
"""Bytes per write; a multiple of every device's block."""

_SLABS = 3


@contextmanager
def direct_file(path: Path) -> Iterator[DirectFile]:
    """A new file, flushed to the disk when the block ends well. Raises OSError."""
    handle = _opened(path)
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="write") as thread:
            file = DirectFile(handle, thread)
            yield file
            file.finish()
        os.fsync(handle)
    finally:
        os.close(handle)


class DirectFile:
    """Collects bytes in aligned slabs, which a thread writes while the next one fills."""

    def __init__(self, handle: int, thread: ThreadPoolExecutor) -> None:
        self._handle = handle
        self._thread = thread
        self._slabs = [mmap.mmap(-1, SLAB) for _ in range(_SLABS)]
        self._pending: list[Future[None] | None] = [None] * _SLABS
        self._current, self._filled, self._offset = 0, 0, 0

    def write(self, data: memoryview) -> None:
        """Append bytes. Raises OSError, that of an earlier write included."""
        taken = 0
        while taken < len(data):
            step = min(SLAB - self._filled, len(data) - taken)
            slab = memoryview(self._slabs[self._current])
            slab[self._filled : self._filled + step] = data[taken : taken + step]
            self._filled, taken = self._filled + step, taken + step
            if self._filled == SLAB:
                self._send()

    def finish(self) -> None:
        """Write what is left."""
        for pending in self._pending:
            if pending is not None:
                pending.result()
        _through_cache(self._handle)
        rest = memoryview(self._slabs[self._current])[: self._filled]
        _write(self._handle, rest, self._offset)

    def _send(self) -> None:
        slab, offset = memoryview(self._slabs[self._current]), self._offset
        self._pending[self._current] = self._thread.submit(_write, self._handle, slab, offset)
        self._current = (self._current + 1) % _SLABS
        self._filled, self._offset = 0, offset + SLAB
        free = self._pending[self._current]
        if free is not None:
            free.result()


def _opened(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | _DIRECT, 0o644)
    except OSError as error:
        if error.errno != errno.EINVAL:  # what a file system without it answers
            raise
        return os.open(path, flags, 0o644)


def _write(handle: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(handle, data, offset)
        data, offset = data[written:], offset + written
        if data:  # what is left is no whole number of blocks
            _through_cache(handle)


def _through_cache(handle: int) -> None:
    fcntl.fcntl(handle, fcntl.F_SETFL, fcntl.fcntl(handle, fcntl.F_GETFL) & ~_DIRECT)


_DIRECT = getattr(os, "O_DIRECT", 0)
