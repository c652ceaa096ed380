"""How a model routes calibration tokens to its experts, and what its experts make of them.

Watches the live model's experts by hooks; what memory holds beside the model does not grow with the
data. Knows nothing of grouping and merging.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from evomerge.checkpoints.weights import Weights
from evomerge.errors import MergeError
from evomerge.merging.fitted.calibration import Example, batches
from evomerge.merging.fitted.network import Network
from evomerge.merging.structure.moe_layers import ExpertLayer

UsageBase = Literal["count", "gate_mass"]


@dataclass
class LayerStatistics:
    """What one layer of E experts was seen to do, summed over `tokens` tokens; float64 sums.

    counts [E]: tokens sent to each expert, each of a token's top k counted once. gate_mass [E]: the
    same, each by its gate value. logits [E, E]: HᵀH of the router's logits H [tokens, E].
    features [E, d]: sum of the layer's inputs that were sent to each expert. outputs [E, d]: sum of
    every expert's outputs for all tokens, sent to it or not; None where that was not asked for.
    """

    counts: Tensor
    gate_mass: Tensor
    logits: Tensor
    features: Tensor
    outputs: Tensor | None = None
    tokens: int = field(default=0)

    def usage(self, base: UsageBase = "count") -> Tensor:
        """The share [E] of the routing that goes to each expert; sums to 1."""
        mass = self.counts if base == "count" else self.gate_mass
        return mass / mass.sum()

    @property
    def mean_features(self) -> Tensor:
        """The mean input [E, d] of what was sent to each expert; 0 where nothing was."""
        return self.features / self.counts.clamp(min=1)[:, None]


Take = Callable[[int, Tensor, Tensor, Tensor, nn.Module], None]
"""Is handed an expert layer's place, the inputs [n, d] of its real tokens, the experts [n, k] each
is sent to, their gate values [n, k], and the live module of its experts."""


@torch.no_grad()
def routing_statistics(
    network: Network,
    model: Weights,
    layers: Sequence[ExpertLayer],
    examples: Sequence[Example],
    *,
    batch_size: int,
    outputs: bool = False,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[LayerStatistics]:
    """Run the examples through a network; what every layer of experts did, padding left out.

    `outputs` has every expert compute every token as well, as HC-SMoE needs it.
    Raises MergeError for NaN or infinity in what a router is given.
    """
    routers = [model.tensor(layer.router[0]).to(network.device).float() for layer in layers]
    biases = [_bias(model, layer, network.device) for layer in layers]
    found = [_empty(layer.experts, w.shape[1], outputs, w.device)
             for layer, w in zip(layers, routers, strict=True)]  # fmt: skip

    def take(at: int, rows: Tensor, chosen: Tensor, gates: Tensor, module: nn.Module) -> None:
        _add(found[at], rows, chosen, gates, functional.linear(rows, routers[at], biases[at]))
        if outputs:
            _add_outputs(found[at], rows, module)

    watch_routing(network, layers, examples, take, batch_size=batch_size, progress=progress)
    for layer, statistics in zip(layers, found, strict=True):
        if not bool(statistics.logits.isfinite().all()):
            raise MergeError(f"{layer.router[0]}: gives NaN or infinity on the calibration data")
    return [_on_cpu(statistics) for statistics in found]


def watch_routing(
    network: Network,
    layers: Sequence[ExpertLayer],
    examples: Sequence[Example],
    take: Take,
    *,
    batch_size: int,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> None:
    """Run the examples and hand what is routed in every layer to `take`, batch by batch."""
    real = [torch.empty(0, dtype=torch.bool)]
    with _watched(network, layers, take, real):
        for number, part in enumerate(batches(examples, batch_size), 1):
            real[0] = part.attention.reshape(-1).bool().to(network.device)
            network.logits(part)
            progress(min(number * batch_size, len(examples)), len(examples))


@contextmanager
def _watched(
    network: Network, layers: Sequence[ExpertLayer], take: Take, real: list[Tensor]
) -> Iterator[None]:
    handles = [
        experts_module(network, layer).register_forward_pre_hook(
            partial(_routed, at, take, real), with_kwargs=True
        )
        for at, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _routed(
    at: int, take: Take, real: list[Tensor], module: nn.Module, args: Any, kwargs: Any
) -> None:
    """transformers' experts are called with (hidden states, top-k indices, top-k gate values)."""
    rows, chosen, gates = (*args, *kwargs.values())[:3]
    rows = rows.reshape(-1, rows.shape[-1])
    if chosen.is_floating_point() or len(chosen) != len(rows) or len(rows) != len(real[0]):
        raise MergeError(
            f"{type(module).__name__}: its routing cannot be watched; transformers calls these"
            " experts in another way than those of Mixtral or Qwen"
        )
    keep = real[0]
    take(at, rows[keep].float(), chosen[keep], gates[keep], module)


def experts_module(network: Network, layer: ExpertLayer) -> nn.Module:
    """The live module that holds a layer's experts."""
    key = network.parts[layer.name(0, layer.roles[0])][0].key
    module: nn.Module = network.model.get_submodule(key.rpartition(".")[0])
    return module


def _add(
    found: LayerStatistics, rows: Tensor, chosen: Tensor, gates: Tensor, logits: Tensor
) -> None:
    experts = len(found.counts)
    flat = chosen.reshape(-1)
    found.tokens += len(rows)
    found.counts += torch.bincount(flat, minlength=experts)
    found.gate_mass.index_add_(0, flat, gates.reshape(-1).double())
    found.logits += logits.double().T @ logits.double()
    sent = rows.double().repeat_interleave(chosen.shape[1], 0)
    found.features.index_add_(0, flat, sent)


def _add_outputs(found: LayerStatistics, rows: Tensor, module: Any) -> None:
    """By the module's own arithmetic, with every token sent to one expert at a time."""
    assert found.outputs is not None
    for expert in range(len(found.counts)):
        chosen = torch.full((len(rows), 1), expert, device=rows.device)
        made = module.forward(rows, chosen, rows.new_ones(len(rows), 1))  # past the hooks
        found.outputs[expert] += made.double().sum(0)


def _bias(model: Weights, layer: ExpertLayer, device: str) -> Tensor | None:
    name = layer.router[0].removesuffix("weight") + "bias"
    return model.tensor(name).to(device).float() if name in layer.router else None


def _empty(experts: int, width: int, outputs: bool, device: torch.device) -> LayerStatistics:
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=device)

    wide = (experts, width)
    made = zeros(*wide) if outputs else None
    return LayerStatistics(
        zeros(experts), zeros(experts), zeros(experts, experts), zeros(*wide), made
    )


def _on_cpu(found: LayerStatistics) -> LayerStatistics:
    made = found.outputs.cpu() if found.outputs is not None else None
    return LayerStatistics(
        found.counts.cpu(),
        found.gate_mass.cpu(),
        found.logits.cpu(),
        found.features.cpu(),
        made,
        found.tokens,
    )
