"""The digest of a checkpoint's contents, as a tree: tensors can be hashed in any order.

A BLAKE3 hash for each tensor, and one over those. Knows no files.

Source: O'Connor, Aumasson, Neves, Wilcox-O'Hearn 2020, "BLAKE3: one function, fast everywhere".
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from blake3 import blake3
from torch import Tensor


class TensorHash:
    """The digest of one tensor, fed with its elements in flat order, in pieces of any size."""

    def __init__(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self._hash = blake3(f"{name}\0{dtype}\0{list(shape)}\0".encode())

    def update(self, elements: Tensor) -> None:
        """Take in the next elements: a contiguous tensor on the CPU, as stored."""
        self._hash.update(elements.reshape(-1).view(torch.uint8).numpy().data)

    def hexdigest(self) -> str:
        """64 hex digits of what was taken in so far."""
        return self._hash.hexdigest()


def tensor_digest(name: str, tensor: Tensor) -> str:
    """BLAKE3 of a tensor's name, dtype, shape and bytes, as 64 hex digits."""
    hashed = TensorHash(name, tensor.dtype, tuple(tensor.shape))
    hashed.update(tensor)
    return hashed.hexdigest()


def combine(preamble: bytes, digests: Mapping[str, str]) -> str:
    """The digest of a checkpoint, as 64 hex digits, from its tensors' digests by name.

    `preamble` is what is not a tensor: `Checkpoint.preamble`. The order of `digests` is irrelevant.
    """
    tree = blake3(blake3(preamble).digest())
    for name in sorted(digests):
        tree.update(bytes.fromhex(digests[name]))
    return tree.hexdigest()
