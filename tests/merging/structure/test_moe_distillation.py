"""Distillation: its loss against the formula in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import get_linear_schedule_with_warmup

from evomerge.merging.fitted.calibration import Example, batch
from evomerge.merging.structure.experts.distillation import (
    distillation_loss,
    divergence,
    learning_rate,
)


def _softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_the_loss_is_the_published_formula() -> None:
    """Token by token in numpy: padding and prompts left out, KL summed and divided by examples."""
    rows = batch([Example((1, 2, 3, 4, 0), answer=3), Example((4, 1, 2))])
    generator = torch.Generator().manual_seed(0)
    z, y = (torch.randn(2, 5, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    places = [(0, 2, 4), (0, 3, 0), (1, 0, 1), (1, 1, 2)]  # example, place, target
    cross = -np.mean([np.log(_softmax(z.numpy()[b, t])[k]) for b, t, k in places])
    total = 0.0
    for b, t, _ in places:
        p, q = _softmax(y.numpy()[b, t] / 2.0), _softmax(z.numpy()[b, t] / 2.0)
        total += float(np.sum(p * np.log(p / q)))
    assert float(divergence(z, y, rows)) == pytest.approx(total / 2, rel=1e-12)
    assert float(distillation_loss(z, y, rows)) == pytest.approx(cross + 0.2 * total / 2, rel=1e-12)
    assert float(distillation_loss(z, y, rows, weight=0)) == pytest.approx(cross, rel=1e-12)


def test_the_gradient_is_that_of_torch() -> None:
    rows = batch([Example((1, 2, 3)), Example((4, 1, 2, 5))])
    generator = torch.Generator().manual_seed(0)
    z, y = (torch.randn(2, 4, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    z.requires_grad_()
    (found,) = torch.autograd.grad(divergence(z, y, rows, temperature=3.0), z)
    plain = torch.nn.functional.kl_div(
        (z[rows.counted] / 3).log_softmax(-1), (y[rows.counted] / 3).softmax(-1), reduction="sum"
    )
    (wanted,) = torch.autograd.grad(plain / 2, z)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-15)


def test_the_learning_rate_is_transformers_linear_schedule() -> None:
    optimiser = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    schedule = get_linear_schedule_with_warmup(optimiser, 4, 20)
    for step in range(20):
        found = learning_rate(step, peak=0.5, warmup=4, steps=20)
        assert found == pytest.approx(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
