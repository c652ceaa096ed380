"""Spending an allowance on things that share costs: max w·r where a·r − ½ rᵀQ r ≤ C, 0 ≤ r ≤ 1.

Q ≥ 0 is what two things cost less together, so the programme is not convex. Arrays only: knows no
network and no group of units.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import coo_array, csr_array, triu

Vector = NDArray[np.float64]
Counts = NDArray[np.int64]

_EXACT = 1e-12
_ROUNDING = 1e-9
_STEPS = 100  # for each thing; a climb takes about one
_STEP_UNITS = 8  # the most that an exchange tries, of one of its two sides
_NEAR = 64  # things on either side that are tried for an exchange


@dataclass(frozen=True, eq=False)
class SharedCost:
    """a·r − ½ rᵀQ r, with `own` a [n] and `shared` Q [n, n], sparse and symmetric, Σ_j Q_ij ≤ a_i:
    more never costs less."""

    own: Vector
    shared: Any

    @classmethod
    def of(cls, own: Vector, entries: list[tuple[int, int, float]]) -> SharedCost:
        """From the entries (i, j, value) of Q, which are summed where a place comes twice."""
        rows, columns, values = np.array(entries, dtype=np.float64).reshape(-1, 3).T
        places = rows.astype(np.intp), columns.astype(np.intp)
        return cls(own, csr_array(coo_array((values, places), shape=(len(own), len(own)))))

    def __call__(self, r: Vector) -> float:
        return float(self.own @ r) - self.together(r)

    def together(self, r: Vector) -> float:
        """½ rᵀQ r."""
        return float(r @ (self.shared @ r)) / 2

    def slopes(self, r: Vector) -> Vector:
        """a − Q r [n], what more of each costs."""
        slopes: Vector = np.maximum(self.own - self.shared @ r, 0.0)
        return slopes

    def scaled(self, r: Vector, allowance: float) -> Vector:
        """The largest t·r, t ≤ 1, that the allowance pays for."""
        if self(r) <= allowance:
            return r
        own, together = float(self.own @ r), self.together(r)
        root = float(np.sqrt(max(own * own - 4 * together * allowance, 0.0)))
        return r * (2 * allowance / (own + root))


@dataclass(frozen=True, eq=False)
class Programme:
    """Maximise `weights`·r, w ≥ 0 [n], with an `allowance` C ≥ 0 of a cost."""

    cost: SharedCost
    weights: Vector
    allowance: float

    def relaxed(self) -> tuple[float, Vector]:
        """A bound that no r reaches beyond, and the r of the linear programme that it comes from.

        What two share is taken for min(r_i, r_j) ≥ r_i·r_j: (a − Q1)·r + Σ_{i<j} Q_ij max(r_i, r_j)
        is to be paid. Where nothing is shared r is the optimum.
        """
        n, pairs = len(self.weights), coo_array(triu(self.cost.shared, 1))
        if not n:
            return 0.0, np.zeros(0)
        at, ones = np.arange(pairs.nnz), np.ones(pairs.nnz)
        itself = self.cost.shared.diagonal() / 2  # r² is taken for r
        alone = self.cost.own - self.cost.shared.sum(axis=1) + itself
        rows = [at, at, len(at) + at, len(at) + at, np.full(n + len(at), 2 * len(at))]
        columns = [pairs.row, n + at, pairs.col, n + at, np.arange(n + len(at))]
        values = [ones, -ones, ones, -ones, alone, pairs.data]
        places = np.concatenate(rows), np.concatenate(columns)
        found = linprog(
            -np.append(self.weights, 0 * ones),
            A_ub=csr_array(coo_array((np.concatenate(values), places))),
            b_ub=np.append(np.zeros(2 * len(at)), self.allowance),
            bounds=(0, 1),
        )
        return -float(found.fun), np.clip(found.x[:n], 0.0, 1.0)

    def climb(self, start: Vector) -> Vector:
        """A local optimum, from a start in the box that is scaled into the allowance.

        What is left is spent where w_i per cost is largest. Then, again and again, the worst of
        what was bought pays for more of the best that was not: at costs d, δ more of i for ε less
        of j, of which

            d_i·δ − d_j·ε + Q_ij·δ·ε = 0,    δ = (d_j / Q_ij)·(1 − √(w_j d_i / w_i d_j))

        is best, cut off at the box. Things that share nothing are never both left in part.
        """
        r = self.cost.scaled(start, self.allowance).copy()
        for _ in range(_STEPS * len(r)):
            slopes = self.cost.slopes(r)
            worth = _worth(self.weights, slopes)
            best = int(np.where(r < 1 - _EXACT, worth, -1.0).argmax())
            worst = int(np.where(r > _EXACT, worth, np.inf).argmin())
            left = self.allowance - self.cost(r)
            if r[best] >= 1 - _EXACT:
                return r
            if worth[best] == np.inf:
                r[best] = 1.0
            elif left > _EXACT:
                r[best] = min(1.0, r[best] + left / slopes[best])
            elif r[worst] > _EXACT and worth[worst] < worth[best] * (1 - _ROUNDING):
                self._exchange(r, slopes, worst, best)
            else:
                return r
        return r

    def _exchange(self, r: Vector, slopes: Vector, worst: int, best: int) -> None:
        up, down, shared = slopes[best], slopes[worst], float(self.cost.shared[best, worst])
        more = min(1 - r[best], down * r[worst] / (up + shared * r[worst]))
        if shared > 0:
            ratio = self.weights[worst] * up / (self.weights[best] * down)
            more = min(more, down / shared * (1 - np.sqrt(ratio)))
        less = up * more / (down - shared * more)
        r[best], r[worst] = min(r[best] + more, 1.0), max(r[worst] - less, 0.0)

    def local_optima(self, *, starts: int, shakes: int, seed: int) -> list[Vector]:
        """Local optima, the best first, none twice.

        From the relaxed programme's r, which are all if it is the optimum; from random starts, half
        of them anywhere in the box and half at its corners; and again and again from the best after
        a quarter of what it buys was given up for a random thing and one that shares with it.
        """
        bound, relaxed = self.relaxed()
        found = [self.climb(relaxed)]
        if self.weights @ found[0] < bound * (1 - _ROUNDING):
            generator = np.random.default_rng(seed)
            found += [self.climb(r) for r in _starts(len(relaxed), starts, generator)]
            best = max(found, key=self._value)
            for _ in range(shakes):
                found.append(self.climb(self._shaken(best, generator)))
                best = max(best, found[-1], key=self._value)
        distinct = {(np.round(r, 6) + 0.0).tobytes(): r for r in found}
        return sorted(distinct.values(), key=self._value, reverse=True)

    def _value(self, r: Vector) -> float:
        return float(self.weights @ r)

    def _shaken(self, r: Vector, generator: np.random.Generator) -> Vector:
        r = r.copy()
        bought = generator.permutation(np.flatnonzero(r))
        r[bought[: math.ceil(len(bought) / 4)]] = 0.0
        i = int(generator.integers(len(r)))
        shares = self.cost.shared[[i]].indices
        r[[i, *generator.permutation(shares)[:1]]] = 1.0
        return r


@dataclass(frozen=True, eq=False)
class WholeUnits:
    """A programme in which r_i = m_i / n_i, with `sizes` n and whole numbers m, int64 [n]."""

    programme: Programme
    sizes: Counts

    def value(self, counts: Counts) -> float:
        """w·r."""
        return float(self.programme.weights @ (counts / self.sizes))

    def near(self, r: Vector) -> Counts:
        """r·n rounded down and improved: what is left is spent, and units of one thing are
        exchanged for units of another (up to 8 of either, and what they pay for or cost of the
        other), the best exchange first, until none gains."""
        return self._improved(np.floor(r * self.sizes + _ROUNDING).astype(np.int64))

    def shaken(self, counts: Counts, *, times: int, seed: int) -> Counts:
        """The best that is found when, again and again, up to 3 units each of two random things are
        given up, one of a third is bought, and the rest is improved. It matters where units are
        large: a programme of whole numbers has its own local optima."""
        generator = np.random.default_rng(seed)
        for _ in range(times if 0 < counts.sum() < self.sizes.sum() else 0):
            tried = counts.copy()
            for i in generator.permutation(np.flatnonzero(tried))[:2]:
                tried[i] -= min(int(tried[i]), int(generator.integers(1, 4)))
            left, slopes = self._market(tried)
            fits = np.flatnonzero((tried < self.sizes) & (slopes / self.sizes <= left))
            tried[generator.permutation(fits)[:1]] += 1
            tried = self._improved(tried)
            if self.value(tried) > self.value(counts) + _EXACT:
                counts = tried
        return counts

    def _improved(self, counts: Counts) -> Counts:
        counts = self._filled(counts)
        while (better := self._exchanged(counts)) is not None:
            counts = self._filled(better)
        return counts

    def _filled(self, counts: Counts) -> Counts:
        """With what is left spent where w_i per cost is largest."""
        counts = counts.copy()
        while True:
            left, slopes = self._market(counts)
            price = slopes / self.sizes
            fits = (counts < self.sizes) & (price <= left)
            if not fits.any():
                return counts
            i = int(np.where(fits, _worth(self.programme.weights, slopes), -1.0).argmax())
            paid = left / price[i] if price[i] > _EXACT else np.inf
            counts[i] += max(1, int(min(self.sizes[i] - counts[i], paid)))

    def _exchanged(self, counts: Counts) -> Counts | None:
        """After the best exchange of units of j for units of i; None where none gains."""
        sizes, weights = self.sizes, self.programme.weights
        left, slopes = self._market(counts)
        worth = _worth(weights, slopes)
        i = _first(np.where(counts < sizes, -worth, np.inf), counts < sizes)[:, None]
        j = _first(worth, counts > 0)[None]
        shared = self.programme.cost.shared[i[:, 0]][:, j[0]].toarray() / (sizes[i] * sizes[j])
        price = slopes / sizes
        best, exchange = _EXACT, None
        for bought, sold in _trades(price[i], price[j], shared, left):
            bought = np.minimum(bought, (sizes - counts)[i])
            gain = bought * (weights / sizes)[i] - sold * (weights / sizes)[j]
            gain = np.where((i != j) & (sold <= counts[j]), gain, -1.0)
            if gain.size and gain.max() > best:
                at = np.unravel_index(int(gain.argmax()), gain.shape)
                best = float(gain[at])
                exchange = i[at[1], 0], bought[at], j[0, at[2]], sold[at]
        if exchange is None:
            return None
        counts = counts.copy()
        counts[exchange[0]] += int(exchange[1])
        counts[exchange[2]] -= int(exchange[3])
        return counts

    def _market(self, counts: Counts) -> tuple[float, Vector]:
        """What is left of the allowance, and the slopes of the cost."""
        r = counts / self.sizes
        cost = self.programme.cost
        return self.programme.allowance - cost(r) + _EXACT, cost.slopes(r)


def _trades(
    price: Vector, paid: Vector, shared: Vector, left: float
) -> Iterator[tuple[Vector, Vector]]:
    """Units (bought, sold) [8, i, j] that an exchange can have, at these prices of a unit: as many
    as 1 to 8 units sold pay for, and as few as pay for 1 to 8 bought."""
    units = np.arange(1.0, _STEP_UNITS + 1)[:, None, None] + 0 * shared
    yield np.floor((left + paid * units) / np.maximum(price + shared * units, _EXACT)), units
    needed = np.ceil((price * units - left) / np.maximum(paid - shared * units, _EXACT))
    yield units, np.maximum(needed, 0.0)


def _starts(n: int, count: int, generator: np.random.Generator) -> Iterator[Vector]:
    for at in range(count):
        start = generator.random(n)
        yield start if at % 2 else (start < generator.random()).astype(np.float64)


def _first(order: Vector, of: NDArray[np.bool_]) -> NDArray[np.intp]:
    """The places of its smallest numbers, among those that `of` says."""
    places = np.argsort(order, kind="stable")
    return places[of[places]][:_NEAR]


def _worth(weights: Vector, slopes: Vector) -> Vector:
    """w per cost; infinite for what is free."""
    free = slopes <= _EXACT
    return np.where(free, np.inf, weights / np.where(free, 1.0, slopes))
