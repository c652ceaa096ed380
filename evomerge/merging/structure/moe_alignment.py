"""Permute an expert's neurons so that they come in the order of a reference expert's.

Knows one pair of experts at a time, as tensors by role; not where they lie, nor who is whose
reference.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

Expert = Mapping[str, Tensor]
"""An expert's tensors by role, such as `up_proj.weight`."""

Axes = Mapping[str, int | None]
"""The axis of each tensor that runs over neurons; None for one without."""


def matched(reference: Expert, expert: Expert, axes: Axes) -> Tensor:
    """The order [f] of an expert's neurons that is most like the reference's.

        C = Σ over inward matrices W (gate, up) of W_ref Wᵀ + V_refᵀ V  (V outward: down)
        P = argmax over permutations of Σᵢ C[i, P(i)]

    Shapes: inward [f, d], outward [d, f], biases of inward layers [f]. Sums run in float32.

    Source: Ainsworth et al. 2023, arXiv:2209.04836, sec. 3.2; Li et al. 2024, arXiv:2310.01334,
    sec. 3.1. The gate's term is ours: the authors do not align experts that have gates.
    """
    total: Tensor | None = None
    for role, axis in axes.items():
        if axis is None:
            continue
        one, other = (_by_neuron(e[role], axis) for e in (reference, expert))
        total = one @ other.T if total is None else total.addmm_(one, other.T)
    assert total is not None  # an expert has neurons
    return torch.from_numpy(linear_sum_assignment(total.cpu().numpy(), maximize=True)[1])


def permuted(tensor: Tensor, order: Tensor, axis: int | None) -> Tensor:
    """The tensor with its neurons in another order: new neuron i is old neuron `order[i]`."""
    return tensor if axis is None else tensor.index_select(axis, order.to(tensor.device))


def _by_neuron(tensor: Tensor, axis: int) -> Tensor:
    return tensor.to(torch.float32).movedim(axis, 0).reshape(tensor.shape[axis], -1)
