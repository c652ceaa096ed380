"""A model with its experts merged as a recipe says, seen as a model: every expert in its place.

What each layer keeps is worked out from a routing fit and the recipe's parameters there. Runs no
model and reads no data.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from evomerge.checkpoints.seen import Seen
from evomerge.checkpoints.weights import Model
from evomerge.errors import MergeError
from evomerge.merging.methods.base import Coefficients, Fitted
from evomerge.merging.methods.structural import Resolve, throughout
from evomerge.merging.structure.experts.compression import decomposed, largest_rows
from evomerge.merging.structure.experts.grouping import adaptive_counts
from evomerge.merging.structure.experts.layers import ExpertLayer, expert_layers
from evomerge.merging.structure.experts.merge import MergedExperts
from evomerge.merging.structure.experts.plan import Aligner, LayerPlan, plan_experts
from evomerge.merging.structure.experts.routing_fit import read_statistics
from evomerge.merging.structure.experts.settings import ExpertSettings
from evomerge.merging.structure.experts.statistics import LayerStatistics

_ROUNDING = 1e-9

# One for all recipes of a search that apply an artifact: to find an order takes a while.
_ALIGNERS: WeakKeyDictionary[Fitted, Aligner] = WeakKeyDictionary()

_METHODS: dict[str, Literal["m_smoe", "hc_smoe", "prune"]] = {
    "dominant": "m_smoe",
    "clusters": "hc_smoe",
    "prune": "prune",
}


class ExpertModel(Seen):
    """The replicated form of a merge of experts: names, shapes and config are the model's own.

    Raises MergeError where the model has other layers of experts than the fit has watched, or the
    parameters ask for what cannot be.
    """

    def __init__(self, model: Model, fitted: Fitted, resolve: Resolve) -> None:
        super().__init__(model)
        layers = expert_layers(model)
        seen = read_statistics(fitted)
        if [layer.prefix for layer in layers] != list(fitted.facts["layers"]):
            raise MergeError(f"{model.path}: the artifact was fitted on another model's experts")
        here = [resolve(layer.name(0, layer.roles[0])) for layer in layers]
        settings = _settings(here, expert_counts(here, layers, seen))
        aligner = _ALIGNERS.setdefault(fitted, Aligner(model, layers))
        self.plans: list[LayerPlan] = plan_experts(
            model, layers, seen, settings, seed=here[0].seed, aligner=aligner
        )
        self._experts = layers[0].experts
        self._ranks = expert_ranks(here, self.plans)
        self._density = float(throughout("density", here))
        self._low: tuple[int, dict[Hashable, Tensor]] = -1, {}  # of one layer
        self._aligned_to = settings.aligned_to
        self._merged = MergedExperts(model, layers, self.plans, settings, aligner=aligner)
        self._at = {
            layer.name(expert, role): at
            for at, layer in enumerate(layers)
            for expert in range(layer.experts)
            for role in layer.roles
        }
        self._place = {
            layer.name(expert, role): (slot, role)
            for layer, plan in zip(layers, self.plans, strict=True)
            for expert, slot in enumerate(plan.groups.slots)
            for role in layer.roles
        }

    def tensor(self, name: str) -> Tensor:
        """Read only. Raises MissingTensor."""
        whole = self._merged.tensor(name)
        if (at := self._at.get(name)) is None or not self._ranks or whole.ndim != 2:
            return whole
        if self._low[0] != at:
            self._low = at, {}
        known, key = self._low[1], self._place[name]
        if key not in known:  # every member of a group asks for the same
            known[key] = self._compressed(whole, self._ranks[at])
        return known[key]

    def _compressed(self, whole: Tensor, rank: int) -> Tensor:
        if rank >= min(whole.shape):
            return whole
        u, v, s = decomposed(whole.float(), rank)
        return (u @ v + largest_rows(s, self._density)).to(whole.dtype)

    @property
    def structure(self) -> str:
        """How many experts are left of each layer's."""
        kept = ", ".join(str(len(plan.groups.members)) for plan in self.plans)
        said = f"experts kept in each layer: {kept} of {self._experts}, written in all places"
        if not self._ranks:
            return said
        ranks = ", ".join(map(str, self._ranks))
        return f"{said}; matrices of rank {ranks} and {self._density:.0%} of rows"

    def fingerprint(self, name: str) -> Hashable:
        """The plan of the layer that an expert's tensor belongs to; of any other the model."""
        if (at := self._at.get(name)) is None:
            return self._model.path
        plan = self.plans[at]
        low = (self._ranks[at], self._density) if self._ranks else None
        return self._model.path, plan.groups.leaders, plan.weights, self._aligned_to, low


def expert_counts(
    here: Sequence[Coefficients], layers: Sequence[ExpertLayer], seen: Sequence[LayerStatistics]
) -> tuple[int, ...]:
    """How many experts each layer keeps, by a recipe's parameters at each of them.

    Without `shares` the published rule, `adaptive_counts` (which may keep fewer); with them
    `shared_out`: as many in all as `keep` times the layers, rounded.
    """
    keep, most = float(throughout("keep", here)), layers[0].experts
    if not 1 <= keep <= most:
        raise MergeError(f"keep: {keep:g} experts of each layer; there are 1 to {most}")
    if throughout("allocation", here) == "adaptive":
        if keep != round(keep):
            raise MergeError(f"keep: {keep:g}; the adaptive rule takes a whole number")
        usage = torch.stack([found.usage(throughout("usage", here)) for found in seen])
        return adaptive_counts(usage, round(keep))
    shares = [at.number("share") for at in here]
    return shared_out(round(keep * len(layers)), shares, most)


def expert_ranks(here: Sequence[Coefficients], plans: Sequence[LayerPlan]) -> tuple[int, ...]:
    """The rank that each layer's experts are cut to, none where `rank` is 0.

        r_t = ⌊rank · s_t · Σ K / Σ (K·s)⌋, at least 1

    for the K_t experts that layer t keeps and its `rank_share` s_t: as many numbers in all as with
    `rank` everywhere.
    """
    rank = float(throughout("rank", here))
    if rank == 0:
        return ()
    kept = [len(plan.groups.members) for plan in plans]
    shares = [at.number("rank_share") for at in here]
    scale = rank * sum(kept) / sum(k * s for k, s in zip(kept, shares, strict=True))
    return tuple(max(1, math.floor(scale * share + _ROUNDING)) for share in shares)


def shared_out(total: int, shares: Sequence[float], most: int) -> tuple[int, ...]:
    """Whole numbers from 1 to `most` of that sum, as near to the proportions as can be.

    One after another goes to where share / (count + 1/2) is largest (Webster's method), the first
    of equals. `total` lies between the number of shares and `most` times it.
    """
    counts = [1] * len(shares)
    for _ in range(total - len(shares)):
        open_ = [at for at, count in enumerate(counts) if count < most]
        best = max(open_, key=lambda at: shares[at] / (counts[at] + 0.5))
        counts[best] += 1
    return tuple(counts)


def _settings(here: Sequence[Coefficients], counts: tuple[int, ...]) -> ExpertSettings:
    given: dict[str, Any] = {
        name: throughout(name, here) for name in ("similarity", "usage", "exponent", "alignment")
    }
    return ExpertSettings(keep=counts, method=_METHODS[throughout("groups", here)], **given)
