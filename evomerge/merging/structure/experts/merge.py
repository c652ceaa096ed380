"""The merged model's tensors: groups of experts averaged by how often they are used.

Says which tensors there are in each of the three forms, and computes one when it is asked for.
Decides no group, runs no model and writes no file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from evomerge.checkpoints.seen import Seen
from evomerge.checkpoints.weights import Weights
from evomerge.merging.structure.experts.alignment import permuted
from evomerge.merging.structure.experts.layers import ExpertLayer, expert_count_keys
from evomerge.merging.structure.experts.plan import REMAPPED, Aligner, LayerPlan, reference_of
from evomerge.merging.structure.experts.router import collapsed
from evomerge.merging.structure.experts.settings import ExpertSettings


class MergedExperts(Seen):
    """The merged model, tensor by tensor, under the names it is stored by.

        E_group = Σ over the group of wᵢ·Pᵢ(Eᵢ),   P the alignment of neurons

    Sums run in float32 and are rounded once to the stored dtype. A group of one expert of weight
    above 0 is that expert's stored bytes, its neurons in their own order; so is whatever is no
    expert and no router. `routers` has one for each layer: [K, d] for the collapsed form, which
    needs them, [E, d] for the others. `aligner` knows orders of neurons; without one they are
    matched by weights.

    Source: Li et al. 2024, arXiv:2310.01334, algorithm 1. The authors divide by Σaᵢ + 10⁻⁷ (10⁻³ in
    one script, which shrinks experts that nothing is merged with); here weights sum to 1.
    """

    def __init__(
        self,
        model: Weights,
        layers: Sequence[ExpertLayer],
        plans: Sequence[LayerPlan],
        settings: ExpertSettings,
        *,
        routers: Sequence[Tensor] = (),
        aligner: Aligner | None = None,
    ) -> None:
        super().__init__(model)
        self._layers, self._plans = layers, plans
        self._settings = settings
        self._aligner = aligner or Aligner(model, layers)
        self._of_expert: dict[str, tuple[int, int, str]] = {}  # layer, group, role
        self._rows: dict[str, Tensor] = {}
        self._merged_at = -1  # the layer that `_kept` is of: a form may ask for a tensor again
        self._kept: dict[tuple[int, str], Tensor] = {}
        dropped: set[str] = set()
        for at, layer in enumerate(layers):
            dropped |= self._place(at, layer)
            if routers:
                self._rows[layer.router[0]] = routers[at]
            if settings.form == "collapsed":
                self._collapse(at, layer)
        self._names = tuple(name for name in model.names if name not in dropped)

    @property
    def names(self) -> tuple[str, ...]:
        """Those of the merged model, sorted."""
        return self._names

    @property
    def config(self) -> dict[str, Any]:
        """The config of the merged model."""
        config = dict(self._model.config)
        if self._settings.form == "collapsed":
            keys = expert_count_keys(config, self._layers[0].experts)
            kept = len(self._plans[0].groups.members)
            config |= dict.fromkeys(keys, kept)
            if "expert_capacity" in config:  # fewer experts, each for more tokens
                room = config["expert_capacity"] * self._layers[0].experts
                config["expert_capacity"] = math.ceil(room / kept)
        elif self._settings.form == "remapped":
            config["remapped_model_type"] = config["model_type"]
            config["model_type"] = REMAPPED
            config["expert_map"] = [list(plan.groups.slots) for plan in self._plans]
        return config

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        row = self._rows.get(name)
        return tuple(row.shape) if row is not None else self._model.shape(name)

    def tensor(self, name: str) -> Tensor:
        """A tensor of the merged model; read only. Raises MissingTensor."""
        if name in self._rows:
            values = self._rows[name]
        elif name in self._of_expert:
            values = self._merged(*self._of_expert[name])
        else:
            values = self._model.tensor(name)
        return values.to(self.dtype(name))  # of a model behind an adapter values are float32

    def _place(self, at: int, layer: ExpertLayer) -> set[str]:
        """Note what stands under each expert's names; the names that there are no more."""
        groups = self._plans[at].groups
        slots: Mapping[int, int] = dict(enumerate(groups.slots))
        if self._settings.form != "replicated":
            slots = {slot: slot for slot in range(len(groups.members))}
        dropped = set()
        for expert in range(layer.experts):
            for role in layer.roles:
                name = layer.name(expert, role)
                if expert in slots:
                    self._of_expert[name] = at, slots[expert], role
                else:
                    dropped.add(name)
        return dropped

    def _collapse(self, at: int, layer: ExpertLayer) -> None:
        how: Literal["dominant", "mean"] = "mean" if self._settings.router == "mean" else "dominant"
        for name in layer.router[1:]:
            self._rows[name] = collapsed(self._model.tensor(name), self._plans[at].groups, how)

    def _merged(self, at: int, group: int, role: str) -> Tensor:
        layer, plan = self._layers[at], self._plans[at]
        members = plan.groups.members[group]
        parts = [expert for expert in members if plan.weights[expert] > 0]
        if len(parts) == 1:
            return self._model.tensor(layer.name(parts[0], role))
        if at != self._merged_at:
            self._merged_at, self._kept = at, {}
        if (group, role) not in self._kept:
            leader = plan.groups.leaders[members[0]]
            tensors = (self._aligned(at, expert, role, leader) for expert in parts)
            weights = [plan.weights[expert] for expert in parts]
            merged = _weighted_sum(tensors, weights)
            self._kept[group, role] = merged.to(self._model.dtype(layer.name(members[0], role)))
        return self._kept[group, role]

    def _aligned(self, at: int, expert: int, role: str, leader: int) -> Tensor:
        layer = self._layers[at]
        tensor = self._model.tensor(layer.name(expert, role))
        reference = reference_of(expert, leader, self._settings)
        if reference is None:
            return tensor
        order = self._aligner.order(at, expert, reference)
        return permuted(tensor, order, layer.neuron_axes[role])


def _weighted_sum(tensors: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    total: Tensor | None = None
    for tensor, weight in zip(tensors, weights, strict=True):
        if total is None:
            total = torch.zeros(tensor.shape, dtype=torch.float32)
        total.add_(tensor.float(), alpha=weight)
    assert total is not None  # a group has members
    return total
