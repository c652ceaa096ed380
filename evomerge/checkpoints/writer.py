"""Write safetensors files tensor by tensor, so that memory is bounded whatever a model's size.

The library's own writer needs every tensor of a file at once. Format: 8 bytes of little-endian
header length, a JSON header of {name: {dtype, shape, data_offsets}}, then the tensors' bytes
without holes. Knows nothing of models.

Source: the format's description, https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from evomerge.checkpoints.direct import direct_file

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Entry:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of its data in bytes."""
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return size


def header(entries: Sequence[Entry]) -> bytes:
    """The first bytes of a file that holds `entries` in this order."""
    document: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for entry in entries:
        document[entry.name] = {
            "dtype": _DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, start + entry.nbytes],
        }
        start += entry.nbytes
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def in_order(entries: Iterable[Entry]) -> list[Entry]:
    """Widest dtypes first, so that every tensor is aligned in the mapped file; then by name."""
    return sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))


def write_file(path: Path, entries: Sequence[Entry], blocks: Iterable[Tensor]) -> Iterator[int]:
    """Write a file and flush it to the disk, yielding the bytes written after every block.

    `blocks` are the flat elements of all entries in their order. Raises OSError.
    """
    with direct_file(path) as file:
        file.write(memoryview(header(entries)))
        for block in blocks:
            file.write(block.contiguous().view(torch.uint8).numpy().data)
            yield block.nbytes
