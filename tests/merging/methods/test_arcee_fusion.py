"""Arcee fusion: worked by hand, against torch's own softmax and quantiles, and its rank search."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from evomerge.merging.methods.arcee_fusion import ArceeFusion
from evomerge.merging.methods.selection import order_statistics
from evomerge.testing.merge_laws import Case, merged

SHAPE = (30, 4, 10)


def case(spread: float = 0.5) -> Case:
    generator = torch.Generator().manual_seed(2)
    base, noise = torch.randn(2, math.prod(SHAPE), generator=generator)
    return Case(base, {"a": base + spread * noise**3}, shape=SHAPE)


def importance(given: Case) -> Tensor:
    base, source = (x.double().view(-1, SHAPE[-1]) for x in (given.base, given.sources["a"]))
    target, given_logits = source.log_softmax(1), base.log_softmax(1)
    divergence = torch.nn.functional.kl_div(
        given_logits, target, reduction="none", log_target=True
    ).sum(1, keepdim=True)
    return ((source - base).abs() * divergence).flatten()


def test_by_hand() -> None:
    # two rows; softmax of (0, ln 3) is (1/4, 3/4), of (0, 0) (1/2, 1/2), so that the first row's
    # KL is 1/4·ln(1/2) + 3/4·ln(3/2) = 0.1308 and only its second element moved: importance
    # 0.1308·ln 3 = 0.1437. The second row moved by 0.5 as a whole: its softmax stays, 0.
    source = torch.tensor([0.0, math.log(3), 0.5, 0.5])
    small = Case(torch.zeros(4), {"a": source}, shape=(2, 2))
    # quartiles of (0, 0.1437, 0, 0): 0, 0 and 0.0359; the threshold is 1.5·0.0359 = 0.0539
    assert torch.equal(merged(ArceeFusion(), small), torch.tensor([0.0, math.log(3), 0.0, 0.0]))
    # from 4 ranges on (0.1437) nothing is left
    assert torch.equal(merged(ArceeFusion(), small.given(iqr_factor=4.01)), torch.zeros(4))


@pytest.mark.parametrize("factor", [-0.5, 0.0, 1.5, 4.0])
@pytest.mark.parametrize("spread", [1e-3, 0.5])
def test_against_quantiles_of_torch(factor: float, spread: float) -> None:
    given = case(spread)
    known = importance(given)
    first, median, third = known.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    threshold = median + factor * (third - first)
    unclear = (known - threshold).abs() <= 1e-5 * threshold.abs()
    assert int(unclear.sum()) <= 1
    expected = torch.where(known >= threshold, given.sources["a"], given.base)
    found = merged(ArceeFusion(), given.given(iqr_factor=factor), block_size=7)
    assert torch.equal(found[~unclear], expected[~unclear])
    assert 0 < int((found != given.base).sum()) < found.numel()


def test_of_a_source_that_hardly_moved_all_is_taken() -> None:
    given = case()
    source = given.base.clone()
    source[:50] += 1.0
    source[5] += 1.0
    assert torch.equal(merged(ArceeFusion(), given.of({"a": source})), source)


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_order_statistics_are_those_of_a_sort(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    values = torch.randn(size, generator=generator).abs().bfloat16().float()
    values[::3] = 0.0
    ranks = sorted({0, size // 4, size // 2, size - 1})
    found = order_statistics(lambda: iter(values.split(13)), ranks)
    assert found == values.sort().values[ranks].tolist()
