"""DAM's losses against their definitions, written out in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from evomerge.merging.fitted import dam_losses as losses
from evomerge.merging.fitted.dam_losses import Teacher


def _logits(seed: int, n: int = 6, v: int = 11) -> Tensor:
    return torch.randn(n, v, generator=torch.Generator().manual_seed(seed)) * 3


def _kl(z: Tensor, t: Tensor, temperature: float) -> float:
    """T²/n·ΣₛΣᵥ p·log(p/q) by the definition."""
    total = 0.0
    for merged, teacher in zip(z.double(), t.double(), strict=True):
        q, p = (row.div(temperature).exp() for row in (merged, teacher))
        q, p = q / q.sum(), p / p.sum()
        total += float((p * (p / q).log()).sum())
    return temperature**2 * total / len(z)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_kl(temperature: float) -> None:
    z, t = _logits(0), _logits(1)
    found = losses.kl(z, Teacher(t), temperature)
    assert float(found) == pytest.approx(_kl(z, t, temperature), rel=1e-5)
    assert float(found) > 0
    assert float(losses.kl(t + 2.5, Teacher(t), temperature)) == pytest.approx(0, abs=1e-5)


def test_kl_is_a_mean_over_tokens_however_many_batches_there_are() -> None:
    z, t = _logits(0), _logits(1)
    once = losses.kl(z, Teacher(t), 2.0)
    twice = losses.kl(z.repeat(4, 1), Teacher(t.repeat(4, 1)), 2.0)
    assert float(twice) == pytest.approx(float(once), rel=1e-5)


@pytest.mark.parametrize("k", [11, 50])
@pytest.mark.parametrize("tail", [False, True])
def test_top_k_of_the_whole_vocabulary_is_the_full_kl(k: int, tail: bool) -> None:
    z, t = _logits(0), _logits(1)
    found = losses.kl(z, Teacher.top(t, k, 2.0, tail=tail), 2.0)
    assert float(found) == pytest.approx(_kl(z, t, 2.0), rel=1e-5)


def test_the_tail_is_one_more_outcome() -> None:
    z, t, k, temperature = _logits(0), _logits(1), 3, 2.0
    total = 0.0
    for merged, teacher in zip(z.double(), t.double(), strict=True):
        ids = teacher.argsort(descending=True)[:k]
        q, p = (row.div(temperature).softmax(0) for row in (merged, teacher))
        p, q = (torch.cat([row[ids], 1 - row[ids].sum()[None]]) for row in (p, q))
        total += float((p * (p / q).log()).sum())
    found = losses.kl(z, Teacher.top(t, k, temperature, tail=True), temperature)
    assert float(found) == pytest.approx(temperature**2 * total / len(z), rel=1e-5)
    assert float(found) < _kl(z, t, temperature)  # coarser outcomes tell less apart


def test_without_tail_both_softmaxes_are_of_the_kept_ones() -> None:
    z, t = _logits(0), _logits(1)
    ids = t.topk(3, dim=1).indices
    wanted = _kl(z.gather(1, ids), t.gather(1, ids), 2.0)
    found = losses.kl(z, Teacher.top(t, 3, 2.0, tail=False), 2.0)
    assert float(found) == pytest.approx(wanted, rel=1e-5)


def test_the_gradient_of_kl_through_a_tail_is_finite_and_right() -> None:
    z, t = _logits(0).double(), _logits(1).double()
    teacher = Teacher.top(t, 4, 2.0, tail=True)
    assert torch.autograd.gradcheck(
        lambda x: losses.kl(x, teacher, 2.0), z.requires_grad_(), eps=1e-6, atol=1e-6
    )


def test_mse_and_entropy() -> None:
    z, t = _logits(0), _logits(1)
    wanted = float(((z.double() - t.double()) ** 2).mean(1).mean())
    assert float(losses.mse(z, Teacher(t))) == pytest.approx(wanted, rel=1e-5)
    kept = t.topk(2, dim=1)
    few = float(((z.gather(1, kept.indices) - kept.values).double() ** 2).mean(1).mean())
    found = losses.mse(z, Teacher.top(t, 2, 1.0, tail=True))
    assert float(found) == pytest.approx(few, rel=1e-5)
    p = (z.double() / 2).softmax(1)
    assert float(losses.entropy(z, 2.0)) == pytest.approx(
        4 * float(-(p * p.log()).sum(1).mean()), rel=1e-5
    )


def _m() -> Tensor:
    return torch.tensor([[0.5, -0.2, 0.1], [0.3, 0.4, 0.0], [-1.0, 0.2, 0.7]])


def test_similarity_is_the_mean_cosine_of_pairs() -> None:
    rows = _m().double().tolist()
    cosines = [
        sum(a * b for a, b in zip(x, y, strict=True)) / (math.hypot(*x) * math.hypot(*y))
        for x, y in itertools.combinations(rows, 2)
    ]
    assert float(losses.similarity(_m())) == pytest.approx(sum(cosines) / 3, rel=1e-5)


def test_similarity_has_no_gradient_where_all_are_equal_and_is_0_of_single_numbers() -> None:
    m = torch.full((3, 5), 1 / 3, requires_grad=True)
    losses.similarity(m).backward()
    assert float(m.grad.abs().max()) < 1e-6
    assert float(losses.similarity(torch.tensor([[0.5], [0.2]]))) == 0
    assert float(losses.similarity(torch.tensor([[0.5, 0.1]]))) == 0


def test_norms_are_not_squared() -> None:
    assert float(losses.l1(_m())) == pytest.approx(3.4, rel=1e-5)
    nought = torch.zeros(2, 3, requires_grad=True)
    losses.l2(nought).backward()
    assert torch.equal(nought.grad, torch.zeros(2, 3))
    wanted = sum(math.hypot(*row) for row in _m().double().tolist())
    assert float(losses.l2(_m())) == pytest.approx(wanted, rel=1e-5)


def test_overlap() -> None:
    pairs = [(0.3 + 0.2 + 0.0), (0.5 + 0.2 + 0.1), (0.3 + 0.2 + 0.0)]
    assert float(losses.overlap(_m())) == pytest.approx(sum(pairs) / 3, rel=1e-5)
    weights = torch.zeros(3, 3, 3)
    weights[0, 1] = weights[1, 0] = torch.tensor([1.0, 0.5, 1.0])
    assert float(losses.overlap(_m(), weights)) == pytest.approx((0.3 + 0.1) / 3, rel=1e-5)


def test_columns_at_45_degrees_weigh_1_parallel_and_orthogonal_ones_0() -> None:
    one = torch.tensor([[1.0, 1.0, 1.0, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0, 1.0]])
    other = torch.tensor([[2.0, 0.0, 1.0, 1.0, -1.0], [0.0, 5.0, 1.0, 1.0, 2.0]])
    tau = torch.stack([one, other])  # [s, r, g]
    found = losses.angle_weights(torch.einsum("irg,jrg->ijg", tau, tau))
    angle = math.acos(-1 / math.sqrt(50))
    wanted = torch.tensor([0, 0, 1, 0, math.sin(2 * angle) ** 2])
    torch.testing.assert_close(found[0, 1], wanted, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found[0, 1], found[1, 0])
