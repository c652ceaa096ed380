"""What experts of a layer are compared by, as inner products of one vector for each expert.

Cosines and distances follow from the products. Knows nothing of how groups are made of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from evomerge.checkpoints.weights import Weights
from evomerge.merging.structure.moe_alignment import permuted
from evomerge.merging.structure.moe_layers import ExpertLayer
from evomerge.merging.structure.moe_settings import Similarity
from evomerge.merging.structure.moe_statistics import LayerStatistics

Order = Callable[[int], Tensor | None]
"""The order of an expert's neurons in which experts are compared; None for its own."""


def similarity_gram(
    base: Similarity,
    model: Weights,
    layer: ExpertLayer,
    seen: LayerStatistics,
    *,
    order: Order,
    generator: torch.Generator,
) -> Tensor:
    """Inner products [E, E] float64 of what the experts of a layer are compared by.

    router_logits: an expert's logits over all tokens. router_weights: its row of the router.
    expert_weights: all its tensors, flattened, neurons in the order that `order` gives.
    features: the mean input of the tokens sent to it. outputs: its mean output over all tokens.
    random: a standard normal vector.

    Source: Li et al. 2024, arXiv:2310.01334, sec. 3.1 and table 4; outputs: Chen et al. 2025,
    arXiv:2410.08589.
    """
    if base == "router_logits":
        return seen.logits
    if base == "expert_weights":
        return _of_experts(model, layer, order)
    if base == "router_weights":
        return _products(model.tensor(layer.router[0]))
    if base == "features":
        return _products(seen.mean_features)
    if base == "outputs":
        assert seen.outputs is not None  # whoever asks has had them measured
        return _products(seen.outputs / seen.tokens)
    return _products(torch.randn(layer.experts, layer.experts, generator=generator))


def _of_experts(model: Weights, layer: ExpertLayer, order: Order) -> Tensor:
    """Memory: one tensor of every expert in float32, at a time."""
    total = torch.zeros(layer.experts, layer.experts, dtype=torch.float64)
    for role, axis in layer.neuron_axes.items():
        total += _products(torch.stack([
            _in_order(model.tensor(layer.name(e, role)), order(e), axis).float().reshape(-1)
            for e in range(layer.experts)
        ]))  # fmt: skip
    return total


def _in_order(tensor: Tensor, order: Tensor | None, axis: int | None) -> Tensor:
    return tensor if order is None else permuted(tensor, order, axis)


def _products(rows: Tensor) -> Tensor:
    rows = rows if rows.dtype == torch.float64 else rows.float()
    return (rows @ rows.T).double()
