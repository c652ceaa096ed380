"""What experts of a layer are compared by, as inner products of one vector for each expert.

Cosines and distances follow from the products. Knows nothing of how groups are made of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from evomerge.checkpoints.weights import Weights
from evomerge.errors import MergeError
from evomerge.merging.structure.experts.alignment import (
    Axes,
    assigned,
    correlation,
    hidden,
    permuted,
)
from evomerge.merging.structure.experts.layers import ExpertLayer
from evomerge.merging.structure.experts.settings import Similarity
from evomerge.merging.structure.experts.statistics import LayerStatistics, RoutedInputs

_T = TypeVar("_T")

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

    With x the inputs that were sent to expert i, rᵢ its row of the router, W all its tensors,
    flattened, neurons in the order that `order` gives, s = √mean x² for each channel:

        router_logits            its logits over all tokens
        router_weights           rᵢ
        router_weight_features   rᵢ·s
        features                 mean x
        absolute_features        mean |x|
        expert_weights           W
        expert_weight_features   inward matrices of W, each column times s of its channel
        gradients                ∂L/∂W, L the cross entropy of the data
        weight_gradients         W·∂L/∂W
        outputs                  its mean output over all tokens
        random                   a standard normal vector

    Three are tables of how like two experts are, 1 on the diagonal, whose cosines they are:

        output_mse               1 − MSE(i, j)/2c, of their outputs for all tokens; c the mean
                                 square of all experts' outputs
        neuron_correlation       mean of corr(aᵤ, a'_P(u)) over neurons u, P the best assignment
        neuron_correlation_max   mean over neurons of either of the largest correlation with one
                                 of the other's

    with a, a' the activations that go into the outward matrix, on the tokens sent to either.
    Raises MergeError for what `seen` does not hold.

    Source: Li et al. 2024, arXiv:2310.01334, sec. 3.1 and table 4, and the bases that the authors'
    code has beside; outputs: Chen et al. 2025, arXiv:2410.08589. Those with s: the authors name
    the product alone, the formula here is our reading; the outward matrix is left out, for its
    inputs are neurons and no features. c is ours, and changes no order.
    """
    if base == "router_logits":
        return seen.logits
    if base == "random":
        return _products(torch.randn(layer.experts, layer.experts, generator=generator))
    if base in ("router_weights", "router_weight_features"):
        rows = model.tensor(layer.router[0]).float()
        return _products(rows if base == "router_weights" else rows * _spread(seen).float())
    if base in ("features", "absolute_features"):
        return _products(seen.mean(seen.features if base == "features" else seen.magnitudes))
    if base in ("expert_weights", "expert_weight_features"):
        return _of_weights(model, layer, order, None if base == "expert_weights" else _spread(seen))
    if base in ("neuron_correlation", "neuron_correlation_max"):
        return _correlations(
            _measured(seen.inputs, base), model, layer, by_max=base.endswith("max")
        )
    if base == "outputs":
        return _products(_measured(seen.outputs, base) / seen.tokens)
    if base == "output_mse":
        return _mean_squared_error(_measured(seen.output_products, base))
    return _measured(seen.gradients if base == "gradients" else seen.weight_gradients, base)


def expert_products(
    layer: ExpertLayer, tensor: Callable[[int, str], Tensor], order: Order, axes: Axes
) -> Tensor:
    """Inner products [E, E] of experts' tensors, those of `axes`, told by (expert, role).

    Memory: one tensor of every expert in float32, at a time.
    """
    total = torch.zeros(layer.experts, layer.experts, dtype=torch.float64)
    for role, axis in axes.items():
        total += _products(torch.stack([
            _in_order(tensor(e, role), order(e), axis).float().reshape(-1)
            for e in range(layer.experts)
        ]))  # fmt: skip
    return total


def _of_weights(model: Weights, layer: ExpertLayer, order: Order, spread: Tensor | None) -> Tensor:
    def tensor(expert: int, role: str) -> Tensor:
        weight = model.tensor(layer.name(expert, role)).float()
        return weight if spread is None else weight * spread[expert].float()

    inward = {r: a for r, a in layer.neuron_axes.items() if a == 0 and r.endswith("weight")}
    return expert_products(layer, tensor, order, layer.neuron_axes if spread is None else inward)


def _spread(seen: LayerStatistics) -> Tensor:
    """s [E, d]: root mean square of each channel of what was sent to each expert."""
    return seen.mean(seen.squares).sqrt()


def _mean_squared_error(products: Tensor) -> Tensor:
    squares = products.diagonal()
    apart = squares[:, None] + squares - products - products.T
    return 1 - apart / (2 * squares.mean().clamp(min=1e-300))


def _correlations(
    inputs: RoutedInputs, model: Weights, layer: ExpertLayer, *, by_max: bool
) -> Tensor:
    """Memory: two experts, and what their neurons make of the tokens kept."""
    found = torch.eye(layer.experts, dtype=torch.float64)
    for i in range(layer.experts):
        one = {role: model.tensor(layer.name(i, role)) for role in layer.roles}
        for j in range(i):
            other = {role: model.tensor(layer.name(j, role)) for role in layer.roles}
            rows = inputs.of(i, j)
            pair = (hidden(e, layer.neuron_axes, rows, inputs.activation) for e in (one, other))
            table = correlation(*pair) if len(rows) > 1 else torch.zeros(1, 1)
            found[i, j] = found[j, i] = _alike(table, by_max=by_max)
    return found


def _alike(table: Tensor, *, by_max: bool) -> float:
    if by_max:
        return float(table.max(0).values.mean() + table.max(1).values.mean()) / 2
    return float(table[torch.arange(len(table)), assigned(table)].mean())


_FIT_SETTINGS = ("outputs", "gradients")


def _measured(found: _T | None, base: Similarity) -> _T:
    if found is None:
        named = {"output_mse": "outputs", "weight_gradients": "gradients"}.get(base, base)
        again = f"; fit it again with `fit: {{{named}: true}}`" if named in _FIT_SETTINGS else ""
        raise MergeError(f"similarity: {base}: was not measured when the data was run{again}")
    return found


def _in_order(tensor: Tensor, order: Tensor | None, axis: int | None) -> Tensor:
    return tensor if order is None else permuted(tensor, order, axis)


def _products(rows: Tensor) -> Tensor:
    rows = rows if rows.dtype == torch.float64 else rows.float()
    return (rows @ rows.T).double()
