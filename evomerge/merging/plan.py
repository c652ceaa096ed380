"""What a merge will read, compute and write, worked out before a tensor is touched.

Bytes are counted in the checkpoints' headers; operations by running each method on a small random
tensor and counting what it asks torch to do. Writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from evomerge.checkpoints.direct import SLAB
from evomerge.merging.compute import Operands
from evomerge.merging.inspection import Inspection
from evomerge.merging.merge import Merge
from evomerge.merging.methods.base import Coefficients, MergeMethod
from evomerge.merging.stream import AHEAD_BYTES

_SAMPLE = 48
"""Longest side of a sample tensor."""

_REDUCTIONS = ("aten.sum", "aten.mean", "aten.cumsum", "aten.amax", "aten.amin", "aten.sort")

_SLABS = 4
"""Of the writer, and one for what it holds besides."""


@dataclass(frozen=True)
class Plan:
    """The work of one merge. Sizes in bytes.

    `methods` counts tensors by merge method, `read` is by checkpoint. `flops` counts the operations
    of the method's definition; kernels save some. `memory` is what the process holds beyond its
    libraries and the pages of the input files. Of a merge that changes structure, `structure` says
    in a line what becomes of it, and what that takes is not counted: `memory` is None.
    """

    tensors: int
    methods: Mapping[str, int]
    read: Mapping[str, int]
    written: int
    files: int
    elements: int
    flops: float
    memory: int | None
    structure: str | None = None


def plan(merge: Merge, *, files: int) -> Plan:
    """The plan of a merge into so many weight files. Reads no tensor."""
    methods: dict[str, int] = {}
    costs: dict[str, _Cost] = {}
    elements, flops = 0, 0.0
    for name in filter(merge.is_merged, merge.names):
        method, coefficients = merge.method(name), merge.coefficients(name)
        sample, shrunk = _sample(coefficients)
        key = repr((method.name, sample))
        if key not in costs:
            costs[key] = _cost(method, sample)
        methods[method.name] = methods.get(method.name, 0) + 1
        elements += coefficients.size
        flops += coefficients.size * costs[key].per_element(shrunk)
    if merge.is_built:
        methods = {merge.recipe.method: sum(merge.dtype(n).is_floating_point for n in merge.names)}
    sizes = [merge.nbytes(name) for name in merge.names]
    largest = max(sizes, default=0)
    return Plan(
        tensors=len(merge.names),
        methods=methods,
        read=Inspection(merge).stored_bytes(),
        written=sum(sizes),
        files=files,
        elements=elements,
        flops=flops,
        memory=None if merge.is_built else largest + max(largest, AHEAD_BYTES) + _SLABS * SLAB,
        structure=merge.structure,
    )


@dataclass(frozen=True)
class _Cost:
    """Operations on a sample: those that grow with its elements, and with elements times side."""

    size: int
    linear: float
    cubic: float

    def per_element(self, shrunk: float) -> float:
        return (self.linear + self.cubic * shrunk) / self.size


def _sample(coefficients: Coefficients) -> tuple[Coefficients, float]:
    """The same parameters for a small tensor, and how many times shorter its sides are."""
    longest = max(coefficients.shape, default=1)
    shrunk = max(1.0, longest / _SAMPLE)
    shape = tuple(max(1, round(side / shrunk)) for side in coefficients.shape)
    return replace(coefficients, tensor="sample", shape=shape), shrunk


def _cost(method: MergeMethod, coefficients: Coefficients) -> _Cost:
    """What one tensor costs; a method that surveys the model surveys the sample."""
    generator = torch.Generator().manual_seed(0)
    base, *sources = (
        torch.randn(coefficients.size, generator=generator) for _ in ("base", *coefficients.names)
    )
    wanted = method.needs_base or method.takes_base
    blocks = Operands(base if wanted else None, tuple(sources)).blocks(coefficients.size)
    with _Counter() as counted:
        survey = method.survey(lambda: iter([(coefficients, blocks)]))
        prepared = method.prepare(blocks, coefficients, survey)
        for block in blocks():
            method.merge(block, coefficients, prepared)
    return _Cost(coefficients.size, counted.linear, counted.cubic)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts floating-point operations: a product of matrices by its sums, a singular value or
    eigenvalue decomposition by Golub and Van Loan's count, arithmetic one for each result."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.linear, self.cubic = 0.0, 0.0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        packet = function._overloadpacket
        if packet in flop_registry:
            self.cubic += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        elif "svd" in str(packet) or "eigh" in str(packet):
            self.cubic += _decomposition(*args[0].shape[-2:])
        elif torch.Tag.pointwise in function.tags:
            self.linear += _elements(out)
        elif str(packet) in _REDUCTIONS:
            self.linear += _elements(args[0])
        return out


def _decomposition(rows: int, columns: int) -> float:
    long, short = max(rows, columns), min(rows, columns)
    return float(6 * long * short**2 + 20 * short**3)


def _elements(tensor: Any) -> int:
    floating = isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
    return int(tensor.numel()) if floating else 0
