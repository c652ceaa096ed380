"""How a model routes calibration tokens to its experts, and what its experts make of them.

What memory holds beside the model does not grow with the data. Knows nothing of grouping and
merging.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from evomerge.checkpoints.weights import Weights
from evomerge.errors import MergeError
from evomerge.merging.fitted.calibration import Example
from evomerge.merging.fitted.network import Network
from evomerge.merging.structure.experts.alignment import activation_name, outputs_of
from evomerge.merging.structure.experts.layers import ExpertLayer
from evomerge.merging.structure.experts.watch import watch_routing

UsageBase = Literal["count", "gate_mass"]
_CHUNK = 1024  # tokens that all experts compute at a time

ROWS = 4096
"""Inputs of a layer that are kept where neurons are to be compared by what they do."""


@dataclass(frozen=True)
class RoutedInputs:
    """The first tokens of the data, at most `ROWS`: a layer's inputs [n, d], float32, and the
    experts [n, k] that each was sent to. `activation` is the nonlinearity's name."""

    rows: Tensor
    chosen: Tensor
    activation: str

    def of(self, *experts: int) -> Tensor:
        """The inputs that were sent to any of these experts."""
        sent = [(self.chosen == expert).any(1) for expert in experts]
        return self.rows[torch.stack(sent).any(0)]


@dataclass
class LayerStatistics:
    """What one layer of E experts was seen to do, summed over `tokens` tokens; float64 sums.

    counts [E]: tokens sent to each expert, each of a token's top k counted once. gate_mass [E]: the
    same, each by its gate value. logits [E, E]: HᵀH of the router's logits H [tokens, E].
    features, magnitudes, squares [E, d]: sums of x, |x| and x² of the layer's inputs x that were
    sent to each expert.

    None where it was not asked for: outputs [E, d], the sum of every expert's outputs for all
    tokens, sent to it or not, and output_products [E, E], that of their inner products; `inputs`;
    gradients and weight_gradients [E, E], see `gradients`.
    """

    counts: Tensor
    gate_mass: Tensor
    logits: Tensor
    features: Tensor
    magnitudes: Tensor
    squares: Tensor
    outputs: Tensor | None = None
    output_products: Tensor | None = None
    inputs: RoutedInputs | None = None
    gradients: Tensor | None = None
    weight_gradients: Tensor | None = None
    tokens: int = field(default=0)

    def usage(self, base: UsageBase = "count") -> Tensor:
        """The share [E] of the routing that goes to each expert; sums to 1."""
        mass = self.counts if base == "count" else self.gate_mass
        return mass / mass.sum()

    def mean(self, sums: Tensor) -> Tensor:
        """Sums [E, d] over what was sent to each expert as means; 0 where nothing was."""
        return sums / self.counts.clamp(min=1)[:, None]


@torch.no_grad()
def routing_statistics(
    network: Network,
    model: Weights,
    layers: Sequence[ExpertLayer],
    examples: Sequence[Example],
    *,
    batch_size: int,
    outputs: bool = False,
    inputs: bool = False,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[LayerStatistics]:
    """Run the examples through a network; what every layer of experts did, padding left out.

    `outputs` has every expert compute every token as well. `inputs` keeps inputs: `ROWS`·d floats
    for each layer.
    Raises MergeError for NaN or infinity in what a router is given, for a layer that is given fewer
    tokens than it has experts, and with `inputs` for experts whose neurons are not told.
    """
    watch = _Watch(network, model, layers, outputs=outputs, inputs=inputs)
    watch_routing(network, layers, examples, watch, batch_size=batch_size, progress=progress)
    for layer, statistics in zip(layers, watch.found, strict=True):
        _check(layer, statistics)
    return [_on_cpu(statistics) for statistics in watch.found]


class _Watch:
    """Adds up what every layer is seen to do."""

    def __init__(
        self,
        network: Network,
        model: Weights,
        layers: Sequence[ExpertLayer],
        *,
        outputs: bool,
        inputs: bool,
    ) -> None:
        device = network.device
        self._model, self._layers = model, layers
        self._outputs, self._inputs = outputs, inputs
        self._routers = [model.tensor(layer.router[0]).to(device).float() for layer in layers]
        self._biases = [
            None if (name := layer.router_bias) is None else model.tensor(name).to(device).float()
            for layer in layers
        ]
        self._activation = activation_name(network.model.config) if inputs else ""
        self.found = [
            _empty(layer.experts, w.shape[1], outputs, w.device)
            for layer, w in zip(layers, self._routers, strict=True)
        ]

    def __call__(
        self, at: int, rows: Tensor, chosen: Tensor, gates: Tensor, module: nn.Module
    ) -> None:
        logits = functional.linear(rows, self._routers[at], self._biases[at])
        _add(self.found[at], rows, chosen, gates, logits)
        if self._outputs:
            for start in range(0, len(rows), _CHUNK):
                _add_outputs(self.found[at], rows[start : start + _CHUNK], module)
        if self._inputs:
            self._keep(at, rows, chosen, module)

    def _keep(self, at: int, rows: Tensor, chosen: Tensor, module: nn.Module) -> None:
        kept, layer = self.found[at].inputs, self._layers[at]
        if kept is None:
            tensors = {role: self._model.tensor(layer.name(0, role)) for role in layer.roles}
            made = outputs_of(tensors, layer.neuron_axes, rows.cpu(), self._activation)
            found = _answers(module, rows, 0, layer.experts).cpu()
            if not torch.allclose(made, found, rtol=1e-2, atol=1e-3 * float(found.abs().max())):
                raise MergeError(
                    f"{layer.prefix}: what its neurons do cannot be told from its weights;"
                    " take `alignment_by: weights` and another similarity"
                )
            kept = RoutedInputs(rows[:0].cpu(), chosen[:0].cpu(), self._activation)
        if (room := ROWS - len(kept.rows)) == 0:
            return
        self.found[at].inputs = RoutedInputs(
            torch.cat([kept.rows, rows[:room].cpu()]),
            torch.cat([kept.chosen, chosen[:room].cpu()]),
            self._activation,
        )


def _check(layer: ExpertLayer, seen: LayerStatistics) -> None:
    if not bool(seen.logits.isfinite().all()):
        raise MergeError(f"{layer.router[0]}: gives NaN or infinity on the calibration data")
    if seen.tokens < layer.experts or not bool(seen.counts.sum() > 0):
        raise MergeError(
            f"calibration: {layer.prefix} is given {seen.tokens} tokens, too few to tell its"
            f" {layer.experts} experts by; name more data or raise `count`"
        )


def _add(
    found: LayerStatistics, rows: Tensor, chosen: Tensor, gates: Tensor, logits: Tensor
) -> None:
    found.tokens += len(rows)
    found.logits += logits.double().T @ logits.double()
    token, place = (chosen >= 0).nonzero(as_tuple=True)
    flat = chosen[token, place]
    found.counts += torch.bincount(flat, minlength=len(found.counts))
    found.gate_mass.index_add_(0, flat, gates[token, place].double())
    sent = rows.double()[token]
    found.features.index_add_(0, flat, sent)
    found.magnitudes.index_add_(0, flat, sent.abs())
    found.squares.index_add_(0, flat, sent.square())


def _add_outputs(found: LayerStatistics, rows: Tensor, module: nn.Module) -> None:
    assert found.outputs is not None
    assert found.output_products is not None
    experts = len(found.counts)
    made = torch.stack([_answers(module, rows, e, experts) for e in range(experts)]).double()
    found.outputs += made.sum(1)
    flat = made.reshape(experts, -1)
    found.output_products += flat @ flat.T


def _answers(module: Any, rows: Tensor, expert: int, experts: int) -> Tensor:
    """An expert's outputs [n, d], by the module's own arithmetic: every token is sent to it."""
    chosen = torch.full((len(rows), 1), expert, device=rows.device)
    if isinstance(module, nn.ModuleDict):
        chosen = functional.one_hot(chosen, experts)
    made: Tensor = module.forward(rows, chosen, rows.new_ones(len(rows), 1))  # past the hooks
    return made.float()


def _empty(experts: int, width: int, outputs: bool, device: torch.device) -> LayerStatistics:
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=device)

    wide, square = (experts, width), (experts, experts)
    return LayerStatistics(
        counts=zeros(experts),
        gate_mass=zeros(experts),
        logits=zeros(*square),
        features=zeros(*wide),
        magnitudes=zeros(*wide),
        squares=zeros(*wide),
        outputs=zeros(*wide) if outputs else None,
        output_products=zeros(*square) if outputs else None,
    )


def _on_cpu(found: LayerStatistics) -> LayerStatistics:
    for key, value in vars(found).items():
        if isinstance(value, Tensor):
            setattr(found, key, value.cpu())
    return found
