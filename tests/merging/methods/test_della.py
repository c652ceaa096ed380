"""DELLA: against an oracle on known draws, its limits, and its statistics."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from evomerge.merging.methods.dare_linear import DareLinear
from evomerge.merging.methods.della import Della
from evomerge.merging.methods.della_linear import DellaLinear
from evomerge.merging.methods.masks import draws, mask_key
from evomerge.merging.values import Scalar
from evomerge.testing.merge_laws import Case, merged

TENSOR = "model.layers.0.mlp.up_proj.weight"
SHAPE = (12, 25)
WEIGHTS = {"a": 0.5, "b": 1.5, "c": 0.75}


def case(seed: int = 3, **parameters: Scalar) -> Case:
    generator = torch.Generator().manual_seed(8)
    base = torch.randn(math.prod(SHAPE), generator=generator)
    sources = {
        name: base + 0.1 * torch.randn(math.prod(SHAPE), generator=generator) for name in WEIGHTS
    }
    own = {name: {"weight": weight} for name, weight in WEIGHTS.items()}
    return Case(base, sources, parameters, own, seed, SHAPE)


def probabilities(tau: Tensor, density: float, epsilon: float) -> Tensor:
    """q, row by row from sorted magnitudes, float64."""
    rows = []
    for row in tau.view(-1, SHAPE[-1]).tolist():
        order = sorted(range(len(row)), key=lambda j: (abs(row[j]), j))
        ranks = {j: r for r, j in enumerate(order, 1)}
        n = len(row)
        low = density - epsilon
        rows += [low + 2 * epsilon * (ranks[j] - 1) / (n - 1) for j in range(n)]
    return torch.tensor(rows, dtype=torch.float64)


def thinned(given: Case, name: str, density: float, epsilon: float, rescale: str) -> Tensor:
    """τ̃ of one source, float64."""
    tau = given.sources[name] - given.base
    q = probabilities(tau, density, epsilon)
    u = draws(mask_key(given.seed, name, TENSOR), 0, len(tau)).double() / 2**32
    kept = torch.where(u >= 1 - q, tau.double(), 0.0)
    if rescale == "unbiased":
        return kept / q
    return kept * (tau.double().abs().sum() / kept.abs().sum() if rescale == "l1" else 1.0)


def test_by_hand() -> None:
    # one row, magnitudes 1 to 4: keep probabilities 0.3, 0.4333, 0.5667, 0.7
    tau = torch.tensor([4.0, -1.0, 3.0, 2.0])
    u = draws(mask_key(4, "a", TENSOR), 0, 4).double() / 2**32
    q = [0.7, 0.3, 0.5 + 0.2 / 3, 0.5 - 0.2 / 3]
    kept = [bool(x >= 1 - p) for x, p in zip(u, q, strict=True)]
    assert kept == [False, False, True, True]
    small = Case(torch.ones(4), {"a": tau + 1}, {"density": 0.5, "epsilon": 0.2}, seed=4)
    expected = [1.0, 1.0, 1 + 3 / q[2], 1 + 2 / q[3]]
    assert merged(DellaLinear(), small).tolist() == pytest.approx(expected, rel=1e-6)
    # l1: what is left, 5, grows to the 10 there was
    l1 = merged(DellaLinear(), small.given(rescale="l1"))
    assert l1.tolist() == pytest.approx([1.0, 1.0, 7.0, 5.0])


@pytest.mark.parametrize("rescale", ["unbiased", "l1", "none"])
@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.15), (0.7, 0.0), (0.2, 0.1)])
def test_sum_against_the_formula_in_float64(rescale: str, density: float, epsilon: float) -> None:
    given = case(density=density, epsilon=epsilon, rescale=rescale)
    expected = given.base.double()
    for name, weight in WEIGHTS.items():
        expected = expected + weight * thinned(given, name, density, epsilon, rescale)
    found = merged(DellaLinear(), given, block_size=7).double()
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rescale", ["unbiased", "l1", "none"])
def test_election_against_the_formula_in_float64(rescale: str) -> None:
    given = case(density=0.6, epsilon=0.3, rescale=rescale)
    votes = {n: w * thinned(given, n, 0.6, 0.3, rescale) for n, w in WEIGHTS.items()}
    expected = given.base.double().clone()
    for j in range(len(expected)):
        total = sum(vote[j].item() for vote in votes.values())
        agree = [n for n, vote in votes.items() if vote[j].item() * total > 0]
        if agree:
            expected[j] += sum(votes[n][j] for n in agree) / sum(WEIGHTS[n] for n in agree)
    found = merged(Della(), given, block_size=7).double()
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rescale", ["unbiased", "l1", "none"])
def test_without_a_window_it_is_dare(rescale: str) -> None:
    given = case(density=0.4, epsilon=0.0, rescale=rescale)
    found, expected = merged(DellaLinear(), given), merged(DareLinear(), given)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_unbiased_over_seeds() -> None:
    tau, seeds = torch.linspace(-1, 1, 25), 1500
    runs = torch.stack(
        [
            merged(DellaLinear(), Case(torch.zeros(25), {"a": tau}, {"density": 0.4}, seed=seed))
            for seed in range(seeds)
        ]
    ).double()
    q = probabilities(tau, 0.4, 0.15)
    error = (tau.double() ** 2 * (1 - q) / q / seeds).sqrt()
    assert ((runs.mean(0) - tau).abs() <= 4 * error + 1e-7).all()


@pytest.mark.parametrize("density", [0.05, 0.95])
def test_a_window_beyond_the_bounds_is_cut(density: float) -> None:
    cut, given = case(density=density, epsilon=0.05), case(density=density, epsilon=0.5)
    assert torch.equal(merged(Della(), given), merged(Della(), cut))


@pytest.mark.parametrize("shape", [(), (5, 1)])
def test_rows_of_one_entry_are_kept_with_the_density(shape: tuple[int, ...]) -> None:
    size = math.prod(shape)
    tau = torch.arange(1.0, size + 1)
    ones = Case(torch.zeros(size), {"a": tau}, {"density": 0.5}, seed=1, shape=shape)
    assert torch.equal(merged(DellaLinear(), ones), merged(DareLinear(), ones))


@pytest.mark.parametrize("rescale", ["unbiased", "l1", "none"])
def test_density_zero_is_the_base(rescale: str) -> None:
    given = case(density=0.0, rescale=rescale)
    for method in (Della(), DellaLinear()):
        assert torch.equal(merged(method, given), given.base)
