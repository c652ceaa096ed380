"""A model with its experts merged as a recipe says, seen as a model: every expert in its place.

What each layer keeps is worked out from a routing fit and the recipe's parameters there. Runs no
model and reads no data.
"""

from __future__ import annotations

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
from evomerge.merging.structure.experts.grouping import adaptive_counts
from evomerge.merging.structure.experts.layers import ExpertLayer, expert_layers
from evomerge.merging.structure.experts.merge import MergedExperts
from evomerge.merging.structure.experts.plan import Aligner, LayerPlan, plan_experts
from evomerge.merging.structure.experts.routing_fit import read_statistics
from evomerge.merging.structure.experts.settings import ExpertSettings
from evomerge.merging.structure.experts.statistics import LayerStatistics

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
        self._aligned_to = settings.aligned_to
        self._merged = MergedExperts(model, layers, self.plans, settings, aligner=aligner)
        self._at = {
            layer.name(expert, role): at
            for at, layer in enumerate(layers)
            for expert in range(layer.experts)
            for role in layer.roles
        }

    def tensor(self, name: str) -> Tensor:
        """Read only. Raises MissingTensor."""
        return self._merged.tensor(name)

    @property
    def structure(self) -> str:
        """How many experts are left of each layer's."""
        kept = ", ".join(str(len(plan.groups.members)) for plan in self.plans)
        return f"experts kept in each layer: {kept} of {self._experts}, written in all places"

    def fingerprint(self, name: str) -> Hashable:
        """The plan of the layer that an expert's tensor belongs to; of any other the model."""
        if (at := self._at.get(name)) is None:
            return self._model.path
        plan = self.plans[at]
        return self._model.path, plan.groups.leaders, plan.weights, self._aligned_to


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
