"""Multi-SLERP and the Karcher mean: worked by hand, against walks on the sphere in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from evomerge.errors import CandidateError
from evomerge.merging.methods.karcher import Karcher, karcher
from evomerge.merging.methods.multislerp import MultiSlerp
from evomerge.merging.methods.nuslerp import NuSlerp
from evomerge.merging.values import Scalar
from evomerge.testing.merge_laws import Case, merged

WEIGHTS = {"a": 0.5, "b": 1.5, "c": 0.7}
METHODS = [MultiSlerp(), Karcher()]


def case(spread: float = 0.5, **parameters: Scalar) -> Case:
    """Models of different lengths, `spread` away from a common one."""
    generator = torch.Generator().manual_seed(4)
    common, base = torch.randn(2, 90, generator=generator)
    sources = {
        name: (common + spread * torch.randn(90, generator=generator)) * factor
        for name, factor in (("a", 1.0), ("b", 0.6), ("c", 1.7))
    }
    own = {name: {"weight": weight} for name, weight in WEIGHTS.items()}
    return Case(0.1 * base, sources, parameters, own)


def inputs(given: Case) -> tuple[Tensor, list[Tensor], list[float]]:
    """Origin, vectors and weights of sum 1, float64."""
    origin = given.base.double() if given.parameters.get("origin") == "base" else torch.zeros(90)
    weights = [float(given.own[name]["weight"]) for name in given.sources]
    shares = [weight / sum(weights) for weight in weights]
    return origin, [source.double() - origin for source in given.sources.values()], shares


def mean_length(vectors: list[Tensor], shares: list[float]) -> float:
    return sum(share * v.norm().item() for share, v in zip(shares, vectors, strict=True))


def tangent_walk(vectors: list[Tensor], shares: list[float]) -> Tensor:
    """What mergekit's `multislerp` is documented to do, step by step, with vectors."""
    units = torch.stack([v / v.norm() for v in vectors])
    w = torch.tensor(shares, dtype=torch.float64)
    mean = (w[:, None] * units).sum(0)
    mean = mean / mean.norm()
    tangents = units - (units @ mean)[:, None] * mean
    tangent = (w[:, None] * tangents).sum(0)
    length = tangent.norm() + 1e-8
    there = mean * length.cos() + tangent * length.sin() / length
    return there * mean_length(vectors, shares)


def descent(vectors: list[Tensor], shares: list[float]) -> Tensor:
    """argmin of the squared angles by plain gradient descent, with vectors."""
    units = torch.stack([v / v.norm() for v in vectors])
    w = torch.tensor(shares, dtype=torch.float64)
    u = units[0].clone()
    for _ in range(3000):
        cosines = (units @ u).clamp(-1, 1)
        angles = cosines.acos()
        factors = torch.where(angles > 1e-12, angles / angles.sin().clamp(min=1e-300), 1.0)
        u = u + 0.3 * ((w * factors)[:, None] * (units - cosines[:, None] * u)).sum(0)
        u = u / u.norm()
    return u * mean_length(vectors, shares)


def test_multislerp_by_hand() -> None:
    # directions (1,0) and (0,1) halve to 45°; lengths 2 and 4 to 3
    sources = {"a": torch.tensor([2.0, 0.0]), "b": torch.tensor([0.0, 4.0])}
    small = Case(torch.zeros(2), sources)
    assert merged(MultiSlerp(), small).tolist() == pytest.approx([3 * math.sqrt(0.5)] * 2)
    # weights 3 and 4 point along (3, 4)/5; the length is 2·3/7 + 4·4/7 = 22/7
    heavy = Case(torch.zeros(2), sources, {}, {"a": {"weight": 3.0}, "b": {"weight": 4.0}})
    assert merged(MultiSlerp(), heavy).tolist() == pytest.approx([22 / 7 * 0.6, 22 / 7 * 0.8])
    # as they are: lengths add up to 22
    plain = merged(MultiSlerp(), heavy.given(normalize=False))
    assert plain.tolist() == pytest.approx([22 * 0.6, 22 * 0.8])


def test_karcher_by_hand() -> None:
    # on a circle the mean is the mean angle: 0° and 90° with weights 2 and 1 give 30°,
    # and the length is (2·2 + 4)/3 = 8/3
    sources = {"a": torch.tensor([2.0, 0.0]), "b": torch.tensor([0.0, 4.0])}
    small = Case(torch.zeros(2), sources, {}, {"a": {"weight": 2.0}})
    expected = [8 / 3 * math.cos(math.pi / 6), 8 / 3 * math.sin(math.pi / 6)]
    assert merged(Karcher(), small).tolist() == pytest.approx(expected, rel=1e-6)
    # 0°, 10° and 80° with equal weights: 30°, where the normalised mean vector points to 28.2°
    turns = {n: math.radians(d) for n, d in {"a": 0, "b": 10, "c": 80}.items()}
    fan = {n: torch.tensor([math.cos(x), math.sin(x)]) for n, x in turns.items()}
    x, y = merged(Karcher(), Case(torch.zeros(2), fan)).tolist()
    assert math.degrees(math.atan2(y, x)) == pytest.approx(30, abs=1e-4)
    x, y = merged(MultiSlerp(), Case(torch.zeros(2), fan)).tolist()
    assert math.degrees(math.atan2(y, x)) == pytest.approx(28.22, abs=0.01)


@pytest.mark.parametrize("origin", ["zero", "base"])
@pytest.mark.parametrize("spread", [0.01, 0.5, 2.0])
def test_multislerp_against_the_walk(spread: float, origin: str) -> None:
    given = case(spread, origin=origin)
    start, vectors, shares = inputs(given)
    expected = start + tangent_walk(vectors, shares)
    found = merged(MultiSlerp(), given, block_size=13).double()
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("origin", ["zero", "base"])
@pytest.mark.parametrize("spread", [0.01, 0.5, 2.0])
def test_karcher_against_descent(spread: float, origin: str) -> None:
    given = case(spread, origin=origin)
    start, vectors, shares = inputs(given)
    expected = start + descent(vectors, shares)
    found = merged(Karcher(), given, block_size=13).double()
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_karcher_of_two_lies_on_their_arc() -> None:
    given = case()
    sources = {n: s / s.norm() for n, s in given.sources.items() if n != "c"}
    two = given.of(sources)
    assert torch.allclose(merged(Karcher(), two), merged(NuSlerp(), two), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_opposite_vectors_are_averaged(method: MultiSlerp | Karcher) -> None:
    source = torch.tensor([3.0, -4.0])
    opposite = Case(torch.zeros(2), {"a": source, "b": -source * 2})
    assert merged(method, opposite).tolist() == pytest.approx([-1.5, 2.0])


@pytest.mark.parametrize("method", METHODS)
def test_a_zero_vector_has_no_direction(method: MultiSlerp | Karcher) -> None:
    source = torch.tensor([3.0, -4.0])
    pair = Case(torch.zeros(2), {"a": torch.zeros(2), "b": source})
    assert merged(method, pair).tolist() == pytest.approx([1.5, -2.0])
    assert merged(method, pair.of({"a": torch.zeros(2), "b": torch.zeros(2)})).tolist() == [0, 0]


@pytest.mark.parametrize("method", METHODS)
def test_no_weight_makes_no_mean(method: MultiSlerp | Karcher) -> None:
    with pytest.raises(CandidateError, match="weight"):
        merged(method, case().given(weight=0.0))


def test_a_walk_that_cancels_out_ends_in_the_plain_mean() -> None:
    """Vectors of one dimension are parallel or opposite: there is no way round the sphere."""
    v, weights = [-1.0, 2.0, -1.0], [6 / 13, 6 / 13, 1 / 13]
    assert karcher([[a * b for b in v] for a in v], weights) == weights
