"""PLeaS for any two networks of torch modules of one architecture: a library call.

Decides what stays apart. Which unit is which, and what can be widened, is found in `pair`;
the network is built in `merge`. Knows no checkpoint of transformers: those are merged by a
recipe (`method: pleas`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from evomerge.errors import MergeError, UserError
from evomerge.merging.structure.networks.merge import MergedNetwork, Refitting, merged_network
from evomerge.merging.structure.networks.pair import NetworkPair
from evomerge.merging.structure.partial.budget import prefix, proxy_weights, scaled, solve, uniform
from evomerge.merging.structure.refit.least_squares import Data

Score = Callable[[nn.Module], float]
"""How good a network is; more is better."""

Allocation = Literal["programme", "uniform", "prefix", "shares"]


class Amount(BaseModel):
    """How much of two networks stays apart: either `budget`, `ratio` or `apart`.

    `budget` is the cost of the merged network as a multiple of one, given out by `allocation`:
    `programme` (as published) by what each group is worth, `uniform` the same share of each,
    `prefix` (ZipIt-like) all of the last groups and nothing of the first, `shares` in proportion to
    those given. `ratio` is the share of every group, 0 merges all and 1 nothing; `apart` says how
    many units of each group, and 0 of those that it does not name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    budget: float | None = None
    allocation: Allocation = "programme"
    shares: dict[str, float] | None = None
    ratio: float | None = Field(default=None, ge=0.0, le=1.0)
    apart: dict[str, int] | None = None

    @model_validator(mode="after")
    def _one_of_three(self) -> Amount:
        if sum(x is not None for x in (self.budget, self.ratio, self.apart)) != 1:
            raise ValueError("say either a budget, a ratio, or how many units stay apart")
        if (self.shares is not None) != (self.allocation == "shares"):
            raise ValueError("shares go with `allocation: shares`, and only with it")
        if self.budget is None and self.allocation != "programme":
            raise ValueError("an allocation is that of a budget")
        return self


@dataclass(frozen=True)
class Worth:
    """Scores of networks with all units `merged`, all `separate`, and with one group otherwise."""

    merged: float
    separate: float
    merged_except: Mapping[str, float]
    separate_except: Mapping[str, float]


def pleas(
    pair: NetworkPair,
    amount: Amount,
    data: Data,
    refitting: Refitting = Refitting(),
    *,
    score: Score | None = None,
) -> MergedNetwork:
    """Merge two networks that were trained apart into one of any size from one to both.

        max Σ_g w_g·r_g  where cost(r) ≤ budget        r_g of the units of group g stay apart
        W = argmin ‖X Wᵀ − Y‖² + λ‖W − W₀‖²            X, Y in the layout [merged | a | b]

    `pair` comes from `pair.matched`. `data` are batches of what the networks take: those of
    their tasks, or any others, which is PLeaS-free. `score` is asked for what groups are worth, by
    `allocation: programme` alone: on 2·groups + 2 networks, without least squares. With heads of
    their own the merged network gives a's labels and then b's, which no budget counts.

    Raises MergeError for a budget out of range and for groups that cannot be widened; UserError for
    too little data.

    Source: Nasery et al. 2024, arXiv:2407.02447. Ours: the ridge, form `sequential`, targets `own`.
    """
    worth = None
    if amount.budget is not None and amount.allocation == "programme":
        pair.costs.allowance(amount.budget)
        if score is None:
            raise UserError("allocation: programme goes by what groups are worth; hand in a"
                            " `score`, or take `uniform`")  # fmt: skip
        worth = measured_worth(pair, data, score, refitting)
    return merged_network(pair, allocated(pair, amount, worth), data, refitting)


def allocated(pair: NetworkPair, amount: Amount, worth: Worth | None = None) -> dict[str, int]:
    """How many units of each group stay apart."""
    costs = pair.costs
    if amount.apart is not None:
        return amount.apart
    if amount.ratio is not None:
        return {name: round(amount.ratio * pair.spec[name].size) for name in costs.groups}
    assert amount.budget is not None  # one of the three is
    if amount.shares is not None:
        return scaled(costs, amount.budget, amount.shares)
    if amount.allocation == "uniform":
        return uniform(costs, amount.budget)
    if amount.allocation == "prefix":
        return prefix(costs, amount.budget, costs.groups)
    if worth is None:
        raise MergeError("allocation: programme goes by what groups are worth")
    weights = proxy_weights(
        worth.merged_except, worth.separate_except, worth.merged, worth.separate, amount.budget
    )
    return solve(costs, amount.budget, weights)


def measured_worth(
    pair: NetworkPair, data: Data, score: Score, refitting: Refitting = Refitting()
) -> Worth:
    """What each group is worth: scores without least squares, for any budget."""
    plain = refitting.model_copy(update={"least_squares": None})

    def scored(apart: Mapping[str, int]) -> float:
        value = float(score(merged_network(pair, apart, data, plain).network))
        if not math.isfinite(value):
            raise UserError(f"the score of a partially merged network is {value}; it must be a"
                            " number")  # fmt: skip
        return value

    none = dict.fromkeys(pair.costs.groups, 0)
    sizes = {name: pair.spec[name].size for name in none}
    return Worth(
        scored(none),
        scored(sizes),
        {name: scored({**none, name: size}) for name, size in sizes.items()},
        {name: scored({**sizes, name: 0}) for name in sizes},
    )
