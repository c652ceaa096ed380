"""Git Re-Basin: bring the sources' units into one order, then average.

The order is an artifact's; how it was found is `evomerge.merging.structure`'s business.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from evomerge.errors import MergeError
from evomerge.merging.kernels.program import Program
from evomerge.merging.methods.base import (
    Block,
    Blocks,
    Coefficients,
    Fitted,
    MergeMethod,
    Parameter,
)
from evomerge.merging.methods.linear import Linear
from evomerge.merging.methods.matrices import gathered
from evomerge.merging.methods.simpler import with_parameters

_AVERAGE = Linear()


MOVED_NAMES = "tensors"
"""The fact of an artifact that says by source which tensor comes to the place of another."""


def order_key(source: str, tensor: str, axis: int) -> str:
    """Where an artifact holds the order of one axis of a source's tensor; absent for one in place.

    Position i of the result is position order[i] of the source's tensor that stands there. Int32
    [size of the axis].
    """
    return f"{source}/{tensor}/{axis}"


class GitRebasin(MergeMethod):
    """The average of the sources, each with its units where their likes are in the reference.

        θ = Σᵢ wᵢ·πᵢ(θᵢ) / Σᵢ wᵢ

    πᵢ permutes axes of the tensor, and whole tensors (experts) among each other. Computed as
    `linear` computes it of the permuted sources, bit for bit. A tensor that no permutation moves is
    averaged as it is. Memory: the tensor of every source, whole.

    Source: Ainsworth et al. 2023, arXiv:2209.04836. The authors interpolate two models; more are
    each aligned to the reference here, not to each other's mean.
    """

    name = "git_rebasin"
    summary = "average of sources whose units were first brought into one order"
    formula = "θ = Σᵢ wᵢ·πᵢ(θᵢ) / Σᵢ wᵢ,  πᵢ permutes units"
    parameters = (
        Parameter("weight", "source", "float", 1.0, "share of the source in the average"),
    )
    needs_base = False
    artifact = "permutation"

    def stands_for(self, tensor: str, source: str, fitted: Fitted | None) -> str:
        """The tensor that the artifact's facts name for it."""
        names = fitted.facts.get(MOVED_NAMES, {}) if fitted is not None else {}
        return str(names.get(source, {}).get(tensor, tensor))

    def prepare(self, blocks: Blocks, coefficients: Coefficients, survey: Any) -> Tensor | None:
        """The average, flat in float32; None for a tensor that stays as it is."""
        moves = [dict(_orders(source, coefficients)) for source in coefficients.names]
        if not any(moves):
            return None
        rows = [_permuted(blocks, coefficients, i, orders) for i, orders in enumerate(moves)]
        return _AVERAGE.merge(Block(None, torch.stack(rows), 0), _averaged(coefficients), None)

    def program(self, coefficients: Coefficients, prepared: Any) -> Program | None:
        return None if prepared is not None else _AVERAGE.program(_averaged(coefficients), None)

    def merge(self, block: Block, coefficients: Coefficients, prepared: Tensor | None) -> Tensor:
        if prepared is not None:
            return prepared[block.start : block.start + block.sources.shape[1]].clone()
        return _AVERAGE.merge(block, _averaged(coefficients), None)


def _permuted(
    blocks: Blocks, coefficients: Coefficients, index: int, orders: dict[int, Tensor]
) -> Tensor:
    """One source's tensor in the reference's order, flat in float32 [n]."""
    whole = gathered(blocks, coefficients, lambda block: block.sources[index])
    for axis, order in orders.items():
        whole = whole.index_select(axis, order.to(whole.device))
    return whole.float().flatten()


def _orders(source: str, coefficients: Coefficients) -> Iterator[tuple[int, Tensor]]:
    fitted, shape = coefficients.fitted, coefficients.shape
    assert fitted is not None
    for axis, size in enumerate(shape):
        if (key := order_key(source, coefficients.tensor, axis)) in fitted:
            order = fitted.tensor(key).long()
            if not torch.equal(order.sort().values.cpu(), torch.arange(size)):
                raise MergeError(
                    f"{coefficients.tensor} {list(shape)}: the artifact holds no order of axis"
                    f" {axis}; it was fitted on models of another shape"
                )
            yield axis, order


def _averaged(coefficients: Coefficients) -> Coefficients:
    return with_parameters(coefficients, normalize=True)
