"""Two networks in one: of each group's units some are merged in pairs and some stay apart.

A widened axis holds [merged | a alone | b alone]. Works on tensors by name, of networks whose units
already lie in one order. Decides neither which units are merged nor how many.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from evomerge.errors import MergeError
from evomerge.merging.structure.permutations.linear_layers import Layer
from evomerge.merging.structure.permutations.permutation import Bind, Spec, Stacked, State
from evomerge.merging.structure.permutations.units import Shapes

BOTH, A, B = 0, 1, 2
"""Whose a place is: of a merged pair, of a unit of a alone, of b alone."""


@dataclass(frozen=True, eq=False)
class Split:
    """The units of a group by what becomes of them, int64 and ascending: at `merged` [k] the pair
    becomes one unit, at `apart` [m] each network keeps its own. The group is then k + 2m wide."""

    merged: Tensor
    apart: Tensor


def split(similarity: Tensor, apart: int) -> Split:
    """Keep the `apart` least similar of n pairs of units apart; of equals the last.

    Shapes: similarity [n], of the pairs that matching has made. Source: PLeaS, Nasery et al. 2024,
    arXiv:2407.02447, sec. 3 (there by a quantile, which never parts all).
    """
    order = torch.argsort(similarity, descending=True, stable=True)
    kept = len(similarity) - apart
    return Split(order[:kept].sort().values, order[kept:].sort().values)


@dataclass(frozen=True, eq=False)
class Layout:
    """A widened axis of n' places: at `origin` int64 [n'] of the old axis it is found in a, in b,
    or in both, as `side` int64 [n'] says."""

    origin: Tensor
    side: Tensor


class PartialMerge:
    """The shape and values of every tensor of the partially merged network, with W of a layer as

        to \\ from    both              a alone     b alone
        both          w·W_a + v·W_b     w·W_a       v·W_b
        a alone       W_a               W_a         0
        b alone       W_b               0           W_b

    and what has no input side, a bias or a norm, (w·a + v·b | a | b). (w, v) are `weights`, of sum
    1. Merging a network with itself gives its function again, whatever the splits.

    Raises MergeError for a split of a group that cannot be widened: units that are whole tensors,
    that have no axis to themselves, or whose tensor is not among `layers` and has two wide axes.

    Source: PLeaS, Nasery et al. 2024, arXiv:2407.02447, and the authors' code, which leaves the
    columns of a head that belong to one network unhalved.
    """

    def __init__(
        self,
        spec: Spec,
        layers: Mapping[str, Layer],
        shapes: Shapes,
        splits: Mapping[str, Split],
        *,
        weights: tuple[float, float] = (0.5, 0.5),
    ) -> None:
        self._layers, self._shapes = layers, shapes
        self.weights = weights
        self._layouts: dict[tuple[str, int], Layout] = {}
        runs = _runs(spec, {name: s for name, s in splits.items() if len(s.apart)})
        for (name, axis), found in runs.items():
            self._layouts[name, axis] = _layout(name, shapes[name][axis], found)
            if name not in layers and sum(key == name for key, _ in self._layouts) > 1:
                raise MergeError(f"{name}: is widened on two axes, but is no linear layer")

    def layout(self, name: str, axis: int) -> Layout | None:
        """How an axis is widened; None for one that stays as it is."""
        return self._layouts.get((name, axis))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor of the merged network."""
        return tuple(
            size if (wide := self.layout(name, axis)) is None else len(wide.origin)
            for axis, size in enumerate(self._shapes[name])
        )

    def tensor(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """A tensor of the merged network from both networks'; sums in float64, a's dtype.

        What is not a float (a count of batches) is a's.
        """
        if not a.is_floating_point():
            return a
        one, other = (self._widened(name, t.double()) for t in (a, b))
        shares = self._shares(name)
        return (one * shares[0] + other * shares[1]).to(a.dtype)

    def state(self, a: State, b: State) -> dict[str, Tensor]:
        """All tensors of the merged network."""
        return {name: self.tensor(name, a[name], b[name]) for name in self._shapes}

    def allowed(self, name: str) -> Tensor | None:
        """Which entries of a layer's weight may differ from zero, bool in the weight's number of
        axes, of size 1 where that does not matter; None where all may."""
        layer = self._layers.get(name)
        if layer is None or not {(name, layer.out_axis), (name, layer.in_axis)} <= {*self._layouts}:
            return None
        shares = self._shares(name)
        return (shares[0] != 0) | (shares[1] != 0)

    def _widened(self, name: str, tensor: Tensor) -> Tensor:
        for axis in range(tensor.ndim):
            if (wide := self.layout(name, axis)) is not None:
                tensor = tensor.index_select(axis, wide.origin.to(tensor.device))
        return tensor

    def _shares(self, name: str) -> tuple[Tensor, Tensor]:
        """What each network's widened tensor is multiplied by; broadcast to its axes."""
        layer, axes = self._layers.get(name), len(self._shapes[name])
        wide = [axis for axis in range(axes) if self.layout(name, axis) is not None]
        into = layer.in_axis if layer is not None else None
        to = next((axis for axis in wide if axis != into), None)
        shares = []
        for mine, weight in zip((A, B), self.weights, strict=True):
            share = torch.full([1] * axes, weight, dtype=torch.float64)
            if to is not None:
                sides = self._sides(name, to)
                share = torch.where(sides == mine, 1.0, torch.where(sides == BOTH, weight, 0.0))
                share = share.double()
            if into is not None and into in wide:
                sides = self._sides(name, into)
                share = share * ((sides == mine) | (sides == BOTH))
            shares.append(share)
        return shares[0], shares[1]

    def _sides(self, name: str, axis: int) -> Tensor:
        wide = self._layouts[name, axis]
        view = [1] * len(self._shapes[name])
        view[axis] = -1
        return wide.side.view(view)


@dataclass(frozen=True, eq=False)
class _Run:
    """Units of one width that lie one after another on an axis, from `start`."""

    start: int
    width: int
    units: int
    split: Split

    @property
    def stop(self) -> int:
        return self.start + self.units * self.width


def _runs(spec: Spec, splits: Mapping[str, Split]) -> dict[tuple[str, int], list[_Run]]:
    """Where the widened groups lie, by axis."""
    found: dict[tuple[str, int], list[_Run]] = {}
    for name, parts in splits.items():
        for bind in spec[name].binds:
            if isinstance(bind, Stacked) or bind.select is not None:
                raise MergeError(f"group {name} cannot be widened: its units are whole tensors")
            found.setdefault((bind.param, bind.axis), []).extend(_runs_of(name, bind, parts))
    return found


def _runs_of(name: str, bind: Bind, parts: Split) -> Iterator[_Run]:
    units, columns = bind.index.shape
    first = bind.index[0].tolist()
    starts = [j for j in range(columns) if j == 0 or first[j] != first[j - 1] + 1]
    for start, stop in zip(starts, [*starts[1:], columns], strict=True):
        width = stop - start
        expected = torch.arange(units * width).view(units, width) + first[start]
        if not torch.equal(bind.index[:, start:stop], expected):
            raise MergeError(f"group {name} cannot be widened: its units do not lie one after"
                             f" another in {bind.param}")  # fmt: skip
        yield _Run(first[start], width, units, parts)


def _layout(name: str, size: int, runs: list[_Run]) -> Layout:
    origins, sides, reached = [], [], 0
    for run in sorted(runs, key=lambda run: run.start):
        if run.start < reached:
            raise MergeError(f"{name}: two groups that are to be widened share places of one axis")
        origins.append(torch.arange(reached, run.start))
        sides.append(torch.full([run.start - reached], BOTH))
        for units, side in ((run.split.merged, BOTH), (run.split.apart, A), (run.split.apart, B)):
            at = run.start + units[:, None] * run.width + torch.arange(run.width)
            origins.append(at.flatten())
            sides.append(torch.full([at.numel()], side))
        reached = run.stop
    origins.append(torch.arange(reached, size))
    sides.append(torch.full([size - reached], BOTH))
    return Layout(torch.cat(origins), torch.cat(sides))
