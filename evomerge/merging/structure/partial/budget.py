"""What a partially merged network costs, and how many units may stay apart within a budget.

Costs are relative to one model: 1 is all merged, 2 an ensemble. Knows groups by their names and
sizes, and layers by what they cost: no tensors, and no way to measure either.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.errors import MergeError
from evomerge.merging.structure.partial.shared_costs import (
    Counts,
    Programme,
    SharedCost,
    Vector,
    WholeUnits,
)

_ROUNDING = 1e-9
STARTS = 20
_SHAKES = 100
_UNIT_SHAKES = 60
_ROUNDED = 5  # the best local optima, of which each is brought to whole units
LEAST_WEIGHT = 1e-5
"""Of a group in the published programme, however little it is worth."""


@dataclass(frozen=True)
class Term:
    """What a layer costs while nothing stays apart, and the groups of its outputs and inputs.

    With r of a group's units apart it is cost·(1 + r_o + r_i − r_o·r_i), as the layer has no weight
    from one network's own units to the other's; with one group, or what is no layer, cost·(1 + r).
    """

    cost: float
    out_group: str | None = None
    in_group: str | None = None


class Costs:
    """The cost of a partially merged network, relative to one of its models.

    `sizes` are the units of each group that may be widened; other groups that terms name never
    are. `groups` are its names in the order in which the terms come to them, on which alone the
    choices below depend. Raises MergeError for a group that costs nothing.

    Source: PLeaS, Nasery et al. 2024, arXiv:2407.02447, and the authors' code.
    """

    def __init__(self, terms: Iterable[Term], sizes: Mapping[str, int]) -> None:
        terms = tuple(terms)
        total = sum(term.cost for term in terms)
        if not math.isfinite(total) or any(term.cost < 0 for term in terms):
            raise MergeError("the cost of a layer must be a number from 0 on")
        found = (g for t in terms if t.cost > 0 for g in (t.in_group, t.out_group) if g in sizes)
        self.groups: tuple[str, ...] = tuple(name for name in dict.fromkeys(found) if name)
        if idle := next((g for g in sizes if g not in self.groups or sizes[g] < 1), None):
            raise MergeError(f"group {idle} has no units, or no layer of it costs anything, so that"
                             " it cannot be widened on a budget")  # fmt: skip
        self.sizes: Counts = np.array([sizes[g] for g in self.groups], dtype=np.int64)
        self.extra = self._extra(terms, total or 1.0)

    def _extra(self, terms: tuple[Term, ...], total: float) -> SharedCost:
        place = {name: i for i, name in enumerate(self.groups)}
        own, shared = np.zeros(len(place)), list[tuple[int, int, float]]()
        for term in terms:
            ends = [place[g] for g in (term.in_group, term.out_group) if g in place]
            for i in ends:
                own[i] += term.cost / total
            if len(ends) == 2:
                i, o = ends
                shared += [(i, o, term.cost / total), (o, i, term.cost / total)]
        return SharedCost.of(own, shared)

    def relative(self, apart: Mapping[str, int]) -> float:
        """The cost with so many units of each group apart, of each network; 0 of others."""
        return 1.0 + self.extra(self._shares(apart))

    def dense(self, apart: Mapping[str, int]) -> float:
        """The same if the zeros between the networks are multiplied too, as plain layers do."""
        r = self._shares(apart)
        return 1.0 + float(self.extra.own @ r) + self.extra.together(r)

    @property
    def maximum(self) -> float:
        """The cost with all units apart."""
        return 1.0 + self.extra(np.ones(len(self.groups)))

    def allowance(self, budget: float) -> float:
        """What a budget leaves for units apart. Raises MergeError for one out of range."""
        most = self.maximum
        if not 1.0 <= budget <= most + _ROUNDING:
            reach = f"{math.floor(most * 1e4 + 1e-4) / 1e4:g}"
            raise MergeError(f"a budget of {budget:g} times one model: it must lie between 1 and"
                             f" {reach}, where all units that may stay apart do")  # fmt: skip
        return (most if most - budget <= _ROUNDING else budget) - 1.0

    def vector(self, values: Mapping[str, float], what: str) -> Vector:
        """Numbers in the order of `groups`. Raises MergeError where they are not of these groups,
        or not numbers from 0 on."""
        if odd := next(iter({*values} ^ {*self.groups}), None):
            raise MergeError(f"{what} of group {odd}: those that may be widened are"
                             f" {', '.join(self.groups) or 'none'}")  # fmt: skip
        found = np.array([float(values[g]) for g in self.groups])
        if not (np.isfinite(found) & (found >= 0)).all():
            raise MergeError(f"{what} of a group must be a number from 0 on")
        return found

    def _shares(self, apart: Mapping[str, int]) -> Vector:
        if odd := next((g for g in apart if g not in self.groups and apart[g]), None):
            raise MergeError(f"group {odd} is none of those that may be widened")
        counts = np.array([apart.get(g, 0) for g in self.groups], dtype=np.int64)
        if (counts < 0).any() or (counts > self.sizes).any():
            at = int(((counts < 0) | (counts > self.sizes)).argmax())
            raise MergeError(f"group {self.groups[at]}: {counts[at]} of its {self.sizes[at]} units"
                             " cannot stay apart")  # fmt: skip
        return counts / self.sizes

    def named(self, counts: Counts) -> dict[str, int]:
        """Counts in the order of `groups`, by name."""
        return dict(zip(self.groups, counts.tolist(), strict=True))


def solve(
    costs: Costs,
    budget: float,
    weights: Mapping[str, float],
    *,
    starts: int = STARTS,
    seed: int = 0,
) -> dict[str, int]:
    """How many units of each group stay apart: max Σ w_g·r_g at a cost of at most `budget`.

    Local optima of the continuous programme from seeded random starts, the best few of them brought
    to whole units, and the best of those improved. A budget of 1 merges everything, the largest one
    nothing. Takes a second for a hundred groups that share layers, two for four hundred.

    Raises MergeError for a budget out of range and for weights that are not of these groups.

    Source: PLeaS, Nasery et al. 2024, arXiv:2407.02447: the programme. There a commercial solver
    finds r, which a quantile then rounds, to a cost that may exceed the budget.
    """
    programme = _programme(costs, budget, weights)
    whole = WholeUnits(programme, costs.sizes)
    optima = programme.local_optima(starts=starts, shakes=_SHAKES, seed=seed)
    best = max((whole.near(r) for r in optima[:_ROUNDED]), key=whole.value)
    return costs.named(whole.shaken(best, times=_UNIT_SHAKES, seed=seed))


def bound(costs: Costs, budget: float, weights: Mapping[str, float]) -> float:
    """What Σ w_g·r_g no choice exceeds within a budget, by a linear relaxation."""
    programme = _programme(costs, budget, weights)
    return programme.relaxed()[0] * _scale(weights)


def scaled(costs: Costs, budget: float, shares: Mapping[str, float]) -> dict[str, int]:
    """How many units stay apart, in proportion to given shares, for as much as the budget pays.

    m_g = ⌊min(1, t·s_g)·n_g⌋ with the largest t that fits, and then one unit more of each group
    while that fits, those first of which most was cut off. A share of 0 is nothing at any budget.
    """
    s, allowance = costs.vector(shares, "the share"), costs.allowance(budget)

    def wanted(t: float) -> Vector:
        return np.minimum(t * s, 1.0) * costs.sizes

    def fits(counts: Counts) -> bool:
        return costs.extra(counts / costs.sizes) <= allowance + _ROUNDING

    low, high = 0.0, 1.0 / min(s[s > 0], default=1.0)
    for _ in range(64):
        t = (low + high) / 2
        low, high = (t, high) if fits(_floor(wanted(t))) else (low, t)
    t = high if fits(_floor(wanted(high))) else low
    counts = _floor(wanted(t))
    cut = wanted(t) - counts
    for i in np.argsort(-cut, kind="stable"):
        more = counts.copy()
        more[i] += 1
        if s[i] > 0 and more[i] <= costs.sizes[i] and fits(more):
            counts = more
    return costs.named(counts)


def uniform(costs: Costs, budget: float) -> dict[str, int]:
    """How many units stay apart if it is the same share of every group."""
    return scaled(costs, budget, dict.fromkeys(costs.groups, 1.0))


def prefix(costs: Costs, budget: float, order: Sequence[str]) -> dict[str, int]:
    """How many units stay apart if groups are merged up to a depth and later ones are not.

    `order` are all groups, by depth. One of them is split, so that the budget is met.

    Source: Stoica et al. 2024, arXiv:2305.03053 (ZipIt!), where the first layers are merged, as the
    code of PLeaS has it for a baseline; there at the end of a stage, whatever that costs.
    """
    allowance = costs.allowance(budget)
    costs.vector(dict.fromkeys(order, 0.0), "the depth")
    place = {name: i for i, name in enumerate(costs.groups)}
    r, counts = np.zeros(len(place)), np.zeros(len(place), dtype=np.int64)
    for i in (place[name] for name in reversed(order)):
        low, high = 0, int(costs.sizes[i])
        while low < high:
            middle = (low + high + 1) // 2
            r[i] = middle / costs.sizes[i]
            fits = costs.extra(r) <= allowance + _ROUNDING
            low, high = (middle, high) if fits else (low, middle - 1)
        counts[i], r[i] = low, low / costs.sizes[i]
        if low < costs.sizes[i]:
            break
    return costs.named(counts)


def proxy_weights(
    merged_except: Mapping[str, float],
    separate_except: Mapping[str, float],
    all_merged: float,
    all_separate: float,
    budget: float,
) -> dict[str, float]:
    """What each group is worth kept apart, by the accuracies of networks that differ in it alone.

        w_g = max(10⁻⁵, (R1_g − A_merged)·(2 − B) − (R0_g − A_separate)·(B − 1))

    R1_g: all groups merged but g; R0_g: all separate but g. The first difference is what g gains on
    its own, the second, negative where g matters, what is lost without it; a budget B near 1 asks
    for the one and near 2 for the other.

    Source: PLeaS, Nasery et al. 2024, arXiv:2407.02447: the formula and the least weight are those
    of the authors' code; what R1 and R0 stand for is our reading of it.
    """
    if odd := next(iter({*merged_except} ^ {*separate_except}), None):
        raise MergeError(f"group {odd} has only one of the two accuracies that its weight is from")
    return {
        group: max(
            LEAST_WEIGHT,
            (merged_except[group] - all_merged) * (2.0 - budget)
            - (separate_except[group] - all_separate) * (budget - 1.0),
        )
        for group in merged_except
    }


def _programme(costs: Costs, budget: float, weights: Mapping[str, float]) -> Programme:
    w = costs.vector(weights, "the weight") / _scale(weights)
    return Programme(costs.extra, w, costs.allowance(budget))


def _scale(weights: Mapping[str, float]) -> float:
    return max(weights.values(), default=0.0) or 1.0


def _floor(wanted: Vector) -> Counts:
    return np.floor(wanted + _ROUNDING).astype(np.int64)
