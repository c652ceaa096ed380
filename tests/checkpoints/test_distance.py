"""Distances against plain numpy float64, for every dtype, across block borders, NaN apart."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from evomerge.checkpoints import distance as module
from evomerge.checkpoints.distance import Distance, Interference, distance, interference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def random(
    seed: int, dtype: torch.dtype = torch.bfloat16, shape: tuple[int, ...] = (37, 29)
) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def near(tensor: Tensor, seed: int) -> Tensor:
    """The tensor with about half of its entries moved a little."""
    moved = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    return torch.where(moved, tensor.float() * 1.02, tensor.float()).to(tensor.dtype)


def flat(tensor: Tensor) -> np.ndarray:
    return tensor.double().numpy().ravel()


@pytest.mark.parametrize("dtype", FLOATS)
def test_distance_is_numpys(dtype: torch.dtype) -> None:
    a = random(0, dtype)
    b = near(a, 1)
    x, y = flat(a), flat(b)
    found = distance(a, b)
    assert found.relative_norm == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x), 1e-12)
    assert found.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), 1e-12)
    assert found.largest == np.abs(y - x).max()
    assert (found.entries, found.changed) == (x.size, int((x != y).sum()))
    assert 0.1 < found.changed_share < 0.9


@pytest.mark.parametrize("dtype", FLOATS)
def test_interference_is_numpys(dtype: torch.dtype) -> None:
    base = random(0, dtype)
    a, b = near(base, 1), near(base, 2)
    b[0] = base[0] - (a[0] - base[0])  # a row where the two pull apart
    u, v = flat(a) - flat(base), flat(b) - flat(base)
    found = interference(base, a, b)
    norms = np.linalg.norm(u), np.linalg.norm(v)
    assert found.cosine == pytest.approx(u @ v / norms[0] / norms[1], 1e-12)
    assert found.relative_norms == pytest.approx(
        tuple(norm / np.linalg.norm(flat(base)) for norm in norms), 1e-12
    )
    both = (u != 0) & (v != 0)
    assert found.both_share == both.mean()
    assert found.sign_agreement == (np.sign(u) == np.sign(v))[both].mean()
    assert 0.5 < found.sign_agreement < 1.0


@pytest.mark.parametrize("size", [1, 7, 100, 5000])
def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    base = random(0)
    a, b = near(base, 1), near(base, 2)
    whole, tasks = distance(a, b), interference(base, a, b)
    monkeypatch.setattr(module, "BLOCK_SIZE", size)
    cut, cut_tasks = distance(a, b), interference(base, a, b)
    assert (cut.changed, cut.largest) == (whole.changed, whole.largest)
    assert vars(cut) == pytest.approx(vars(whole), rel=1e-12)
    assert vars(cut_tasks) == pytest.approx(vars(tasks), rel=1e-12)


def test_sums_of_parts_are_the_sums_of_the_whole() -> None:
    base = random(0)
    a, b = near(base, 1), near(base, 2)
    parts = sum((distance(x, y) for x, y in zip(a, b, strict=True)), Distance())
    tasks = sum((interference(*rows) for rows in zip(base, a, b, strict=True)), Interference())
    assert vars(parts) == pytest.approx(vars(distance(a, b)), rel=1e-12)
    assert vars(tasks) == pytest.approx(vars(interference(base, a, b)), rel=1e-12)


def test_equal_tensors_are_at_no_distance() -> None:
    found = distance(random(0), random(0))
    assert (found.changed, found.relative_norm, found.cosine, found.largest) == (0, 0.0, 1.0, 0.0)


def test_one_bit_is_a_change() -> None:
    """-0.0 equals 0.0, and yet the files differ."""
    found = distance(torch.zeros(3), torch.tensor([0.0, -0.0, 0.0]))
    assert (found.changed, found.relative_norm) == (1, 0.0)


def test_another_dtype_is_compared_by_value() -> None:
    a = random(0, torch.bfloat16)
    assert distance(a, a.float()).changed == 0
    assert distance(random(0, torch.float32), a).changed > 0


def test_integers_and_booleans() -> None:
    found = distance(torch.tensor([1, 2, 2]), torch.tensor([1, 2, 4]))
    assert (found.changed, found.largest, found.relative_norm) == (1, 2.0, 2 / 3)
    assert distance(torch.tensor([True, False]), torch.tensor([True, True])).changed == 1


def test_zero_has_no_direction() -> None:
    zero, one = torch.zeros(4), torch.ones(4)
    assert (distance(zero, one).relative_norm, distance(zero, one).cosine) == (None, None)
    assert distance(zero, zero).relative_norm == 0.0
    unmoved = interference(one, one, one + 1)
    assert (unmoved.cosine, unmoved.sign_agreement, unmoved.both_share) == (None, None, 0.0)
    assert unmoved.relative_norms == (0.0, 1.0)


def test_empty_tensors_and_scalars() -> None:
    assert distance(torch.empty(0), torch.empty(0)) == Distance()
    assert distance(torch.tensor(2.0), torch.tensor(3.0)).relative_norm == 0.5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_entries_are_counted_and_left_out(bad: float) -> None:
    a = random(0, torch.float32)
    b = near(a, 1)
    a[0, 0], b[0, 0], b[3, 3] = bad, bad, bad
    found = distance(a, b)
    assert (found.non_finite_a, found.non_finite_b) == (1, 2)
    finite = np.isfinite(flat(a)) & np.isfinite(flat(b))
    x, y = flat(a)[finite], flat(b)[finite]
    assert found.relative_norm == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x), 1e-12)
    assert found.largest == np.abs(y - x).max()
    tasks = interference(random(2, torch.float32), a, b)
    u, v = x - flat(random(2, torch.float32))[finite], y - flat(random(2, torch.float32))[finite]
    assert tasks.cosine == pytest.approx(u @ v / np.linalg.norm(u) / np.linalg.norm(v), 1e-12)


def test_the_same_nan_in_both_is_no_change() -> None:
    a = random(0)
    a[0, 0] = math.nan
    found = distance(a, a.clone())
    assert (found.changed, found.non_finite_a, found.non_finite_b, found.cosine) == (0, 1, 1, 1.0)
