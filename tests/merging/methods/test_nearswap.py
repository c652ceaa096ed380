"""NearSwap: worked by hand and against the interpolation it is documented as, in float64."""

from __future__ import annotations

import pytest
import torch

from evomerge.merging.methods.nearswap import NearSwap
from evomerge.testing.merge_laws import Case, merged


def test_by_hand() -> None:
    base = torch.tensor([1.0, 1.0, 1.0, 1.0, -2.0])
    source = torch.tensor([1.25, 3.0, -4.0, 1.0, -2.5])
    # within half of the base the source wins; from further away comes a step of one half
    found = merged(NearSwap(), Case(base, {"a": source}, {"t": 0.5}))
    assert found.tolist() == [1.25, 1.5, 0.5, 1.0, -2.5]


@pytest.mark.parametrize("t", [1e-4, 1e-2, 0.5, 3.0])
def test_against_the_interpolation_in_float64(t: float) -> None:
    generator = torch.Generator().manual_seed(0)
    base, noise = torch.randn(2, 500, generator=generator)
    source = base + noise
    distance = (source.double() - base.double()).abs()
    p = (t / distance.clamp(min=1e-6)).clamp(0, 1)
    expected = p * source.double() + (1 - p) * base.double()
    found = merged(NearSwap(), Case(base, {"a": source}, {"t": t}), block_size=7)
    assert torch.allclose(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_moves_no_weight_further_than_t() -> None:
    generator = torch.Generator().manual_seed(1)
    base, source = torch.randn(2, 500, generator=generator).bfloat16().float()
    found = merged(NearSwap(), Case(base, {"a": source}, {"t": 0.125}))
    assert ((found - base).abs() <= 0.125 * (1 + 1e-5)).all()
    near = (source - base).abs() <= 0.125
    assert near.any()
    assert torch.equal(found[near], source[near])
