"""Permute an expert's neurons so that they come in the order of a reference expert's.

Neurons are alike by their weights, or by what they do. Knows one pair of experts at a time, as
tensors by role; not where they lie, nor who is whose reference.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional

from evomerge.errors import MergeError

_GATE = re.compile(r"(?:gate_proj|w1)\b")

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
    return assigned(total)


def matched_by_activations(
    reference: Expert, expert: Expert, axes: Axes, rows: Tensor, activation: str
) -> Tensor:
    """The order [f] of an expert's neurons that is active most like the reference's.

        P = argmax over permutations of Σᵢ corr(aᵢ, a'_P(i))

    a and a' are what goes into the outward matrix of either, over the tokens [n, d] that were sent
    to either. By weights where those are fewer than two.

    Source: Li et al. 2024, arXiv:2310.01334 (the authors' code); Ainsworth et al. 2023,
    arXiv:2209.04836, sec. 3.1.
    """
    if len(rows) < 2:
        return matched(reference, expert, axes)
    one, other = (hidden(e, axes, rows, activation) for e in (reference, expert))
    return assigned(correlation(one, other))


def assigned(similarity: Tensor) -> Tensor:
    """The permutation P [f] of largest Σ similarity[i, P(i)]."""
    return torch.from_numpy(linear_sum_assignment(similarity.cpu().numpy(), maximize=True)[1])


def hidden(expert: Expert, axes: Axes, rows: Tensor, activation: str) -> Tensor:
    """What an expert's neurons [n, f] make of tokens [n, d]: what goes into its outward matrix.

    σ(x W_gᵀ)·(x W_uᵀ) with a gate, σ(x Wᵀ) without. Raises MergeError for other experts.
    """
    from transformers.activations import ACT2FN

    inward = [role for role, axis in axes.items() if axis == 0 and expert[role].ndim == 2]
    gates = [role for role in inward if _GATE.search(role)]
    if len(inward) != 1 + len(gates) or len(gates) > 1:
        raise MergeError(f"{', '.join(inward)}: which of them is the experts' gate is not told")
    (first,), second = gates or inward, [role for role in inward if role not in gates]
    made: Tensor = ACT2FN[activation](_linear(expert, first, rows))
    return made * _linear(expert, second[0], rows) if gates else made


def outputs_of(expert: Expert, axes: Axes, rows: Tensor, activation: str) -> Tensor:
    """What an expert makes of tokens [n, d], in float32."""
    (outward,) = [role for role, axis in axes.items() if axis == 1]
    return _linear(expert, outward, hidden(expert, axes, rows, activation))


def correlation(one: Tensor, other: Tensor) -> Tensor:
    """Correlations [f, g] of columns [n, f] and [n, g]; 0 for a column that never changes."""
    return _standard(one).T @ _standard(other)


def activation_name(config: Any) -> str:
    """The name of a model's nonlinearity. Raises MergeError where its config has none."""
    for key in ("hidden_act", "hidden_activation", "dense_act_fn"):
        if isinstance(name := getattr(config, key, None), str):
            return name
    raise MergeError(
        f"{config.model_type}: its config names no activation function;"
        " take `alignment_by: weights` and another similarity"
    )


def _standard(columns: Tensor) -> Tensor:
    centred = columns - columns.mean(0)
    lengths: Tensor = torch.linalg.vector_norm(centred, dim=0)
    constant = lengths <= 1e-6 * torch.linalg.vector_norm(columns, dim=0)
    return centred / lengths.masked_fill(constant, torch.inf)


def _linear(expert: Expert, role: str, rows: Tensor) -> Tensor:
    bias = expert.get(role.removesuffix("weight") + "bias")
    return functional.linear(rows, expert[role].float(), None if bias is None else bias.float())


def permuted(tensor: Tensor, order: Tensor, axis: int | None) -> Tensor:
    """The tensor with its neurons in another order: new neuron i is old neuron `order[i]`."""
    return tensor if axis is None else tensor.index_select(axis, order.to(tensor.device))


def _by_neuron(tensor: Tensor, axis: int) -> Tensor:
    return tensor.to(torch.float32).movedim(axis, 0).reshape(tensor.shape[axis], -1)
