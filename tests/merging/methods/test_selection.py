"""Exact selection against a stable full sort."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomerge.merging.methods.selection import KEEP_ALL, KEEP_NONE, Cut, Quota, cuts, kept_count


def select(tau: Tensor, quota: Quota, step: int = 1000) -> tuple[Tensor, Cut]:
    def rows() -> Iterator[tuple[str, int, Tensor]]:
        for start in range(0, tau.numel(), step):
            yield "x", start, tau[start : start + step]
            yield "other", start, tau[start : start + step]

    cut = cuts(rows, {"x": quota})["x"]
    return cut.mask(tau, 0), cut


def by_sorting(tau: Tensor, count: int) -> Tensor:
    order = sorted(range(tau.numel()), key=lambda index: (-abs(tau[index].item()), index))
    mask = torch.zeros(tau.numel(), dtype=torch.bool)
    mask[order[:count]] = True
    return mask


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    size=st.integers(1, 40),
    levels=st.sampled_from([2, 5, 10**6]),
    exponent=st.sampled_from([-44, -20, 0, 30]),
    step=st.sampled_from([1, 7, 1000]),
    data=st.data(),
)
def test_keeps_what_a_stable_sort_keeps(
    seed: int, size: int, levels: int, exponent: int, step: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tau = torch.randint(-levels, levels + 1, (size,), generator=generator).float() * 10.0**exponent
    count = data.draw(st.integers(1, size))
    mask, _ = select(tau, Quota(count), step)
    assert mask.tolist() == by_sorting(tau, count).tolist()
    smallest = tau[mask].abs().min()
    everything_equal, _ = select(tau, Quota(count, all_equal=True), step)
    assert everything_equal.tolist() == (tau.abs() >= smallest).tolist()


def test_a_part_is_masked_as_in_the_whole() -> None:
    tau = torch.randint(-3, 4, (500,), generator=torch.Generator().manual_seed(1)).float()
    mask, cut = select(tau, Quota(123))
    parts = [cut.mask(tau[start : start + 77], start) for start in range(0, 500, 77)]
    assert torch.equal(torch.cat(parts), mask)
    assert torch.equal(cut.shifted(200).mask(tau[200:], 0), mask[200:])
    assert int(mask.sum()) == 123


def test_bfloat16_ties_at_the_threshold_keep_exactly_k() -> None:
    generator = torch.Generator().manual_seed(0)
    base = (torch.randn(20_000, generator=generator) * 0.02).bfloat16().float()
    tuned = (base + torch.randn(20_000, generator=generator) * 1e-4).bfloat16().float()
    tau = tuned - base
    exact, _ = select(tau, Quota(4000))
    reference, _ = select(tau, Quota(4000, all_equal=True))
    assert int(exact.sum()) == 4000
    assert int(reference.sum()) > 1.5 * 4000


def test_a_quota_beyond_the_vector_keeps_everything() -> None:
    mask, cut = select(torch.zeros(3), Quota(4))
    assert mask.all()
    assert cut.keeps_all


def test_fixed_cuts() -> None:
    tau = torch.tensor([0.0, -0.0, 3e38, -1e-45])
    assert KEEP_ALL.mask(tau, 5).all()
    assert not KEEP_NONE.mask(tau, 5).any()


@pytest.mark.parametrize(
    ("size", "density", "count"),
    [(100, 0.29, 29), (10, 0.2, 2), (3, 0.2, 0), (7, 0.5, 3), (10, 1.0, 10), (10, 0.0, 0)],
)
def test_kept_count(size: int, density: float, count: int) -> None:
    assert kept_count(size, density) == count
