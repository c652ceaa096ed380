"""Have the pages of a mapped file read ahead, and let go of them when they are done with.

A page that is first touched in a computation stops it for a read and a fault; asked for in
megabytes by a thread of its own, reading overlaps with computing. Does nothing where the system has
no such calls. Knows nothing of what the tensors mean.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor

_STEP = 16 << 20
_POPULATE_READ = 22  # Linux 5.14; not yet among mmap's constants
_WILLNEED = 3
_DONTNEED = 4


def populate(tensor: Tensor) -> None:
    """Read a mapped tensor's pages from the disk and enter them in the page table."""
    for start, size in _ranges(tensor):
        # of one piece, not ahead of it: read so, pages come in large folios, which cost little
        _advise(start, size, _WILLNEED)
        _advise(start, size, _POPULATE_READ)


def release(tensor: Tensor) -> None:
    """Take a mapped tensor's pages out of the process's memory; touching them reads them again.

    For tensors that lie in a file's pages only: any other memory would lose its contents.
    """
    for start, size in _ranges(tensor):
        _advise(start, size, _DONTNEED)


def _ranges(tensor: Tensor) -> list[tuple[int, int]]:
    first = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    end = tensor.data_ptr() + tensor.nbytes
    return [(start, min(_STEP, end - start)) for start in range(first, end, _STEP)]


def _advise(start: int, size: int, advice: int) -> None:
    # without checking its answer: a system that knows better may refuse, and nothing depends on it
    if _madvise is not None:
        _madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), ctypes.c_int(advice))


_madvise = ctypes.CDLL(None).madvise if sys.platform == "linux" else None
