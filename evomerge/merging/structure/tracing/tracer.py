"""The permutation specification of a plain network of torch modules, found by following its axes.

The network is exported once on an example, which yields every operation with its shapes; what each
does to axes is in `traced_operations`. Chosen over torch.fx's symbolic tracing because modules,
methods and functions all become operations of one small documented set, in which nothing happens in
place and attention is taken apart into products, and because control flow on shapes and settings is
no obstacle. Knows no architecture and no checkpoint.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.utils import _pytree as pytree

from evomerge.errors import MergeError
from evomerge.merging.structure.architectures.trial_network import random_tensor
from evomerge.merging.structure.permutations.check import FLOAT64, check
from evomerge.merging.structure.permutations.permutation import Bind, Group, Spec, Stacked, State
from evomerge.merging.structure.tracing.traced_axes import Places
from evomerge.merging.structure.tracing.traced_operations import Dims, Operations

_STATES = 3
_BY_HAND = (
    "write a Spec by hand and prove it with evomerge.merging.structure.permutations.check.check"
)


def traced_spec(model: nn.Module, *example: Any) -> Spec:
    """The permutation groups of a network, by the names of `model.state_dict()`.

    `example` are the arguments of a forward pass; small ones will do. The network is copied, to
    float64 on the CPU in eval mode; the original is left as it is. What touches its inputs or
    outputs is fixed, and so is what touches an operation that is not known to treat all units
    alike: channels under GroupNorm of several groups or under grouped convolutions, and what is
    picked by position. An axis that is taken apart moves in blocks: whole attention heads. A group
    is named after the first module that writes to it; its role is "residual" where activations are
    added to each other, else "inner". Of tied tensors all names move.

    Groups that the outputs do not depend on are left out; of the others, what they do not depend on
    is inert, such as a bias that a norm takes off again. The rest is proved with random weights, by
    about three forward passes for each tensor. Raises MergeError for a network that cannot be
    exported, and for groups that are not proved.

    Source: the idea is that of the code of PLeaS (Nasery et al. 2024, arXiv:2407.02447), which goes
    by torch.fx, leaves concatenated axes unlinked, and lets groups survive that a reshape breaks.
    """
    network = _Network(model, example)
    choices: dict[str, int] = {}
    walk = network.walk(choices)
    while lost := walk.reshapes.lost():
        choices |= lost
        walk = network.walk(choices)
    return _proved(Spec(tuple(_groups(network, walk))), network)


class _Network:
    """A copy of a network: a function of its state, and a graph of operations."""

    def __init__(self, model: nn.Module, example: tuple[Any, ...]) -> None:
        self.name = type(model).__name__
        self._module = copy.deepcopy(model).cpu().double().eval().requires_grad_(False)
        self._inputs = pytree.tree_map(in_float64, example)
        live = self._module.state_dict(keep_vars=True)
        firsts: dict[int, str] = {}
        self.first = {name: firsts.setdefault(id(t), name) for name, t in live.items()}
        self._live = {name: live[name].detach() for name in firsts.values()}
        self.dims: dict[str, Dims] = {}
        self._program = self._exported()

    def compute(self, state: State) -> Tensor:
        """All that it returns for the example, in one row. Tied tensors go by their first name."""
        for name, tensor in self._live.items():
            tensor.copy_(state[name])
        results = pytree.tree_leaves(self._module(*self._inputs))
        return torch.cat([r.double().flatten() for r in results if isinstance(r, Tensor)])

    def random_state(self, seed: int) -> dict[str, Tensor]:
        """Weights that tell all units apart; what is not a float stays as it is."""
        generator = torch.Generator().manual_seed(seed)
        drawn = {
            name: random_tensor(name, tuple(t.shape), t.dtype, generator)
            if t.is_floating_point()
            else t.clone()
            for name, t in self._live.items()
        }
        return {name: drawn[first] for name, first in self.first.items()}

    def walk(self, choices: Mapping[str, int]) -> Operations:
        """What all its operations do to axes; `dims` are those of its tensors, by first name."""
        walk = Operations(_live(self._program), choices)
        self.dims = {
            name: tuple(map(walk.axes.new, tensor.shape)) for name, tensor in self._live.items()
        }
        targets = {s.arg.name: s.target for s in self._program.graph_signature.input_specs}
        for node in self._program.graph.nodes:
            if node.op == "placeholder":
                name = self.first.get(targets.get(node.name) or "")
                walk.give(node, self.dims[name] if name is not None else None)
            elif node.op == "output":
                walk.fix(node.all_input_nodes)
            else:
                walk.add(node)
        return walk

    def _exported(self) -> ExportedProgram:
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # the exporter's, about itself
                program = torch.export.export(self._module, self._inputs, strict=False)
                decomposed: ExportedProgram = program.run_decompositions()
                return decomposed
        except Exception as error:  # whatever a network, or the exporter, may raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise MergeError(
                f"{self.name} cannot be traced on this example: its operations depend on data, or"
                f" the example does not fit it; {_BY_HAND} ({reason[:200]})"
            ) from error


def in_float64(given: Any) -> Any:
    """An argument of a forward pass on the CPU, in float64 if it is a tensor of floats."""
    if not isinstance(given, Tensor):
        return given
    given = given.detach().cpu()
    return given.double() if given.is_floating_point() else given


def _live(program: ExportedProgram) -> set[Node]:
    """The operations that depend on the network's inputs."""
    given = {
        spec.arg.name
        for spec in program.graph_signature.input_specs
        if spec.kind is InputKind.USER_INPUT
    }
    live: set[Node] = set()
    for node in program.graph.nodes:
        if node.name in given or live.intersection(node.all_input_nodes):
            live.add(node)
    return live


def _groups(network: _Network, walk: Operations) -> Iterator[Group]:
    """The kinds of units of which there are two or more, bound in two places or more."""
    units, kinds = walk.axes.kinds()
    written = _written(network, walk, kinds)
    summed = {kind for axis in walk.sums for kind in kinds[axis.places].tolist()}
    taken: Counter[str] = Counter()
    for kind, binds in _binds(network, walk, units, kinds).items():
        size = len(binds[0].index)
        if size > 1 and sum(not bind.inert for bind in binds) > 1:
            name = written.get(kind) or _module_of(binds[0].param)
            taken[name] += 1
            name += f".{taken[name]}" if taken[name] > 1 else ""
            yield Group(name, "residual" if kind in summed else "inner", size, tuple(binds))


def _written(network: _Network, walk: Operations, kinds: Places) -> dict[int, str]:
    """The first module that writes to units of each kind."""
    names = {axis: name for name, dims in network.dims.items() for axis in dims}
    found: dict[int, str] = {}
    for axis in walk.writers:
        if axis in names:
            for kind in kinds[axis.places].tolist():
                found.setdefault(kind, _module_of(names[axis]))
    return found


def _module_of(name: str) -> str:
    return name.rpartition(".")[0] or name


def _binds(
    network: _Network, walk: Operations, units: Places, kinds: Places
) -> dict[int, list[Bind]]:
    """What holds units of each kind; they are numbered as they lie in the first."""
    numbers: dict[int, int] = {}
    found: dict[int, list[Bind]] = {}
    for name, first in network.first.items():
        for dim, axis in enumerate(network.dims[first]):
            if axis is None:
                continue
            compared = name == first and axis not in walk.statistics
            here = kinds[axis.places]
            for kind in np.unique(here[here >= 0]).tolist():
                places = np.flatnonzero(here == kind)
                owners = units[axis.places[places]].tolist()
                for unit in owners:
                    numbers.setdefault(unit, len(numbers))
                order = np.argsort([numbers[unit] for unit in owners], kind="stable")
                index = torch.from_numpy(places[order].reshape(len(set(owners)), -1))
                bind = Bind(name, dim, index, compared=compared, inert=name != first)
                found.setdefault(kind, []).append(bind)
    return found


def _proved(spec: Spec, network: _Network) -> Spec:
    """The groups that the network depends on, with what it does not depend on marked as inert.

    Of a few random states the one is taken in which it depends on most: units of few channels may
    all be dead under one.
    """
    trials = []
    for seed in range(_STATES):
        state = network.random_state(seed)
        trials.append((state, idle := _idle(spec, network, state)))
        if all(state[bind.params[0]].dim() == 1 for bind in idle):
            break
    state, idle = min(trials, key=lambda trial: len(trial[1]))  # the first of equals
    spec = Spec(tuple(_without(spec, idle)))
    try:
        check(spec, state, network.compute, tolerance=FLOAT64)
    except MergeError as error:
        raise MergeError(
            f"{network.name}: the permutation groups found by tracing are not proved: {error}."
            f" Or {_BY_HAND}"
        ) from error
    return spec


def _idle(spec: Spec, network: _Network, state: State) -> set[Bind | Stacked]:
    """The binds whose places have no influence on the outputs."""
    wanted, other = network.compute(state), network.random_state(_STATES)
    found: set[Bind | Stacked] = set()
    for bind in (bind for group in spec.groups for bind in group.binds):
        if isinstance(bind, Bind) and not bind.inert:
            drawn, places = state[bind.param].clone(), bind.index.flatten()
            drawn.index_copy_(bind.axis, places, other[bind.param].index_select(bind.axis, places))
            change = (network.compute({**state, bind.param: drawn}) - wanted).abs().max()
            if change <= FLOAT64 * wanted.abs().max():
                found.add(bind)
    return found


def _without(spec: Spec, idle: set[Bind | Stacked]) -> Iterator[Group]:
    for group in spec.groups:
        binds = [replace(bind, inert=True) if bind in idle else bind for bind in group.binds]
        if sum(not bind.inert for bind in binds) > 1:
            yield replace(group, binds=tuple(binds))
