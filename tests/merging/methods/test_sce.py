"""SCE: worked by hand, against the formula in float64 weight by weight, and its limits."""

from __future__ import annotations

import statistics

import pytest
import torch

from evomerge.merging.methods.sce import Sce
from evomerge.merging.values import Scalar
from evomerge.testing.merge_laws import Case, merged


def case(count: int = 3, size: int = 200, **parameters: Scalar) -> Case:
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(size, generator=generator)
    sources = {
        name: base + scale * torch.randn(size, generator=generator)
        for name, scale in list({"a": 0.1, "b": 0.3, "c": 0.2, "d": 0.05}.items())[:count]
    }
    return Case(base, sources, parameters)


def oracle(given: Case, density: float, *, normalize: bool, uniform: bool = False) -> list[float]:
    base = given.base.double()
    taus = [(source.double() - base).tolist() for source in given.sources.values()]
    size = len(base)
    variances = [statistics.pvariance([tau[j] for tau in taus]) for j in range(size)]
    if density < 1:
        keep = sorted(range(size), key=lambda j: -variances[j])[: int(density * size + 1e-9)]
        taus = [[tau[j] if j in set(keep) else 0.0 for j in range(size)] for tau in taus]
    energies = [sum(x * x for x in tau) for tau in taus]
    shares = [1 / len(taus) if uniform else energy / sum(energies) for energy in energies]
    result = base.tolist()
    for j in range(size):
        total = sum(tau[j] for tau in taus)
        agree = [i for i, tau in enumerate(taus) if tau[j] * total > 0]
        if agree:
            divisor = sum(shares[i] for i in agree) if normalize else 1.0
            result[j] += sum(shares[i] * taus[i][j] for i in agree) / divisor
    return result


def test_by_hand() -> None:
    # task vectors [3, 0, 1] and [-1, 0, 1]: energies 10 and 2; + wins at 0 with 3, all agree at 2
    sources = {"a": torch.tensor([3.0, 0.0, 1.0]), "b": torch.tensor([-1.0, 0.0, 1.0])}
    small = Case(torch.zeros(3), sources)
    assert merged(Sce(), small).tolist() == pytest.approx([3.0, 0.0, 1.0])
    # the paper has no divisor: 10/12 of 3, and both shares of 1
    plain = merged(Sce(), small.given(normalize=False)).tolist()
    assert plain == pytest.approx([2.5, 0.0, 1.0])
    # one weight varies over the sources, so that a density of 1 keeps it and one below 1 only it
    assert merged(Sce(), small.given(density=0.99)).tolist() == pytest.approx([3.0, 0.0, 1.0])
    wide = small.of({"a": torch.tensor([3.0, 2.0, 1.0]), "b": torch.tensor([-1.0, 0.0, 1.0])})
    assert merged(Sce(), wide.given(density=0.5)).tolist() == pytest.approx([3.0, 0.0, 0.0])


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_against_the_formula_in_float64(count: int, density: float, normalize: bool) -> None:
    given = case(count, density=density, normalize=normalize)
    found = merged(Sce(), given, block_size=7).tolist()
    expected = oracle(given, density, normalize=normalize)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("floor", "uniform"), [(0.2, True), (0.1, False)])
def test_uniform_below_a_floor(floor: float, uniform: bool) -> None:
    """The mean squares sum to about 0.01 + 0.09 + 0.04 = 0.14."""
    given = case(uniform_below=floor)
    expected = oracle(given, 1.0, normalize=True, uniform=uniform)
    assert merged(Sce(), given).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("sign_tie", "first"), [("majority", -2.0), ("positive", 2.0), ("zero", 0.0)]
)
def test_a_zero_sum(sign_tie: str, first: float) -> None:
    sources = {"a": -torch.ones(10), "b": -torch.ones(10)}
    sources["a"][0], sources["b"][0] = 2.0, -2.0
    small = Case(torch.zeros(10), sources, {"sign_tie": sign_tie})
    assert merged(Sce(), small, block_size=3).tolist() == pytest.approx([first] + [-1.0] * 9)


def test_a_density_that_would_select_nothing_selects_everything() -> None:
    given = case()
    source = given.sources["b"]
    same = given.of({"a": source, "b": source.clone()}).given(density=0.3)
    assert torch.allclose(merged(Sce(), same), source, rtol=1e-6)
