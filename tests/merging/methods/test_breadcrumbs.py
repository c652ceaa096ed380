"""Breadcrumbs: worked by hand, against ranks counted in float64, and small tensors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from evomerge.merging.methods.breadcrumbs import Breadcrumbs
from evomerge.merging.methods.breadcrumbs_ties import BreadcrumbsTies
from evomerge.merging.values import Scalar
from evomerge.testing.merge_laws import Case, merged

SHAPE = (10, 3, 20)
WEIGHTS = {"a": 0.5, "b": 1.5, "c": 0.75}


def case(**parameters: Scalar) -> Case:
    generator = torch.Generator().manual_seed(6)
    base = torch.randn(math.prod(SHAPE), generator=generator)
    # steps of 1/8, so that magnitudes are often equal
    sources = {
        name: base + (torch.randn(math.prod(SHAPE), generator=generator) * 8).round() / 8
        for name in WEIGHTS
    }
    own = {name: {"weight": weight} for name, weight in WEIGHTS.items()}
    return Case(base, sources, parameters, own, shape=SHAPE)


def middling(tau: Tensor, density: float, gamma: float) -> Tensor:
    """One vector's band, from a sort of its magnitudes by (size, index); float64."""
    size = len(tau)
    count = math.floor(density * size + 1e-9)
    top = min(math.floor(gamma * size + 1e-9), size - count)
    order = sorted(range(size), key=lambda j: (-abs(tau[j].item()), j))
    kept = torch.zeros(size, dtype=torch.bool)
    kept[order[top : top + count]] = True
    return torch.where(kept, tau, 0.0)


def thinned(given: Case, scope: str, density: float, gamma: float) -> dict[str, Tensor]:
    width = SHAPE[-1] if scope == "row" else math.prod(SHAPE)
    return {
        name: torch.cat(
            [
                middling(row, density, gamma).double()
                for row in (source - given.base).view(-1, width)
            ]
        )
        for name, source in given.sources.items()
    }


def test_by_hand() -> None:
    # of ten magnitudes the largest (9, a fifth is 2: 9 and 8) goes, the next half (7 to 3) stays
    tau = torch.tensor([1.0, -9, 2, 7, -3, 4, 8, -5, 6, 0])
    small = Case(torch.ones(10), {"a": tau + 1}, {"density": 0.5, "gamma": 0.2, "lambda": 2.0})
    kept = [0.0, 0, 0, 7, -3, 4, 0, -5, 6, 0]
    assert merged(Breadcrumbs(), small, block_size=3).tolist() == [1 + 2 * x for x in kept]
    # as two rows of five: 9 goes and 7, 3 stay; 8 goes and 6, 5 stay
    rows = Case(small.base, small.sources, {"density": 0.4, "gamma": 0.2, "scope": "row"})
    rows = Case(rows.base, rows.sources, rows.parameters, shape=(2, 5))
    expected = [1.0, 1, 1, 8, -2, 1, 1, -4, 7, 1]
    assert merged(Breadcrumbs(), rows, block_size=3).tolist() == expected
    # an election between that band of a and a lone -10 in b at its first place, kept whole
    lone = torch.zeros(10)
    lone[3] = -10
    both = Case(
        torch.zeros(10),
        {"a": tau, "b": lone},
        {"gamma": 0.2},
        {"a": {"density": 0.5}, "b": {"density": 1.0}},
    )
    assert merged(BreadcrumbsTies(), both).tolist() == [0.0, 0, 0, -10, -3, 4, 0, -5, 6, 0]


@pytest.mark.parametrize("scope", ["tensor", "row"])
@pytest.mark.parametrize(("density", "gamma"), [(0.5, 0.1), (0.9, 0.3), (0.25, 0.0), (0.05, 0.5)])
def test_sum_against_ranks(scope: str, density: float, gamma: float) -> None:
    given = case(scope=scope, density=density, gamma=gamma)
    expected = given.base.double()
    for name, tau in thinned(given, scope, density, gamma).items():
        expected = expected + WEIGHTS[name] * tau
    found = merged(Breadcrumbs(), given, block_size=7).double()
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scope", ["tensor", "row"])
@pytest.mark.parametrize(("density", "gamma"), [(0.5, 0.1), (0.9, 0.3)])
def test_election_against_ranks(scope: str, density: float, gamma: float) -> None:
    given = case(scope=scope, density=density, gamma=gamma, sign_tie="zero", normalize=True)
    votes = {n: WEIGHTS[n] * tau for n, tau in thinned(given, scope, density, gamma).items()}
    expected = given.base.double().clone()
    for j in range(len(expected)):
        total = sum(vote[j].item() for vote in votes.values())
        agree = [n for n, vote in votes.items() if vote[j].item() * total > 0]
        if agree:
            expected[j] += sum(votes[n][j] for n in agree) / sum(WEIGHTS[n] for n in agree)
    found = merged(BreadcrumbsTies(), given, block_size=7).double()
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 50])
def test_a_gamma_of_no_entry_drops_no_entry(size: int) -> None:
    """⌊0.01·50⌋ = 0: mergekit's slice [:-0] would be empty here, and drop everything."""
    tau = torch.arange(1.0, size + 1)
    small = Case(torch.zeros(size), {"a": tau}, {"density": 0.9, "gamma": 0.01})
    found = merged(Breadcrumbs(), small)
    dropped = size - math.floor(0.9 * size) if size > 1 else 0
    assert found.tolist() == [0.0] * dropped + tau.tolist()[dropped:]


@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_density_zero_is_the_base(scope: str) -> None:
    given = case(density=0.0, gamma=0.1, scope=scope)
    for method in (Breadcrumbs(), BreadcrumbsTies()):
        assert torch.equal(merged(method, given), given.base)
