"""Freed memory, given back to the system at once.

glibc learns to keep large blocks that were freed, in pieces that gradients of other shapes do not
fit: measured, more than a copy of the model after a few backward passes. Elsewhere nothing is done.
"""

from __future__ import annotations

import ctypes

_M_MMAP_THRESHOLD = -3  # malloc.h
_LARGE_BYTES = 1 << 16


def return_large_blocks() -> None:
    """From now on, blocks of 64 KB and more go back to the system when they are freed."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # no glibc
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
