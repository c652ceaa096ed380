"""Which rows stay: the schedule, the importance, and one threshold for all matrices."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evomerge.merging.structure.experts.pruning import blended, kept_rows, remaining, row_importance

_PAPER = {"steps": 10000, "dense": 400, "settled": 1600, "density": 0.1}


def test_the_schedule_at_its_ends_and_by_hand() -> None:
    assert remaining(0, **_PAPER) == 1
    assert remaining(400, **_PAPER) == 1  # continuous
    assert remaining(401, **_PAPER) == pytest.approx(0.1 + 0.9 * (1 - 1 / 8000) ** 3, rel=1e-12)
    assert remaining(4400, **_PAPER) == pytest.approx(0.1 + 0.9 / 8)  # half the way
    assert remaining(8399, **_PAPER) == pytest.approx(0.1, abs=1e-10)
    assert remaining(8400, **_PAPER) == remaining(10000, **_PAPER) == 0.1


@given(st.integers(1, 60), st.data())
def test_the_schedule_never_rises_and_ends_at_the_density(steps: int, data: st.DataObject) -> None:
    dense = data.draw(st.integers(0, steps))
    settled = data.draw(st.integers(0, steps - dense))
    density = data.draw(st.floats(0, 1))
    shares = [
        remaining(t, steps=steps, dense=dense, settled=settled, density=density)
        for t in range(steps + 1)
    ]
    assert shares[-1] == density
    assert all(a >= b >= density for a, b in pairwise(shares))


def test_importance_is_the_mean_over_rows_of_a_running_mean() -> None:
    """Against the running mean of whole matrices, as it is published."""
    generator = torch.Generator().manual_seed(0)
    whole, rows = torch.zeros(4, 3), torch.zeros(4)
    for _ in range(5):
        s, g = (torch.randn(4, 3, generator=generator) for _ in range(2))
        whole = 0.85 * whole + 0.15 * (s * g).abs()
        blended(rows, row_importance(s, g))
    torch.testing.assert_close(rows, whole.mean(1))


def test_one_threshold_over_all_matrices() -> None:
    """The best rows of all, wide and narrow, until the share of entries is full: 12 of 36."""
    masks = kept_rows([torch.tensor([5.0, 1.0, 3.0]), torch.tensor([4.0, 2.0])], [4, 12], 1 / 3)
    assert [mask.tolist() for mask in masks] == [[True, False, False], [False, False]]
    masks = kept_rows([torch.tensor([5.0, 1.0, 3.0]), torch.tensor([4.0, 2.0])], [4, 12], 16 / 36)
    assert [mask.tolist() for mask in masks] == [[True, False, False], [True, False]]


@given(
    st.lists(st.tuples(st.integers(1, 9), st.lists(st.floats(0, 1), min_size=1)), min_size=1),
    st.floats(0, 1),
)
def test_the_asked_share_is_kept_to_a_row(
    matrices: list[tuple[int, list[float]]], share: float
) -> None:
    widths = [width for width, _ in matrices]
    scores = [torch.tensor(rows) for _, rows in matrices]
    masks = kept_rows(scores, widths, share)
    total = sum(w * len(s) for w, s in zip(widths, scores, strict=True))
    kept = sum(w * int(m.sum()) for w, m in zip(widths, masks, strict=True))
    assert kept <= share * total + 0.5
    if share == 1:
        assert kept == total
    assert kept == total or kept + max(widths) > share * total - 0.5
    stays = torch.cat([s[m] for s, m in zip(scores, masks, strict=True)])
    goes = torch.cat([s[~m] for s, m in zip(scores, masks, strict=True)])
    assert not len(stays) or not len(goes) or float(stays.min()) >= float(goes.max())
