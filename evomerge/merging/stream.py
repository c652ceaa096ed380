"""Merged tensors one after another, with reading, computing and consuming overlapped.

While the caller writes one tensor, the next is computed, the inputs of the one after it are looked
at and those of a further one are read from the disk. Memory holds a few tensors, whatever the
model. Writes nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from torch import Tensor

from evomerge.merging.merge import Merge

T = TypeVar("T")

AHEAD_BYTES = 64 << 20
"""Results that are computed ahead of the caller hold at most this much, but for one tensor."""


def merged_tensors(
    merge: Merge,
    names: Sequence[str],
    fetch: Callable[[str], None],
    look: Callable[[str], None],
) -> Iterator[tuple[str, Tensor]]:
    """The merged tensors of these names, in their order.

    `fetch(name)` reads a tensor's inputs from the disk, `look(name)` looks at them; each is called
    for every name in order, in a thread of its own, before the tensor is computed. Raises what
    they, or the merge, raise.
    """
    ahead: deque[tuple[str, int, Future[Tensor]]] = deque()
    held = 0
    with (
        ThreadPoolExecutor(1, thread_name_prefix="fetch") as reader,
        ThreadPoolExecutor(1, thread_name_prefix="look") as looker,
        ThreadPoolExecutor(1, thread_name_prefix="merge") as computer,
    ):
        try:
            for name in names:
                size = merge.nbytes(name)
                while ahead and held + size > AHEAD_BYTES:
                    done, freed, tensor = ahead.popleft()
                    yield done, tensor.result()
                    held -= freed
                there = reader.submit(fetch, name)
                seen = looker.submit(_after, there, look, name)
                ahead.append((name, size, computer.submit(_after, seen, merge.tensor, name)))
                held += size
            for done, _, tensor in ahead:
                yield done, tensor.result()
        finally:
            for executor in (reader, looker, computer):
                executor.shutdown(wait=True, cancel_futures=True)


def _after(earlier: Future[None], stage: Callable[[str], T], name: str) -> T:
    earlier.result()
    return stage(name)
