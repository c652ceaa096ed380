"""Which units of a network may change places without changing what it computes, as data.

A group is a set of units that move together in every tensor that has them: neurons of an MLP,
channels of the residual stream, attention heads, experts. Pure tensors by name: knows no
architecture (those are in `families`), no checkpoint and no way to find a good permutation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from evomerge.errors import MergeError

State = Mapping[str, Tensor]
Permutations = Mapping[str, Tensor]
"""Int64 [n] by the name of a group: unit u of the result is unit p[u] of what it was applied to.
A group that is not named keeps its order."""


@dataclass(frozen=True, eq=False)
class Bind:
    """Unit u of a group owns the positions index[u] of one axis of a tensor; index is int64 [n, m].

    m is 1 for a channel, the head dimension for a head. `select` (axis, position) restricts the
    bind to one slice of the tensor. `compared` is False for what moves along but says nothing of a
    unit's likeness (running statistics), `inert` is True for what the function does not depend on.
    """

    param: str
    axis: int
    index: Tensor
    select: tuple[int, int] | None = None
    compared: bool = True
    inert: bool = False

    @property
    def params(self) -> tuple[str, ...]:
        """The tensors that it moves units of."""
        return (self.param,)

    def units(self, state: State) -> Tensor:
        """The group's units, one in a row [n, m·rest], in the tensor's dtype."""
        rows = self._slice(state[self.param]).movedim(self.axis, 0)
        return rows[self.index].flatten(1)

    def permute_(self, state: dict[str, Tensor], order: Tensor) -> None:
        """Move unit order[u] to the place of unit u, in place."""
        part = self._slice(state[self.param])
        moved = part.index_select(self.axis, self.index[order].flatten().to(part.device))
        part.index_copy_(self.axis, self.index.flatten().to(part.device), moved)

    def fault(self, shapes: Mapping[str, tuple[int, ...]], size: int) -> str | None:
        """Why it does not fit tensors of these shapes and a group of `size` units, if so."""
        if (shape := shapes.get(self.param)) is None:
            return f"{self.param} is not there"
        if self.axis >= len(shape):
            return f"{self.param} {list(shape)} has no axis {self.axis}"
        flat = self.index.flatten()
        if self.index.shape[:1] != (size,) or len(set(flat.tolist())) != len(flat):
            return f"{self.param}: the index {list(self.index.shape)} is not one place for each" \
                   f" of {size} units"  # fmt: skip
        if len(flat) and not 0 <= int(flat.min()) <= int(flat.max()) < shape[self.axis]:
            return f"{self.param} {list(shape)}: axis {self.axis} has no place {int(flat.max())}"
        return None

    def _slice(self, tensor: Tensor) -> Tensor:
        return tensor if self.select is None else tensor.narrow(*self.select, 1)


@dataclass(frozen=True, eq=False)
class Stacked:
    """Unit u of a group is the whole tensor params[u], as checkpoints store experts."""

    params: tuple[str, ...]
    compared: bool = True
    inert: bool = False

    def units(self, state: State) -> Tensor:
        """The group's units, one in a row [n, numel]."""
        return torch.stack([state[name].flatten() for name in self.params])

    def permute_(self, state: dict[str, Tensor], order: Tensor) -> None:
        """Give tensor order[u] the name of tensor u."""
        moved = [state[self.params[u]] for u in order.tolist()]
        state.update(zip(self.params, moved, strict=True))

    def fault(self, shapes: Mapping[str, tuple[int, ...]], size: int) -> str | None:
        """As that of Bind."""
        if missing := [name for name in self.params if name not in shapes]:
            return f"{missing[0]} is not there"
        if len(self.params) != size or len({shapes[name] for name in self.params}) > 1:
            return f"{self.params[0]} and the others are not {size} tensors of one shape"
        return None


@dataclass(frozen=True, eq=False)
class Group:
    """`size` units that move together in all `binds`.

    `role` is what its units are (`mlp`, `kv`, ...). A group may lie inside one unit of another, its
    `parent`: the query heads of key-value head `unit`. It then belongs to the place and not to what
    lies there: the parent is permuted first.
    """

    name: str
    role: str
    size: int
    binds: tuple[Bind | Stacked, ...]
    parent: str | None = None
    unit: int = 0


@dataclass(frozen=True, eq=False)
class Spec:
    """All groups of one network, a parent before the groups inside it.

    A group inside a unit must have its like in every other unit of the parent: of the same role and
    size, and as many-th of them. A parent has no parent itself. Raises MergeError where that does
    not hold.
    """

    groups: tuple[Group, ...]

    def __post_init__(self) -> None:
        seen: dict[str, Group] = {}
        for group in self.groups:
            parent = seen.get(group.parent) if group.parent is not None else None
            if group.name in seen or (group.parent is not None and parent is None):
                raise MergeError(f"group {group.name}: named twice, or before its parent")
            if parent is not None and parent.parent is not None:
                raise MergeError(f"group {group.name}: its parent {parent.name} is inside another")
            seen[group.name] = group
        for group in self.groups:
            units = range(seen[group.parent].size) if group.parent else ()
            if any((*self._places[group.name], u) not in self._by_place for u in units):
                raise MergeError(f"group {group.name}: other units of {group.parent} have no like")

    def __getitem__(self, name: str) -> Group:
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, Group]:
        return {group.name: group for group in self.groups}

    @cached_property
    def _places(self) -> dict[str, tuple[Any, ...]]:
        """Where each group lies inside its unit: the first, second, ... of its role and size."""
        seen: Counter[tuple[str | None, str, int, int]] = Counter()
        places = {}
        for group in self.groups:
            kind = group.parent, group.role, group.size, group.unit
            places[group.name] = (*kind[:3], seen[kind])
            seen[kind] += 1
        return places

    @cached_property
    def _by_place(self) -> dict[tuple[Any, ...], Group]:
        inside = (group for group in self.groups if group.parent is not None)
        return {(*self._places[group.name], group.unit): group for group in inside}

    def like(self, group: Group, unit: int) -> Group:
        """The group that lies inside another unit of its parent as this one does inside its own."""
        return self._by_place[(*self._places[group.name], unit)]

    def inside(self, group: Group) -> tuple[Group, ...]:
        """The groups inside the units of a group."""
        return self._inside.get(group.name, ())

    @cached_property
    def _inside(self) -> dict[str, tuple[Group, ...]]:
        found: dict[str, tuple[Group, ...]] = {}
        for group in self.groups:
            if group.parent is not None:
                found[group.parent] = (*found.get(group.parent, ()), group)
        return found

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises MergeError for the first bind that does not fit tensors of these shapes."""
        for group in self.groups:
            for bind in group.binds:
                if fault := bind.fault(shapes, group.size):
                    raise MergeError(f"permutation group {group.name}: {fault}")


def identity(spec: Spec) -> dict[str, Tensor]:
    """Every unit in its place."""
    return {group.name: torch.arange(group.size) for group in spec.groups}


def random_permutations(spec: Spec, generator: torch.Generator) -> dict[str, Tensor]:
    """A uniformly random permutation of every group, drawn in the order of the groups."""
    return {group.name: torch.randperm(group.size, generator=generator) for group in spec.groups}


def apply(spec: Spec, state: State, permutations: Permutations) -> dict[str, Tensor]:
    """The network with its units rearranged, group after group; copies only what a group moves.

    Raises MergeError for a group that the spec has not, or that is not permuted but resized.
    """
    moved = [spec[name] for name in _known(spec, permutations)]
    params = {param for group in moved for bind in group.binds for param in bind.params}
    out = {name: t.clone() if name in params else t for name, t in state.items()}
    for group in spec.groups:
        if group.name in permutations:
            for bind in group.binds:
                bind.permute_(out, permutations[group.name])
    return out


def move(state: State, binds: Iterable[Bind | Stacked], order: Tensor) -> dict[str, Tensor]:
    """The network with the units of these binds rearranged; the tensors of others are shared."""
    binds = tuple(binds)
    params = {param for bind in binds for param in bind.params}
    out = {name: t.clone() if name in params else t for name, t in state.items()}
    for bind in binds:
        bind.permute_(out, order)
    return out


def compose(spec: Spec, first: Permutations, then: Permutations) -> dict[str, Tensor]:
    """The permutations that do what applying `first`, and to its result `then`, does.

    p[u] = first[then[u]]                  for a group of its own
    q_u[v] = first_{r[u]}[then_u[v]]       inside unit u of a parent that `then` moves by r
    """
    first, then = identity(spec) | _known(spec, first), identity(spec) | _known(spec, then)
    out = {}
    for group in spec.groups:
        before = group
        if group.parent is not None:
            before = spec.like(group, int(then[group.parent][group.unit]))
        out[group.name] = first[before.name][then[group.name]]
    return out


def moved_on(
    spec: Spec, permutations: Mapping[str, Tensor], group: Group, order: Tensor
) -> dict[str, Tensor]:
    """`compose` with a permutation of one group, where `permutations` has every group."""
    out = {**permutations, group.name: permutations[group.name][order]}
    for part in spec.inside(group):
        out[part.name] = permutations[spec.like(part, int(order[part.unit])).name]
    return out


def inverse(spec: Spec, permutations: Permutations) -> dict[str, Tensor]:
    """The permutations that undo these: compose(p, inverse(p)) is the identity, either way."""
    all_ = identity(spec) | _known(spec, permutations)
    undone = {name: torch.argsort(order) for name, order in all_.items()}
    out = {}
    for group in spec.groups:
        place = group
        if group.parent is not None:
            place = spec.like(group, int(undone[group.parent][group.unit]))
        out[group.name] = undone[place.name]
    return out


def in_place(spec: Spec) -> Spec:
    """The specification without the groups that are made of whole tensors: every tensor keeps its
    name. What is inside such a group's units moves on its own."""
    whole = {g.name for g in spec.groups if any(isinstance(b, Stacked) for b in g.binds)}
    return without(spec, whole)


def without(spec: Spec, gone: Container[str]) -> Spec:
    """The specification without some groups, by name. What is inside their units moves on its
    own."""
    kept = (group for group in spec.groups if group.name not in gone)
    return Spec(tuple(replace(g, parent=None, unit=0) if g.parent in gone else g for g in kept))


def axis_orders(
    spec: Spec, shapes: Mapping[str, tuple[int, ...]], permutations: Permutations
) -> dict[tuple[str, int], Tensor]:
    """What the permutations do to each axis of each tensor, int64 [size of the axis]: position i of
    the result is position order[i], of the tensor that `whole_tensors` puts there. Axes that keep
    their order are left out.

    Raises MergeError for groups of slices: those are no order of an axis.
    """
    known = _known(spec, permutations)
    places = {_key(n, axis): (n, axis) for n, shape in shapes.items() for axis in range(len(shape))}
    orders: dict[str, Tensor] = {}
    for group in spec.groups:
        for bind in group.binds:
            if isinstance(bind, Bind) and bind.select is not None:
                raise MergeError(f"group {group.name} does not move whole axes of one tensor")
            for moving in _on_orders(bind, shapes):
                for name, axis in (places[key] for key in moving.params):
                    orders.setdefault(_key(name, axis), torch.arange(shapes[name][axis]))
                if group.name in known:
                    moving.permute_(orders, known[group.name])
    return {
        places[key]: order
        for key, order in orders.items()
        if not torch.equal(order, torch.arange(len(order)))
    }


def _key(name: str, axis: int) -> str:
    return f"{name}/{axis}"


def _on_orders(
    bind: Bind | Stacked, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[Bind | Stacked]:
    """What a bind does to the orders of axes, each a tensor under its key."""
    if isinstance(bind, Bind):
        yield Bind(_key(bind.param, bind.axis), 0, bind.index)
        return
    for axis in range(len(shapes[bind.params[0]])):
        yield Stacked(tuple(_key(param, axis) for param in bind.params))


def whole_tensors(spec: Spec, permutations: Permutations) -> dict[str, str]:
    """Which tensor comes to the place of each; those that stay are left out."""
    known = _known(spec, permutations)
    names: dict[str, str] = {}
    for group in spec.groups:
        for bind in group.binds:
            if isinstance(bind, Stacked) and group.name in known:
                moved = [bind.params[u] for u in known[group.name].tolist()]
                names |= dict(zip(bind.params, moved, strict=True))
    return {name: other for name, other in names.items() if name != other}


def _known(spec: Spec, permutations: Permutations) -> dict[str, Tensor]:
    sizes = {group.name: group.size for group in spec.groups}
    for name, order in permutations.items():
        if name not in sizes:
            raise MergeError(f"there is no permutation group {name!r} in this architecture")
        if not torch.equal(order.sort().values, torch.arange(sizes[name])):
            raise MergeError(f"group {name}: not a permutation of its {sizes[name]} units")
    return dict(permutations)
