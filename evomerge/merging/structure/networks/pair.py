"""Two networks of torch modules whose units were brought into one order, and which may be widened.

What does not depend on how much is merged: matching, the groups that can be widened, what they
cost. What becomes of the units is decided in `pleas_networks`.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from evomerge.errors import MergeError
from evomerge.merging.structure.architectures.trial_network import random_tensor
from evomerge.merging.structure.networks.heads import ROLE, Separate
from evomerge.merging.structure.networks.resizing import resized
from evomerge.merging.structure.partial.budget import Costs, Term
from evomerge.merging.structure.partial.multiply_adds import counted, layer_terms, positions
from evomerge.merging.structure.partial.partial import PartialMerge, Split
from evomerge.merging.structure.permutations.activations import Live, Statistic, activation_matching
from evomerge.merging.structure.permutations.check import FLOAT64
from evomerge.merging.structure.permutations.linear_layers import (
    Layer,
    linear_layers,
    plain_modules,
)
from evomerge.merging.structure.permutations.matching import Matching, weight_matching
from evomerge.merging.structure.permutations.permutation import Spec, State, apply, identity
from evomerge.merging.structure.permutations.units import Shapes
from evomerge.merging.structure.refit.activation_moments import run
from evomerge.merging.structure.refit.layer_rows import survey
from evomerge.merging.structure.refit.least_squares import Data
from evomerge.merging.structure.tracing.tracer import in_float64, traced_spec

Likeness = Literal["identity", "weights"] | Statistic
Example = tuple[Any, ...]
"""The arguments of a forward pass."""


@dataclass(frozen=True, eq=False)
class NetworkPair:
    """Networks a and b in eval mode, copies; units of b lie in a's order.

    `costs` are those of the groups that may be widened; `left` says of every other group why it may
    not. `heads` are those of different label spaces. `layers` are in the order in which they
    run; `shapes` are those of either network, its heads filled up to the larger number of labels.
    """

    a: nn.Module
    b: nn.Module
    spec: Spec
    matching: Matching
    layers: Mapping[str, Layer]
    shapes: Shapes
    costs: Costs
    left: Mapping[str, str]
    heads: Separate
    example: Example

    def similarity(self, group: str) -> Tensor:
        """How alike the pairs [n] of a group are; alike where nothing was compared."""
        found = self.matching.similarity.get(group)
        return found if found is not None else torch.zeros(self.spec[group].size)


def matched(
    a: nn.Module,
    b: nn.Module,
    data: Data,
    *,
    example: Example,
    similarity: Likeness = "distance",
    spec: Spec | None = None,
    heads: Sequence[str] = (),
) -> NetworkPair:
    """Bring b's units into the order of a's, and find out which groups of units may be widened.

    `example` are the arguments of a forward pass, on which the network is traced and its costs are
    counted; `spec` one written by hand, in place of the traced one. `similarity` as in weight and
    activation matching, the latter on all of `data`; `identity` leaves b's units where they are.
    `heads` are the linear layers, by name, in which the networks' label spaces differ; both are
    kept.

    A group may be widened if a merge that keeps all of its units apart and gives all weight to a is
    still a, on random weights, whatever b is. So it may not where units act on one another, as
    under a LayerNorm, nor where a module cannot be told of its new width.

    Raises MergeError for networks of different shapes and for those that cannot be traced;
    UserError without data that the matching needs.
    """
    separate = Separate.of(a, b, heads)
    a, b = (_alone(model) for model in (a, b))
    _check_shapes(a, b, separate)
    if spec is None:
        spec = traced_spec(a, *example)
    matching = _matching(separate.body(spec), a, b, data, similarity, separate)
    a, b = separate.filled(a, 0), separate.filled(b, 1)
    b.load_state_dict(apply(spec, b.state_dict(), matching.permutations))
    spec = separate.with_labels(spec)
    shapes = {name: tuple(t.shape) for name, t in a.state_dict().items()}
    layers = _in_running_order(a, linear_layers(plain_modules(a), shapes), example)
    tried = _Tried(a, spec, layers, shapes, example)
    names = [group.name for group in spec.groups if group.role != ROLE]
    left = {name: fault for name in names if (fault := tried.fault([name])) is not None}
    costs = _costs(tried, names, left)
    if fault := tried.fault(costs.groups):
        raise MergeError(f"{type(a).__name__}: its groups can be widened one by one, but not all of"
                         f" them: {fault}")  # fmt: skip
    return NetworkPair(a, b, spec, matching, layers, shapes, costs, left, separate, example)


def live_network(model: nn.Module) -> Live:
    """A network of torch modules as it is watched on batches: a tensor, or the arguments of a
    forward pass as a tuple or by name."""
    return Live(plain_modules(model), lambda batch: run(model, [batch]))


def state_on_cpu(model: nn.Module) -> dict[str, Tensor]:
    """The state of a network, which may lie anywhere."""
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()}


def _alone(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).eval()


def _check_shapes(a: nn.Module, b: nn.Module, separate: Separate) -> None:
    one, two = ({n: list(t.shape) for n, t in m.state_dict().items()} for m in (a, b))
    for name in dict.fromkeys([*one, *two]):
        if one.get(name) != two.get(name) and name not in separate.tensors:
            raise MergeError(
                f"{name}: is {one.get(name, 'not there')} in one network and"
                f" {two.get(name, 'not there')} in the other; both must have the same layers. Where"
                " their labels differ, name the `heads`"
            )


def _matching(
    spec: Spec, a: nn.Module, b: nn.Module, data: Data, by: Likeness, separate: Separate
) -> Matching:
    if by == "identity":
        return Matching(identity(spec), {}, 0, ())
    if by == "weights":
        return weight_matching(spec, *(separate.without(state_on_cpu(m)) for m in (a, b)))
    batches = (batch for batch, _ in data)
    return activation_matching(spec, live_network(a), live_network(b), batches, statistic=by)


def _in_running_order(
    model: nn.Module, layers: Mapping[str, Layer], example: Example
) -> dict[str, Layer]:
    ran = survey(live_network(model), example, list(layers))
    return {name: layers[name] for name in dict.fromkeys([*ran, *layers])}


class _Tried:
    """Network a with random weights in float64, widened by groups of which no unit is merged."""

    def __init__(
        self,
        a: nn.Module,
        spec: Spec,
        layers: Mapping[str, Layer],
        shapes: Shapes,
        example: Example,
    ) -> None:
        self.a = copy.deepcopy(a).cpu().double()
        self.spec, self.layers, self.shapes = spec, layers, shapes
        self.inputs = pytree.tree_map(in_float64, example)
        self._states = [_random(self.a, seed) for seed in (0, 1)]
        self.a.load_state_dict(self._states[0])
        self._wanted = self._outputs(self.a)

    def widened(self, groups: Collection[str]) -> nn.Module:
        """a, beside a second network that has no weight in anything. Raises MergeError."""
        none = torch.tensor([], dtype=torch.long)
        splits = {name: Split(none, torch.arange(self.spec[name].size)) for name in groups}
        merge = PartialMerge(self.spec, self.layers, self.shapes, splits, weights=(1.0, 0.0))
        made = resized(self.a, {name: merge.shape(name) for name in self.shapes})
        made.load_state_dict(merge.state(*self._states))
        return made

    def fault(self, groups: Collection[str]) -> str | None:
        """Why these cannot be widened, if so."""
        try:
            made = self.widened(groups)
        except MergeError as error:
            return str(error)
        try:
            found = self._outputs(made)
        except Exception as error:  # whatever a network may raise
            reason = " ".join(str(error).split()) or type(error).__name__
            return f"the network does not run with more of its units ({reason[:100]})"
        if found.shape != self._wanted.shape:
            return "its outputs have another shape with more of its units"
        if not (found - self._wanted).abs().max() <= FLOAT64 * self._wanted.abs().max():
            return ("its units cannot be told apart: they act on one another, as under a LayerNorm,"
                    " or are read by a layer that is not split")  # fmt: skip
        return None

    def cost(self, groups: Collection[str] = ()) -> float:
        """Multiply-adds of a forward pass."""
        made = self.widened(groups) if groups else self.a
        return counted(lambda: made(*self.inputs))

    @torch.no_grad()
    def _outputs(self, model: nn.Module) -> Tensor:
        found = pytree.tree_leaves(model(*self.inputs))
        return torch.cat([t.flatten() for t in found if isinstance(t, Tensor)])


def _random(model: nn.Module, seed: int) -> State:
    """Random weights; tied tensors stay the same."""
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[int, Tensor] = {}
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in drawn:
            drawn[id(tensor)] = random_tensor(name, tuple(tensor.shape), tensor.dtype, generator)
        state[name] = drawn[id(tensor)]
    return state


def _costs(tried: _Tried, groups: Sequence[str], left: dict[str, str]) -> Costs:
    """Of the groups that may be widened. Groups that cost nothing are added to those left."""
    modules = plain_modules(tried.a)
    uses = positions(modules, lambda: tried.a(*tried.inputs))
    wide = [name for name in groups if name not in left]
    terms = list(layer_terms(tried.spec, tried.layers, tried.shapes, uses, wide))
    terms += _beside_layers(tried, wide, terms)
    paid = {end for term in terms if term.cost > 0 for end in (term.out_group, term.in_group)}
    for name in wide:
        if name not in paid:
            left[name] = "no layer of it costs anything"
    return Costs(terms, {name: tried.spec[name].size for name in wide if name in paid})


def _beside_layers(tried: _Tried, groups: Sequence[str], terms: Sequence[Term]) -> Iterator[Term]:
    """What is multiplied without being a linear layer, as in attention: it is counted."""
    whole = tried.cost()
    rest = whole - sum(term.cost for term in terms)
    for name in groups:
        known = sum(
            term.cost * ((1 + (term.out_group == name)) * (1 + (term.in_group == name)) - 1)
            for term in terms
        )
        more = tried.cost([name]) - whole - known
        if more > 0:
            rest -= more
            yield Term(more, name)
    if rest > 0:
        yield Term(rest)
