"""Model Stock: worked by hand, against the formula in float64, its limits and its pole."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from evomerge.merging.methods.model_stock import ModelStock
from evomerge.merging.values import Scalar
from evomerge.testing.merge_laws import Case, merged

SHAPE = (8, 3, 5)


def case(count: int = 3, common: float = 0.5, **parameters: Scalar) -> Case:
    generator = torch.Generator().manual_seed(1)
    base, shared = torch.randn(2, math.prod(SHAPE), generator=generator)
    sources = {
        name: base + common * shared + 0.5 * torch.randn(math.prod(SHAPE), generator=generator)
        for name in "abcd"[:count]
    }
    return Case(base, sources, parameters, shape=SHAPE)


def oracle(given: Case, groups: Tensor, *, clamped: bool) -> Tensor:
    base = given.base.double()
    tau = torch.stack([source.double() - base for source in given.sources.values()])
    count, result = len(tau), base.clone()
    for group in groups:
        pairs = list(itertools.combinations(tau[:, group], 2))
        c = sum(torch.cosine_similarity(a, b, dim=0).item() for a, b in pairs) / len(pairs)
        c = min(max(c, 0.0), 1.0) if clamped else c
        t = count * c / (1 + (count - 1) * c)
        result[group] = t * (base[group] + tau[:, group].mean(0)) + (1 - t) * base[group]
    return result


def test_by_hand() -> None:
    # task vectors (2, 0) and (1, 1) at 45°: t = 2·0.7071/1.7071 = 0.8284, their mean is (1.5, 0.5)
    base = torch.tensor([1.0, -1.0])
    sources = {"a": torch.tensor([3.0, -1.0]), "b": torch.tensor([2.0, 0.0])}
    t = 2 * math.sqrt(0.5) / (1 + math.sqrt(0.5))
    found = merged(ModelStock(), Case(base, sources)).tolist()
    assert found == pytest.approx([1 + 1.5 * t, -1 + 0.5 * t], rel=1e-6)


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("vectors", ["tensor", "row"])
@pytest.mark.parametrize("common", [0.0, 0.5, 5.0])
def test_against_the_formula_in_float64(count: int, vectors: str, common: float) -> None:
    given = case(count, common, vectors=vectors)
    index = torch.arange(math.prod(SHAPE))
    groups = index.view(1, -1) if vectors == "tensor" else index.view(-1, SHAPE[-1])
    found = merged(ModelStock(), given, block_size=11).double()
    assert torch.allclose(found, oracle(given, groups, clamped=True), rtol=1e-5, atol=1e-5)
    if common:
        free = merged(ModelStock(), given.given(cosine="free")).double()
        expected = oracle(given, groups, clamped=False)
        assert torch.allclose(free, expected, rtol=1e-3, atol=1e-3)


def test_orthogonal_task_vectors_leave_the_base() -> None:
    base = torch.tensor([0.5, -0.25, 8.0])
    sources = {"a": base + torch.tensor([1.0, 0, 0]), "b": base + torch.tensor([0, 3.0, 0])}
    assert torch.equal(merged(ModelStock(), Case(base, sources)), base)


@pytest.mark.parametrize(("angle", "free"), [(-0.5, -2.0), (-1.0, 0.0)])
def test_disagreeing_task_vectors(angle: float, free: float) -> None:
    """c < 0 is taken for 0; free computes t = 2c/(1 + c), and gives up at the pole."""
    first = torch.tensor([1.0, 0.0])
    second = torch.tensor([angle, math.sqrt(1 - angle * angle)])
    opposed = Case(torch.zeros(2), {"a": first, "b": second})
    assert merged(ModelStock(), opposed).tolist() == [0.0, 0.0]
    found = merged(ModelStock(), opposed.given(cosine="free"))
    assert torch.allclose(found, free * (first + second) / 2, rtol=1e-4)


def test_a_source_that_equals_the_base_has_no_angle() -> None:
    given = case(3)
    still = given.of({**given.sources, "a": given.base})
    two = given.of({name: given.sources[name] for name in "bc"})
    base, b, c = (tensor.double() for tensor in (given.base, *two.sources.values()))
    cosine = torch.cosine_similarity(b - base, c - base, dim=0).item() / 3
    t = 3 * cosine / (1 + 2 * cosine)
    expected = base + t * (b - base + c - base) / 3
    assert torch.allclose(merged(ModelStock(), still).double(), expected, rtol=1e-5, atol=1e-6)
