"""The batch size that fits into memory: the one asked for, and half of it whenever it does not.

Knows nothing of requests, and of models only how to name one. What comes out of a smaller batch
differs in the last digits at most, as lm-eval's own results do from one batch size to another.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from evomerge.errors import OutOfMemory

T = TypeVar("T")
# what torch's allocators say in a plain RuntimeError
_CPU, _OTHER = "can't allocate memory", "out of memory"
_GIB = 2**30


class Room:
    """`batch_size` only ever shrinks: what did not fit once is not tried for the next candidate.

    `asked` is the batch size to begin with.
    """

    def __init__(self, batch_size: int, model: Any) -> None:
        self.asked = self.batch_size = batch_size
        self._model = model

    def batches(self, count: int, run: Callable[[int, int], tuple[int, T]]) -> Iterator[T]:
        """The results of one batch after another, until `count` items are done.

        `run(start, batch_size)` does a batch of items from `start` on and gives where the next one
        begins, and its result. One that runs out of memory is begun again with half the batch
        size. Raises OutOfMemory where one item alone does not fit.
        """
        start = 0
        while start < count:
            done: tuple[int, T] | None = None
            with out_of_memory() as reasons:
                done = run(start, self.batch_size)
            if done is None:
                self._shrink(reasons[0])
            else:
                start, result = done
                yield result

    def _shrink(self, reason: str) -> None:
        """Halve the batch size; nobody holds a tensor of the batch that failed any more."""
        free_memory()
        if self.batch_size == 1:
            raise OutOfMemory(
                f"a batch of 1 of {name_of(self._model)} does not fit (`batch_size` was "
                f"{self.asked}): {situation(self._model.device, reason)}"
            )
        self.batch_size //= 2


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception is one of the ways in which torch runs out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (_CPU in text or _OTHER in text)


@contextlib.contextmanager
def out_of_memory() -> Iterator[list[str]]:
    """Swallow running out of memory; the list then holds the reason.

    Not the exception: its traceback keeps alive what filled the memory.
    """
    reasons: list[str] = []
    try:
        yield reasons
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reasons.append((str(error).splitlines() or [type(error).__name__])[0])


def twice(action: Callable[[], T], what: str, device: torch.device | str) -> T:
    """The action's result; where memory runs out it is freed and the action begun once more.

    Raises OutOfMemory if there is too little again.
    """
    with out_of_memory():
        return action()
    free_memory()
    with out_of_memory() as reasons:
        return action()
    raise OutOfMemory(f"{what} does not fit: {situation(device, reasons[0])}")


def free_memory() -> None:
    """Give back what nobody uses, to the device too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def situation(device: torch.device | str, reason: str) -> str:
    """How much memory a device has, in one line, and what to do about it."""
    free, total = _memory(torch.device(device))
    return (
        f"{device} has {free / _GIB:.1f} of {total / _GIB:.1f} GiB free ({reason}); give each "
        "worker more memory, or more GPUs by `workers.num_gpus`"
    )


def name_of(model: Any) -> str:
    """Where a model was loaded from."""
    return str(getattr(model.config, "name_or_path", "") or "the model")


def _memory(device: torch.device) -> tuple[int, int]:
    """Free bytes and all bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    page = os.sysconf("SC_PAGE_SIZE")
    return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page
