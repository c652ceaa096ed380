"""Coefficients in training: merged weights made from them, and their gradients from the weights'.

    W = Σᵢ φ(mᵢ)⊙Wᵢ  (or W₀ + Σᵢ φ(mᵢ)⊙(Wᵢ − W₀))
    ∂L/∂mᵢ[c] = φ′(mᵢ[c]) · Σ over the elements of c of ∂L/∂W ⊙ Wᵢ  (or ⊙ (Wᵢ − W₀))

Sources are read where they are mapped, a piece of one tensor at a time. Knows no loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from evomerge.merging.fitted.base import Problem, merged_names
from evomerge.merging.fitted.network import Network
from evomerge.merging.methods.mergers import Grid, activated, slope

_PIECE = 1 << 20  # elements


class Mergers:
    """The coefficients `m` by key, [s, g] float32, sources in the order of their names.

    `grids` are those of the trained tensors; `keys` say whose coefficients each has, so that a
    layer can share them. All others are averaged. Nothing here is written to but `m`.
    """

    def __init__(
        self,
        problem: Problem,
        grids: Mapping[str, Grid],
        keys: Mapping[str, str],
        initial: Mapping[str, Tensor],
        *,
        non_linearity: str,
        around_base: bool,
    ) -> None:
        self.m = {key: value.to(problem.device, torch.float32) for key, value in initial.items()}
        self.grids, self.keys = grids, keys
        self.averaged = tuple(n for n in merged_names(problem) if n not in grids)
        self._problem = problem
        self._non_linearity = non_linearity
        self._base = problem.base if around_base else None
        self._summed: dict[str, Tensor] = {}

    def write(self, network: Network, names: Iterable[str] | None = None) -> None:
        """Make the network the merge; only some of its tensors, if `names` are given."""
        for name in (*self.grids, *self.averaged) if names is None else names:
            network.write(name, self.weight(name))

    def weight(self, name: str) -> Tensor:
        """One merged tensor, float32, by the operations of the merge method."""
        count = len(self._problem.sources)
        grid = self.grids.get(name, Grid(self._problem.anchor.shape(name), 0, 1))
        if name in self.grids:
            phi = activated(self._non_linearity, self.m[self.keys[name]])
        else:
            phi = torch.full((count, 1), 1 / count, device=self._problem.device)
        out = torch.empty(grid.shape, device=self._problem.device)
        merged = grid.view(out)
        base = None if self._base is None else grid.view(self._base.tensor(name))
        for row, source in enumerate(self._problem.sources.values()):
            stored = grid.view(source.tensor(name))
            for cut in _pieces(stored):
                term = self._part(stored, base, cut) * phi[row][cut[1], None]
                merged[cut].copy_(term) if row == 0 else merged[cut].add_(term)
        if base is not None:
            for cut in _pieces(base):
                merged[cut].add_(self._float(base[cut]))
        return out

    def take(self, name: str, gradient: Tensor) -> None:
        """Add what ∂L/∂W of a merged tensor says of its coefficients."""
        if name not in self.grids:
            return
        grid, key = self.grids[name], self.keys[name]
        summed = self._summed.setdefault(key, torch.zeros_like(self.m[key]))
        flow = grid.view(gradient)
        base = None if self._base is None else grid.view(self._base.tensor(name))
        for row, source in enumerate(self._problem.sources.values()):
            stored = grid.view(source.tensor(name))
            for cut in _pieces(stored):
                summed[row][cut[1]] += (flow[cut] * self._part(stored, base, cut)).sum((0, 2))

    def gradients(self) -> dict[str, Tensor]:
        """∂L/∂m by key of all that was taken since the last call."""
        found = {
            key: slope(self._non_linearity, m) * self._summed.get(key, torch.zeros_like(m))
            for key, m in self.m.items()
        }
        self._summed = {}
        return found

    def products(self, name: str) -> Tensor:
        """⟨τᵢ, τⱼ⟩ of every group of a tensor, [s, s, g], τ = Wᵢ − W₀."""
        base = self._problem.base
        assert base is not None
        grid = self.grids[name]
        anchor = grid.view(base.tensor(name))
        stored = [grid.view(source.tensor(name)) for source in self._problem.sources.values()]
        found = torch.zeros(len(stored), len(stored), grid.groups, device=self._problem.device)
        for cut in _pieces(anchor):
            tau = torch.stack([self._part(rows, anchor, cut) for rows in stored])
            for row, one in enumerate(tau):
                found[row][:, cut[1]] += (tau * one).sum((1, 3))
        return found

    def _part(self, stored: Tensor, base: Tensor | None, cut: tuple[slice, ...]) -> Tensor:
        part = self._float(stored[cut])
        return part if base is None else part - self._float(base[cut])

    def _float(self, piece: Tensor) -> Tensor:
        return piece.to(self._problem.device, torch.float32)


def _pieces(view: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Cuts of [o, g, r] of about a million elements, along the longest axis."""
    longest = max(range(3), key=lambda axis: view.shape[axis])
    step = max(_PIECE * view.shape[longest] // max(view.numel(), 1), 1)
    for start in range(0, view.shape[longest], step):
        cut = [slice(None)] * 3
        cut[longest] = slice(start, start + step)
        yield cut[0], cut[1], cut[2]
