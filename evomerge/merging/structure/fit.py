"""The fit of `git_rebasin`: for each source, the order that lies its units beside the reference's.

Knows nothing of how permuted sources are merged.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from evomerge.checkpoints.weights import Model
from evomerge.merging.fitted.artifact import Draft
from evomerge.merging.fitted.base import Fitter, Problem, Settings, Watch
from evomerge.merging.fitted.gram import even_batches
from evomerge.merging.fitted.network import Network
from evomerge.merging.methods.git_rebasin import order_key
from evomerge.merging.structure.activations import Live, activation_matching
from evomerge.merging.structure.families import spec_of
from evomerge.merging.structure.linear_layers import modules_of
from evomerge.merging.structure.matching import Matching, weight_matching
from evomerge.merging.structure.permutation import Spec, axis_orders, in_place
from evomerge.merging.structure.trial_network import prove


class PermutationSettings(Settings):
    """`similarity` is what makes two units alike: their `weights`, for which no data is looked at,
    or the `correlation`, `inner` product or squared `distance` of what they compute on all
    calibration data. `batch_size` is the most examples in a forward pass."""

    similarity: Literal["weights", "correlation", "inner", "distance"] = "weights"
    batch_size: int = Field(default=16, ge=1)


class PermutationFit(Fitter):
    """The permutation of every group of each source to the reference: the base, or the first
    source by name where there is none.

    The specification is first proved on a tiny network of the reference's config.
    Whole experts keep their place, since a merge sees one tensor at a time; the neurons inside each
    are matched. Memory: the weights of two models, or two live models in float32 and a table of
    c × c for each layer side of c units. Artifact: `order_key` int32 for each axis that moves, and
    `source/group` int32 for each group; facts `moved`, the share of units that change places by
    role. FLOPs are those of forward passes.

    Source: Ainsworth et al. 2023, arXiv:2209.04836; see `weight_matching`, `activation_matching`.
    """

    name = "permutation"
    summary = "which unit of each source is which of the reference's, by weights or activations"
    settings = PermutationSettings

    def fit(self, problem: Problem, settings: Any, draft: Draft, watch: Watch) -> None:
        anchor = problem.anchor
        prove(anchor.config)
        shapes = {name: anchor.shape(name) for name in anchor.names}
        spec = in_place(spec_of(anchor.config, shapes))
        for done, (source, model) in enumerate(problem.sources.items(), 1):
            if source not in draft.kept:
                matching, flops = _matched(spec, problem, model, settings)
                tensors = _tensors(spec, shapes, source, matching)
                draft.keep(source, tensors, {"moved": _moved(spec, matching)}, flops=flops)
            watch.progress(done, len(problem.sources))
        moved = {source: draft.kept[source]["moved"] for source in problem.sources}
        draft.finish({}, {"moved": moved}, flops=0.0)


def _matched(
    spec: Spec, problem: Problem, model: Model, settings: PermutationSettings
) -> tuple[Matching, float]:
    if settings.similarity == "weights":
        return weight_matching(spec, _state(problem.anchor), _state(model)), 0.0
    a, b = (Network(each, device=problem.device) for each in (problem.anchor, model))
    shapes = {name: problem.anchor.shape(name) for name in problem.anchor.names}
    first, second = (Live(modules_of(each.model, shapes), each.logits) for each in (a, b))
    examples = [e for source in problem.sources for e in problem.calibration.of(source)]
    examples = list(dict.fromkeys(examples))  # what is meant for all stands under every name
    batches = even_batches(examples, settings.batch_size)
    matching = activation_matching(spec, first, second, batches, statistic=settings.similarity)
    return matching, a.flops + b.flops


def _state(model: Model) -> dict[str, Tensor]:
    return {name: model.tensor(name) for name in model.names}


def _tensors(
    spec: Spec, shapes: dict[str, tuple[int, ...]], source: str, matching: Matching
) -> dict[str, Tensor]:
    orders = axis_orders(spec, shapes, matching.permutations)
    tensors = {order_key(source, name, axis): order for (name, axis), order in orders.items()}
    tensors |= {f"{source}/{name}": order for name, order in matching.permutations.items()}
    return {key: order.to(torch.int32) for key, order in tensors.items()}


def _moved(spec: Spec, matching: Matching) -> dict[str, float]:
    """The share of the units of each role that change places."""
    changed: dict[str, list[Tensor]] = {}
    for group in spec.groups:
        order = matching.permutations[group.name]
        changed.setdefault(group.role, []).append(order != torch.arange(group.size))
    return {role: float(torch.cat(flags).double().mean()) for role, flags in changed.items()}
