"""Two matched networks of torch modules in one: built, refit, and told its statistics.

How many units of each group stay apart is handed in; `pleas_networks` decides it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from evomerge.errors import MergeError
from evomerge.merging.structure.networks.pair import (
    NetworkPair,
    live_network,
    state_on_cpu,
)
from evomerge.merging.structure.networks.resizing import resized
from evomerge.merging.structure.partial.multiply_adds import counted
from evomerge.merging.structure.partial.partial import BOTH, A, B, PartialMerge, split
from evomerge.merging.structure.permutations.permutation import axis_orders
from evomerge.merging.structure.refit.activation_moments import run
from evomerge.merging.structure.refit.least_squares import (
    Data,
    LayerFit,
    LeastSquaresSettings,
    Merged,
    refit,
)
from evomerge.merging.structure.refit.normalization import repair, reset_batch_norm


class Refitting(BaseModel):
    """What is done to a partial merge: by default as published.

    `weights` are the shares of a and b in merged units, of sum 1. `least_squares` None leaves out
    the refit. `normalization`: `reset` gives batch norms the statistics of the data, `repair`
    (REPAIR) rescales the layers of a network that has none and is not widened, `kept` does neither.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    weights: tuple[float, float] = (0.5, 0.5)
    least_squares: LeastSquaresSettings | None = LeastSquaresSettings()
    normalization: Literal["reset", "repair", "kept"] = "reset"

    @model_validator(mode="after")
    def _of_sum_one(self) -> Refitting:
        if min(self.weights) < 0 or not math.isclose(sum(self.weights), 1.0):
            raise ValueError(f"weights of {self.weights}: they must be from 0 on and have sum 1")
        return self


@dataclass(frozen=True)
class MergeReport:
    """`cost` as a multiple of one network, entries that must be 0 left out as published; `dense` is
    counted on the built network, which multiplies them. By group: units `apart` of each network,
    and `widths`; `left` says why the others were not widened. `layers` say how each was refit,
    `kept` are those that were not. `labels` are how many of a's and of b's each head gives."""

    cost: float
    dense: float
    apart: Mapping[str, int]
    widths: Mapping[str, int]
    left: Mapping[str, str]
    labels: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    layers: Mapping[str, LayerFit] = field(default_factory=dict)
    kept: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class MergedNetwork:
    """The merged network, in eval mode, and how it came about."""

    network: nn.Module
    report: MergeReport
    pair: NetworkPair
    merge: PartialMerge

    def features(self, layer: str, side: Literal["a", "b"]) -> Tensor:
        """Where a layer's inputs of one network are found among those of the merged one: int64 [d].

        `layer` is a linear layer's name; `side` says in whose own order. With it, what a network's
        old head read is `x[..., features]`; merged units stand in for both networks'.
        """
        name = f"{layer}.weight"
        if (found := self.pair.layers.get(name)) is None:
            raise MergeError(f"{layer}: is no linear layer of this network")
        wide = self.merge.layout(name, found.in_axis)
        places = torch.arange(self.pair.shapes[name][found.in_axis])
        if wide is not None:
            mine = (wide.side == BOTH) | (wide.side == (A if side == "a" else B))
            places = mine.nonzero()[:, 0]
            places = places[wide.origin[mine].argsort()]
        if side == "a":
            return places
        orders = axis_orders(self.pair.spec, self.pair.shapes, self.pair.matching.permutations)
        order = orders.get((name, found.in_axis), torch.arange(len(places)))
        return places[order.argsort()]


@torch.no_grad()
def merged_network(
    pair: NetworkPair, apart: Mapping[str, int], data: Data, refitting: Refitting = Refitting()
) -> MergedNetwork:
    """The network with so many units of each group apart, filled, refit, and normalized."""
    _check(pair, apart)
    sizes = {group.name: group.size for group in pair.spec.groups}
    widened = {**apart, **pair.heads.apart}
    splits = {name: split(pair.similarity(name), m) for name, m in widened.items() if m}
    merge = PartialMerge(pair.spec, pair.layers, pair.shapes, splits, weights=refitting.weights)
    network = resized(pair.a, {name: merge.shape(name) for name in pair.shapes})
    start = merge.state(state_on_cpu(pair.a), state_on_cpu(pair.b))
    network.load_state_dict(start)
    fits, kept = _refit(pair, merge, network, start, data, refitting)
    _normalize(pair, network, data, refitting)
    network = pair.heads.cut(network)
    report = MergeReport(
        pair.costs.relative(apart),
        _cost(network, pair) / _cost(pair.a, pair),
        {name: apart.get(name, 0) for name in pair.costs.groups},
        {name: sizes[name] + apart.get(name, 0) for name in sizes if name not in pair.heads.apart},
        pair.left,
        pair.heads.labels,
        fits,
        kept,
    )
    return MergedNetwork(network, report, pair, merge)


def _check(pair: NetworkPair, apart: Mapping[str, int]) -> None:
    for name, count in apart.items():
        if count and name in pair.left:
            raise MergeError(f"group {name} cannot be widened: {pair.left[name]}")
    pair.costs.relative(apart)  # refuses other groups, and more units than there are


def _refit(
    pair: NetworkPair,
    merge: PartialMerge,
    network: nn.Module,
    start: Mapping[str, Tensor],
    data: Data,
    refitting: Refitting,
) -> tuple[Mapping[str, LayerFit], tuple[str, ...]]:
    if refitting.least_squares is None:
        return {}, ()
    live = network.state_dict()

    def write(name: str, tensor: Tensor) -> None:
        live[name].copy_(tensor)

    found = refit(
        live_network(pair.a),
        live_network(pair.b),
        merge,
        pair.layers,
        start,
        data,
        refitting.least_squares,
        merged=Merged(live_network(network), write),
    )
    for name, tensor in found.tensors.items():
        write(name, tensor)
    return found.layers, found.kept


def _normalize(pair: NetworkPair, network: nn.Module, data: Data, refitting: Refitting) -> None:
    batches = [batch for batch, _ in data]
    if refitting.normalization == "repair":
        repair(network, (pair.a, pair.b), batches, refitting.weights)
    has_norms = any(isinstance(module, _BatchNorm) for module in network.modules())
    if refitting.normalization == "reset" and has_norms:
        reset_batch_norm(network, batches)


def _cost(network: nn.Module, pair: NetworkPair) -> float:
    return counted(lambda: run(network, [pair.example]))
