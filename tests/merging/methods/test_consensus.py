"""Consensus merging: worked by hand, against the formula in float64, and what it reduces to."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomerge.merging.methods.base import MergeMethod
from evomerge.merging.methods.consensus import Consensus
from evomerge.merging.methods.consensus_ties import ConsensusTies
from evomerge.merging.methods.task_arithmetic import TaskArithmetic
from evomerge.merging.methods.ties import Ties
from evomerge.testing.merge_laws import Case, merged, random_case

TAUS = ([4.0, 1.0, 0.0], [2.0, -3.0, 0.0], [0.0, 2.5, 5.0])
BOTH = (Consensus(), ConsensusTies())


def around(base: list[float], *taus: list[float]) -> Case:
    start = torch.tensor(base)
    return Case(start, {f"s{i}": start + torch.tensor(tau) for i, tau in enumerate(taus)})


def test_by_hand() -> None:
    # the sum is [6, 0.5, 5]; t = 0.4
    # s0: 4 > 0.4*2, 1 > 0.4*0.5, 0 > 0.4*5 no;  s1: 2 > 0.4*4, 3 > 0.4*3.5, no
    # s2: 0 > 0.4*6 no, 2.5 > 0.4*2, 5 > 0: counts [2, 3, 1]
    case = around([1.0, 1.0, 1.0], *TAUS).given(threshold=0.4, **{"lambda": 0.5})
    counts = {1: [4.0, 1.25, 3.5], 2: [4.0, 1.25, 1.0], 3: [1.0, 1.25, 1.0], 4: [1.0] * 3}
    for agree, expected in counts.items():
        assert merged(Consensus(), case.given(agree=float(agree))).tolist() == expected


def test_on_ties_by_hand() -> None:
    # signs +, +, +; what agrees sums to [6, 3.5, 5]; t = 0.4
    # s0: 4 > 0.4*2, 1 > 0.4*2.5 no, no;  s1: 2 > 0.4*4, 3 > 0.4*6.5, no
    # s2: no, 2.5 > 0.4*1, 5 > 0: counts [2, 2, 1]
    case = around([1.0, 1.0, 1.0], *TAUS).given(threshold=0.4, density=1.0)
    counts = {1: [7.0, 4.5, 6.0], 2: [7.0, 4.5, 1.0], 3: [1.0] * 3}
    for agree, expected in counts.items():
        assert merged(ConsensusTies(), case.given(agree=float(agree))).tolist() == expected


def test_weights_scale_what_is_compared() -> None:
    # votes [4, -2] sum to 2: s0 needs it if 4 > t*2, s1 if 2 > t*4
    case = around([0.0], [2.0], [-1.0]).given(weight=2.0)
    own = {"s0": {"threshold": 1.9}, "s1": {"threshold": 0.6}}
    case = Case(case.base, case.sources, case.parameters, own)
    assert merged(Consensus(), case.given(agree=1.0)).tolist() == [2.0]
    assert merged(Consensus(), case.given(agree=2.0)).tolist() == [0.0]


def oracle(case: Case, agree: float) -> tuple[Tensor, Tensor]:
    """The merge in float64, and where no comparison is too close to call in float32."""
    base = case.base.double()
    votes = [
        case.own[name]["weight"] * (source.double() - base) for name, source in case.sources.items()
    ]
    total = sum(votes, torch.zeros_like(base))
    count, clear = torch.zeros_like(base), torch.ones_like(base, dtype=torch.bool)
    for name, vote in zip(case.sources, votes, strict=True):
        distance = case.own[name]["threshold"] * (total - vote).abs()
        count += vote.abs() > distance
        clear &= (vote.abs() - distance).abs() > 1e-5 * vote.abs() + 1e-12
        clear |= vote == 0
    return torch.where(count >= agree, base + case.parameters["lambda"] * total, base), clear


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), count=st.integers(2, 5), agree=st.integers(0, 6))
def test_against_the_formula_in_float64(seed: int, count: int, agree: int) -> None:
    case = random_case(seed, method=Consensus(), sources=count, size=200, spread=1e-2)
    case = case.given(agree=float(agree))
    found = merged(Consensus(), case, block_size=7).double()
    expected, clear = oracle(case, agree)
    assert int(clear.sum()) > 100
    assert torch.allclose(found[clear], expected[clear], rtol=1e-5, atol=1e-7)


def test_without_a_consensus_to_reach_it_is_the_method_underneath() -> None:
    for seed in range(20):
        case = random_case(seed, method=ConsensusTies(), sources=3)
        added = merged(TaskArithmetic(), case.given(normalize=False, **{"lambda": 1.0}))
        case = case.given(agree=0.0, **{"lambda": 1.0})
        assert torch.allclose(merged(Consensus(), case), added, rtol=0, atol=1e-7)
        summed = merged(Ties(), case.given(aggregate="sum"))
        assert torch.equal(merged(ConsensusTies(), case), summed)


@pytest.mark.parametrize("method", BOTH, ids=lambda method: method.name)
def test_a_consensus_of_more_than_all_is_the_base(method: MergeMethod) -> None:
    case = random_case(3, method=method, sources=3).given(agree=4.0)
    assert torch.equal(merged(method, case), case.base)


@pytest.mark.parametrize("method", BOTH, ids=lambda method: method.name)
def test_a_greater_consensus_keeps_less(method: MergeMethod) -> None:
    case = random_case(4, method=method, sources=4, size=400, spread=1e-2)
    case = case.given(**{"lambda": 1.0})
    changed = [merged(method, case.given(agree=float(k))) != case.base for k in range(6)]
    for more, fewer in itertools.pairwise(changed):
        assert not bool((fewer & ~more).any())
    assert int(changed[1].sum()) > int(changed[2].sum()) > int(changed[3].sum())


def test_the_trim_runs_before_the_vote() -> None:
    # density 1/3 keeps 4, -3 and 5; who needs a weight is asked of the whole task vectors
    # merged [4, -3, 5]: counts s0 (4 > 0, 1 > 1.6 no), s1 (2 > 0.8, 3 > 0), s2 (no, 2.5 > 2.2, 5)
    case = around([0.0, 0.0, 0.0], *TAUS).given(threshold=0.4, density=1 / 3, agree=2.0)
    assert merged(ConsensusTies(), case).tolist() == [4.0, -3.0, 0.0]
