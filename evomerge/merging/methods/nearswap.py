"""NearSwap: take the source's weights, but none further from the base's than a threshold.

Knows nothing of checkpoints, layers or blocks beyond the elements it is handed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evomerge.merging.methods.base import Block, Coefficients, MergeMethod, Parameter


def nearswap(base: Tensor, source: Tensor, *, t: float) -> Tensor:
    """Swap what is near for the source's, and let the rest move by t.

        θ = (1 − p)·θ₀ + p·θ₁,  p = min(1, t/|θ₁ − θ₀|)
          = θ₀ + τ clamped to [−t, t]                      τ = θ₁ − θ₀

    Shapes: base and source [n], returns [n], float32, as is all arithmetic. Where |τ| ≤ t the
    result is the source bit for bit; with t = 0 it is the base bit for bit.

    Source: mergekit's `nearswap`, after alchemonaut's QuartetAnemoi-70B (2024). mergekit takes
    |τ| for at least 1e-6, so that with t < 1e-6 it moves smaller differences by less.
    """
    if t == 0:
        return base.clone()
    tau = source - base
    return torch.where(tau.abs() <= t, source, base + tau.clamp(-t, t))


class NearSwap(MergeMethod):
    """`nearswap` as a plug-in."""

    name = "nearswap"
    summary = "the source where it is near the base, a step of t towards it elsewhere"
    formula = "θ = (1−p)·θ₀ + p·θ₁,  p = min(1, t/|θ₁−θ₀|)"
    parameters = (Parameter("t", "recipe", "float", 0.001, "how far a weight may move", low=0.0),)
    max_sources = 1

    def merge(self, block: Block, coefficients: Coefficients, prepared: Any) -> Tensor:
        assert block.base is not None
        return nearswap(block.base, block.sources[0], t=coefficients.number("t"))
