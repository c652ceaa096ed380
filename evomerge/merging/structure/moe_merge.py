"""The merged model's tensors: groups of experts averaged by how often they are used.

Says which tensors there are in each of the three forms, and computes one when it is asked for.
Runs no model and writes no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evomerge.checkpoints.weights import Weights
from evomerge.errors import MergeError
from evomerge.merging.structure.moe_alignment import matched, permuted
from evomerge.merging.structure.moe_grouping import (
    Groups,
    adaptive_counts,
    by_clusters,
    by_dominants,
    check_counts,
)
from evomerge.merging.structure.moe_layers import ExpertLayer, expert_count_keys, top_k
from evomerge.merging.structure.moe_settings import ExpertSettings
from evomerge.merging.structure.moe_similarity import similarity_gram
from evomerge.merging.structure.moe_statistics import LayerStatistics

REMAPPED = "evomerge_remapped"
"""`model_type` of a config whose checkpoint only `remapped` can load."""


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of the experts of one layer: `weights[i]` is expert i's share of its group."""

    groups: Groups
    weights: tuple[float, ...]


class Aligner:
    """The neuron orders of a model's experts, each computed once."""

    def __init__(self, model: Weights, layers: Sequence[ExpertLayer]) -> None:
        self._model, self._layers = model, layers
        self._orders: dict[tuple[int, int, int], Tensor] = {}

    def order(self, at: int, expert: int, reference: int) -> Tensor:
        """The order [f] of an expert's neurons that matches a reference of the same layer."""
        key = at, expert, reference
        if key not in self._orders:
            one, other = self._expert(at, reference), self._expert(at, expert)
            self._orders[key] = matched(one, other, self._layers[at].neuron_axes)
        return self._orders[key]

    def _expert(self, at: int, expert: int) -> dict[str, Tensor]:
        layer = self._layers[at]
        return {role: self._model.tensor(layer.name(expert, role)) for role in layer.roles}


def check_settings(model: Weights, layers: Sequence[ExpertLayer], settings: ExpertSettings) -> None:
    """Raise MergeError where the settings do not fit the model."""
    experts = layers[0].experts
    if any(layer.experts != experts for layer in layers):
        raise MergeError(f"{model.path}: its layers have different numbers of experts")
    if outside := [at for at in settings.skip if not 0 <= at < len(layers)]:
        raise MergeError(f"experts.skip: no layer {outside[0]} among {len(layers)} with experts")
    collapsed = settings.form == "collapsed"
    least = top_k(model.config) if collapsed else 1
    if isinstance(settings.keep, int):
        check_counts([settings.keep] * len(layers), experts, len(layers), least=least)
    else:
        check_counts(settings.keep, experts, len(layers), least=least)
    if collapsed:
        _check_collapsible(model, layers)
    if settings.form == "remapped" and model.config.get("model_type") == REMAPPED:
        raise MergeError(f"{model.path}: its experts are remapped already")


def _check_collapsible(model: Weights, layers: Sequence[ExpertLayer]) -> None:
    expert_count_keys(model.config, layers[0].experts)
    if (model.config.get("n_group") or 1) > 1:
        raise MergeError(
            f"{model.path}: its router chooses among groups of experts (n_group), which a collapsed"
            " router would change; take `form: remapped`"
        )
    for name in layers[0].router[1:]:
        if not name.endswith(".bias"):
            raise MergeError(
                f"{model.path}: its router also has {name}, which cannot be collapsed; take `form:"
                " remapped`"
            )


def plan_experts(
    model: Weights,
    layers: Sequence[ExpertLayer],
    seen: Sequence[LayerStatistics],
    settings: ExpertSettings,
    *,
    seed: int = 0,
) -> list[LayerPlan]:
    """Groups and weights for every layer. Raises MergeError where the settings do not fit."""
    check_settings(model, layers, settings)
    usage = torch.stack([statistics.usage(settings.usage) for statistics in seen])
    counts = _counts(usage, settings)
    aligner = Aligner(model, layers)
    generator = torch.Generator().manual_seed(seed)
    plans = []
    for at, (layer, keep) in enumerate(zip(layers, counts, strict=True)):

        def order(expert: int, at: int = at) -> Tensor | None:
            return None if settings.aligned_to == "none" else aligner.order(at, expert, 0)

        gram = similarity_gram(
            settings.compared_by, model, layer, seen[at], order=order, generator=generator
        )
        group = by_clusters if settings.method == "hc_smoe" else by_dominants
        groups = group(usage[at], gram, keep)
        plans.append(LayerPlan(groups, group_weights(usage[at], groups, settings)))
    return plans


def _counts(usage: Tensor, settings: ExpertSettings) -> tuple[int, ...]:
    layers, experts = usage.shape
    if not isinstance(settings.keep, int):
        return settings.keep
    if settings.adaptive:
        return adaptive_counts(usage, settings.keep, unmerged=settings.skip)
    return tuple(experts if at in settings.skip else settings.keep for at in range(layers))


def group_weights(usage: Tensor, groups: Groups, settings: ExpertSettings) -> tuple[float, ...]:
    """Each expert's share of its group, of sum 1 in every group.

        wᵢ = aᵢ / Σ over the group of aⱼ,   a = usage^γ

    All alike in a group that is never used. Pruning gives all to the group's leader.
    """
    shares = [0.0] * len(groups.leaders)
    for members in groups.members:
        if settings.method == "prune":
            shares[groups.leaders[members[0]]] = 1.0
            continue
        mass = usage[list(members)].double() ** settings.exponent
        if not mass.sum() > 0:
            mass = torch.ones_like(mass)
        for expert, share in zip(members, (mass / mass.sum()).tolist(), strict=True):
            shares[expert] = share
    return tuple(shares)


class MergedExperts:
    """The merged model, tensor by tensor, under the names it is stored by.

        E_group = Σ over the group of wᵢ·Pᵢ(Eᵢ),   P the alignment of neurons

    Sums run in float32 and are rounded once to the stored dtype. A group of
    one expert of weight above 0 is that expert's stored bytes, its neurons in their own order; so
    is whatever is no expert and no collapsed router. `routers` are the collapsed [K, d], one for
    each layer.

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
    ) -> None:
        self._model, self._layers, self._plans = model, layers, plans
        self._settings = settings
        self._aligner = Aligner(model, layers)
        self._of_expert: dict[str, tuple[int, int, str]] = {}  # layer, group, role
        self._rows: dict[str, Tensor] = {}
        self._merged_at = -1  # the layer that `_kept` is of: a form may ask for a tensor again
        self._kept: dict[tuple[int, str], Tensor] = {}
        dropped: set[str] = set()
        for at, layer in enumerate(layers):
            dropped |= self._place(at, layer)
            if settings.form == "collapsed":
                self._collapse(at, layer, routers[at])
        self.names = tuple(name for name in model.names if name not in dropped)
        self.path, self.folder = model.path, model.folder

    @property
    def config(self) -> dict[str, Any]:
        """The config of the merged model."""
        config = dict(self._model.config)
        if self._settings.form == "collapsed":
            keys = expert_count_keys(config, self._layers[0].experts)
            config |= dict.fromkeys(keys, len(self._plans[0].groups.members))
        elif self._settings.form == "remapped":
            config["remapped_model_type"] = config["model_type"]
            config["model_type"] = REMAPPED
            config["expert_map"] = [list(plan.groups.slots) for plan in self._plans]
        return config

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        row = self._rows.get(name)
        return tuple(row.shape) if row is not None else self._model.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        return self._model.dtype(name)

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

    def _collapse(self, at: int, layer: ExpertLayer, router: Tensor) -> None:
        groups = self._plans[at].groups
        leaders = [groups.leaders[members[0]] for members in groups.members]
        self._rows[layer.router[0]] = router
        for name in layer.router[1:]:
            self._rows[name] = self._model.tensor(name)[leaders]

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
        layer, to = self._layers[at], self._settings.aligned_to
        tensor = self._model.tensor(layer.name(expert, role))
        reference = 0 if to == "first" else leader
        if to == "none" or expert == reference:
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
