"""One tensor's merge: from operands as they are stored to the merged tensor, rounded once.

The one place where merged values are computed and rounded, so a live model and an exported
checkpoint cannot differ. Knows no recipe, no checkpoint and no study.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from evomerge.checkpoints.checkpoint import is_finite
from evomerge.errors import NonFiniteModel
from evomerge.merging.kernels import cpu, cuda, streaming
from evomerge.merging.kernels.facts import Facts, Store
from evomerge.merging.kernels.program import Program
from evomerge.merging.methods.base import Block, Blocks, Coefficients, Inputs, MergeMethod

Kernel: TypeAlias = Callable[[Program, Tensor | None, Sequence[Tensor], Tensor], bool]
"""Carries a program out; False if a result is not finite."""

BLOCK_SIZE = 1 << 17
"""Elements per block: a block of base, sources and result stays in a core's cache."""


@dataclass(frozen=True)
class Operands:
    """The tensors that one merged tensor is computed from, flat and in their stored dtypes.

    base [n] (None where the method has no use for it), sources s times [n], in the order of the
    coefficients' names. All on one device. What is found out about them is kept in `store`, if
    there is one, under the digests of what they are: `base_key` and `source_keys` [s].
    """

    base: Tensor | None
    sources: tuple[Tensor, ...]
    store: Store | None = None
    base_key: str = ""
    source_keys: tuple[str, ...] = ()

    def blocks(self, size: int) -> Blocks:
        """Streams them as float32, `size` elements at a time."""

        def stream() -> Iterator[Block]:
            for start in range(0, len(self.sources[0]), size):
                cut = slice(start, start + size)
                # Copies, even of float32: no method can write into a file's pages.
                base = None if self.base is None else self.base[cut].to(torch.float32, copy=True)
                rows = torch.empty(len(self.sources), len(self.sources[0][cut]))
                for row, source in zip(rows, self.sources, strict=True):
                    row.copy_(source[cut])
                yield Block(base=base, sources=rows, start=start)

        return stream

    @property
    def facts(self) -> Facts:
        """What is known of the operands without streaming them."""
        return Facts(self.base, self.sources, self.store, self.base_key, self.source_keys)


def merge_tensor(
    method: MergeMethod,
    coefficients: Coefficients,
    operands: Operands,
    survey: Any,
    out: Tensor,
    *,
    block_size: int = BLOCK_SIZE,
) -> None:
    """Write the merged tensor into `out` [n], rounded once, to nearest even, to its dtype.

    Raises NonFiniteModel, naming the tensor, if a merged value is NaN, or infinite once rounded;
    `out` then holds part of the result. A method that says its merge as a program is carried out
    in one fused pass where a kernel knows the device and the dtypes; the bits are the same.
    """
    blocks = operands.blocks(block_size)
    kernel = _kernel(operands, out)
    if kernel is not None:
        inputs = Inputs(blocks, operands.facts)
        prepared = method.prepare(inputs, coefficients, survey)
        program = method.program(coefficients, prepared)
        if program is not None:
            if not kernel(program, operands.base, operands.sources, out):
                raise _explained(method, coefficients, blocks, survey, out.dtype)
            return
    else:
        prepared = method.prepare(blocks, coefficients, survey)
    for block in blocks():
        merged = method.merge(block, coefficients, prepared)
        target = out[block.start : block.start + merged.numel()]
        target.copy_(merged)
        if not is_finite(target):
            raise _non_finite(method, coefficients, merged, out.dtype)


def _kernel(operands: Operands, out: Tensor) -> Kernel | None:
    """What carries a program out where the result is to be; the operands lie in host memory."""
    stored = (operands.base, *operands.sources)
    if cpu.can_read(*stored, out):
        return cpu.run
    if out.is_cuda and cuda.available() and cpu.can_read(*stored) and cuda.reads(*stored, out):
        return streaming.stream
    return None


def _explained(
    method: MergeMethod, coefficients: Coefficients, blocks: Blocks, survey: Any, dtype: torch.dtype
) -> NonFiniteModel:
    """What the kernel found not to be finite, found again by the method itself."""
    prepared = method.prepare(blocks, coefficients, survey)
    for block in blocks():
        merged = method.merge(block, coefficients, prepared)
        if not is_finite(merged.to(dtype)):
            return _non_finite(method, coefficients, merged, dtype)
    raise AssertionError(f"{coefficients.tensor}: the kernel and {method.name} differ")


def _non_finite(
    method: MergeMethod, coefficients: Coefficients, merged: Tensor, dtype: torch.dtype
) -> NonFiniteModel:
    name = coefficients.tensor
    if is_finite(merged):
        return NonFiniteModel(
            f"{name}: a merged value of {float(merged.abs().max()):g} is beyond"
            f" {dtype}'s largest, {torch.finfo(dtype).max:g}; merge to bfloat16 or float32"
        )
    return NonFiniteModel(f"{name}: {method.name} computed NaN or infinity")
