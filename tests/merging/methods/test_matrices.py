"""Iso-C, Iso-CTS and TSV-Merge: by hand, against NumPy in float64, and what they promise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from evomerge.merging.methods.base import Block, Coefficients
from evomerge.merging.methods.iso_c import IsoC
from evomerge.merging.methods.iso_cts import IsoCts
from evomerge.merging.methods.matrices import MatrixMethod, directions, gathered, polar
from evomerge.merging.methods.tsv_m import TsvM
from evomerge.testing.merge_laws import Case, merged, random_case

Matrix = NDArray[np.float64]
ALL = (IsoC(), IsoCts(), TsvM())


def around_zero(*taus: list[list[float]] | Tensor) -> Case:
    first = torch.as_tensor(taus[0])
    sources = {f"s{i}": torch.as_tensor(tau).float().flatten() for i, tau in enumerate(taus)}
    return Case(torch.zeros(first.numel()), sources, shape=tuple(first.shape))


def matrix(method: MatrixMethod, case: Case) -> Tensor:
    assert case.shape is not None
    return merged(method, case, block_size=3).view(case.shape)


def diagonal(*values: float) -> Tensor:
    return torch.diag(torch.tensor(values))


def test_iso_c_by_hand() -> None:
    # the sum is [[0, 3], [-1, 0]]: singular values 3 and 1, made 2 and 2
    case = around_zero([[0.0, 2.0], [0.0, 0.0]], [[0.0, 1.0], [-1.0, 0.0]])
    assert torch.allclose(matrix(IsoC(), case), torch.tensor([[0.0, 2.0], [-2.0, 0.0]]))


def test_iso_cts_by_hand() -> None:
    # the sum is diag(8, 6, 0, 5); half of 4 directions are common: e1 (8) and e2 (6)
    # what is left of s0 is diag(0, 0, 2, 0): e3 (2); of s1 diag(0, 0, -2, 5): e4 (5)
    # the mean of 8, 6, 2 and 5 is 5.25 (Iso-C: 19/3 on e1, e2 and e4)
    case = around_zero(diagonal(4, 3, 2, 0), diagonal(4, 3, -2, 5))
    assert torch.allclose(matrix(IsoCts(), case.given(common=0.5)), 5.25 * torch.eye(4))
    expected = diagonal(1, 1, 0, 1) * 19 / 3
    assert torch.allclose(matrix(IsoC(), case), expected, atol=1e-6)


def test_tsv_m_by_hand() -> None:
    # one direction each: 4 along 0 degrees, 3·2 along 45 degrees (s1's weight is 3);
    # the nearest orthogonal pair lies at -22.5 and 67.5 degrees
    case = around_zero(diagonal(4, 1), [[1.0, 1.0], [1.0, 1.0]])
    case = replace(case, own={"s1": {"weight": 3.0}})
    a = torch.tensor([math.cos(math.radians(-22.5)), math.sin(math.radians(-22.5))])
    b = torch.tensor([math.cos(math.radians(67.5)), math.sin(math.radians(67.5))])
    expected = 4 * torch.outer(a, a) + 6 * torch.outer(b, b)
    assert torch.allclose(matrix(TsvM(), case), expected, atol=1e-6)


# --- oracles in NumPy, from the papers' formulas; every factor of full rank


def weighted(case: Case) -> list[Matrix]:
    assert case.shape is not None
    base = case.base.double().numpy()
    return [
        case.own[name]["weight"] * (source.double().numpy() - base).reshape(case.shape)
        for name, source in sorted(case.sources.items())
    ]


def factor(matrix: Matrix) -> Matrix:
    u, _, v = np.linalg.svd(matrix, full_matrices=False)
    return u @ v


def iso_c(case: Case) -> Matrix:
    u, sigma, v = np.linalg.svd(sum(weighted(case)), full_matrices=False)
    return sigma.mean() * u @ v


def iso_cts(case: Case) -> Matrix:
    taus = weighted(case)
    u, sigma, v = np.linalg.svd(sum(taus), full_matrices=False)
    count, rank = len(taus), len(sigma)
    own = round((rank - int(case.parameters["common"] * rank)) / count)
    kept = rank - own * count
    us, sigmas, vs = [u[:, :kept]], [sigma[:kept]], [v[:kept]]
    projector = np.eye(len(u)) - us[0] @ us[0].T
    for tau in taus:
        ui, si, vi = np.linalg.svd(projector @ tau, full_matrices=False)
        us.append(ui[:, :own]), sigmas.append(si[:own]), vs.append(vi[:own])
    return np.concatenate(sigmas).mean() * factor(np.hstack(us)) @ factor(np.vstack(vs))


def tsv_m(case: Case) -> Matrix:
    us, sigmas, vs = [], [], []
    for name, tau in zip(sorted(case.sources), weighted(case), strict=True):
        weight = case.own[name]["weight"]
        u, sigma, v = np.linalg.svd(tau / weight, full_matrices=False)
        k = len(sigma) // len(case.sources)
        us.append(u[:, :k]), sigmas.append(weight * sigma[:k]), vs.append(v[:k])
    return factor(np.hstack(us)) @ np.diag(np.concatenate(sigmas)) @ factor(np.vstack(vs))


@pytest.mark.parametrize(
    ("method", "oracle"), [(IsoC(), iso_c), (IsoCts(), iso_cts), (TsvM(), tsv_m)]
)
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_against_numpy(
    method: MatrixMethod, oracle: Callable[[Case], Matrix], shape: tuple[int, int], count: int
) -> None:
    for seed in range(5):
        size = shape[0] * shape[1]
        case = random_case(seed, method=method, size=size, sources=count, born=torch.float32)
        case = replace(case.given(common=0.6, tolerance=1e-9), shape=shape)
        scale = float(case.parameters["lambda"])
        expected = case.base.double() + scale * torch.from_numpy(oracle(case)).flatten()
        found = merged(method, case, block_size=50).double()
        assert torch.allclose(found, expected, rtol=1e-6, atol=1e-8)


# --- what the methods promise


def random_tasks(count: int, rank: int, size: int = 40) -> list[Tensor]:
    """Task vectors of low rank whose row and column spaces are orthogonal."""
    generator = torch.Generator().manual_seed(7)
    left, right = (
        torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
        for _ in range(2)
    )
    cuts = [slice(i * rank, (i + 1) * rank) for i in range(count)]
    return [left[:, cut] @ right[:, cut].mT for cut in cuts]


def test_tsv_m_adds_orthogonal_tasks_of_low_rank() -> None:
    # of 10 directions per task 5 are none: kept, they would bend the others by half their norm;
    # in float32 they are of 1e-8, which the default tolerance takes for directions
    tasks = random_tasks(4, rank=5)
    expected = sum(tasks, torch.zeros(40, 40, dtype=torch.float64))

    def error(case: Case) -> float:
        difference = matrix(TsvM(), case).double() - expected
        return float(torch.linalg.matrix_norm(difference) / torch.linalg.matrix_norm(expected))

    assert error(around_zero(*tasks).given(tolerance=1e-6)) < 1e-6
    assert error(around_zero(*tasks)) > 0.4


def test_tsv_m_drops_exact_zeros_by_default() -> None:
    tasks = [torch.diag(torch.arange(8) % 4 == index).float() for index in range(4)]
    tasks[0][0, 0] = 3
    assert torch.allclose(matrix(TsvM(), around_zero(*tasks)), sum(tasks, torch.zeros(8, 8)))


@pytest.mark.parametrize("count", [2, 3])
def test_tsv_m_merges_copies_to_their_strongest_directions(count: int) -> None:
    tau = torch.randn(12, 12, generator=torch.Generator().manual_seed(0))
    u, sigma, v = torch.linalg.svd(tau.double())
    kept = 12 // count
    expected = u[:, :kept] * sigma[:kept] @ v[:kept]
    case = around_zero(*[tau] * count)
    assert torch.allclose(matrix(TsvM(), case).double(), expected, atol=1e-5)


def test_iso_c_keeps_the_nuclear_norm_in_a_flat_spectrum() -> None:
    generator = torch.Generator().manual_seed(1)
    taus = [torch.randn(10, 30, generator=generator) for _ in range(3)]
    spectrum = torch.linalg.svdvals(matrix(IsoC(), around_zero(*taus)).double())
    expected = torch.linalg.svdvals(sum(taus, torch.zeros(10, 30)).double()).mean()
    assert torch.allclose(spectrum, expected.expand(10), rtol=1e-5)


def test_iso_c_leaves_directions_alone_that_no_task_has() -> None:
    # an unused token's row: an SVD would give it a direction, and the mean strength with it
    case = around_zero([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    assert torch.allclose(matrix(IsoC(), case), torch.tensor([[2.0, 0], [0, 2], [0, 0]]), atol=1e-6)


def test_iso_cts_of_common_directions_only_is_iso_c() -> None:
    for seed in range(10):
        case = random_case(seed, method=IsoCts(), size=48).given(common=1.0, tolerance=1e-9)
        assert torch.allclose(merged(IsoCts(), case), merged(IsoC(), case), atol=1e-6)


@pytest.mark.parametrize("method", ALL, ids=lambda method: method.name)
@pytest.mark.parametrize("shape", [(12,), (), (2, 2, 3)])
def test_other_tensors_are_averaged(method: MatrixMethod, shape: tuple[int, ...]) -> None:
    size = math.prod(shape)
    base = torch.ones(size)
    sources = {"a": base + 2, "b": base - 1, "absent": base + 100}
    case = Case(base, sources, {"lambda": 0.5}, {"absent": {"weight": 0.0}}, shape=shape)
    assert merged(method, case).tolist() == [1.25] * size


@pytest.mark.parametrize("method", ALL, ids=lambda method: method.name)
def test_more_sources_than_directions(method: MatrixMethod) -> None:
    # one row: r = 1. Iso keeps the sum; TSV-Merge gives one right vector to two strengths
    case = around_zero([[3.0, 4.0]], [[3.0, 4.0]])
    expected = [[3.0, 4.0]] if method.name == "tsv_m" else [[6.0, 8.0]]
    assert torch.allclose(matrix(method, case), torch.tensor(expected))


def test_text_projection_is_averaged() -> None:
    case = around_zero(diagonal(4, 2), diagonal(2, 2))
    sources = torch.stack(list(case.sources.values()))
    known = Coefficients(
        "text_projection.weight", (2, 2), ("a", "b"), (0, 1), {"weight": (1.0, 1.0)},
        {"lambda": 1.0}, 0,
    )  # fmt: skip
    block = Block(case.base, sources, 0)
    prepared = IsoC().prepare(lambda: iter([block]), known, None)
    assert IsoC().merge(block, known, prepared).tolist() == [3.0, 0.0, 0.0, 2.0]


def test_directions_and_polar_of_a_matrix_without_full_rank() -> None:
    flat = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    u, sigma, v = directions(flat)
    assert (u.shape, sigma.tolist(), v.shape) == ((2, 1), pytest.approx([2.0]), (1, 2))
    assert torch.allclose(polar(flat), flat / 2)
    assert not directions(torch.zeros(2, 3, dtype=torch.float64))[1].numel()


def test_gathered_joins_the_blocks() -> None:
    case = random_case(0, size=12)
    known = Coefficients("w", (3, 4), ("a",), (0,), {}, {}, 0)

    def blocks() -> Iterator[Block]:
        for start in (0, 5, 10):
            yield Block(case.base[start : start + 5], case.base[None, start : start + 5], start)

    whole = gathered(blocks, known, lambda block: block.sources[0])
    assert torch.equal(whole, case.base.double().view(3, 4))
