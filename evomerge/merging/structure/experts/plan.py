"""What becomes of the experts of every layer: which are one, and each one's share in it.

A pure function of routing statistics and settings, so that a search measures once and plans often.
Reads weights only where experts are compared by them; merges nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from evomerge.checkpoints.weights import Weights
from evomerge.errors import MergeError
from evomerge.merging.structure.experts.alignment import matched, matched_by_activations
from evomerge.merging.structure.experts.grouping import (
    Groups,
    adaptive_counts,
    by_clusters,
    by_dominants,
    check_counts,
)
from evomerge.merging.structure.experts.layers import ExpertLayer, expert_count_keys, top_k
from evomerge.merging.structure.experts.settings import ExpertSettings
from evomerge.merging.structure.experts.similarity import similarity_gram
from evomerge.merging.structure.experts.statistics import LayerStatistics, RoutedInputs

REMAPPED = "evomerge_remapped"
"""`model_type` of a config whose checkpoint only `remapped` can load."""


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of the experts of one layer: `weights[i]` is expert i's share of its group."""

    groups: Groups
    weights: tuple[float, ...]


class Aligner:
    """The neuron orders of a model's experts, each computed once.

    By weights; by what neurons make of each layer's `inputs` where those are given. `orders` holds
    those known so far, by layer, expert and reference.
    """

    def __init__(
        self,
        model: Weights,
        layers: Sequence[ExpertLayer],
        inputs: Sequence[RoutedInputs] = (),
        orders: Mapping[tuple[int, int, int], Tensor] | None = None,
    ) -> None:
        self._model, self._layers, self._inputs = model, layers, inputs
        self.orders: dict[tuple[int, int, int], Tensor] = dict(orders or {})

    def order(self, at: int, expert: int, reference: int) -> Tensor:
        """The order [f] of an expert's neurons that matches a reference of the same layer."""
        key = at, expert, reference
        if key not in self.orders:
            self.orders[key] = self._matched(*key)
        return self.orders[key]

    def of_plans(self, plans: Sequence[LayerPlan], settings: ExpertSettings) -> None:
        """Compute all that a merge by these plans asks for."""
        for at, plan in enumerate(plans):
            for members in plan.groups.members:
                parts = [expert for expert in members if plan.weights[expert] > 0]
                for expert in parts if len(parts) > 1 else ():
                    reference = reference_of(expert, plan.groups.leaders[expert], settings)
                    if reference is not None:
                        self.order(at, expert, reference)

    def _matched(self, at: int, expert: int, reference: int) -> Tensor:
        one, other = self._expert(at, reference), self._expert(at, expert)
        axes = self._layers[at].neuron_axes
        if not self._inputs:
            return matched(one, other, axes)
        inputs = self._inputs[at]
        rows = inputs.of(expert, reference)
        return matched_by_activations(one, other, axes, rows, inputs.activation)

    def _expert(self, at: int, expert: int) -> dict[str, Tensor]:
        layer = self._layers[at]
        return {role: self._model.tensor(layer.name(expert, role)) for role in layer.roles}


def aligner_of(
    model: Weights,
    layers: Sequence[ExpertLayer],
    seen: Sequence[LayerStatistics],
    settings: ExpertSettings,
) -> Aligner:
    """The aligner that the settings ask for."""
    if settings.alignment_by == "weights":
        return Aligner(model, layers)
    return Aligner(model, layers, [s.inputs for s in seen if s.inputs is not None])


def reference_of(expert: int, leader: int, settings: ExpertSettings) -> int | None:
    """The expert whose order of neurons an expert takes; None for its own."""
    reference = 0 if settings.aligned_to == "first" else leader
    return None if settings.aligned_to == "none" or expert == reference else reference


def compared_in(aligner: Aligner, settings: ExpertSettings, at: int, expert: int) -> Tensor | None:
    """The order of an expert's neurons in which it is compared to others; None for its own."""
    return None if settings.aligned_to == "none" else aligner.order(at, expert, 0)


def check_settings(model: Weights, layers: Sequence[ExpertLayer], settings: ExpertSettings) -> None:
    """Raise MergeError where the settings do not fit the model."""
    experts = layers[0].experts
    if any(layer.experts != experts for layer in layers):
        raise MergeError(f"{model.path}: its layers have different numbers of experts")
    if (chosen := top_k(model.config)) > experts:
        raise MergeError(
            f"{model.path}: config.json sends each token to {chosen} experts, its layers have"
            f" {experts}"
        )
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
        if len(model.shape(name)) > 1:
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
    aligner: Aligner | None = None,
) -> list[LayerPlan]:
    """Groups and weights for every layer; `aligner` is one that earlier plans have filled.

    Raises MergeError where the settings do not fit.
    """
    check_settings(model, layers, settings)
    usage = torch.stack([statistics.usage(settings.usage) for statistics in seen])
    counts = _counts(usage, settings)
    aligner = aligner or aligner_of(model, layers, seen, settings)
    generator = torch.Generator().manual_seed(seed)
    plans = []
    for at, (layer, keep) in enumerate(zip(layers, counts, strict=True)):
        order = partial(compared_in, aligner, settings, at)
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
