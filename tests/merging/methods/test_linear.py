"""Linear merging and task arithmetic: worked by hand, and at their edges."""

from __future__ import annotations

import pytest
import torch

from evomerge.errors import CandidateError
from evomerge.merging.methods.linear import linear
from evomerge.merging.methods.task_arithmetic import task_arithmetic

BASE = torch.tensor([1.0, 2.0, -4.0])
SOURCES = torch.tensor([[2.0, 2.0, -8.0], [1.0, 6.0, 0.0]])


def test_linear_by_hand() -> None:
    # (1·[2, 2, -8] + 3·[1, 6, 0]) / 4
    assert linear(SOURCES, [1, 3]).tolist() == [1.25, 5.0, -2.0]
    assert linear(SOURCES, [1, 3], normalize=False).tolist() == [5.0, 20.0, -8.0]


def test_task_arithmetic_by_hand() -> None:
    # τ₁ = [1, 0, -4], τ₂ = [0, 4, 4]; 0.5·(1·τ₁ + 2·τ₂) = [0.5, 4, 2]
    merged = task_arithmetic(BASE, SOURCES, weights=[1, 2], scale=0.5)
    assert merged.tolist() == [1.5, 6.0, -2.0]


def test_task_arithmetic_normalised_by_hand() -> None:
    # (1·τ₁ + 3·τ₂) / 4 = [0.25, 3, 2]
    merged = task_arithmetic(BASE, SOURCES, weights=[1, 3], normalize=True)
    assert merged.tolist() == [1.25, 5.0, -2.0]


def test_normalised_task_arithmetic_is_linear() -> None:
    average = linear(SOURCES, [1, 3])
    assert torch.equal(task_arithmetic(BASE, SOURCES, weights=[1, 3], normalize=True), average)


def test_linear_refuses_weights_without_an_average() -> None:
    with pytest.raises(CandidateError, match=r"\[1, -1\] sum to 0"):
        linear(SOURCES, [1, -1])
    assert linear(SOURCES, [0, 0], normalize=False).tolist() == [0, 0, 0]


def test_task_arithmetic_divides_a_sum_of_zero_by_one() -> None:
    plain = task_arithmetic(BASE, SOURCES, weights=[1, -1])
    assert torch.equal(task_arithmetic(BASE, SOURCES, weights=[1, -1], normalize=True), plain)


def test_one_neutral_source_is_exact_where_the_task_vector_is_not_a_float32() -> None:
    base, source = torch.tensor([1.0, -0.0, 0.1]), torch.tensor([[1e-20, -0.0, 0.3333333]])
    assert base[0] + (source[0, 0] - base[0]) != source[0, 0]
    merged = task_arithmetic(base, source, weights=[1])
    assert torch.equal(merged.view(torch.int32), source[0].view(torch.int32))


def test_a_source_without_weight_is_not_read() -> None:
    broken = torch.stack([SOURCES[0], torch.full((3,), float("nan"))])
    assert linear(broken, [2, 0]).tolist() == SOURCES[0].tolist()
    assert task_arithmetic(BASE, broken, weights=[0, 0]).tolist() == BASE.tolist()


def test_task_arithmetic_is_affine_in_every_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(500, generator=generator)
    sources = base + torch.randn(3, 500, generator=generator) * 0.1
    expected = base.double() + sum(
        w * (source.double() - base.double())
        for w, source in zip((0.3, -0.2, 1.1), sources, strict=True)
    )
    merged = task_arithmetic(base, sources, weights=[0.3, -0.2, 1.1])
    assert torch.allclose(merged.double(), expected, rtol=1e-6, atol=1e-7)
