"""What one tensor's operands are, whatever is made of them: magnitudes, inner products.

None of it depends on a genome, so a `Store` keeps it for a search. Gives the numbers of the
methods' own torch functions. Knows no method and no recipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evomerge.merging.kernels.cpu import CODES
from evomerge.merging.methods.reductions import LANES, SEGMENT, added, pairwise_sum
from evomerge.merging.methods.selection import KEEP_ALL, Cut, Quota

_PLACES = 1 << 18
"""Places of the table in which distinct magnitudes are counted; half of them may be taken."""


class Store(Protocol):
    """Keeps arrays by name."""

    def get(self, key: str) -> NDArray[np.generic] | None:
        """The array kept under a key; None if there is none."""

    def put(self, key: str, array: NDArray[np.generic]) -> None:
        """Keeps an array under a key."""


@dataclass
class Memory:
    """A store for one process."""

    arrays: dict[str, NDArray[np.generic]] = field(default_factory=dict)

    def get(self, key: str) -> NDArray[np.generic] | None:
        return self.arrays.get(key)

    def put(self, key: str, array: NDArray[np.generic]) -> None:
        self.arrays[key] = array


@dataclass(frozen=True)
class Facts:
    """The facts of one tensor.

    Shapes: base [n] or None, sources s times [n], what `cpu.can_read` accepts. With a `store`,
    `base_key` and `source_keys` [s] say what the operands are, whatever the recipe: equal keys mean
    equal values.
    """

    base: Tensor | None
    sources: tuple[Tensor, ...]
    store: Store | None = None
    base_key: str = ""
    source_keys: tuple[str, ...] = ()

    def cut(self, source: int, quota: Quota, *, located: bool = False) -> Cut:
        """The cut that fills a quota of |θᵢ − θ₀|.

        Of those equal to the threshold it says how many are kept, or with `located` up to where.
        With a store a table of all magnitudes is made once; without, two passes find the one.
        """
        if quota.count > self.sources[source].numel():
            return KEEP_ALL
        table = self._magnitudes(source)
        if table is None:
            pattern, needed, equal = self._selected(source, quota.count)
        else:
            pattern, needed, equal = _looked_up(table, quota.count)
        if quota.all_equal or needed == equal:
            return Cut(pattern, 1 << 62)
        return self._located(source, pattern, needed) if located else Cut(pattern, -1, needed)

    def gram(self, *, from_base: bool) -> list[float]:
        """⟨vᵢ, vⱼ⟩ (i ≤ j, by rows), in float64; v is θ, or τ with `from_base`."""
        from evomerge.merging.kernels import loops

        key = self._key(f"gram-{from_base}", self.source_keys, from_base)
        known = self.store.get(key) if self.store else None
        if known is not None:
            return [float(value) for value in known]
        count = len(self.sources)
        addresses = np.array([source.data_ptr() for source in self.sources], np.int64)
        codes = np.array([CODES[source.dtype] for source in self.sources], np.int64)
        base = self.base if from_base else None
        address, code = (base.data_ptr(), CODES[base.dtype]) if base is not None else (0, 0)
        size, found = self.sources[0].numel(), []
        for start in range(0, size, SEGMENT):
            sums = np.zeros((count * (count + 1) // 2, LANES))
            stop = min(start + SEGMENT, size)
            loops.products(addresses, codes, address, code, from_base, start, stop, sums)
            found.append(pairwise_sum(torch.from_numpy(sums)))
        products = added(torch.stack(found)) if found else []
        if self.store:
            self.store.put(key, np.array(products, np.float64))
        return products

    def _magnitudes(self, source: int) -> NDArray[np.int64] | None:
        """Distinct magnitudes, descending, and how many there are down to each [2, m]; empty if
        they are too many. None without a store."""
        if self.store is None:
            return None
        key = self._key("magnitudes", (self.source_keys[source],), True)
        table = self.store.get(key)
        if table is None:
            table = self._tabulated(source)
            self.store.put(key, table)
        found: NDArray[np.int64] = np.asarray(table, np.int64)
        return found if found.shape[1] else None

    def _tabulated(self, source: int) -> NDArray[np.int64]:
        from evomerge.merging.kernels import loops

        keys, counts = np.full(_PLACES, -1, np.int64), np.zeros(_PLACES, np.int64)
        if not loops.tabulate(*self._places(source), keys, counts):
            return np.zeros((2, 0), np.int64)
        taken = keys >= 0
        order = np.argsort(-keys[taken])
        return np.stack([keys[taken][order], counts[taken][order].cumsum()])

    def _selected(self, source: int, count: int) -> tuple[int, int, int]:
        from evomerge.merging.kernels import loops

        bins = np.zeros((4, 1 << 16), np.int32)
        loops.histogram(*self._places(source), bins)
        upper, rest, _ = _from_top(bins.sum(0, dtype=np.int64), count)
        lower = np.zeros(1 << 15, np.int64)
        loops.within_bin(*self._places(source), upper, lower)
        low, needed, equal = _from_top(lower, rest)
        return (upper << 15) | low, needed, equal

    def _located(self, source: int, pattern: int, needed: int) -> Cut:
        from evomerge.merging.kernels import loops

        return Cut(pattern, int(loops.locate(*self._places(source), pattern, needed)))

    def _places(self, source: int) -> tuple[int, int, int, int, int]:
        tensor, base = self.sources[source], self.base
        assert base is not None
        address = base.data_ptr()
        return tensor.data_ptr(), CODES[tensor.dtype], address, CODES[base.dtype], tensor.numel()

    def _key(self, kind: str, sources: Sequence[str], from_base: bool) -> str:
        return "|".join([kind, self.base_key if from_base else "", *sources])


def _from_top(histogram: NDArray[np.int64], count: int) -> tuple[int, int, int]:
    """The bin of the count-th largest element, its rank in the bin, and the bin's size."""
    from_top = histogram[::-1].cumsum()
    place = int(np.searchsorted(from_top, count))
    above = int(from_top[place - 1]) if place else 0
    return len(histogram) - 1 - place, count - above, int(from_top[place]) - above


def _looked_up(table: NDArray[np.int64], count: int) -> tuple[int, int, int]:
    """As `_from_top`, of the magnitudes themselves."""
    place = int(np.searchsorted(table[1], count))
    above = int(table[1, place - 1]) if place else 0
    return int(table[0, place]), count - above, int(table[1, place]) - above
