"""SLERP: worked by hand, against the formula in float64, and its symmetries."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from evomerge.merging.methods.slerp import Slerp
from evomerge.testing.merge_laws import Case, merged


def between(first: Tensor, second: Tensor, t: float, names: tuple[str, str] = ("a", "b")) -> Tensor:
    sources = dict(zip(names, (first, second), strict=True))
    return merged(Slerp(), Case(torch.zeros_like(first), sources, {"t": t}), block_size=3)


def oracle(first: Tensor, second: Tensor, t: float) -> Tensor:
    a, b = first.double(), second.double()
    cosine = (torch.dot(a, b) / (a.norm() * b.norm())).item()
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def test_by_hand() -> None:
    # a right angle; a third of the way: sin 60° = 0.8660 of a, sin 30° = 0.5 of b
    merged = between(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 4.0]), 1 / 3)
    assert merged.tolist() == pytest.approx([2 * 0.8660254, 2.0], rel=1e-6)


@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("noise", [0.0, 0.02, 0.05, 1.0, 10.0])
def test_against_the_formula_in_float64(t: float, noise: float) -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(200, generator=generator)
    second = first + noise * torch.randn(200, generator=generator)
    expected = oracle(first, second, t)
    assert torch.allclose(between(first, second, t).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_runs_in_the_order_of_the_recipe(names: tuple[str, str]) -> None:
    first, second = torch.tensor([1.0, 0.0, 3.0]), torch.tensor([0.0, 1.0, -1.0])
    assert torch.equal(between(first, second, 0.0, names), first)
    assert torch.equal(between(first, second, 1.0, names), second)
    expected = between(first, second, 0.25)
    assert torch.equal(between(first, second, 0.25, names), expected)


def test_there_and_back() -> None:
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randn(2, 100, generator=generator)
    there, back = between(first, second, 0.3), between(second, first, 0.7)
    assert torch.allclose(there, back, rtol=1e-5, atol=1e-6)


def test_keeps_a_norm_that_both_ends_have() -> None:
    generator = torch.Generator().manual_seed(2)
    first, second = (row / row.norm() for row in torch.randn(2, 100, generator=generator))
    assert between(first, second, 0.4).norm().item() == pytest.approx(1, rel=1e-5)


def test_nearly_parallel_and_opposite_models_take_the_line() -> None:
    first = torch.tensor([1.0, 1.0])
    assert between(first, torch.tensor([1.0, 1.01]), 0.5).tolist() == pytest.approx([1.0, 1.005])
    assert between(first, -first, 0.25).tolist() == [0.5, 0.5]


def test_a_zero_model_has_no_angle() -> None:
    second = torch.tensor([3.0, -4.0])
    merged = between(torch.zeros(2), second, 0.5)
    assert merged.tolist() == pytest.approx([3 * math.sqrt(0.5), -4 * math.sqrt(0.5)])
    assert between(torch.zeros(2), torch.zeros(2), 0.5).tolist() == [0.0, 0.0]
