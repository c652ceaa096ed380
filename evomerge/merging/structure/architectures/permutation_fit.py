"""The fit of `git_rebasin`: for each source, the order that lies its units beside the reference's.

Knows nothing of how permuted sources are merged.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from evomerge.checkpoints.weights import Model
from evomerge.merging.fitted.artifact import Draft
from evomerge.merging.fitted.base import Fitter, Problem, Settings, Watch
from evomerge.merging.fitted.gram import even_batches
from evomerge.merging.fitted.network import Network
from evomerge.merging.methods.git_rebasin import MOVED_NAMES, order_key
from evomerge.merging.structure.architectures.families import spec_of
from evomerge.merging.structure.architectures.trial_network import prove
from evomerge.merging.structure.permutations.activations import Live, activation_matching
from evomerge.merging.structure.permutations.linear_layers import modules_of
from evomerge.merging.structure.permutations.matching import Matching, weight_matching
from evomerge.merging.structure.permutations.permutation import (
    Spec,
    apply,
    axis_orders,
    compose,
    whole_tensors,
    without,
)

Similarity = Literal["weights", "correlation", "inner", "distance"]


class PermutationSettings(Settings):
    """`similarity` is what makes two units alike: their `weights`, for which no data is looked at,
    or the `correlation`, `inner` product or squared `distance` of what they compute on all
    calibration data. `batch_size` is the most examples in a forward pass."""

    similarity: Similarity = "weights"
    batch_size: int = Field(default=16, ge=1)


_FACTS = ("moved", MOVED_NAMES)


class PermutationFit(Fitter):
    """The permutation of every group of each source to the reference: the base, or the first
    source by name where there is none.

    The specification is first proved on a tiny network of the reference's config. By activations,
    what has no layer of its own (fused experts) is matched by its weights, given all else.
    Memory: the weights of two models, or two live models in float32 and a table of c × c for each
    layer side of c units. Artifact: `order_key` int32 for each axis that moves, and `source/group`
    int32 for each group; facts `moved`, the share of units that change places by role, and
    `tensors`, by source the tensors that come to the place of others (experts). FLOPs are those of
    forward passes.

    Source: Ainsworth et al. 2023, arXiv:2209.04836; see `weight_matching`, `activation_matching`.
    """

    name = "permutation"
    summary = "which unit of each source is which of the reference's, by weights or activations"
    settings = PermutationSettings

    def fit(self, problem: Problem, settings: Any, draft: Draft, watch: Watch) -> None:
        anchor = problem.anchor
        prove(anchor.config)
        shapes = {name: anchor.shape(name) for name in anchor.names}
        spec = spec_of(anchor.config, shapes)
        for done, (source, model) in enumerate(problem.sources.items(), 1):
            if source not in draft.kept:
                matching, flops = _matched(spec, problem, model, settings)
                tensors = _tensors(spec, shapes, source, matching)
                notes: dict[str, Any] = {"moved": _moved(spec, matching)}
                notes[MOVED_NAMES] = whole_tensors(spec, matching.permutations)
                draft.keep(source, tensors, notes, flops=flops)
            watch.progress(done, len(problem.sources))
        kept = draft.kept
        facts = {key: {s: kept[s].get(key, {}) for s in problem.sources} for key in _FACTS}
        draft.finish({}, facts, flops=0.0)


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
    permutations = _with_the_rest(spec, problem.anchor, model, matching)
    return replace(matching, permutations=permutations), a.flops + b.flops


def _with_the_rest(
    spec: Spec, anchor: Model, model: Model, matching: Matching
) -> dict[str, Tensor]:
    """Permutations of all groups, those by weights that a matching compared nothing of."""
    rest = without(spec, matching.similarity)
    moved = apply(spec, _state(model), matching.permutations)
    found = weight_matching(rest, _state(anchor), moved)
    return compose(spec, matching.permutations, found.permutations)


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
