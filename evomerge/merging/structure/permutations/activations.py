"""Activation matching: two units are alike that are active alike on the same data.

Statistics of pairs of units are streamed batch by batch from two live networks; no activation is
kept. Any network with linear layers and convolutions will do: it is a callable and its modules.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from evomerge.errors import MergeError, UserError
from evomerge.merging.structure.permutations.linear_layers import Modules, weight_axes
from evomerge.merging.structure.permutations.matching import MAX_SWEEPS, AnyBind, Matching, match
from evomerge.merging.structure.permutations.permutation import Bind, Group, Spec, Stacked

Statistic = Literal["correlation", "inner", "distance"]
Site = tuple[str, int]
"""A stored weight, and the axis of it on whose side of the layer activations are taken."""


@dataclass(frozen=True)
class Live:
    """A network in memory: `run` does a forward pass on a batch of whatever kind, `modules` are its
    layers by the stored name of their weight."""

    modules: Modules
    run: Callable[[Any], object]


def activation_matching(
    spec: Spec,
    a: Live,
    b: Live,
    batches: Iterable[Any],
    *,
    statistic: Statistic = "correlation",
    max_sweeps: int = MAX_SWEEPS,
) -> Matching:
    """Rearrange b so that its units are active as those of a are, on the batches given to both.

    With z_u the activation of a unit over the n places of all batches, S[u, v] is the sum, over the
    inputs and outputs of layers that the group is bound to, of

        correlation   cov(z_u, z_v) / (σ_u σ_v), 0 for a unit that never changes
        inner         Σ z_u z_v / n
        distance      −Σ (z_u − z_v)² / n

    Sums in float64; what several layers are given alike is counted once. Memory: a c × c table for
    each such place of c units. Padding is counted like anything else: batches should have none.
    Groups that touch no linear layer or convolution of their own (fused experts) keep their order,
    and so do neurons of experts that change places: each network shows an expert other data.

    Source: Ainsworth et al. 2023, arXiv:2209.04836, sec. 3.1 (inner products); Li et al. 2016,
    arXiv:1511.07543 (correlation). PLeaS' code sums the unsquared distances of each batch, which
    depend on the batch size.
    """
    recorded = _Recorded(spec, a.modules)
    for batch in batches:
        recorded.add(_captured(a, recorded.sites, batch), _captured(b, recorded.sites, batch))
    return match(spec, _Activations(recorded, statistic), max_sweeps=max_sweeps)


class _Recorded:
    """Sums over batches for each site, but for those that share their activations with another."""

    def __init__(self, spec: Spec, modules: Modules) -> None:
        binds = [bind for group in spec.groups for bind in group.binds]
        routed = {p for bind in binds if isinstance(bind, Stacked) for p in bind.params}
        moved = (b for b in binds if isinstance(b, Bind) and b.param not in routed)
        every = {(bind.param, bind.axis): None for bind in moved}
        self.sites: list[Site] = [s for s in every if _side(modules.get(s[0]), s[1]) is not None]
        if not self.sites:
            raise MergeError("no layer of this network has activations that its groups can be"
                             " matched by; match them by weights")  # fmt: skip
        self.sums: dict[Site, _Sums] = {}

    def add(self, a: Mapping[Site, Tensor], b: Mapping[Site, Tensor]) -> None:
        firsts: dict[int, Site] = {}
        for site in self.sites:
            if site not in a or site not in b:
                raise MergeError(f"{site[0]}: its layer did not run on a batch, so its units cannot"
                                 " be matched by activations")  # fmt: skip
            if firsts.setdefault(id(a[site]), site) == site:
                self.sums.setdefault(site, _Sums()).add(_rows(a[site]), _rows(b[site]))


class _Sums:
    """What the statistics are made from: n, Σx and Σx² of each side [c], Σ x yᵀ [c, c]."""

    def __init__(self) -> None:
        self.n = 0
        self._sums: tuple[Tensor, ...] = ()

    def add(self, x: Tensor, y: Tensor) -> None:
        if x.shape != y.shape:
            raise MergeError(f"activations of the two networks are {list(x.shape)} and"
                             f" {list(y.shape)}; they must be of one shape")  # fmt: skip
        new = x.sum(0), y.sum(0), (x * x).sum(0), (y * y).sum(0), x.T @ y
        old = self._sums or tuple(map(torch.zeros_like, new))
        self._sums = tuple(s + t for s, t in zip(old, new, strict=True))
        self.n += len(x)

    def table(self, statistic: Statistic) -> Tensor:
        """Similarity of each channel of a with each of b [c, c]."""
        x, y, xx, yy, xy = (total / self.n for total in self._sums)
        if statistic == "inner":
            return xy
        if statistic == "distance":
            return 2 * xy - xx[:, None] - yy
        spreads = _spread(x, xx)[:, None] * _spread(y, yy)
        correlation = (xy - x[:, None] * y) / spreads
        return torch.where(spreads > 0, correlation, torch.zeros_like(spreads))


def _spread(mean: Tensor, square: Tensor) -> Tensor:
    """Standard deviation [c]; 0 for what rounding leaves of a constant's."""
    variance = square - mean * mean
    return torch.where(variance > 1e-12 * square, variance, torch.zeros_like(variance)).sqrt()


class _Activations:
    """Likeness by a statistic of activations."""

    def __init__(self, recorded: _Recorded, statistic: Statistic) -> None:
        if not recorded.sums:
            raise UserError("no batch to match activations on; name more data")
        self._tables = {site: s.table(statistic) for site, s in recorded.sums.items()}

    def keys(self, bind: AnyBind) -> Iterable[Hashable]:
        return () if isinstance(bind, Stacked) else (_site(bind),)

    def between(self, bind: AnyBind, other: AnyBind) -> Tensor | None:
        if isinstance(bind, Stacked) or isinstance(other, Stacked) or _site(bind) != _site(other):
            return None
        if (table := self._tables.get(_site(bind))) is None:
            return None
        return table[bind.index[:, None], other.index[None]].sum(-1)

    def size(self, bind: AnyBind) -> int:
        return int(not isinstance(bind, Stacked) and _site(bind) in self._tables)

    def move(self, group: Group, order: Tensor) -> None:
        for site, bind in self._of(group.binds):
            Bind("b", 1, bind.index).permute_({"b": self._tables[site]}, order)

    def total(self, binds: Iterable[AnyBind] | None = None) -> float:
        sites = self._tables if binds is None else [site for site, _ in self._of(binds)]
        return sum(float(self._tables[site].trace()) for site in sites)

    def _of(self, binds: Iterable[AnyBind]) -> Iterator[tuple[Site, Bind]]:
        for bind in binds:
            if isinstance(bind, Bind) and _site(bind) in self._tables:
                yield _site(bind), bind


def _site(bind: Bind) -> Site:
    return bind.param, bind.axis


def _side(module: nn.Module | None, axis: int) -> Literal["input", "output"] | None:
    """Whether an axis of a layer's weight is that of its inputs or of its outputs."""
    axes = weight_axes(module)
    if axes is None or axis not in axes:
        return None
    return "output" if axis == axes[0] else "input"


def _captured(live: Live, sites: list[Site], batch: Any) -> dict[Site, Tensor]:
    """Activations of one forward pass; sites that are given the same tensor share it."""
    found: dict[Site, Tensor] = {}
    with torch.no_grad(), _hooks(live, sites, found):
        live.run(batch)
    return found


@contextmanager
def _hooks(live: Live, sites: list[Site], found: dict[Site, Tensor]) -> Iterator[None]:
    handles = []
    try:
        for site in sites:
            hook = partial(_keep, found, site)
            handles.append(live.modules[site[0]].register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _keep(
    found: dict[Site, Tensor],
    site: Site,
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    out: Tensor,
) -> None:
    is_input = _side(module, site[1]) == "input"
    tensor = inputs[0] if is_input else out
    channels_first = isinstance(module, nn.Conv1d | nn.Conv2d)
    found[site] = tensor.movedim(1, -1) if channels_first else tensor


def _rows(activations: Tensor) -> Tensor:
    return activations.detach().flatten(0, -2).double().cpu()
