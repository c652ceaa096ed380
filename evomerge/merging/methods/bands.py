"""Which entries of each task vector Breadcrumbs keeps: neither the largest nor the small ones.

Knows nothing of how the task vectors are then merged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from evomerge.merging.kernels.program import Row
from evomerge.merging.methods.base import Block, Blocks, Coefficients, Parameter, facts_of
from evomerge.merging.methods.rows import RowWindow, row_length
from evomerge.merging.methods.selection import KEEP_NONE, Cut, Key, Quota, cuts, kept_count
from evomerge.merging.methods.thinning import Thinning

BAND_PARAMETERS = (
    Parameter(
        "density", "source", "float", 1.0, "share of the task vector kept", low=0.0, high=1.0
    ),
    Parameter(
        "gamma",
        "source",
        "float",
        0.01,
        "share of the largest entries dropped, as far as the density leaves room",
        low=0.0,
        high=1.0,
    ),
    Parameter(
        "scope",
        "recipe",
        "choice",
        "tensor",
        "what the shares are of: a whole tensor, or each of its rows (last axis)",
        choices=("tensor", "row"),
    ),
)


class Band(NamedTuple):
    """The ranks kept of one task vector: from after the `top` largest up to rank `last`."""

    top: int
    last: int


def band(size: int, density: float, gamma: float) -> Band | None:
    """The band of a vector of `size` entries; None keeps everything.

        count = ⌊density·size⌋,  top = min(⌊gamma·size⌋, size − count)

    A density that would leave nothing of so small a vector leaves it whole, unless it is 0.
    """
    count = kept_count(size, density)
    if count == size or (count == 0 and density > 0):
        return None
    top = min(kept_count(size, gamma), size - count)
    return Band(top, top + count)


def bands_of(blocks: Blocks, coefficients: Coefficients) -> Thinning:
    """The bands of one tensor. Equal magnitudes rank by their flat index."""
    by_row = coefficients.choice("scope") == "row"
    size = row_length(coefficients) if by_row else coefficients.size
    found = {}
    for index, weight in enumerate(coefficients.floats("weight")):
        density, gamma = (coefficients.floats(name)[index] for name in ("density", "gamma"))
        kept = band(size, density, gamma)
        if weight != 0 and kept is not None:
            found[index] = kept
    return _RowBands(blocks, size, found) if by_row else TensorBands(blocks, found)


class TensorBands:
    """Bands of a whole tensor: what one cut keeps and another, of the largest, does not."""

    def __init__(self, blocks: Blocks, bands: Mapping[int, Band]) -> None:
        self._bands = bands
        ends = [(source, end) for source, kept in bands.items() for end in set(kept) if end > 0]
        quotas: dict[Key, Quota] = {end: Quota(end[1]) for end in ends}

        def rows() -> Iterator[tuple[Key, int, Tensor]]:
            for block in blocks():
                for end in ends:
                    yield end, block.start, _tau(block, end[0])

        facts = facts_of(blocks)
        if facts is None:
            self._cuts = cuts(rows, quotas) if quotas else {}
        else:
            self._cuts = {end: facts.cut(end[0], Quota(end[1]), located=True) for end in ends}

    def row(self, source: int, factor: float, weight: float) -> Row:
        """The band as data."""
        if source not in self._bands:
            return Row(source, factor, weight)
        top, last = self._bands[source]
        above = self._cut(source, top) if top > 0 else None
        return Row(source, factor, weight, cut=self._cut(source, last), top=above)

    def keeps_all(self, source: int) -> bool:
        return source not in self._bands

    def tau(self, block: Block, source: int) -> Tensor:
        tau = _tau(block, source)
        if source not in self._bands:
            return tau
        top, last = self._bands[source]
        kept = self._cut(source, last).mask(tau, block.start)
        if top > 0:
            kept &= ~self._cut(source, top).mask(tau, block.start)
        return tau.mul_(kept)

    def _cut(self, source: int, count: int) -> Cut:
        return self._cuts.get((source, count), KEEP_NONE)


class _RowBands:
    """Bands of each row, ranked as the rows come by."""

    def __init__(self, blocks: Blocks, width: int, bands: Mapping[int, Band]) -> None:
        self._windows = {
            source: RowWindow(blocks, width, _ranked(source, width, kept))
            for source, kept in bands.items()
        }

    def keeps_all(self, source: int) -> bool:
        return source not in self._windows

    def tau(self, block: Block, source: int) -> Tensor:
        tau = _tau(block, source)
        if source not in self._windows:
            return tau
        return tau.mul_(self._windows[source].at(block.start, tau.numel())[0])


def _ranked(source: int, width: int, kept: Band) -> Callable[[Block], Tensor]:
    def mask(rows: Block) -> Tensor:
        magnitudes = _tau(rows, source).abs_().view(-1, width)
        order = magnitudes.sort(dim=1, descending=True, stable=True).indices
        chosen = order[:, kept.top : kept.last]
        return torch.zeros_like(magnitudes, dtype=torch.bool).scatter_(1, chosen, True).view(1, -1)

    return mask


def _tau(block: Block, source: int) -> Tensor:
    assert block.base is not None
    return block.sources[source] - block.base
