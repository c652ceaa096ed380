"""Which unit of one network is which unit of another: assignment over all permutation groups.

What makes two units alike (their weights, what they compute) is handed in as a `Likeness`. Knows
no tensor by itself and no architecture.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from evomerge.errors import MergeError
from evomerge.merging.structure.permutations.permutation import (
    Bind,
    Group,
    Spec,
    Stacked,
    State,
    identity,
    moved_on,
)

_GAIN = 1e-12  # of Git Re-Basin's code; relative, for sums of large numbers round by more
MAX_SWEEPS = 100

AnyBind = Bind | Stacked


@dataclass(frozen=True, eq=False)
class Matching:
    """How the units of network b are to be rearranged to lie beside their likes in network a.

    `permutations` are to be applied to b. `similarity` float64 [n], by group: of unit u of a and
    the unit of b that comes to its place, over all binds; a group of which nothing was compared is
    not in it, and keeps its order. `sweeps` is how often all groups were gone through after the
    first time; `objective` the sum of all likeness before the first sweep and after each.
    """

    permutations: dict[str, Tensor]
    similarity: dict[str, Tensor]
    sweeps: int
    objective: tuple[float, ...]


class Likeness(Protocol):
    """Two networks, the second of which is rearranged step by step."""

    def keys(self, bind: AnyBind) -> Iterable[Hashable]:
        """What the bind is compared by: binds that share one are moved by each other's groups."""

    def between(self, bind: AnyBind, other: AnyBind) -> Tensor | None:
        """Similarity of a's units by `bind` and b's by `other`, as b lies now, float64 [n, n]; None
        where the two cannot be compared."""

    def size(self, bind: AnyBind) -> int:
        """How many numbers are compared."""

    def move(self, group: Group, order: Tensor) -> None:
        """Rearrange the units of b."""

    def total(self, binds: Iterable[AnyBind] | None = None) -> float:
        """Similarity of a and b as it lies now, of what these binds (of all) are compared by."""


def match(spec: Spec, likeness: Likeness, *, max_sweeps: int = MAX_SWEEPS) -> Matching:
    """Coordinate descent over the groups, each by the best assignment given all others.

    The first time through, a group is matched only by what the groups already matched leave fixed,
    those with the largest share of it first: the residual stream by vocabulary or pixels. Whole
    heads and experts are compared by the best assignment of what is inside them. Then sweeps in the
    order of the specification, by everything, until none gains.

    Source: Ainsworth et al. 2023, arXiv:2209.04836, sec. 3.2 (there in random order). That the
    anchored order recovers planted permutations where a random one fails was measured.
    """
    descent = _Descent(spec, likeness)
    descent.anchor()
    objective = [likeness.total()]
    while len(objective) <= max_sweeps and descent.sweep():
        objective.append(likeness.total())
    similarity = {}
    for group in spec.groups:
        if (table := descent.similarity(group, group)) is not None:
            similarity[group.name] = table.diagonal().clone()
    return Matching(descent.permutations, similarity, len(objective) - 1, tuple(objective))


def assignment(similarity: Tensor) -> tuple[Tensor, float]:
    """The permutation p [n] with the largest Σ similarity[u, p[u]], and that sum."""
    if not bool(similarity.isfinite().all()):
        raise MergeError("units cannot be matched: their similarity is NaN or infinite")
    rows, columns = linear_sum_assignment(similarity.numpy(), maximize=True)
    order = torch.from_numpy(columns).long()
    return order, float(similarity[torch.from_numpy(rows), order].sum())


class _Descent:
    def __init__(self, spec: Spec, likeness: Likeness) -> None:
        self.spec = spec
        self.likeness = likeness
        self.permutations = identity(spec)
        self._done: set[str] = set()
        self._claims: dict[Hashable, set[str]] = defaultdict(set)
        for group in spec.groups:
            for bind in group.binds:
                for key in likeness.keys(bind):
                    self._claims[key].add(group.name)

    def anchor(self) -> None:
        """Match every group once."""
        waiting = list(self.spec.groups)
        while waiting:
            ready = [g for g in waiting if g.parent is None or g.parent in self._done]
            group = max(ready, key=self._settled_share)  # the first of equals
            waiting.remove(group)
            table = self._nested(group)
            if table is None:
                table = self.similarity(group, group)
            if table is not None:
                self._move(group, assignment(table)[0])
            self._done.add(group.name)

    def sweep(self) -> bool:
        """Match every group again, given all others; whether one gained."""
        gained = False
        for group in self.spec.groups:
            table = self.similarity(group, group)
            if table is None or group.size < 2:
                continue
            order, best = assignment(table)
            gain, least = best - float(table.trace()), _GAIN * max(1.0, abs(best))
            if gain > least:
                gained |= self._try(group, order, least)
        return gained

    def similarity(
        self, group: Group, other: Group, use: Callable[[Group, AnyBind], bool] | None = None
    ) -> Tensor | None:
        """Σ over the binds, of a's units of `group` and b's of `other`; None of nothing."""
        pairs = zip(group.binds, other.binds, strict=True)
        tables = [
            table
            for bind, like in pairs
            if (use is None or use(group, bind))
            and (table := self.likeness.between(bind, like)) is not None
        ]
        return torch.stack(tables).sum(0) if tables else None

    def _try(self, group: Group, order: Tensor, least: float) -> bool:
        """Move, and back if that gains nothing: a group on two axes of one tensor is in its own
        way."""
        before = self.likeness.total(group.binds)
        self._move(group, order)
        if self.likeness.total(group.binds) - before > least:
            return True
        self._move(group, torch.argsort(order))
        return False

    def _move(self, group: Group, order: Tensor) -> None:
        self.likeness.move(group, order)
        self.permutations = moved_on(self.spec, self.permutations, group, order)

    def _nested(self, group: Group) -> Tensor | None:
        """Similarity by what is settled, with the best assignment of what is inside each unit."""
        table = self.similarity(group, group, self._settled)
        inside: list[list[Group]] = [[] for _ in range(group.size)]
        for part in self.spec.inside(group):
            inside[part.unit].append(part)
        for row, mine in enumerate(inside):
            for column, theirs in enumerate(inside):
                for part, like in zip(mine, theirs, strict=True):
                    inner = self.similarity(part, like, self._settled)
                    if inner is not None:
                        table = table if table is not None else inner.new_zeros(2 * [group.size])
                        table[row, column] += assignment(inner)[1]
        return table

    def _settled(self, group: Group, bind: AnyBind) -> bool:
        """Whether no group that is still to be matched has a part in what the bind compares."""
        keys = set(self.likeness.keys(bind))
        others = {name for key in keys for name in self._claims[key]} - {group.name, group.parent}
        if any(b is not bind and keys & set(self.likeness.keys(b)) for b in group.binds):
            return False
        return all(name in self._done or self._beside(group, name) for name in others)

    def _beside(self, group: Group, name: str) -> bool:
        """Whether a group is inside another unit of the same parent: it has other places."""
        other = self.spec[name]
        return other.parent is not None and (
            other.parent == group.parent and other.unit != group.unit
        )

    def _settled_share(self, group: Group) -> float:
        sizes = {bind: self.likeness.size(bind) for bind in group.binds if bind.compared}
        settled = sum(size for bind, size in sizes.items() if self._settled(group, bind))
        return settled / max(sum(sizes.values()), 1)


class _Weights:
    """Likeness by inner products of weights."""

    def __init__(self, a: State, b: State) -> None:
        self._a, self._b = a, dict(b)
        self._owned: set[str] = set()

    def keys(self, bind: AnyBind) -> Iterable[Hashable]:
        return bind.params

    def between(self, bind: AnyBind, other: AnyBind) -> Tensor | None:
        if not bind.compared:
            return None
        return bind.units(self._a).double() @ other.units(self._b).double().T

    def size(self, bind: AnyBind) -> int:
        return sum(self._a[name].numel() for name in bind.params)

    def move(self, group: Group, order: Tensor) -> None:
        for bind in group.binds:
            for name in set(bind.params) - self._owned:
                self._b[name] = self._b[name].clone()  # the caller's stays as it is
                self._owned.add(name)
            bind.permute_(self._b, order)

    def total(self, binds: Iterable[AnyBind] | None = None) -> float:
        compared = [b for b in binds if b.compared] if binds is not None else None
        names = {n for b in compared for n in b.params} if compared is not None else set(self._a)
        pairs = ((self._a[name].flatten(), self._b[name].flatten()) for name in sorted(names))
        return sum(float(a.double() @ b.double()) for a, b in pairs)


def weight_matching(spec: Spec, a: State, b: State, *, max_sweeps: int = MAX_SWEEPS) -> Matching:
    """Rearrange b so that Σ over weights of a·b is largest, as far as coordinate descent finds.

        S[u, v] = Σ_binds ⟨W_a[u], W_b[v]⟩,  all other axes of W_b as matched so far

    a and b hold the tensors that the specification names, in the same shapes; sums in float64.
    Running statistics move along and are not compared. For two equal networks it is the identity.

    Source: Ainsworth et al. 2023, arXiv:2209.04836, algorithm 1. The similarity that comes with it
    is that of the final places; the code of PLeaS mixes places and origins there.
    """
    for state in (a, b):
        spec.check_shapes({name: tuple(tensor.shape) for name, tensor in state.items()})
    if odd := next((n for n in sorted(a) if n not in b or a[n].shape != b[n].shape), None):
        raise MergeError(f"{odd}: units can be matched only where both networks have it in one"
                         " shape")  # fmt: skip
    return match(spec, _Weights(a, b), max_sweeps=max_sweeps)


def mean(states: Iterable[State], weights: Iterable[float]) -> dict[str, Tensor]:
    """Σ wᵢ·θᵢ of networks that have been brought into one order; sums in float64, dtypes kept.

    What is not a float (a count of batches) is the first network's.
    """
    pairs = list(zip(states, weights, strict=True))
    first = pairs[0][0]
    out = dict(first)
    for name, tensor in first.items():
        if tensor.is_floating_point():
            total = torch.stack([w * state[name].double() for state, w in pairs]).sum(0)
            out[name] = total.to(tensor.dtype)
    return out
