"""AdamW against torch's, and MoFO against its definition written out here."""

from __future__ import annotations

import math

import pytest
import torch

from evomerge.merging.fitted.mofo import AdamW, moving


def _gradients(steps: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"a": torch.randn(3, 7, generator=generator), "b": torch.randn(2, 1, generator=generator)}
        for _ in range(steps)
    ]


def _values() -> dict[str, torch.Tensor]:
    return {"a": torch.linspace(-1, 1, 21).view(3, 7), "b": torch.tensor([[0.5], [-0.25]])}


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_is_torchs(decay: float) -> None:
    values, theirs = _values(), {key: v.requires_grad_() for key, v in _values().items()}
    ours = AdamW(values, rate=0.05, weight_decay=decay)
    reference = torch.optim.AdamW(theirs.values(), lr=0.05, weight_decay=decay)
    for gradients in _gradients(7):
        ours.step(gradients)
        for key, value in theirs.items():
            value.grad = gradients[key].clone()
        reference.step()
    for key, value in values.items():
        torch.testing.assert_close(value, theirs[key].detach(), rtol=1e-5, atol=1e-6)


def test_mofo_moves_the_entries_of_largest_momentum() -> None:
    values, alpha, rate, decay = _values(), 0.3, 0.05, 0.1
    plain = {key: value.double().flatten().tolist() for key, value in values.items()}
    u = {key: [0.0] * len(value) for key, value in plain.items()}
    v = {key: [0.0] * len(value) for key, value in plain.items()}
    optimizer = AdamW(values, rate=rate, weight_decay=decay, alpha=alpha)
    for step, gradients in enumerate(_gradients(5), 1):
        optimizer.step(gradients)
        for key, entries in plain.items():
            flat = gradients[key].flatten().tolist()
            u[key] = [0.9 * a + 0.1 * g for a, g in zip(u[key], flat, strict=True)]
            v[key] = [0.999 * a + 0.001 * g * g for a, g in zip(v[key], flat, strict=True)]
            count = max(1, math.ceil(alpha * len(flat)))
            threshold = sorted(map(abs, u[key]))[-count]
            for at, a in enumerate(u[key]):
                if abs(a) >= threshold:
                    sure = math.sqrt(v[key][at] / (1 - 0.999**step)) + 1e-8
                    entries[at] -= rate * (a / (1 - 0.9**step) / sure + decay * entries[at])
    for key, value in values.items():
        torch.testing.assert_close(
            value.flatten().double(), torch.tensor(plain[key]).double(), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(("size", "alpha", "count"), [(1, 0.3, 1), (2, 0.3, 1), (10, 0.25, 3)])
def test_at_least_one_entry_moves(size: int, alpha: float, count: int) -> None:
    assert int(moving(torch.arange(1.0, size + 1), alpha).sum()) == count


def test_equals_at_the_threshold_all_move() -> None:
    assert moving(torch.tensor([1.0, -1.0, 0.5]), 0.1).tolist() == [True, True, False]


def test_restored_it_takes_the_same_steps() -> None:
    first, *rest = _gradients(4)
    one = AdamW(_values(), rate=0.1, weight_decay=0.01, alpha=0.5)
    one.step(first)
    other = AdamW(
        {k: v.clone() for k, v in one.values.items()}, rate=0.1, weight_decay=0.01, alpha=0.5
    )
    other.restore({k: v.clone() for k, v in one.state().items()}, one.steps)
    for gradients in rest:
        one.step(gradients)
        other.step(gradients)
    assert all(torch.equal(one.values[k], other.values[k]) for k in one.values)
