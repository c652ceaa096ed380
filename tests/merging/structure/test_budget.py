"""The budget programme: costs by hand, the solver against a grid, SLSQP and a bound, all limits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from evomerge.errors import MergeError
from evomerge.merging.structure.partial.budget import (
    Costs,
    Term,
    bound,
    prefix,
    proxy_weights,
    scaled,
    solve,
    uniform,
)
from evomerge.merging.structure.partial.shared_costs import Programme

BUDGETS = [1.1, 1.3, 1.6, 1.85]


def chain(groups, seed, units=10):
    """Layers one after another, with a group between each two."""
    draw = np.random.default_rng(seed)
    names = [f"g{i}" for i in range(groups)]
    ends = [None, *names, None]
    terms = [Term(draw.uniform(0.2, 3), o, i) for i, o in itertools.pairwise(ends)]
    return Costs(terms, dict.fromkeys(names, units)), _weights(names, draw)


def residual(groups, seed, units=10):
    """Bottleneck blocks: two groups inside each, around streams that many of them share."""
    draw = np.random.default_rng(seed)
    streams = [f"s{i}" for i in range(max(1, groups // 5))]
    inner = [f"g{i}" for i in range(groups - len(streams))]
    terms = [Term(0.2, s) for s in streams]
    for first, second in itertools.zip_longest(inner[::2], inner[1::2]):
        s = streams[draw.integers(len(streams))]
        last = second or first
        terms += [Term(draw.uniform(0.5, 2), first, s), Term(draw.uniform(0.5, 2), s, last)]
        terms += [Term(draw.uniform(1, 4), second, first)] if second else []
    return Costs(terms, dict.fromkeys([*streams, *inner], units)), _weights(streams + inner, draw)


def _weights(names, draw):
    values = draw.lognormal(0, 0.7, len(names))
    return dict(zip(names, values / values.sum(), strict=True))


def worth(costs, weights, apart):
    return sum(
        weights[g] * apart[g] / n for g, n in zip(costs.groups, costs.sizes.tolist(), strict=True)
    )


def one_unit(costs, weights):
    return max(weights[g] / n for g, n in zip(costs.groups, costs.sizes.tolist(), strict=True))


def programme(costs, weights, budget):
    return Programme(
        costs.extra, np.array([weights[g] for g in costs.groups]), costs.allowance(budget)
    )


def everything(costs):
    return dict(zip(costs.groups, costs.sizes.tolist(), strict=True))


@st.composite
def networks(draw):
    """Any layers between any groups, also from a group to itself, and what each is worth."""
    names = [f"g{i}" for i in range(draw(st.integers(1, 5)))]
    end = st.sampled_from([None, *names])
    cost = st.floats(0.01, 100)
    terms = draw(st.lists(st.builds(Term, cost, end, end), max_size=8))
    terms += [Term(draw(cost), name) for name in names]
    sizes = {name: draw(st.integers(1, 12)) for name in names}
    weights = {name: draw(st.floats(1e-5, 1)) for name in names}
    return terms, sizes, weights, draw(st.floats(0, 1))


def budget_at(costs, share):
    return 1 + share * (costs.maximum - 1)


# ---- costs


def test_costs_by_hand():
    """8 inputs, 4 units, 6 units, 2 outputs: 1 of the 4 and 3 of the 6 stay apart."""
    costs = Costs(
        [Term(32, "a"), Term(24, "b", "a"), Term(12, None, "b")],
        {"a": 4, "b": 6},
    )
    apart = {"a": 1, "b": 3}
    assert costs.groups == ("a", "b")
    nonzero = 8 * 5 + (5 * 9 - 2 * 1 * 3) + 9 * 2
    assert costs.relative(apart) == pytest.approx(nonzero / 68, rel=1e-14)
    assert costs.dense(apart) == pytest.approx((8 * 5 + 5 * 9 + 9 * 2) / 68, rel=1e-14)


def test_a_layer_within_one_group():
    costs = Costs([Term(9, "a", "a")], {"a": 3})
    assert costs.relative({"a": 1}) == pytest.approx((16 - 2) / 9)
    assert costs.dense({"a": 1}) == pytest.approx(16 / 9)
    assert costs.maximum == pytest.approx(2)


def test_groups_that_are_not_to_be_widened_stay_as_they_are():
    costs = Costs([Term(2, "a", "stream"), Term(1, "stream", "a"), Term(1, "stream")], {"a": 8})
    assert costs.maximum == pytest.approx(1.75)
    assert costs.dense({"a": 8}) == pytest.approx(1.75)


@settings(deadline=None)
@given(networks())
def test_one_model_is_1_and_both_are_2(network):
    terms, sizes, *_ = network
    within = [term for term in terms if term.out_group or term.in_group]
    costs = Costs(within, sizes)
    assert costs.relative({}) == costs.dense({}) == 1
    assert costs.relative(sizes) == costs.maximum == pytest.approx(2)
    fixed = [Term(sum(t.cost for t in within))]
    assert Costs(within + fixed, sizes).maximum == pytest.approx(1.5)


@settings(deadline=None)
@given(networks(), st.randoms(use_true_random=False))
def test_more_units_apart_never_cost_less(network, random):
    terms, sizes, *_ = network
    costs = Costs(terms, sizes)
    apart = {name: random.randint(0, n - 1) for name, n in sizes.items()}
    for name in sizes:
        more = apart | {name: apart[name] + 1}
        assert costs.relative(more) >= costs.relative(apart) - 1e-12
        assert costs.dense(more) > costs.dense(apart)
    assert costs.dense(apart) >= costs.relative(apart) - 1e-12


@pytest.mark.parametrize(
    ("apart", "message"),
    [
        ({"a": 5}, "group a: 5 of its 4 units cannot stay apart"),
        ({"a": -1}, "group a: -1 of its 4 units"),
        ({"z": 1}, "group z is none of those that may be widened"),
    ],
)
def test_impossible_numbers_of_units_are_refused(apart, message):
    with pytest.raises(MergeError, match=message):
        Costs([Term(1, "a")], {"a": 4}).relative(apart)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ([Term(1, "b"), Term(0, "a")], "group a has no units, or no layer of it costs anything"),
        ([Term(1, "a"), Term(-1, "a")], "must be a number from 0 on"),
        ([Term(float("nan"), "a")], "must be a number from 0 on"),
    ],
)
def test_costs_that_make_no_sense_are_refused(terms, message):
    with pytest.raises(MergeError, match=message):
        Costs(terms, {"a": 4})


# ---- the programme


def grid_optimum(costs, weights, budget, levels=11):
    """By trying every r of a grid, with its formula."""
    axis = np.linspace(0, 1, levels)
    own, shared = costs.extra.own, costs.extra.shared.toarray()
    w = np.array([weights[g] for g in costs.groups])
    rest = np.stack(np.meshgrid(*[axis] * (len(w) - 1), indexing="ij"), -1).reshape(-1, len(w) - 1)
    cost = rest @ own[1:] - ((rest @ shared[1:, 1:]) * rest).sum(1) / 2
    values, between, best = rest @ w[1:], rest @ shared[0, 1:], 0.0
    for first in axis:
        paid = cost + own[0] * first - between * first <= budget - 1 + 1e-12
        best = max(best, float(np.max(values, where=paid, initial=-np.inf) + w[0] * first))
    return best


CASES = [(chain, 5, 0), (chain, 6, 1), (residual, 6, 3), (residual, 7, 4)]


@pytest.mark.parametrize(("make", "groups", "seed"), CASES)
def test_no_grid_is_better(make, groups, seed):
    costs, weights = make(groups, seed)
    fine, _ = make(groups, seed, units=640)
    for budget in BUDGETS:
        grid = grid_optimum(costs, weights, budget)
        best = programme(costs, weights, budget).local_optima(starts=20, shakes=100, seed=0)[0]
        assert costs.extra(best) <= budget - 1 + 1e-9
        assert float(np.array([weights[g] for g in costs.groups]) @ best) >= grid - 1e-9
        assert worth(fine, weights, solve(fine, budget, weights)) >= grid - 1e-9
        assert worth(costs, weights, solve(costs, budget, weights)) >= grid - 1e-9


def slsqp_optimum(costs, weights, budget, starts=20):
    """By a general method for smooth programmes, with gradients."""
    own, shared = costs.extra.own, costs.extra.shared.toarray()
    w = np.array([weights[g] for g in costs.groups])
    limit = {
        "type": "ineq",
        "fun": lambda r: budget - 1 - own @ r + r @ shared @ r / 2,
        "jac": lambda r: shared @ r - own,
    }
    draw, best = np.random.default_rng(0), 0.0
    for _ in range(starts):
        found = minimize(
            lambda r: -w @ r,
            draw.random(len(w)),
            jac=lambda r: -w,
            bounds=[(0, 1)] * len(w),
            constraints=limit,
            method="SLSQP",
            options={"maxiter": 200, "ftol": 1e-10},
        )
        r = np.clip(found.x, 0, 1)
        best = max(best, float(w @ r) if limit["fun"](r) > -1e-7 else 0.0)
    return best


@pytest.mark.parametrize("make", [chain, residual])
@pytest.mark.parametrize("groups", [7, 16, 25])
def test_a_general_method_is_not_better(make, groups):
    for seed, budget in enumerate(BUDGETS):
        costs, weights = make(groups, seed)
        best = programme(costs, weights, budget).local_optima(starts=20, shakes=100, seed=0)[0]
        found = float(np.array([weights[g] for g in costs.groups]) @ best)
        assert found >= slsqp_optimum(costs, weights, budget) - 1e-6
        assert found <= bound(costs, budget, weights) + 1e-6


def test_many_groups_come_close_to_the_bound():
    costs, weights = residual(200, 0, units=256)
    for budget in (1.2, 1.8):
        found = worth(costs, weights, solve(costs, budget, weights))
        assert 0.999 < found / bound(costs, budget, weights) <= 1 + 1e-6


def test_groups_that_share_no_layer_are_bought_by_their_price():
    """As in a decoder: what is worth most for what it costs comes first, and one is split."""
    sizes = {"a": 100, "b": 200, "c": 50}
    costs = Costs([Term(40, "a"), Term(30, "b"), Term(30, "c")], sizes)
    apart = solve(costs, 1.5, {"a": 1.0, "b": 0.9, "c": 0.1})  # prices 40, 33, 300 for 1
    assert apart == {"a": 50, "b": 200, "c": 0}


@settings(max_examples=20, deadline=None)
@given(networks())
def test_no_choice_exceeds_its_budget(network):
    terms, sizes, weights, share = network
    costs = Costs(terms, sizes)
    budget = budget_at(costs, share)
    order = sorted(sizes)
    for apart in (
        solve(costs, budget, weights, starts=4),
        uniform(costs, budget),
        scaled(costs, budget, weights),
        prefix(costs, budget, order),
    ):
        assert costs.relative(apart) <= budget + 1e-9
    full = {g for g, n in apart.items() if n == sizes[g]}
    split = [g for g, n in apart.items() if 0 < n < sizes[g]]
    assert len(split) < 2
    assert full >= set(order[order.index(split[0]) + 1 :] if split else ())


@settings(max_examples=20, deadline=None)
@given(networks())
def test_nothing_and_everything(network):
    terms, sizes, weights, _ = network
    costs = Costs(terms, sizes)
    order = sorted(sizes)
    for budget, wanted in ((1, dict.fromkeys(sizes, 0)), (costs.maximum, sizes)):
        assert solve(costs, budget, weights, starts=4) == wanted
        assert uniform(costs, budget) == wanted
        assert scaled(costs, budget, weights) == wanted
        assert prefix(costs, budget, order) == wanted


@settings(max_examples=15, deadline=None, derandomize=True)
@given(networks(), st.floats(0, 1))
def test_more_budget_is_worth_no_less(network, other):
    terms, sizes, weights, share = network
    costs = Costs(terms, sizes)
    low, high = sorted((budget_at(costs, share), budget_at(costs, other)))
    found = [worth(costs, weights, solve(costs, b, weights)) for b in (low, high)]
    assert found[1] >= found[0] - 1e-9


@settings(max_examples=15, deadline=None)
@given(networks(), st.randoms(use_true_random=False))
def test_names_and_their_order_do_not_matter(network, random):
    terms, sizes, weights, share = network
    shuffled = random.sample(sorted(sizes), len(sizes))
    name = dict(zip(sorted(sizes), (f"x{g}" for g in shuffled), strict=True)) | {None: None}
    costs = Costs(terms, sizes)
    renamed = Costs(
        [Term(t.cost, name[t.out_group], name[t.in_group]) for t in terms],
        {name[g]: sizes[g] for g in shuffled},
    )
    budget = budget_at(costs, share)
    first = solve(costs, budget, weights)
    again = solve(renamed, budget, {name[g]: weights[g] for g in shuffled})
    assert again == {name[g]: n for g, n in first.items()}
    assert first == solve(costs, budget, weights)


@pytest.mark.parametrize("budget", [0.99, 2.01, float("nan"), float("inf")])
@pytest.mark.parametrize("choose", [uniform, lambda c, b: solve(c, b, {"a": 1.0})])
def test_a_budget_out_of_range_is_refused_with_the_range(budget, choose):
    costs = Costs([Term(2, "a"), Term(1)], {"a": 4})
    with pytest.raises(MergeError, match=r"must lie between 1 and 1\.6666, where all units"):
        choose(costs, budget)
    assert uniform(costs, 1.6666) == {"a": 3}


def test_weights_of_other_groups_are_refused():
    costs = Costs([Term(2, "a"), Term(1, "b")], {"a": 4})
    for weights in ({}, {"a": 1.0, "b": 1.0}, {"a": -1.0}, {"a": float("nan")}):
        with pytest.raises(MergeError, match=r"the weight of (a )?group"):
            solve(costs, 1.5, weights)


def test_a_network_without_groups_to_widen_has_one_budget():
    costs = Costs([Term(2, "a")], {})
    assert solve(costs, 1, {}) == uniform(costs, 1) == prefix(costs, 1, []) == {}
    with pytest.raises(MergeError, match="between 1 and 1,"):
        solve(costs, 1.1, {})


# ---- rules


def test_uniform_is_one_share_of_all_to_a_unit():
    costs, _ = residual(12, 0, units=64)
    for budget in BUDGETS:
        apart = uniform(costs, budget)
        assert max(apart.values()) - min(apart.values()) <= 1
        more = [apart | {g: n + 1} for g, n in apart.items() if n == min(apart.values())]
        assert all(costs.relative(m) > budget for m in more)


def test_shares_are_kept_in_proportion():
    costs = Costs([Term(100, "a"), Term(100, "b"), Term(100, "c")], dict.fromkeys("abc", 300))
    assert scaled(costs, 1.5, {"a": 1, "b": 0.5, "c": 0}) == {"a": 300, "b": 150, "c": 0}
    assert scaled(costs, 1.1, {"a": 1, "b": 0.5, "c": 0}) == {"a": 60, "b": 30, "c": 0}
    assert scaled(costs, 2, {"a": 1, "b": 0.5, "c": 0}) == {"a": 300, "b": 300, "c": 0}


def test_a_prefix_is_merged():
    costs = Costs([Term(100, "a"), Term(100, "b"), Term(100, "c")], dict.fromkeys("abc", 300))
    assert prefix(costs, 1.5, ["c", "a", "b"]) == {"a": 150, "b": 300, "c": 0}
    with pytest.raises(MergeError, match="the depth of group c"):
        prefix(costs, 1.5, ["a", "b"])


def test_weights_from_proxies():
    merged, separate = {"a": 0.6, "b": 0.5}, {"a": 0.9, "b": 0.7}
    near_one = proxy_weights(merged, separate, 0.5, 0.9, 1.0)
    assert near_one == pytest.approx({"a": 0.1, "b": 1e-5})
    near_two = proxy_weights(merged, separate, 0.5, 0.9, 2.0)
    assert near_two == pytest.approx({"a": 1e-5, "b": 0.2})
    half = proxy_weights(merged, separate, 0.5, 0.9, 1.5)
    assert half == pytest.approx({"a": 0.05, "b": 0.1})
    with pytest.raises(MergeError, match="group b has only one of the two accuracies"):
        proxy_weights(merged, {"a": 1.0}, 0.5, 0.9, 1.5)
