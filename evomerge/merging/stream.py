"""Merged tensors one after another, with reading, computing and consuming overlapped.

While the caller writes one tensor, the next is computed and the inputs of the one after it are read
from the disk and looked at. Memory holds a few tensors, whatever the model. Writes nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from evomerge.merging.merge import Merge

AHEAD_BYTES = 64 << 20
"""Results that are computed ahead of the caller hold at most this much, but for one tensor."""


def merged_tensors(
    merge: Merge, names: Sequence[str], look: Callable[[str], None]
) -> Iterator[tuple[str, Tensor]]:
    """The merged tensors of these names, in their order.

    `look(name)` reads a tensor's inputs; it is called for each name in order, in a thread, before
    the tensor is computed. Raises what it, or the merge, raises.
    """
    ahead: deque[tuple[str, int, Future[Tensor]]] = deque()
    held = 0
    with (
        ThreadPoolExecutor(1, thread_name_prefix="read") as reader,
        ThreadPoolExecutor(1, thread_name_prefix="merge") as computer,
    ):
        try:
            for name in names:
                size = merge.nbytes(name)
                while ahead and held + size > AHEAD_BYTES:
                    done, freed, tensor = ahead.popleft()
                    yield done, tensor.result()
                    held -= freed
                read = reader.submit(look, name)
                ahead.append((name, size, computer.submit(_computed, merge, name, read)))
                held += size
            for done, _, tensor in ahead:
                yield done, tensor.result()
        finally:
            for executor in (reader, computer):
                executor.shutdown(wait=True, cancel_futures=True)


def _computed(merge: Merge, name: str, read: Future[None]) -> Tensor:
    read.result()
    return merge.tensor(name)
