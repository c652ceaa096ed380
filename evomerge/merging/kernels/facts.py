"""What one tensor's operands are, whatever is made of them: magnitudes, inner products.

None of it depends on a genome, so a `Store` keeps it for a search. Gives the numbers of the
methods' own torch functions. Knows no method and no recipe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evomerge.merging.kernels.cpu import CODES
from evomerge.merging.kernels.program import Draw
from evomerge.merging.methods.reductions import LANES, SEGMENT, added, pairwise_sum
from evomerge.merging.methods.selection import KEEP_ALL, Cut, Quota

Kernel: TypeAlias = Callable[[int, int, int], int]

_SAMPLE = 1 << 13
"""Elements by which the place of a magnitude is guessed."""
_BIN_BITS = 17
"""Log2 of how many bins magnitudes are counted in: they lie in a core's second cache."""
_SPAN = 64
"""Segments whose sums are held at a time."""


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
        key = self._key(f"gram-{from_base}", self.source_keys, from_base)
        known = self.store.get(key) if self.store else None
        if known is not None:
            return [float(value) for value in known]
        products = added(self._sums(self.base if from_base else None))
        if self.store:
            self.store.put(key, np.array(products, np.float64))
        return products

    def norms(self, source: int, draw: Draw) -> tuple[float, float]:
        """Σ|τ| of a source's task vector, and Σ|τ| over the elements that a draw keeps."""
        from evomerge.merging.kernels import norms, products

        assert self.base is not None
        operands = self.base, self.sources[source]
        size = len(operands[1])
        sums = np.zeros((-(-size // SEGMENT), 2, LANES))
        kernel = norms.norms(CODES[operands[1].dtype], CODES[self.base.dtype])
        whole = size // LANES * LANES
        parts = [(0, operands, whole, sums)]
        if whole < size:
            rest = _filled_up(operands[0][whole:]), _filled_up(operands[1][whole:])
            parts.append((whole, rest, LANES, sums[-1:]))
        for first, (base, tensor), end, into in parts:
            addresses = base.data_ptr(), into.ctypes.data, tensor.data_ptr()
            table = np.array([*addresses, draw.key, draw.threshold, first], np.int64)
            kernel(table.ctypes.data, 0, end)
        before, after = added(pairwise_sum(torch.from_numpy(products.in_order(sums))))
        return before, after if draw.threshold < 1 << 32 else 0.0

    def _sums(self, base: Tensor | None) -> Tensor:
        """Every segment's sums of products. Shapes: [segments, s·(s+1)/2] float64."""
        found = [
            pairwise_sum(torch.from_numpy(self._lanes(base, start, start + _SPAN * SEGMENT)))
            for start in range(0, self.sources[0].numel(), _SPAN * SEGMENT)
        ]
        return torch.cat(found) if found else torch.zeros(0, 0)

    def _lanes(self, base: Tensor | None, start: int, stop: int) -> NDArray[np.float64]:
        """Segments' sums by lanes. Shapes: [segments, s·(s+1)/2, 512]."""
        from evomerge.merging.kernels import products

        operands = [None if base is None else base[start:stop]]
        operands += [source[start:stop] for source in self.sources]
        count, size = len(self.sources), len(self.sources[0][start:stop])
        codes = tuple(CODES[source.dtype] for source in self.sources)
        kernel = products.products(codes, None if base is None else CODES[base.dtype])
        sums = np.zeros((-(-size // SEGMENT), count * (count + 1) // 2, LANES))
        whole = size // LANES * LANES
        _called(kernel, operands, sums, whole)
        if whole < size:
            rest = [None if x is None else _filled_up(x[whole:]) for x in operands]
            _called(kernel, rest, sums[-1:], LANES)
        return products.in_order(sums)

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
        from evomerge.merging.kernels import magnitudes

        places = 1 << magnitudes.PLACES_BITS
        keys, counts = np.full(places, -1, np.int64), np.zeros(places, np.int64)
        table = self._table(source, keys.ctypes.data, counts.ctypes.data)
        if self._run(magnitudes.tabulate, source, table) < 0:
            return np.zeros((2, 0), np.int64)
        counts[keys == 0] -= self._padding(source)
        taken = counts > 0
        order = np.argsort(-keys[taken])
        return np.stack([keys[taken][order], counts[taken][order].cumsum()])

    def _selected(self, source: int, count: int) -> tuple[int, int, int]:
        """The pattern of the count-th largest magnitude, its rank among equals, and their number.

        A sample says about where it is, one pass counts what is there and what is above; more
        passes only where the sample was wrong, or says too little.
        """
        low, high = self._bracket(source, count)
        while True:
            shift = max(0, (high - low - 1).bit_length() - _BIN_BITS)
            low = low >> shift << shift
            above, bins, exact = self._counted(source, low, high - low, shift)
            if not above < count <= above + int(bins.sum()):
                low, high = 0, 1 << 31
                continue
            digit, rest, equal = _from_top(bins, count - above)
            low += digit << shift
            high = low + (1 << shift)
            if exact:
                return low, rest, equal

    def _bracket(self, source: int, count: int) -> tuple[int, int]:
        """Patterns between which the count-th largest magnitude lies, but for bad luck."""
        size = self.sources[source].numel()
        if size < 4 * _SAMPLE:
            return 0, 1 << 31
        runs = np.arange(0, size - 32, size // (_SAMPLE // 32))
        places = (runs[:, None] + np.arange(32)).ravel()
        patterns = np.sort(self._patterns(source, places))
        rank = len(patterns) * (1 - count / size)
        slack = 5 * math.sqrt(rank * count / size) + 2
        low, high = math.floor(rank - slack), math.ceil(rank + slack)
        return (
            int(patterns[low]) if low > 0 else 0,
            int(patterns[high]) + 1 if high < len(patterns) else 1 << 31,
        )

    def _counted(
        self, source: int, low: int, span: int, shift: int
    ) -> tuple[int, NDArray[np.int64], bool]:
        """How many magnitudes are above a span of patterns, how many of it are in each bin, and
        whether all of a bin are equal: what is stored in 16 bits differs in few."""
        from evomerge.merging.kernels import magnitudes

        bins = np.zeros(((span - 1) >> shift) + 1, np.int64)
        table = self._table(source, low, span, shift, bins.ctypes.data, 0, 0)
        self._run(magnitudes.count, source, table)
        if low == 0:
            bins[0] -= self._padding(source)
        exact = int(table[magnitudes.BITS]) & ((1 << shift) - 1) == 0
        return int(table[magnitudes.ABOVE]), bins, exact

    def _located(self, source: int, pattern: int, needed: int) -> Cut:
        from evomerge.merging.kernels import magnitudes

        table = self._table(source, pattern, needed)
        begin = self._run(magnitudes.locate, source, table)
        part = np.arange(begin, min(begin + 64, self.sources[source].numel()))
        equal = np.flatnonzero(self._patterns(source, part) == pattern)
        return Cut(pattern, begin + int(equal[int(table[magnitudes.NEEDED]) - 1]))

    def _patterns(self, source: int, places: NDArray[np.int64]) -> NDArray[np.int32]:
        assert self.base is not None
        tau = _floats(self.sources[source], places) - _floats(self.base, places)
        patterns: NDArray[np.int32] = np.abs(tau).view(np.int32)
        return patterns

    def _padding(self, source: int) -> int:
        """The zeros that a walk adds at the end."""
        from evomerge.merging.kernels.formats import width

        return -self.sources[source].numel() % width()

    def _table(self, source: int, *numbers: int) -> NDArray[np.int64]:
        assert self.base is not None
        addresses = self.sources[source].data_ptr(), self.base.data_ptr()
        return np.array([*addresses, *numbers], np.int64)

    def _run(
        self, loop: Callable[[int, int], Kernel], source: int, table: NDArray[np.int64]
    ) -> int:
        assert self.base is not None
        tensor = self.sources[source]
        code = loop(CODES[tensor.dtype], CODES[self.base.dtype])
        return code(table.ctypes.data, 0, tensor.numel())

    def _key(self, kind: str, sources: Sequence[str], from_base: bool) -> str:
        return "|".join([kind, self.base_key if from_base else "", *sources])


def _called(
    kernel: Kernel, operands: Sequence[Tensor | None], sums: NDArray[np.float64], end: int
) -> None:
    base, *sources = (0 if x is None else x.data_ptr() for x in operands)
    table = np.array([base, sums.ctypes.data, *sources], np.int64)
    kernel(table.ctypes.data, 0, end)


def _filled_up(x: Tensor) -> Tensor:
    """With zeros to as many elements as there are lanes."""
    return torch.cat([x, x.new_zeros(LANES - len(x))])


def _floats(x: Tensor, places: NDArray[np.int64]) -> NDArray[np.float32]:
    """Some elements; without torch, whose threads would wait for more to do."""
    if x.dtype == torch.bfloat16:
        words = x.view(torch.int16).numpy()[places].view(np.uint16)
        return (words.astype(np.uint32) << np.uint32(16)).view(np.float32)
    found: NDArray[np.float32] = x.numpy()[places].astype(np.float32)
    return found


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
