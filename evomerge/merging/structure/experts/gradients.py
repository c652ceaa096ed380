"""What experts are compared by where it is gradients: inner products of ∂L/∂W.

Runs the model forward and back. Knows nothing of groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from evomerge.checkpoints.weights import Weights
from evomerge.merging.fitted.calibration import Example, batches
from evomerge.merging.fitted.network import Network
from evomerge.merging.structure.experts.layers import ExpertLayer
from evomerge.merging.structure.experts.similarity import expert_products
from evomerge.merging.structure.experts.statistics import LayerStatistics

GRADIENT_BYTES = 4 << 30
"""Of gradients that are held at a time: data is run again for layers that have no room."""


def add_gradients(
    network: Network,
    model: Weights,
    layers: Sequence[ExpertLayer],
    seen: Sequence[LayerStatistics],
    examples: Sequence[Example],
    *,
    order: Callable[[int, int], Tensor | None],
    batch_size: int,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> None:
    """Set `gradients` and `weight_gradients` [E, E] of every layer's statistics.

        ⟨gᵢ, gⱼ⟩ and ⟨Wᵢ·gᵢ, Wⱼ·gⱼ⟩,   g = ∂/∂W of the mean cross entropy of tokens that count

    `order(layer, expert)` is that in which neurons are compared. The mean is over all data, so that
    batches do not matter; memory holds `GRADIENT_BYTES` of it, or one layer's.

    Raises MergeError for a loss that is NaN or infinite.
    """
    parts = list(_passes(model, layers))
    for number, part in enumerate(parts):
        done = number * len(examples)

        def told(more: int, done: int = done) -> None:
            progress(done + more, len(parts) * len(examples))

        sums = _summed(network, model, [layers[at] for at in part], examples, batch_size, told)
        for at in part:
            _compare(model, layers[at], seen[at], sums, partial(order, at))


def _passes(model: Weights, layers: Sequence[ExpertLayer]) -> Iterator[list[int]]:
    """The places of layers whose gradients are taken at a time."""
    part: list[int] = []
    held = 0
    for at, layer in enumerate(layers):
        size = sum(4 * math.prod(model.shape(name)) for name in _names(layer))
        if part and held + size > GRADIENT_BYTES:
            yield part
            part, held = [], 0
        part, held = [*part, at], held + size
    yield part


def _summed(
    network: Network,
    model: Weights,
    layers: Sequence[ExpertLayer],
    examples: Sequence[Example],
    batch_size: int,
    progress: Callable[[int], object],
) -> dict[str, Tensor]:
    names = [name for layer in layers for name in _names(layer)]
    sums = {name: torch.zeros(model.shape(name)) for name in names}
    counted = max(sum(len(example.predicted) for example in examples), 1)

    def take(name: str, gradient: Tensor) -> None:
        if name in sums:
            sums[name] += gradient.cpu()

    with network.gradients(take, of=names):
        for number, part in enumerate(batches(examples, batch_size), 1):
            rows = part.to(network.device)
            logits = network.logits(rows)[rows.counted]
            loss = cross_entropy(logits, rows.targets[rows.counted], reduction="sum") / counted
            network.backward(loss, rows, what="gradients of experts")
            progress(min(number * batch_size, len(examples)))
    return sums


def _compare(
    model: Weights,
    layer: ExpertLayer,
    seen: LayerStatistics,
    sums: dict[str, Tensor],
    order: Callable[[int], Tensor | None],
) -> None:
    def gradient(expert: int, role: str) -> Tensor:
        return sums[layer.name(expert, role)]

    def weighted(expert: int, role: str) -> Tensor:
        return gradient(expert, role) * model.tensor(layer.name(expert, role)).float()

    seen.gradients = expert_products(layer, gradient, order, layer.neuron_axes)
    seen.weight_gradients = expert_products(layer, weighted, order, layer.neuron_axes)
    for role in layer.roles:  # the next layers need the room
        for expert in range(layer.experts):
            del sums[layer.name(expert, role)]


def _names(layer: ExpertLayer) -> list[str]:
    return [layer.name(expert, role) for expert in range(layer.experts) for role in layer.roles]
