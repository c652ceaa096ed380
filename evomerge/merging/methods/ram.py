"""RAM: average task vectors over the sources that changed a weight, and only over those.

Knows nothing of checkpoints, devices or studies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from evomerge.merging.methods.base import Block, Blocks, Coefficients, MergeMethod, Parameter
from evomerge.merging.methods.combination import moved, task_vectors


def ram(
    base: Tensor, sources: Tensor, *, threshold: float, lone_factors: Sequence[float]
) -> Tensor:
    """Average what several sources changed, and take what one alone changed as it is.

        A = {i : |τᵢ| > ε}                       τᵢ = θᵢ − θ₀
        θ = θ₀ + Σ_A τᵢ / |A|      where |A| ≥ 2
          = θ₀ + gᵢ·τᵢ             where A = {i}
          = θ₀                     where A is empty
        gᵢ = 1 + r·min(sharedᵢ/loneᵢ, α)

    Shapes: base [n], sources [s, n] float32, lone_factors g [s]; returns [n] float32. ε is
    `threshold`; sharedᵢ and loneᵢ count the tensor's weights that source i changed with others and
    alone. g is computed in float64, the rest in float32. A lone source gives itself wherever
    |τ| > ε and gᵢ = 1, bit for bit.

    Source: mergekit's `ram` (r = 0), and `ramplus_tl` (r = 0.1, α = 0.2). A lone change that is
    averaged over all sources, as plain averages do, shrinks with their number; here it does not.
    """
    total = torch.zeros_like(base)
    count = torch.zeros_like(base)
    for tau in task_vectors(base, sources):
        active = tau.abs() > threshold
        total += tau * active
        count += active
    merged = total / count.clamp(min=1)
    for tau, factor in zip(task_vectors(base, sources), lone_factors, strict=True):
        if factor != 1:
            lone = (tau.abs() > threshold) & (count == 1)
            merged = torch.where(lone, merged * factor, merged)
    return torch.where(count > 0, moved(base, merged), base)


class Ram(MergeMethod):
    """`ram` as a plug-in."""

    name = "ram"
    summary = "averages task vectors over the sources that changed a weight"
    formula = "θ = θ₀ + Σ_A τᵢ/|A|,  A = {i : |τᵢ| > ε}"
    parameters = (
        Parameter(
            "epsilon",
            "recipe",
            "float",
            1e-5,
            "a source changed a weight if it moved it by more than this",
            low=0.0,
        ),
        Parameter(
            "r",
            "recipe",
            "float",
            0.0,
            "how much to enlarge what a source changed alone, for what it shares",
            low=0.0,
        ),
        Parameter(
            "alpha",
            "recipe",
            "float",
            0.2,
            "most that r may be multiplied by; without r it has no effect",
            low=0.0,
        ),
    )

    def prepare(self, blocks: Blocks, coefficients: Coefficients, survey: Any) -> list[float]:
        r, alpha = coefficients.number("r"), coefficients.number("alpha")
        if r == 0:
            return [1.0] * len(coefficients.names)
        counts = torch.zeros(2, len(coefficients.names), dtype=torch.int64)
        for block in blocks():
            counts += _counts(block, coefficients.number("epsilon")).cpu()
        shared, lone = counts.tolist()
        return [1 + r * min(s / max(n, 1), alpha) for s, n in zip(shared, lone, strict=True)]

    def merge(self, block: Block, coefficients: Coefficients, prepared: list[float]) -> Tensor:
        assert block.base is not None
        epsilon = coefficients.number("epsilon")
        if len(block.sources) == 1 and prepared == [1.0]:
            near = (block.sources[0] - block.base).abs() <= epsilon
            return torch.where(near & (epsilon > 0), block.base, block.sources[0])
        return ram(block.base, block.sources, threshold=epsilon, lone_factors=prepared)


def _counts(block: Block, threshold: float) -> Tensor:
    """How many weights each source changed with others, and alone. Shapes: returns [2, s]."""
    assert block.base is not None
    active = (block.sources - block.base).abs() > threshold
    count = active.sum(0)
    return torch.stack([(active & (count > 1)).sum(1), (active & (count == 1)).sum(1)])
