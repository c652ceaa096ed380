"""Two models and what is merged of them, in memory: networks whose layers are watched on data.

Knows how they are built and that b's units are brought beside a's. No fit and no artifact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evomerge.checkpoints.skeleton import blank
from evomerge.checkpoints.weights import Model, Weights
from evomerge.merging.fitted.calibration import Batch, Example
from evomerge.merging.fitted.gram import even_batches
from evomerge.merging.fitted.network import Network
from evomerge.merging.structure.architectures.families import spec_of
from evomerge.merging.structure.permutations.activations import Live
from evomerge.merging.structure.permutations.linear_layers import modules_of
from evomerge.merging.structure.permutations.permutation import apply, in_place
from evomerge.merging.structure.permutations.units import Shapes
from evomerge.merging.structure.pleas.model import PleasModel, order_key


@dataclass(frozen=True)
class Batches:
    """Examples of one length at a time, gone through as often as one likes, each time alike."""

    examples: Sequence[Example]
    size: int

    def __iter__(self) -> Iterator[Batch]:
        return even_batches(self.examples, self.size)


def shapes_of(model: Model) -> Shapes:
    """Shapes of a model's tensors, by their stored names."""
    return {name: model.shape(name) for name in model.names}


def state_of(model: Weights) -> dict[str, Tensor]:
    """A model's tensors."""
    return {name: model.tensor(name) for name in model.names}


def watched(network: Network, shapes: Shapes) -> Live:
    """A network as its layers are watched."""
    return Live(modules_of(network.model, shapes), network.logits)


def in_order(model: Model, orders: Mapping[str, Tensor], *, device: str) -> Network:
    """The second model, live, its units beside those of the first."""
    network = Network(model, device=device)
    spec = in_place(spec_of(model.config, shapes_of(model)))
    permutations = {g.name: orders[order_key(g.name)].long() for g in spec.groups}
    for name, tensor in apply(spec, state_of(model), permutations).items():
        network.write(name, tensor)
    return network


def widened_network(model: PleasModel, *, device: str) -> Network:
    """The merged model, live in float32."""
    made = blank(model, otherwise="it cannot be run", dtype=torch.float32, device=device)
    network = Network(model, device=device, model=made)
    network.become(model, model.names)
    return network
