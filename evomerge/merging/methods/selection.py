"""Exact selection of the k largest magnitudes of a vector that is never held as a whole.

Float32 magnitudes are ordered as their bit patterns are, so two histograms (the upper 15 bits, then
the lower 16 of the bin that holds the k-th) find the k-th magnitude exactly, in bounded memory and
whatever the blocks. Knows nothing of merging: rows come in under keys, cuts for the keys come out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

_LOW_BITS = 16


@dataclass(frozen=True)
class Cut:
    """Keeps the magnitudes above a threshold, and of those equal to it the first ones.

    `pattern` is the threshold's float32 bit pattern; `last` the flat index of the last element
    equal to it that is kept. Where that is not located yet, `equal` says how many of them are kept
    (`last` is then −1): a kernel that walks the tensor counts them as it goes.
    """

    pattern: int
    last: int
    equal: int = 0

    @property
    def keeps_all(self) -> bool:
        """Whether the cut keeps everything whatever the values."""
        return self.pattern < 0

    def shifted(self, offset: int) -> Cut:
        """The same cut for the part of the vector that starts at `offset`."""
        return Cut(self.pattern, self.last - offset)

    def mask(self, tau: Tensor, start: int) -> Tensor:
        """Which elements are kept. Shapes: tau [n] from flat index `start`; returns [n] bool."""
        patterns = _patterns(tau)
        above = patterns > self.pattern
        if self.last < start:
            return above
        equal = patterns == self.pattern
        equal[max(self.last + 1 - start, 0) :] = False
        return above.logical_or_(equal)


KEEP_ALL = Cut(-1, -1)
KEEP_NONE = Cut(2**31 - 1, -1)
_NO_END = 2**62


@dataclass(frozen=True)
class Quota:
    """How many of the largest magnitudes to keep, at least 1.

    Of those equal to the smallest kept, the ones of the lowest flat index, or with `all_equal` all.
    """

    count: int
    all_equal: bool = False


Key: TypeAlias = Hashable
Rows: TypeAlias = Callable[[], Iterator[tuple[Key, int, Tensor]]]
"""Streams (key, flat index of the first element, elements [n]); may be called more than once."""


def kept_count(size: int, density: float) -> int:
    """k = ⌊density·size + 1e-9⌋, at most `size`: 0.29·100 keeps 29, not the 28 of float64."""
    return min(math.floor(density * size + 1e-9), size)


def cuts(rows: Rows, quotas: Mapping[Key, Quota]) -> dict[Key, Cut]:
    """The cut that fills each key's quota.

    Rows of a key must stream in ascending order; rows of other keys are skipped. A quota of the
    vector's length or more keeps everything. Three passes over the rows at most.
    """
    wanted = {key: quota.count for key, quota in quotas.items()}
    high, above = _bins(_histograms(rows, wanted, _upper), wanted)
    remaining = {key: wanted[key] - above[key] for key in high}

    def lower(key: Key, patterns: Tensor) -> Tensor:
        inside = patterns[(patterns >> _LOW_BITS) == high[key]]
        return inside.bitwise_and_((1 << _LOW_BITS) - 1)

    histograms = _histograms(rows, remaining, lower)
    low, over = _bins(histograms, remaining)
    found: dict[Key, Cut] = {key: KEEP_ALL for key in quotas}
    pending: dict[Key, tuple[int, int]] = {}
    for key in low:
        pattern = (high[key] << _LOW_BITS) | low[key]
        found[key] = Cut(pattern, _NO_END)
        needed = remaining[key] - over[key]
        if not quotas[key].all_equal and needed < int(histograms[key][low[key]]):
            pending[key] = (pattern, needed)
    return found | _located(rows, pending)


def order_statistics(stream: Callable[[], Iterator[Tensor]], ranks: Sequence[int]) -> list[float]:
    """The values of these ranks (0 is the smallest) of a vector of float32 that are not negative.

    `stream` yields the vector piece by piece and is called twice.
    """
    upper = torch.zeros(1 << _LOW_BITS, dtype=torch.int64)
    for piece in stream():
        upper += torch.bincount(_patterns(piece) >> _LOW_BITS, minlength=1 << _LOW_BITS).cpu()
    below = upper.cumsum(0)
    highs = [int(torch.searchsorted(below, rank, right=True)) for rank in ranks]
    lower = {high: torch.zeros(1 << _LOW_BITS, dtype=torch.int64) for high in highs}
    for piece in stream():
        patterns = _patterns(piece)
        for high, histogram in lower.items():
            digits = patterns[(patterns >> _LOW_BITS) == high].bitwise_and_((1 << _LOW_BITS) - 1)
            histogram += torch.bincount(digits, minlength=1 << _LOW_BITS).cpu()
    found = []
    for rank, high in zip(ranks, highs, strict=True):
        rest = rank - (int(below[high - 1]) if high else 0)
        low = int(torch.searchsorted(lower[high].cumsum(0), rest, right=True))
        found.append((high << _LOW_BITS) | low)
    return [float(value) for value in torch.tensor(found, dtype=torch.int32).view(torch.float32)]


def _patterns(tau: Tensor) -> Tensor:
    """|τ| as integers in the same order. Shapes: [n] float32 -> [n] int32."""
    return tau.abs().view(torch.int32)


def _upper(key: Key, patterns: Tensor) -> Tensor:
    return patterns >> _LOW_BITS


def _histograms(
    rows: Rows, wanted: Mapping[Key, int], digit: Callable[[Key, Tensor], Tensor]
) -> dict[Key, Tensor]:
    """How often each 16-bit digit occurs, for each wanted key. Shapes: {key: [65536] int64}."""
    histograms: dict[Key, Tensor] = {}
    if not wanted:
        return histograms
    for key, _, tau in rows():
        if key in wanted:
            digits = digit(key, _patterns(tau))
            ones = torch.ones((), dtype=torch.int64, device=tau.device).expand(digits.numel())
            if key not in histograms:
                histograms[key] = ones.new_zeros(1 << _LOW_BITS)
            histograms[key].index_add_(0, digits, ones)
    return histograms


def _bins(
    histograms: Mapping[Key, Tensor], wanted: Mapping[Key, int]
) -> tuple[dict[Key, int], dict[Key, int]]:
    """For each key: the digit that holds its wanted-th largest element, and how many lie above it.

    A key that wants more elements than there are is left out.
    """
    digits: dict[Key, int] = {}
    above: dict[Key, int] = {}
    for key, histogram in histograms.items():
        from_top = histogram.flip(0).cumsum(0)
        if wanted[key] <= int(from_top[-1]):
            position = int(torch.searchsorted(from_top, wanted[key]))
            digits[key] = histogram.numel() - 1 - position
            above[key] = int(from_top[position - 1]) if position else 0
    return digits, above


def _located(rows: Rows, pending: dict[Key, tuple[int, int]]) -> dict[Key, Cut]:
    """Turn "the first m elements equal to the threshold" into the flat index of the m-th."""
    found: dict[Key, Cut] = {}
    if not pending:
        return found
    for key, start, tau in rows():
        if key not in pending:
            continue
        pattern, needed = pending[key]
        equal = _patterns(tau) == pattern
        count = int(equal.sum())
        if count < needed:
            pending[key] = (pattern, needed - count)
            continue
        found[key] = Cut(pattern, start + int(equal.nonzero()[needed - 1]))
        del pending[key]
        if not pending:
            break
    return found
